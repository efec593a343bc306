"""Seals of what a run writes: damage is refused in one line, or makes no difference."""

import errno
import json
import os
from multiprocessing import get_context

import pytest
import yaml
from damaged import read_or_refused
from hypothesis import given
from hypothesis import strategies as st

from saltflat.lab import record
from saltflat.lab.config import BadInput, Data, Optimizer, Train, as_text, read_yaml

ENVIRONMENT = {"torch": "2.13.0", "cores": 2, "cuda": None, "git": {"commit": "0123abc", "dirty": False}, "pi": 3.14}
CONTENT = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)


@given(CONTENT)
def test_what_is_sealed_comes_back_through_a_file(content):
    content.pop("seal", None)
    sealed = record.sealed(content)
    assert list(sealed)[-1] == "seal"
    assert record.unsealed(json.loads(json.dumps(sealed, indent=1))) == content


@given(CONTENT, st.text(max_size=5), st.integers())
def test_another_content_does_not_have_the_seal(content, name, value):
    content.pop("seal", None)
    other = {**record.sealed(content), name: value}
    if name != "seal" and (name not in content or json.dumps(content[name]) != json.dumps(value)):
        with pytest.raises(ValueError, match="not what was written"):
            record.unsealed(other)


def test_what_has_no_seal_is_of_an_earlier_version():
    assert record.unsealed({"a": 1}) == {"a": 1}
    for content in ([], 3, None, "text"):
        with pytest.raises(ValueError, match="expected named fields"):
            record.unsealed(content)


def flips(content, every=1):
    """(place, the bytes with a bit of that one changed); all eight bits in turn."""
    for at in range(0, len(content), every):
        changed = bytearray(content)
        changed[at] ^= 1 << (at // every % 8)
        yield at, bytes(changed)
        changed = bytearray(content)
        changed[at] = ord("1") if content[at : at + 1] != b"1" else ord("2")  # a digit where there was another
        yield at, bytes(changed)


def refused(read, path):
    """The line of a BadInput, or what was read."""
    found = read_or_refused(read, path)
    return (found, None) if isinstance(found, str) else (None, found)


def renamed_seal(found, whole):
    """The name of the seal was hit, so that it is a field more; what there was is equal."""
    more = set(found) - set(whole)
    return len(more) == 1 and all(found[name] == whole[name] for name in whole)


def test_every_character_of_a_record_counts(tmp_path):
    path = tmp_path / "environment.json"
    record.write_json(path, ENVIRONMENT)
    assert record.read_again(path) == ENVIRONMENT
    told = 0
    for at, content in flips(path.read_bytes()):
        path.write_bytes(content)
        line, found = refused(record.read_again, path)
        assert line or found == ENVIRONMENT or renamed_seal(found, ENVIRONMENT), at
        assert line is None or f"{path} is not a whole file" in line
        told += line is not None
    assert told > len(content)


def test_every_character_of_metrics_counts(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "test": {"n": 30}}]
    for line in lines:
        record.append_metrics(tmp_path, line)
    whole = path.read_bytes()
    told = 0
    for at, content in flips(whole):
        path.write_bytes(content)
        line, found = refused(record.read_metrics, tmp_path)
        if at == len(whole) - 1 and line is None:  # the end of the last line, as if it had been cut
            assert found in (lines, lines[:1])
        elif line is None:
            assert len(found) == 2
            assert all(one == other or renamed_seal(one, other) for one, other in zip(found, lines, strict=True)), at
        else:
            assert line.endswith(f"is damaged; saltflat train --resume {tmp_path} makes it anew")
            told += 1
    assert told > len(whole)


def test_metrics_are_cut_anywhere_but_never_read_wrong(tmp_path):
    lines = [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 2 / 3}]
    for line in lines:
        record.append_metrics(tmp_path, line)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = record.read_metrics(tmp_path)
        assert found == lines[: (size >= first) + (size >= len(whole) - 1)]
        assert record.count_metrics(tmp_path) == (size > first)


def test_metrics_are_put_back_as_they_were(tmp_path):
    lines = [record.append_metrics(tmp_path, {"epoch": epoch, "loss": epoch / 7}) for epoch in (1, 2, 3)]
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert whole == "".join(line + "\n" for line in lines).encode()
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-9])
    record.write_metrics(tmp_path, lines)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    record.write_metrics(tmp_path, [])
    assert record.read_metrics(tmp_path) == []


def leaves(fields, before=()):
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from leaves(value, (*before, name))
        else:
            yield (*before, name), value


def test_what_decides_are_all_fields_but_those_that_are_free():
    fields = read_yaml(as_text(Train()), "config")
    found = record.deciding(fields)
    assert {".".join(names) for names, _ in leaves(fields)} - {".".join(names) for names, _ in leaves(found)} == set(
        record.FREE
    )
    assert fields == read_yaml(as_text(Train()), "config")  # not changed


