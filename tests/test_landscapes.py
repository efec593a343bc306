"""The job behind `saltflat landscape`: what is written, resumed, refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import convolutional
from torch import nn

from saltflat.data import Images
from saltflat.evaluation import outcomes
from saltflat.lab import landscapes, record
from saltflat.lab.config import BadInput
from saltflat.lab.landscapes import How, check_alike, in_words, line, plane, symmetric
from saltflat.lab.subjects import Subject
from saltflat.lab.threat import Threat
from saltflat.objectives import TRADES

ALPHAS = symmetric(0.5, 5)
HOW = How(examples=0, steps=3, batch_size=8, seed=3)


def subject(folder, model=None, objective=None):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8)
    model = convolutional() if model is None else model
    more = {} if objective is None else {"objective": objective}
    threat = Threat("Linf", 0.1, 0.05)
    return Subject(folder, "last", "0123", "w", model.eval(), {"test": (x, torch.arange(20) % 3)}, threat, **more)


def written(folder):
    (path,) = (folder / "landscapes").glob("*.json")
    return record.read_again(path), np.load(path.with_suffix(".npz"))


@pytest.mark.parametrize("batch_size", [8, 256])
def test_a_curve_passes_through_the_evaluation_s_loss(tmp_path, batch_size):
    of = subject(tmp_path)
    found = line(of, ALPHAS, 2, How(examples=0, steps=3, batch_size=batch_size, seed=3))
    images = Images(*of.splits["test"], 3, "test")
    robust = outcomes(of.model, images, of.threat.pgd(3), batch_size=batch_size, seed=3)
    clean = outcomes(of.model, images, None, batch_size=batch_size)
    for curve in found["curves"]:
        assert curve["robust_loss"][2] == robust.mean_loss
        assert curve["robust_accuracy"][2] == robust.accuracy
        assert curve["clean_loss"][2] == clean.mean_loss
    assert [curve["direction_seed"] for curve in found["curves"]] == [3, 4]
    on_disk, examples = written(tmp_path)
    assert on_disk == found
    assert examples["robust_loss"].shape == (10, 20)
    assert np.allclose(examples["robust_loss"].mean(1).reshape(2, 5), [c["robust_loss"] for c in found["curves"]])


def test_what_was_asked_is_read_and_another_question_has_a_file_of_its_own(tmp_path):
    of = subject(tmp_path, objective=TRADES(3.0))
    found = line(of, ALPHAS, 1, HOW)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "landscapes").iterdir()}
    assert line(of, ALPHAS, 1, HOW) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "landscapes").iterdir()} == before
    for other in ({"normalisation": "layer"}, {"direction": "adversarial"}, {"frozen": True}, {"own_loss": True}):
        line(of, ALPHAS, 1, How(examples=0, steps=3, batch_size=8, seed=3, **other))
    assert len(list((tmp_path / "landscapes").glob("*.json"))) == 5


class Stop(Exception):
    pass


def interrupted_after(points, measure, monkeypatch):
    left = points

    def once(shown):
        real = measure(shown)

        def counted():
            nonlocal left
            if left == 0:
                raise Stop
            left -= 1
            return real()

        return counted

    monkeypatch.setattr(landscapes, "_measure", once)


@pytest.mark.parametrize("kind", ["line", "plane"])
@pytest.mark.parametrize("done", [1, 4, 7])
def test_an_interrupted_measurement_goes_on_to_equal_bytes(tmp_path, monkeypatch, kind, done):
    def measured(folder):
        of = subject(folder)
        return line(of, ALPHAS, 2, HOW) if kind == "line" else plane(of, symmetric(1, 3), symmetric(1, 3), HOW)

    whole, measure = measured(tmp_path / "whole"), landscapes._measure
    interrupted_after(done, measure, monkeypatch)
    with pytest.raises(Stop):
        measured(tmp_path / "cut")
    (part,) = (tmp_path / "cut" / "landscapes").iterdir()
    assert np.load(part)["done"].sum() == done
    rest = len(np.load(part)["done"]) - done
    interrupted_after(rest, measure, monkeypatch)  # one point more would raise
    assert measured(tmp_path / "cut") == whole
    one, other = (sorted((tmp_path / name / "landscapes").iterdir()) for name in ("whole", "cut"))
    assert [path.name for path in one] == [path.name for path in other]
    assert one[0].read_bytes() == other[0].read_bytes()
    first, second = np.load(one[1]), np.load(other[1])
    assert all(np.array_equal(first[name], second[name]) for name in first.files)


def test_a_coarse_grid_comes_first(tmp_path, monkeypatch):
    interrupted_after(3, landscapes._measure, monkeypatch)
    with pytest.raises(Stop):
        line(subject(tmp_path), symmetric(1, 11), 1, HOW)
    (part,) = (tmp_path / "landscapes").iterdir()
    assert np.flatnonzero(np.load(part)["done"]).tolist() == [0, 5, 10]


@pytest.mark.parametrize("content", [b"", b"not an archive", None])
def test_a_damaged_part_is_not_gone_on_from(tmp_path, monkeypatch, content):
    of = subject(tmp_path)
    with monkeypatch.context() as patch:
        interrupted_after(2, landscapes._measure, patch)
        with pytest.raises(Stop):
            line(of, ALPHAS, 1, HOW)
    (part,) = (tmp_path / "landscapes").iterdir()
    part.write_bytes(part.read_bytes()[:-30] if content is None else content)
    with pytest.raises(BadInput, match="delete it to begin anew"):
        line(of, ALPHAS, 1, HOW)
    assert part.exists()


def test_a_loss_that_is_not_finite_is_a_gap_that_says_why(tmp_path):
    of = subject(tmp_path, convolutional().float())
    found = line(of, [-1e30, -0.5, 0.0, 0.5, 1e30], 1, HOW)
    (curve,) = found["curves"]
    assert [value is None for value in curve["robust_loss"]] == [True, False, False, False, True]
    assert [gap["alpha"] for gap in found["gaps"]] == [-1e30, 1e30]
    assert all("not finite" in gap["why"] for gap in found["gaps"])
    assert "gaps: 2" in in_words(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_at_s_own_loss_is_cross_entropy_and_not_measured_twice(tmp_path):
    of = subject(tmp_path)
    found = line(of, ALPHAS, 1, How(examples=0, steps=3, batch_size=8, seed=3, own_loss=True))
    assert found == line(of, ALPHAS, 1, HOW)
    assert "objective" not in found["curves"][0]


def test_a_plane_along_the_adversarial_direction_names_both(tmp_path):
    found = plane(subject(tmp_path), [-0.1, 0.0, 0.1], [-0.1, 0.0, 0.1], replace(HOW, direction="adversarial"))
    assert found["settings"]["direction"] == "adversarial, steepest ascent of the robust loss at w (α), and random (β)"
    assert found["robust_loss"][2][1] > found["robust_loss"][1][1] > found["robust_loss"][0][1]


def test_more_examples_than_there_are_are_all(tmp_path):
    assert line(subject(tmp_path), ALPHAS, 1, replace(HOW, examples=1000))["n"] == 20


def test_a_preview_is_said_when_the_coarse_grid_is_done(tmp_path, capsys):
    line(subject(tmp_path), symmetric(1, 11), 1, HOW)
    assert "3 of 11 points, robust loss from" in capsys.readouterr().out


@pytest.mark.parametrize("measured", [lambda of: line(of, ALPHAS, 1, HOW), lambda of: plane(of, ALPHAS, ALPHAS, HOW)])
def test_a_finished_file_that_is_damaged_is_not_believed(tmp_path, measured):
    of = subject(tmp_path)
    measured(of)
    (path,) = (tmp_path / "landscapes").glob("*.json")
    path.write_text("{}")
    with pytest.raises(BadInput, match="it lacks kind; delete it to begin anew"):
        measured(of)


def test_a_part_without_one_of_its_arrays_is_not_gone_on_from(tmp_path, monkeypatch):
    of = subject(tmp_path)
    with monkeypatch.context() as patch:
        interrupted_after(2, landscapes._measure, patch)
        with pytest.raises(Stop):
            line(of, ALPHAS, 1, HOW)
    (part,) = (tmp_path / "landscapes").iterdir()
    with np.load(part) as read:
        kept = {name: read[name] for name in read.files if name != "clean_loss"}
    with open(part, "wb") as file:
        np.savez(file, **kept)
    with pytest.raises(BadInput, match="delete it to begin anew"):
        line(of, ALPHAS, 1, HOW)


def test_a_coarse_grid_of_a_plane_is_coarse_both_ways(tmp_path, monkeypatch):
    interrupted_after(4, landscapes._measure, monkeypatch)
    with pytest.raises(Stop):
        plane(subject(tmp_path), symmetric(1, 7), symmetric(1, 7), HOW)
    (part,) = (tmp_path / "landscapes").iterdir()
    assert np.flatnonzero(np.load(part)["done"]).tolist() == [0, 5, 35, 40]


def test_a_plane_has_its_line_in_it(tmp_path):
    of = subject(tmp_path)
    grid = symmetric(0.5, 5)
    surface, curve = plane(of, grid, grid, HOW), line(of, grid, 1, HOW)["curves"][0]
    assert [row[2] for row in surface["robust_loss"]] == curve["robust_loss"]
    assert [row[2] for row in surface["clean_loss"]] == curve["clean_loss"]
    assert np.shape(surface["robust_accuracy"]) == (5, 5)
    assert abs(surface["cosine"]) < 0.5
    assert in_words(surface).startswith(f"{surface['robust_loss'][2][2]:.3f} nats at w")


def test_frozen_examples_are_named_and_show_less(tmp_path):
    of = subject(tmp_path)
    afresh, frozen = (
        line(of, ALPHAS, 1, How(examples=0, steps=3, batch_size=8, frozen=kept)) for kept in (False, True)
    )
    assert "made once at w and kept" in frozen["settings"]["attack"]
    assert "made afresh at each point" in afresh["settings"]["attack"]
    (high,), (low,) = afresh["curves"], frozen["curves"]
    assert low["robust_loss"][2] == pytest.approx(high["robust_loss"][2], rel=1e-12)
    assert low["robust_loss"][0] < high["robust_loss"][0]
    assert low["robust_loss"][-1] < high["robust_loss"][-1]


def test_a_run_s_own_loss_stands_beside_cross_entropy(tmp_path):
    of = subject(tmp_path, objective=TRADES(3.0))
    found = line(of, ALPHAS, 1, How(examples=0, steps=3, batch_size=8, own_loss=True))
    (curve,) = found["curves"]
    assert "TRADES(beta=3.0)" in found["settings"]["loss"]
    assert all(own > clean for own, clean in zip(curve["objective"], curve["clean_loss"], strict=True))
    assert curve["objective"] != curve["robust_loss"]


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(108, 3).double()

    def forward(self, x):
        z = self.linear(x.flatten(1))
        return z + 0.1 * torch.randn_like(z)


def test_a_network_that_draws_at_random_is_refused(tmp_path):
    with pytest.raises(BadInput, match="equal losses on equal images"):
        line(subject(tmp_path, Noisy()), ALPHAS, 1, HOW)
    assert not (tmp_path / "landscapes").exists()


def test_one_axis_needs_one_architecture(tmp_path):
    one, same = subject(tmp_path / "a"), subject(tmp_path / "b")
    check_alike([one, same])
    other = nn.Sequential(*convolutional()[:-1], nn.Linear(20, 4).double())
    with pytest.raises(BadInput, match=r"6\.weight of shape \(3, 20\) in .*a and \(4, 20\) in .*b"):
        check_alike([one, subject(tmp_path / "b", other)])


def test_the_range_holds_zero():
    assert symmetric(0.3, 7)[3] == 0.0
    assert symmetric(1.0, 3) == [-1.0, 0.0, 1.0]
    assert math.isclose(symmetric(0.7, 21)[-1], 0.7)
