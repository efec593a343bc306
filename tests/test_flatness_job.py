"""The job behind `saltflat flatness`: what every measure says of itself, and that nothing computed is lost."""

import json
import math

import pytest
import torch
from networks import convolutional, equal_states, state

from saltflat.inputs import PGD
from saltflat.lab import flatness as job
from saltflat.lab.config import BadInput
from saltflat.lab.flatness import flatness
from saltflat.lab.measures import MEASURES, Found, How, Shown
from saltflat.lab.subjects import Subject
from saltflat.lab.threat import Threat

HOW = How(examples=0, batch_size=8, steps=2, draws=3, climbs=2, restarts=1, directions=2, probes=9)


def subject(folder):
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (12, 3, 6, 6), dtype=torch.uint8), torch.arange(12) % 3
    model, initial = convolutional().eval(), convolutional().state_dict()
    threat = Threat("Linf", 0.1, 0.05)
    return Subject(folder, "last", "0123", "w", model, {"train": (x, y)}, threat, initial=lambda: initial)


def shown(**settings):
    of = subject(None)
    how = How(**{**HOW.__dict__, **settings})
    x = of.splits["train"][0].double() / 255
    return Shown(of.model, x, of.splits["train"][1], PGD(of.threat.ball, 0.05, how.steps), how, of.initial)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_has_a_unit_its_settings_and_draws_by_the_seed(name):
    given = shown()
    before = state(given.model)
    found = MEASURES[name](given)
    assert len({each.name for each in found}) == len(found) > 0
    for each in found:
        assert math.isfinite(each.value)
        assert each.unit
        assert each.settings
        assert each.sign in (-1, 1)
    assert equal_states(state(given.model), before)
    assert all(parameter.grad is None for parameter in given.model.parameters())
    again = MEASURES[name](shown())
    assert [(a.name, a.value) for a in again] == [(a.name, a.value) for a in found]


def test_sharper_models_measure_sharper():
    """A network that is right, and ten times as sure of it."""
    names = ("average", "adaptive-average", "worst", "adaptive", "keskar", "tolerance", "slices")

    def values(scale):
        given = shown(draws=6, climbs=6)
        given.y.copy_(given.model(given.x).argmax(1))
        given.model[6].weight.data.mul_(scale)
        return {each.name: each.sign * each.value for name in names for each in MEASURES[name](given)}

    flat, sharp = values(1.0), values(10.0)
    assert [name for name in flat if sharp[name] <= flat[name]] == []


def test_all_is_written_down_and_read_again(tmp_path):
    of = subject(tmp_path)
    found = flatness(of, ("average", "norms"), HOW)
    (path,) = (tmp_path / "flatness").iterdir()
    assert json.loads(path.read_text()) == found
    assert [row["name"] for row in found["measures"]][:2] == ["average case", "average case, clean loss"]
    assert found["settings"]["attack"].startswith("PGD-2, Linf, eps 0.1")
    assert found["settings"]["batch_norm"] == "eval mode"
    stamp = path.stat().st_mtime_ns
    assert flatness(of, ("average", "norms"), HOW) == found
    assert path.stat().st_mtime_ns == stamp


def test_an_interrupted_measurement_goes_on_measure_by_measure(tmp_path, monkeypatch):
    names = ("average", "slices", "norms")
    whole = flatness(subject(tmp_path / "whole"), names, HOW)
    asked = []

    def counted(name, real):
        def measure(given):
            asked.append(name)
            if name == "slices" and asked.count("slices") == 1:
                raise KeyboardInterrupt
            return real(given)

        return measure

    monkeypatch.setattr(job, "MEASURES", {name: counted(name, MEASURES[name]) for name in names})
    with pytest.raises(KeyboardInterrupt):
        flatness(subject(tmp_path / "cut"), names, HOW)
    found = flatness(subject(tmp_path / "cut"), names, HOW)
    assert asked == ["average", "slices", "slices", "norms"]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in whole["measures"]]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in found["measures"]] == timeless
    assert [path.suffix for path in (tmp_path / "cut" / "flatness").iterdir()] == [".json"]


@pytest.mark.parametrize(("names", "why"), [(("sharpness",), "expected any of"), (("norms", "norms"), "each once")])
def test_names_that_stand_for_nothing_or_repeat_are_refused(tmp_path, names, why):
    with pytest.raises(BadInput, match=f"measures: .*{why}"):
        flatness(subject(tmp_path), names, HOW)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_null_and_says_what_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "MEASURES", {"wide": lambda given: [Found("width", math.inf, math.nan, "nats", "all")]})
    (row,) = flatness(subject(tmp_path), ("wide",), HOW)["measures"]
    assert row["value"] is None
    assert row["standard_error"] is None
    assert row["note"] == "inf"


def test_a_network_without_what_a_measure_needs_says_so(tmp_path):
    """No initial weights, no distance from them."""
    given = shown()
    names = {each.name for each in MEASURES["norms"](Shown(given.model, given.x, given.y, given.attack, given.how))}
    assert "distance from the start" not in names
    assert names < {each.name for each in MEASURES["norms"](given)}