def other_than(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "3/255" if isinstance(value, str) and "/" in value else ["1"] if isinstance(value, list) else "other"


def test_a_config_in_which_a_deciding_field_was_changed_is_refused(tmp_path):
    """Whatever else would be said of the value, it is one line."""
    record.write_config(tmp_path, Train())
    path = tmp_path / "config.yaml"
    first, _, text = path.read_text().partition("\n")
    fields = read_yaml(text, "config")
    changed = 0
    for names, value in leaves(fields):
        if ".".join(names) in record.FREE:
            continue
        other = yaml.safe_load(text)
        section = other if len(names) == 1 else other[names[0]]
        section[names[-1]] = other_than(value)
        path.write_text(f"{first}\n{yaml.safe_dump(other, sort_keys=False)}")
        line, _ = refused(record.read_config, tmp_path)
        assert line, names
        changed += "was changed or damaged since the run began" in line
    assert changed > 10


def test_what_a_run_is_free_to_change_is_changed(tmp_path):
    record.write_config(tmp_path, Train(data=Data(name="cifar10", path="here")))
    path = tmp_path / "config.yaml"
    text = path.read_text()
    for old, new in (
        ("path: here", "path: there"), ("threads: 0", "threads: 1"), ("device: auto", "device: cpu"),
        ("keep_every: 0", "keep_every: 5"), ("checkpoint_minutes: 15.0", "checkpoint_minutes: 1"),
    ):  # fmt: skip
        assert old in text
        path.write_text(f"{text.replace(old, new)}\n# and a note\n")
        record.read_config(tmp_path)


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_of_a_config_counts(every, tmp_path):
    config = Train(seed=3, data=Data(examples=60))
    record.write_config(tmp_path, config)
    path = tmp_path / "config.yaml"
    assert record.read_config(tmp_path) == config
    expected = record.deciding(read_yaml(as_text(config), "config"))
    told = 0
    for at, content in flips(path.read_bytes(), every):
        path.write_bytes(content)
        line, found = refused(record.read_config, tmp_path)
        told += line is not None
        assert line or record.deciding(read_yaml(as_text(found), "config")) == expected, at
    assert told > len(content) // every


def test_a_config_of_before_there_was_a_field_has_the_digest_that_it_had(tmp_path):
    fields = read_yaml(as_text(Train()), "config")
    del fields["compute"]["spread"], fields["optimizer"]["accumulate"]
    text = yaml.safe_dump(fields, sort_keys=False)
    path = tmp_path / "config.yaml"
    path.write_text(f"{record.DECIDES}{record.digest(record.deciding(fields))}\n{text}")
    assert record.read_config(tmp_path) == Train()
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(BadInput, match="was changed or damaged since the run began"):
        record.read_config(tmp_path)
    path.write_text(text)  # nor has one of before there were digests any
    assert record.read_config(tmp_path) == Train()


def test_whole_numbers_may_stand_for_others_in_a_config(tmp_path):
    config = Train(optimizer=Optimizer(learning_rate=1, weight_decay=0))
    record.write_config(tmp_path, config)
    assert record.read_config(tmp_path) == config


def test_one_process_is_alone(tmp_path):
    with record.alone(tmp_path / "x.lock"):
        with pytest.raises(BadInput, match="another process is at work"), record.alone(tmp_path / "x.lock"):
            pytest.fail("both are in")
        assert (tmp_path / "x.lock").exists()  # whoever was refused has not taken it away
    assert not list(tmp_path.iterdir())
    with record.alone(tmp_path / "x.lock"):
        pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with record.alone(tmp_path / "x.lock"), record.alone(tmp_path / "x.lock"):
        pass


def created(folders, at_once, told):
    """What became of each, where several begin at the same moment."""
    for folder in folders:
        at_once.wait(timeout=60)
        try:
            record.create(folder, Train(), ENVIRONMENT, {"steps": 7})
            told.put((folder, "made"))
        except Exception as error:
            told.put((folder, f"{type(error).__name__}: {error}"))


def test_of_processes_that_begin_at_once_one_makes_the_folder_and_it_is_whole(tmp_path):
    fork, number = get_context("fork"), 4
    folders = [tmp_path / f"run-{each}" for each in range(20)]
    for folder in folders[::2]:
        folder.mkdir()  # an empty one is taken
    at_once, told = fork.Barrier(number), fork.Queue()
    processes = [fork.Process(target=created, args=(folders, at_once, told), daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    found = [told.get(timeout=60) for _ in range(number * len(folders))]
    for process in processes:
        process.join(timeout=60)
    refusal = "BadInput: out: expected a folder that does not exist yet, got {0!r} (go on with --resume {0})"
    whole = {"checkpoints", "config.yaml", "environment.json", "evaluation.json"}
    for folder in folders:
        outcomes = sorted(outcome for of, outcome in found if of == folder)
        assert outcomes == [refusal.format(str(folder))] * (number - 1) + ["made"]
        assert {path.name for path in folder.iterdir()} == whole
        assert record.read_config(folder) == Train()
        assert record.read_again(folder / "environment.json") == ENVIRONMENT
    assert sorted(tmp_path.iterdir()) == sorted(folders)


def test_a_folder_of_a_run_can_be_read_by_whom_other_folders_can_and_have_a_long_name(tmp_path):
    folder, other = tmp_path / "n" / ("ä" * 127), tmp_path / "other"
    record.create(folder, Train(), ENVIRONMENT, {})
    other.mkdir()
    assert folder.stat().st_mode == other.stat().st_mode
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_killed_start_left_is_cleared_and_nothing_else_is(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    left, made = (tmp_path / f".at.{name}.new" for name in ("0123abcd", "89abcdef"))
    others = [tmp_path / name for name in (".at.my notes.new", ".at.b.0123abcd.new", ".mart.0123abcd.new", "at.new")]
    for folder in (left, made, *others):
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    held = os.open(made, os.O_RDONLY)  # by a process that is at it
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        record.create(tmp_path / "at", Train(), ENVIRONMENT, {})
    finally:
        os.close(held)
    assert {path.name for path in tmp_path.iterdir()} == {"at", made.name, *(other.name for other in others)}


def test_a_folder_that_somebody_holds_is_no_reason_to_wait_for_ever(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        record.create(tmp_path / "at", Train(), ENVIRONMENT, {})
    finally:
        os.close(held)
    assert (tmp_path / "at" / "config.yaml").is_file()
