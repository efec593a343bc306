"""docs/theory.md: its examples run, its counts are counted, and the names of its letters exist."""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from family import sgd
from networks import batch, convolutional

from docs import api
from saltflat import AT, MART, PGD, TRADES, Layerwise, Linf, double_perturbation_step
from saltflat.lab.config import Train
from saltflat.neighbours.amortised import amortised_step

PAGE = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()
RECORDS = Path(__file__).parent.parent / "records"
OBJECTIVES = {"AT": AT(), "TRADES": TRADES(6.0), "MART": MART(6.0)}


def test_the_examples_run_one_after_the_other():
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)


def test_numbers_of_the_example_in_the_text_are_those_of_the_code():
    text, code = PAGE.split("### By hand")[1].split("```python")[:2]
    for number in re.findall(r"\d\.\d{4}", code.split("```")[0]):
        assert number in text


def counted(objective, take):
    """Forwards, and backward passes that reach the weights, of one step."""
    model, (x, y), found = convolutional().train(), batch(), Counter()
    model[3].register_forward_hook(lambda *_: found.update(["forwards"]))
    model[3].weight.register_hook(lambda _: found.update(["gradients"]))
    take(model, x, y, objective=objective, optimizer=sgd(model))
    return found["forwards"], found["gradients"]


def step_of(words: str, k1: int, k2: int):
    attack, ball = PGD(Linf(8 / 255), 2 / 255, k1), Layerwise(0.01)
    if "amortised" in words:
        return partial(amortised_step, attack=attack, ball=ball)
    return partial(double_perturbation_step, attack=attack, ball=ball if "AWP" in words else None, steps=k2)


COSTS = re.findall(r"^\| ((?:AT|TRADES|MART)[^|]*) \| (K1[^|]*) \| ([^|]*) \| (\d+) and (\d+) \|$", PAGE, re.MULTILINE)


def test_all_costs_are_looked_at():
    assert len(COSTS) == 9


@pytest.mark.parametrize(("words", "forwards", "gradients", "of_ten", "with_one"), COSTS)
def test_costs_are_those_that_are_counted(words, forwards, gradients, of_ten, with_one):
    objective = OBJECTIVES[re.match(r"[A-Z]+", words)[0]]
    assert counted(objective, step_of(words, 10, 1)) == (int(of_ten), int(with_one))
    k1, k2 = 3, 1 if "amortised" in words else 2
    formulas = [eval(re.sub(r"(\d) K", r"\1 * K", formula), {"K1": k1, "K2": k2}) for formula in (forwards, gradients)]
    assert list(counted(objective, step_of(words, k1, k2))) == formulas


def named_in_code() -> set[str]:
    """Functions, classes, their methods and parameters, anywhere in the package."""
    found: set[str] = set()

    def walk(of):
        for name, member in of.members.items():
            if not member.is_alias:
                found.update([name], (parameter.name for parameter in getattr(member, "parameters", ())))
                if member.is_module or member.is_class:
                    walk(member)

    walk(api.package())
    return found


def test_letters_have_the_names_that_the_table_says():
    rows = re.findall(r"^\|.*\| ([^|]*) \|$", PAGE.split("## Letters")[1].split("## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) > 25
    known, config = named_in_code(), Train()
    for name in names:
        section, _, field = name.partition(".")
        if hasattr(config, section) and field:
            assert hasattr(getattr(config, section), field), name
        else:
            parts = re.findall(r"[A-Za-z_]\w*", name)
            assert [part for part in parts if part not in known | {"named_parameters"}] == [], name


@pytest.mark.parametrize(
    ("record", "said", "there"),
    [
        ("2026-11-26_flatness-and-the-gap", "training robust loss alone has τ = −0.57", "loss alone has τ = −0.57"),
        ("2026-11-26_flatness-and-the-gap", "τ = 0.63 there", "weight norm alone 0.63"),
        ("2026-11-26_flatness-and-the-gap", "Of 17 without any association", "17 measures were looked at"),
        ("2026-11-26_speed", "14.6 % (11.1 % to 17.6 %", "14.6% (11.1% to 17.6%)"),
    ],
)
def test_numbers_of_records_are_theirs(record, said, there):
    plain = lambda text: re.sub(r"\s+", " ", text).replace(" %", "%")  # some spaces are of the kind that does not break
    assert plain(said) in plain(PAGE)
    assert f"records/{record}/README.md" in PAGE
    assert plain(there) in plain((RECORDS / record / "README.md").read_text())
