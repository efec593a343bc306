"""The job behind `saltflat flatness`: what every measure says of itself, and that nothing computed is lost."""

import json
import math
from dataclasses import replace

import pytest
import torch
from networks import convolutional, equal_states, state
from torch import nn

from saltflat.inputs import PGD
from saltflat.lab import flatness as job
from saltflat.lab import measures, record
from saltflat.lab.config import BadInput
from saltflat.lab.flatness import flatness
from saltflat.lab.measures import MEASURES, Found, How, Shown, Spectrum
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
        assert each.sign in (-1, 0, 1)
        assert (each.sign == 0) == (name == "norms")
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
    assert record.read_again(path) == found
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


@pytest.mark.parametrize("text", ["{}", '{"done": {"norms": 3}}', '{"done": [1]}', '{"done": {"other": []}}', "cut"])
def test_a_damaged_part_is_not_gone_on_from(tmp_path, text):
    of = subject(tmp_path)
    flatness(of, ("norms",), HOW)
    (path,) = (tmp_path / "flatness").iterdir()
    path.rename(path.with_suffix(".part")).write_text(text)
    with pytest.raises(BadInput, match="delete it to begin anew"):
        flatness(of, ("norms",), HOW)


def test_more_examples_than_there_are_are_all(tmp_path):
    assert flatness(subject(tmp_path), ("norms",), replace(HOW, examples=1000))["n"] == 12


def test_every_radius_is_on_record_and_another_has_a_file_of_its_own(tmp_path):
    of = subject(tmp_path)
    found = flatness(of, ("average",), HOW)
    wider = flatness(of, ("average",), replace(HOW, xi=0.6))
    assert found["settings"]["xi"] == 0.5
    assert wider["measures"][0]["value"] != found["measures"][0]["value"]
    assert len(list((tmp_path / "flatness").iterdir())) == 2


def test_a_maximum_says_what_each_start_found():
    for name in ("worst", "adaptive", "keskar"):
        for found in MEASURES[name](shown(restarts=2)):
            assert len(found.starts) == 3
            assert found.value >= max(found.starts) - 1e-12  # by batch, the sum of maxima; else the maximum itself
            assert found.note == ""


def test_the_share_of_negative_eigenvalues_is_not_that_of_rounding():
    """A linear network's loss is convex in its weights: none is negative, though fp32 makes some a hair less than 0."""
    given = shown()
    given = replace(given, model=nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), x=given.x.float())
    (found,) = MEASURES["density"](given)
    assert found.value == 0.0


def test_a_density_s_atoms_are_on_record_and_give_its_value(tmp_path):
    """And no other measure has any."""
    how = replace(HOW, probes=12)
    *others, row = flatness(subject(tmp_path), ("norms", "density"), how)["measures"]
    assert [each["spectrum"] for each in others] == [None] * len(others)
    (path,) = (tmp_path / "flatness").iterdir()
    assert json.loads(path.read_text())["measures"][-1] == row
    nodes, weights = (torch.tensor(row["spectrum"][part], dtype=torch.float64) for part in ("nodes", "weights"))
    assert nodes.shape == weights.shape == (3, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    below = torch.where(nodes < -1e-4 * nodes.abs().max(), weights, 0)
    assert row["value"] == pytest.approx(below.sum(1).mean().item())


def test_a_spectrum_that_is_not_finite_is_null(tmp_path, monkeypatch):
    found = Found("share", 0.5, 0.1, "of 1", "all", spectrum=Spectrum(((math.nan, 1.0),), ((0.5, 0.5),)))
    monkeypatch.setattr(job, "MEASURES", {"broken": lambda given: [found]})
    (row,) = flatness(subject(tmp_path), ("broken",), HOW)["measures"]
    assert row["spectrum"] is None


def test_curvature_that_is_not_finite_is_a_note_and_no_end(monkeypatch):
    def broken(*arguments, **settings):
        raise FloatingPointError("operator: products are not finite: nan")

    names = [each.name for each in MEASURES["curvature"](shown())]
    for name in ("top_eigenvalues", "spectral_density"):
        monkeypatch.setattr(measures, name, broken)
    found = MEASURES["curvature"](shown()) + MEASURES["density"](shown())
    assert [each.name for each in found] == [*names, "share of negative Hessian eigenvalues"]
    assert all(math.isnan(each.value) for each in found)
    assert "not finite" in found[0].note


def test_a_finished_file_that_is_damaged_is_not_believed(tmp_path):
    of = subject(tmp_path)
    flatness(of, ("norms",), HOW)
    (path,) = (tmp_path / "flatness").iterdir()
    path.write_text("{}")
    with pytest.raises(BadInput, match="delete it to begin anew"):
        flatness(of, ("norms",), HOW)


def test_a_half_width_is_censored_side_by_side(monkeypatch):
    """One side reaches the rise at 0.3, the other nowhere: (0.3 + 1) / 2."""
    given = shown(directions=1)
    curve = [0.0] * 5 + [0.0] + [0.0, 1.0] + [1.0] * 3  # between 0.2 and 0.4 it reaches 0.5 halfway, at 0.3
    values = iter(curve)
    monkeypatch.setattr(measures, "total", lambda losses: next(values))
    area, half = MEASURES["slices"](given)
    assert half.value == pytest.approx(0.65)
    assert half.note == "on 1 of 2 sides it is not reached by 1"
    monkeypatch.setattr(measures, "total", lambda losses: 0.0)
    area, half = MEASURES["slices"](given)
    assert (area.value, half.value) == (0.0, 1.0)
    assert math.isnan(half.standard_error)


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
