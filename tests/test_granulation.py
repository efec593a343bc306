"""Psi on grids where it is known how a measure behaves along every axis."""

import itertools
import math

import numpy as np
import pytest

from saltflat.lab.study.association import tau_b
from saltflat.lab.study.granulation import granulated, psi, without_each, worst

GRID = [
    {"gamma": gamma, "rate": rate, "seed": seed}
    for gamma, rate, seed in itertools.product((0.0, 0.005, 0.01), (0.05, 0.1), (0, 1))
]
GAMMA, RATE = (np.array([axes[name] for axes in GRID]) for name in ("gamma", "rate"))
TARGET = 100 * GAMMA + RATE  # grows with both


def test_a_measure_that_is_right_along_one_axis_and_reversed_along_the_other():
    measure = 100 * GAMMA - RATE
    by_name = {axis.name: axis for axis in granulated(GRID, measure, TARGET)}
    assert by_name.keys() == {"gamma", "rate"}
    assert (by_name["gamma"].psi, by_name["gamma"].groups, by_name["gamma"].pairs) == (1, 4, 12)
    assert (by_name["rate"].psi, by_name["rate"].groups, by_name["rate"].pairs) == (-1, 6, 6)
    assert psi(list(by_name.values())) == 0
    assert tau_b(measure, TARGET) > 0.5  # which the reversed axis hides in
    assert worst(list(by_name.values()), 1) == by_name["rate"]
    assert worst(list(by_name.values()), -1) == by_name["gamma"]
    assert by_name["rate"].sign_error(1) == 1
    assert by_name["gamma"].sign_error(1) == 0
    assert by_name["gamma"].sign_error(-1) == 1


def test_psi_is_the_mean_over_groups_of_the_tau_in_each():
    draws = np.random.default_rng(0)
    measure, target = draws.normal(size=(2, len(GRID)))
    (found,) = (axis for axis in granulated(GRID, measure, target) if axis.name == "gamma")
    taus = []
    for rate, seed in itertools.product((0.05, 0.1), (0, 1)):
        group = [place for place, axes in enumerate(GRID) if (axes["rate"], axes["seed"]) == (rate, seed)]
        taus.append(tau_b(measure[group], target[group]))
    assert found.psi == pytest.approx(np.mean(taus), abs=1e-14)


def test_the_sign_error_weighs_groups_equally_however_many_pairs_they_have():
    models = [{"a": a, "b": b} for b, values in ((0, 4), (1, 2)) for a in range(values)]
    target = np.array([0.0, 1.0, 2.0, 3.0, 0.0, 1.0])
    measure = np.array([0.0, 1.0, 2.0, 3.0, 1.0, 0.0])  # right in six pairs of one group, wrong in the other's one
    (axis,) = (one for one in granulated(models, measure, target) if one.name == "a")
    assert (axis.groups, axis.pairs) == (2, 7)
    assert axis.sign_error(1) == 0.5


def test_a_tie_counts_half_an_error():
    (axis,) = granulated([{"rate": 1}, {"rate": 2}], np.array([1.0, 1.0]), np.array([1.0, 2.0]))
    assert axis.psi == 0
    assert axis.sign_error(1) == axis.sign_error(-1) == 0.5


def test_what_differs_in_two_axes_or_in_the_seed_alone_is_never_compared():
    assert granulated([{"a": 1, "b": 1}, {"a": 2, "b": 2}], np.arange(2.0), np.arange(2.0)) == ()
    assert granulated([{"a": 1, "seed": 0}, {"a": 1, "seed": 1}], np.arange(2.0), np.arange(2.0)) == ()
    assert granulated([{"a": 1}, {"a": 1}], np.arange(2.0), np.arange(2.0)) == ()  # measured twice
    assert granulated([{}, {}], np.arange(2.0), np.arange(2.0)) == ()
    assert math.isnan(psi(()))
    assert worst((), 1) is None


def test_models_that_lack_an_axis_stay_out_of_it():
    models = [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"b": 1}, {"a": 1, "b": 2}]
    axes = granulated(models, np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 0.0, 4.0]))
    assert [(axis.name, axis.psi, axis.pairs) for axis in axes] == [("a", 1, 1), ("b", 1, 1)]


def test_values_of_an_axis_that_repeat_within_a_group_are_not_compared_with_each_other():
    models = [{"a": 1, "seed": 0}, {"a": 1, "seed": 0}, {"a": 2, "seed": 0}]
    (axis,) = granulated(models, np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 3.0]))
    assert (axis.psi, axis.pairs) == (1, 2)


def test_leaving_a_method_out_shows_what_rests_on_it():
    labels = ["at"] * 4 + ["awp"] * 4
    x = np.array([1.0, 2.0, 3.0, 4.0, 15.0, 16.0, 17.0, 18.0])
    y = np.array([4.0, 3.0, 2.0, 1.0, 15.0, 16.0, 17.0, 18.0])
    found = without_each(labels, x, y)
    assert found == pytest.approx({"at": 1, "awp": -1})
    assert without_each(["at"] * 8, x, y) == {}
