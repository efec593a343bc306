"""Every field of a config against every kind of value, and YAML that was written to do harm: a config, or one line."""

import dataclasses
import math
import re
import time
import typing
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from damaged import Harmful
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.lab.config import BadInput, Train, as_text, checked, from_text
from saltflat.lab.recipes import RECIPES
from saltflat.lab.record import read_config


def leaves(of: type, prefix: str = "") -> dict[str, Any]:
    """Every field, by its dotted name, and its type."""
    hints, found = typing.get_type_hints(of), dict[str, Any]()
    for field in dataclasses.fields(of):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        found |= leaves(kind, f"{name}.") if dataclasses.is_dataclass(kind) else {name: kind}
    return found


FIELDS = leaves(Train)
SECTIONS = sorted({name.partition(".")[0] for name in FIELDS if "." in name})
ODD = "\n\x1b[2J\x00\u202e</style><script>{{7*7}}"
NO_NUMBERS = [
    math.nan, math.inf, -math.inf, -1, "", "x", ODD, "nan", "-inf", "1/0", "1/2/3", "1e999", 10**400, -(10**400), True,
    None, [], [1], {}, {"a": 1}, [[[]]], b"\xff", date(2020, 1, 1), "9" * 5000, "x" * 10**6,
]  # fmt: skip
NO_NAMES = [0, 1.5, math.nan, True, None, [], ["a"], {}, {"a": "b"}, date(2020, 1, 1)]
WRONG: dict[str, list[Any]] = {
    "int": [*NO_NUMBERS, 1.5, 2**63, 1e300, "1.5", "0x10", "8/255"],
    "float": NO_NUMBERS,
    "bool": [2, -1, 0.5, math.nan, "", "maybe", ODD, None, [], [True], {}, {"a": True}, 10**400],
    "name": [*NO_NAMES, "", "nothing of that name", ODD, "x" * 10**6],
    "str": NO_NAMES,
    "path": [each for each in NO_NAMES if each is not None],
    "numbers": ["0.5", 0.5, True, None, {"a": 1}, [None], [[1]], ["x"], [math.nan], [10**400], [True], [{}], [ODD]],
}


def kind_of(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "name"
    if origin is tuple:
        return "numbers"
    return hint.__name__ if hint in (int, float, bool, str) else {Path | None: "path"}[hint]


def tree_of(name: str, value: Any) -> dict[str, Any]:
    section, _, leaf = name.rpartition(".")
    return {section: {leaf: value}} if section else {leaf: value}


def refused(read: Any, given: Any) -> str:
    """The one line with which it is refused."""
    with pytest.raises(BadInput) as caught:
        read(given)
    line = str(caught.value)
    assert line.splitlines() == [line]
    assert line.isprintable()
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_what_it_cannot_hold(name):
    for value in WRONG[kind_of(FIELDS[name])]:
        line = refused(checked, tree_of(name, value))
        assert re.match(rf"{re.escape(name)}(\.\d+)?: ", line), (value, line)


@pytest.mark.parametrize("name", FIELDS)
def test_nor_out_of_a_file(name):
    for value in WRONG[kind_of(FIELDS[name])]:
        if isinstance(value, str | int) and len(str(value) if isinstance(value, str) else hex(value)) > 300:
            continue  # the file as a whole is longer than is read, or the number than Python writes
        refused(from_text, yaml.safe_dump(tree_of(name, value), allow_unicode=True))


def test_every_kind_of_field_has_wrong_values():
    assert {kind_of(hint) for hint in FIELDS.values()} == WRONG.keys()
    assert sum(len(WRONG[kind_of(hint)]) for hint in FIELDS.values()) > 1000


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=8) | st.dates()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(FIELDS))


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.dictionaries(NAMES, TREES, max_size=4))
def test_any_value_anywhere_gives_a_config_or_one_line(values):
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    assert_config_or_line(checked, tree)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*SECTIONS, "seed", "", "a\nb", "\x1b[2J"]) | st.integers(), TREES, max_size=3))
def test_any_tree_gives_a_config_or_one_line(tree):
    assert_config_or_line(checked, tree)


def assert_config_or_line(read: Any, given: Any) -> None:
    try:
        config = read(given)
    except BadInput as error:
        line = str(error)
        assert line.splitlines() == [line]
        assert line.isprintable()
        return
    assert isinstance(config, Train)
    assert from_text(as_text(config)) == config


def checkable(recipe: Train) -> bool:
    """Whether it needs no file that is not named."""
    return recipe.data.name == "digits" and recipe.extra.share == 0


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(name for name, recipe in RECIPES.items() if checkable(recipe))),
    st.text(max_size=30),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
    st.floats(min_value=1e-300, max_value=1e300),
    st.integers(0, 2**31 - 1),
)
def test_what_is_written_is_read_again_the_same(recipe, name, path, rate, seed):
    base = RECIPES[recipe]
    config = dataclasses.replace(
        base,
        recipe=name,
        seed=seed,
        model=dataclasses.replace(base.model, initial=Path(path)),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
    )
    assert from_text(as_text(config)) == config


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("ab:-[]{}&*!|>%@`'\"#,? \n\t0123.<~", max_size=60))
def test_any_text_gives_a_config_or_one_line(text):
    assert_config_or_line(from_text, text)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.text(max_size=6))
