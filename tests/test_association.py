"""Taus against pairs that are counted one by one and against SciPy; partials against known values; ICC."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltflat.lab.study.association import (
    Array,
    intraclass,
    kendall,
    partial,
    pearson,
    permuted,
    ranks,
    spearman,
    tau_b,
)

# Two columns of few values, so that ties are common.
TWO = st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2))


def counted(x: Array, y: Array) -> float:
    """tau-b from its definition: concordant minus discordant pairs, over pairs that are not tied."""
    concordant = discordant = untied_x = untied_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        product = (x[i] - x[j]) * (y[i] - y[j])
        concordant += product > 0
        discordant += product < 0
        untied_x += x[i] != x[j]
        untied_y += y[i] != y[j]
    if not untied_x or not untied_y:
        return math.nan
    return (concordant - discordant) / math.sqrt(untied_x * untied_y)


@given(TWO)
def test_tau_b_is_what_counting_pairs_gives(columns):
    x, y = (np.array(column, dtype=float) for column in columns)
    assert tau_b(x, y) == pytest.approx(counted(x, y), abs=1e-14, nan_ok=True)


@given(TWO, st.data())
def test_counts_are_the_same_as_repeating_models(columns, data):
    x, y = (np.array(column, dtype=float) for column in columns)
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(x), max_size=len(x))))
    repeated = counted(np.repeat(x, counts), np.repeat(y, counts))
    found = kendall(np.stack([x, y]), np.stack([counts, np.ones(len(x))]))
    assert found.shape == (2, 2, 2)
    assert found[0, 0, 1] == pytest.approx(repeated, abs=1e-14, nan_ok=True)
    assert found[1, 0, 1] == pytest.approx(counted(x, y), abs=1e-14, nan_ok=True)


def test_coefficients_agree_with_scipy():
    statistics = pytest.importorskip("scipy.stats")

    @given(TWO)
    def agree(columns):
        x, y = (np.array(column, dtype=float) for column in columns)
        np.testing.assert_array_equal(ranks(x), statistics.rankdata(x))
        if len(set(columns[0])) > 1 and len(set(columns[1])) > 1:
            assert tau_b(x, y) == pytest.approx(statistics.kendalltau(x, y).statistic, abs=1e-12)
            assert spearman(x, y) == pytest.approx(statistics.spearmanr(x, y).statistic, abs=1e-12)
            assert pearson(x, y) == pytest.approx(statistics.pearsonr(x, y).statistic, abs=1e-12)

    agree()


@given(TWO)
def test_tau_knows_only_the_order_and_turns_with_its_sign(columns):
    x, y = (np.array(column, dtype=float) for column in columns)
    assert tau_b(np.exp(x), y) == pytest.approx(tau_b(x, y), abs=1e-14, nan_ok=True)
    assert tau_b(-x, y) == pytest.approx(-tau_b(x, y), abs=1e-14, nan_ok=True)
    assert spearman(np.exp(x), y) == pytest.approx(spearman(x, y), abs=1e-12, nan_ok=True)


def test_a_constant_column_has_no_association():
    x, constant = np.arange(4.0), np.ones(4)
    assert math.isnan(tau_b(x, constant))
    assert math.isnan(pearson(x, constant))
    assert math.isnan(spearman(constant, x))


def test_pearson_of_tiny_and_huge_values_is_that_of_plain_ones():
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 1.0, 5.0, 4.0])
    assert pearson(1e-200 * x, 1e200 * y) == pytest.approx(pearson(x, y), abs=1e-14)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-14)


def test_partial_tau_is_the_partial_correlation_of_the_sign_matrices():
    x, y, z = np.random.default_rng(0).normal(size=(3, 9))
    taus = kendall(np.stack([x, y, z]))
    a, b, c = (np.sign(column[:, None] - column).ravel() for column in (x, y, z))
    a, b = (one - (one @ c) / (c @ c) * c for one in (a, b))  # what the control explains is taken away
    expected = (a @ b) / math.sqrt((a @ a) * (b @ b))
    assert partial(taus[0, 1], taus[0, 2], taus[1, 2]) == pytest.approx(expected, abs=1e-14)


def test_partial_tau_of_known_values():
    assert partial(np.array(0.69), np.array(-0.6), np.array(-0.8)) == pytest.approx((0.69 - 0.48) / (0.8 * 0.6))
    np.testing.assert_array_equal(partial(np.full(3, 0.5), np.array([1.0, -1.0, 0.0]), np.zeros(3)), [0, 0, 0.5])
    assert math.isnan(partial(np.array(0.5), np.array(math.nan), np.array(0.1)))


def test_permuted_taus_are_those_of_the_permuted_column():
    draws = np.random.default_rng(1)
    x, others = draws.integers(0, 4, 7).astype(float), draws.normal(size=(2, 7))
    orders = np.stack([draws.permutation(7) for _ in range(5)])
    expected = [[tau_b(x[order], other) for other in others] for order in orders]
    np.testing.assert_allclose(permuted(x, others, orders), expected, atol=1e-14)


def test_intraclass_correlation_of_known_cases():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert intraclass(values, values) == 1
    assert intraclass(values, values[::-1]) == -1
    assert math.isnan(intraclass(values[:1], values[:1]))
    # One-way analysis of variance by hand: means 1.5, 3.5, 5.5 of pairs that differ by 1.
    assert intraclass(np.array([1.0, 3.0, 5.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx((8 - 0.5) / (8 + 0.5))


def test_intraclass_correlation_is_the_share_of_variance_between_models():
    draws = np.random.default_rng(2)
    truth = draws.normal(size=20000) * math.sqrt(3)
    first, second = truth + draws.normal(size=(2, 20000))
    assert intraclass(first, second) == pytest.approx(0.75, abs=0.02)
