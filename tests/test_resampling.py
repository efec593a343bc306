"""Intervals cover as often as they say, and runs count rather than checkpoints."""

import math

import numpy as np
import pytest

from saltflat.lab.study.association import kendall, permuted, tau_b
from saltflat.lab.study.resampling import (
    arrangements,
    cluster_counts,
    detectable,
    interval,
    p_value,
    permutations,
)


def bootstrapped(x, y, clusters, resamples=400, seed=0):
    counts = cluster_counts(clusters, resamples, np.random.default_rng(seed))
    return interval(kendall(np.stack([x, y]), counts)[:, 0, 1])


def test_a_cluster_is_drawn_whole_and_as_many_are_drawn_as_there_are():
    clusters = ["a", "b", "a", "c", "b", "a"]
    counts = cluster_counts(clusters, 200, np.random.default_rng(0))
    assert counts.shape == (200, 6)
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    np.testing.assert_array_equal(counts[:, 0], counts[:, 5])
    np.testing.assert_array_equal(counts[:, 1], counts[:, 4])
    np.testing.assert_array_equal(counts[:, [0, 1, 3]].sum(1), 3)
    np.testing.assert_array_equal(counts, cluster_counts(clusters, 200, np.random.default_rng(0)))


def test_repeating_every_model_within_its_run_does_not_shrink_the_interval():
    x, y = np.random.default_rng(0).normal(size=(2, 20)) + np.linspace(0, 2, 20)
    runs = [f"run {index:02}" for index in range(20)]
    once = bootstrapped(x, y, runs)
    thrice = bootstrapped(np.repeat(x, 3), np.repeat(y, 3), np.repeat(runs, 3).tolist())
    assert thrice == pytest.approx(once, abs=1e-12)
    apart = bootstrapped(np.repeat(x, 3), np.repeat(y, 3), [str(index) for index in range(60)])
    assert apart[1] - apart[0] < 0.75 * (once[1] - once[0])


def test_intervals_hold_the_true_tau_about_as_often_as_they_say():
    draws = np.random.default_rng(3)
    correlation = 0.6
    truth = 2 / math.pi * math.asin(correlation)  # Kendall's tau of a bivariate normal law
    held = 0
    for study in range(200):
        x, other = draws.normal(size=(2, 40))
        y = correlation * x + math.sqrt(1 - correlation**2) * other
        low, high = bootstrapped(x, y, [str(index) for index in range(40)], resamples=200, seed=study)
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


def test_intervals_are_quantiles_of_what_is_finite():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.r_[np.arange(101.0), np.full(50, np.nan)]) == pytest.approx((2.5, 97.5))
    assert all(map(math.isnan, interval(np.full(3, np.nan))))
    assert all(map(math.isnan, interval(np.r_[1.0, np.full(3, np.nan)])))


def test_permutations_exchange_whole_runs_of_equal_size():
    clusters = ["a", "b", "a", "c", "b", "d", "e", "e", "e"]
    orders = permutations(clusters, 100, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(9), (100, 1)))
    np.testing.assert_array_equal(orders[:, 6:], np.tile([6, 7, 8], (100, 1)))
    assert {tuple(order) for order in orders[:, [0, 2, 1, 4]]} == {(0, 2, 1, 4), (1, 4, 0, 2)}
    assert {tuple(order) for order in orders[:, [3, 5]]} == {(3, 5), (5, 3)}
    assert arrangements(clusters) == 4
    assert arrangements([str(index) for index in range(100)]) == math.inf


def test_p_is_uniform_without_and_small_with_an_association():
    draws = np.random.default_rng(4)
    clusters = [str(index) for index in range(15)]
    orders = permutations(clusters, 199, np.random.default_rng(5))
    found = []
    for _ in range(150):
        x, y = draws.normal(size=(2, 15))
        found.append(p_value(tau_b(x, y), permuted(x, y[None], orders)[:, 0]))
    assert 0.40 < np.mean(found) < 0.60
    assert np.mean(np.array(found) <= 0.1) < 0.2
    x = np.arange(15.0)
    assert p_value(tau_b(x, x), permuted(x, x[None], orders)[:, 0]) == 1 / 200
    assert p_value(tau_b(x, -x), permuted(x, -x[None], orders)[:, 0]) == 1 / 200  # two-sided
    assert math.isnan(p_value(math.nan, np.zeros(3)))


def test_the_detectable_tau_is_detected_in_four_of_five_studies():
    draws = np.random.default_rng(6)
    n, tau = 40, detectable(40)
    correlation = math.sin(math.pi / 2 * tau)
    deviation = math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
    hits = 0
    for _ in range(1000):
        x, other = draws.normal(size=(2, n))
        hits += abs(tau_b(x, correlation * x + math.sqrt(1 - correlation**2) * other)) > 1.96 * deviation
    assert hits / 1000 == pytest.approx(0.8, abs=0.06)
    assert detectable(1) == math.inf