def test_a_config_that_was_written_over_gives_a_config_or_one_line(start, length, words):
    text = as_text(RECIPES["at-awp"])
    start %= len(text)
    assert_config_or_line(from_text, text[:start] + words + text[start + length % 40 :])


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join([f'*{chr(97 + i)}'] * 9)}]}}\n" for i in range(12)
)
HOSTILE = {
    "empty": "",
    "blank": " \n\n",
    "a list": "- at\n- awp\n",
    "a word": "at",
    "a number": "0",
    "billion laughs": BOMB,
    "billion laughs in a field": BOMB + "seed: *m\n",
    "billion merges": MERGES,
    "itself": "data: &a [*a]\n",
    "an alias alone": "seed: &s 1\nthreads: *s\n",
    "a call": f"seed: !!python/object/apply:{Harmful.NAME} [harmed]\n",
    "a call of new": f"!!python/object/new:{Harmful.NAME} [harmed]\n",
    "a name": f"seed: !!python/name:{Harmful.NAME}\n",
    "a module": "!!python/module:os {}\n",
    "a tuple": "model: {mean: !!python/tuple [1]}\n",
    "an own tag": "seed: !vault abc\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "a key twice within": "awp: {gamma: 0.1, gamma: 0.2}\n",
    "a section twice": "awp: {gamma: 0.1}\nseed: 1\nawp: {steps: 2}\n",
    "a key in quotes twice": "seed: 1\n'seed': 2\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "deep lists": "data: " + "[" * 5000,
    "deep whole lists": "data: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "data: " + "{a: " * 5000 + "1" + "}" * 5000,
    "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(500)),
    "ten megabytes": "recipe: " + "x" * 10**7,
    "ten megabytes of fields": "a: 1\n" * (2 * 10**6),
    "control characters": "recipe: \x00\x01\n",
    "escaped control characters": 'seed: "\\0\\e[2J\\n"\n',
    "a bad date": "seed: 2020-13-45\n",
    "a date": "seed: 2020-01-01\n",
    "no int": "seed: !!int x\n",
    "an empty int": "seed: !!int ''\n",
    "no bool": "seed: !!bool maybe\n",
    "no float": "seed: !!float x\n",
    "no date": "seed: !!timestamp x\n",
    "no binary": "seed: !!binary ä\n",
    "a set": "data: !!set {a, b}\n",
    "pairs": "data: !!omap [a: 1]\n",
    "a list as a key": "? [a]\n: b\n",
    "a mapping as a key": "? {a: 1}\n: b\n",
    "null as a key": "~: 1\n",
    "tabs": "awp:\n\tgamma: 1\n",
    "another version": "%YAML 9.9\n---\nseed: 1\n",
    "an open quote": "recipe: 'at\n",
    "a long hexadecimal": "seed: 0x" + "f" * 9000 + "\n",
    "a long decimal": "seed: " + "9" * 9000 + "\n",
    "base sixty": "seed: " + ":".join(["59"] * 3000) + "\n",
    "a long key": "x" * 10**5 + ": 1\n",
    "a key of control characters": '"a\\n\\e[31m\\u202e": 1\n',
    "JSON": '{"sead": 1}',
    "XML": "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
    "no flag": "seed: yes\n",
    "not a number": "awp: {gamma: .nan}\n",
    "infinite": "attack: {eps: .inf}\n",
    **{f"{section}, a word": f"{section}: word\n" for section in SECTIONS},
    **{f"{section}, a list": f"{section}: [1, 2]\n" for section in SECTIONS},
    **{f"{section}, nothing": f"{section}:\n" for section in SECTIONS},
    **{f"{section}, an unknown field": f"{section}: {{nothing_of_that_name: 1}}\n" for section in SECTIONS},
    **{f"{section}, too deep": f"{section}: {{{section}: {{{section}: 1}}}}\n" for section in SECTIONS},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_in_one_line_and_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    refused(from_text, HOSTILE[name])
    assert time.perf_counter() - began < 5
    (tmp_path / "config.yaml").write_text(HOSTILE[name], encoding="utf-8")
    refused(read_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "data",
    [b"\x80\x02c", b"\x00" * 1000, bytes(range(256)) * 40, b"\xff\xfe" + "seed: 1".encode("utf-16-le"), b"\xc3\x28"],
    ids=["a pickle", "zeros", "all bytes", "UTF-16", "no UTF-8"],
)
def test_a_config_of_other_bytes_is_refused_in_one_line(data, tmp_path):
    (tmp_path / "config.yaml").write_bytes(data)
    refused(read_config, tmp_path)
