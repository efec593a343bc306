import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltflat.landscape.extent import area, curvature_at_zero, half_width, widths

ALPHAS = np.linspace(-1, 1, 201)
curvatures = st.floats(0.01, 1e4)
heights = st.floats(-100, 100)


@given(c=curvatures, height=heights, b=st.floats(-10, 10))
def test_a_parabola_s_area_is_its_closed_form(c, height, b):
    """c a^3 / 3, and what the trapezoids have too much, c h^2 / 12 for every unit; a slope has no area."""
    g = height + b * ALPHAS + c * ALPHAS**2 / 2
    assert area(ALPHAS, g) == pytest.approx(c / 3 + 2 * c * 0.01**2 / 12, rel=1e-9, abs=1e-9)


@given(c=curvatures, height=heights, b=st.floats(-10, 10), left=st.integers(0, 99), right=st.integers(101, 200))
def test_a_parabola_s_curvature_is_exact_however_far_the_neighbours_are(c, height, b, left, right):
    at = ALPHAS[[left, 100, right]]
    assert curvature_at_zero(at, height + b * at + c * at**2 / 2) == pytest.approx(c, rel=1e-6, abs=1e-6)


@given(c=st.floats(0.1, 1e3), height=heights, share=st.floats(0.01, 0.99))
def test_a_parabola_s_half_width_is_its_closed_form(c, height, share):
    """To the error of linear interpolation: chords lie up to c h^2 / 8 above it, with slopes >= c (alpha - h / 2)."""
    exact = math.sqrt(share)
    found = half_width(ALPHAS, height + c * ALPHAS**2 / 2, threshold=share * c / 2)
    assert -(0.01**2) / (8 * (exact - 0.005)) - 1e-9 <= found - exact <= 1e-9


@given(left=st.floats(0.1, 10), right=st.floats(0.1, 10))
def test_a_wedge_is_read_exactly(left, right):
    """g = -left alpha, or right alpha: points need not be equally far."""
    at = np.array([-3.0, -1.0, -0.2, 0.0, 0.7, 1.0, 4.0])
    g = 5 + np.where(at < 0, -left * at, right * at)
    assert area(at, g) == pytest.approx(left * 9 / 2 + right * 8)
    assert widths(at, g, 0.25) == pytest.approx((0.25 / left, 0.25 / right))
    assert half_width(at, g, 0.25) == pytest.approx((0.25 / left + 0.25 / right) / 2)


def test_widths_are_the_first_crossings_outwards_and_half_width_is_their_mean():
    at = [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    g = [9.0, -1.0, 2.0, 0.0, 0.0, -1.0, 3.0, -5.0, 9.0]
    for threshold, left, right in ((1.0, 1.5, 1.5), (2.0, 2.0, 1.75), (9.0, 4.0, 4.0)):
        assert widths(at, g, threshold) == pytest.approx((left, right))
        assert half_width(at, g, threshold) == pytest.approx((left + right) / 2)


def test_a_side_that_never_reaches_the_threshold_is_infinitely_wide_and_the_other_is_not():
    at, g = np.array([-1.0, 0.0, 1.0]), np.array([8.0, 0.0, 0.5])
    assert widths(at, g, 1.0) == (0.125, math.inf)
    assert widths(at, g[::-1], 1.0) == (math.inf, 0.125)
    assert half_width(at, g, 1.0) == math.inf
    assert widths(at, -g, 1.0) == (math.inf, math.inf)
    assert half_width([-1.0, 0.0, 1.0], [-9.0, 0.0, 9.0], 1.0) == math.inf


def test_points_that_were_not_measured_are_bridged():
    at = np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    g = np.abs(at) + 3
    for hole in (1, 2, 4, 5, [1, 2, 4, 5]):
        holey = g.copy()
        holey[hole] = np.nan
        assert area(at, holey) == pytest.approx(area(at, g))
        assert half_width(at, holey, 1.25) == pytest.approx(1.25)
        assert math.isfinite(curvature_at_zero(at, holey))
    g[2] = np.nan
    assert curvature_at_zero(at, g) == pytest.approx(curvature_at_zero(at[[1, 3, 4]], g[[1, 3, 4]]))


def test_what_is_missing_at_an_end_or_at_zero_is_not_made_up():
    at, g = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]), np.array([4.0, 1.0, 0.0, 1.0, np.nan])
    assert math.isnan(area(at, g))
    assert math.isnan(area(-at[::-1], g[::-1]))
    assert half_width(at, g, 0.5) == 0.5  # reached before
    left, right = widths(at, g, 2.0)
    assert left == pytest.approx(4 / 3)
    assert math.isnan(right)  # it may have been reached there, or not
    assert math.isnan(half_width(at, g, 2.0))
    assert curvature_at_zero(at, g) == 2.0
    assert math.isnan(curvature_at_zero(at[1:4], np.array([1.0, 0.0, np.nan])))
    for bad in (np.nan, np.inf):
        g = np.array([4.0, 1.0, bad, 1.0, 4.0])
        assert all(math.isnan(value) for value in (area(at, g), *widths(at, g, 0.5), curvature_at_zero(at, g)))


def test_an_infinite_loss_is_beyond_every_threshold():
    at, g = [-2.0, -1.0, 0.0, 1.0, 2.0], [np.inf, 1.0, 0.0, 1.0, np.inf]
    assert area(at, g) == math.inf
    for threshold in (5.0, 1e300):
        assert widths(at, g, threshold) == (1.0, 1.0)  # the last point that was below
    assert widths(at, g, 0.5) == (0.5, 0.5)
    assert widths([-1.0, 0.0, 1.0], [1.0, 0.0, np.inf], 0.5) == (0.5, 0.0)
    assert widths([-2.0, *at[1:]], [np.inf, np.nan, 0.0, np.nan, np.inf], 5.0) == (0.0, 0.0)
    assert curvature_at_zero(at, g) == 2.0


def test_refuses_what_is_no_curve():
    with pytest.raises(ValueError, match="g: expected as many numbers as alphas"):
        area([-1.0, 0.0, 1.0], [1.0, 0.0])
    for at in ([1.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [-1.0, 0.5, 1.0], [-1.0, 0.0, np.nan]):
        with pytest.raises(ValueError, match="alphas: expected increasing numbers with 0 among them"):
            area(at, [1.0, 0.0, 1.0])
    for measure in (lambda *curve: widths(*curve, threshold=1.0), curvature_at_zero):
        with pytest.raises(ValueError, match="alphas: expected numbers on both sides of 0"):
            measure([0.0, 1.0], [0.0, 1.0])
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="threshold: expected a number > 0"):
            widths([-1.0, 0.0, 1.0], [1.0, 0.0, 1.0], threshold)


def test_one_sided_curves_have_an_area():
    assert area([0.0, 2.0], [1.0, 3.0]) == 2.0
