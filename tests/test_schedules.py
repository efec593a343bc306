import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltflat.schedules import constant, cosine, cyclic, from_progress, piecewise, warm_up

progress = st.floats(0, 1)


def official_piecewise(t, epochs, peak):
    """The rule of the published scripts, in epochs."""
    if t / epochs < 0.5:
        return peak
    return peak / 10 if t / epochs < 0.75 else peak / 100


@given(st.integers(0, 199), st.integers(0, 390))
def test_piecewise_is_the_official_learning_rate(epoch, i):
    t = epoch + (i + 1) / 391
    ours = piecewise(0.1, {0.5: 0.1, 0.75: 0.1})(t / 200)
    assert ours == pytest.approx(official_piecewise(t, 200, 0.1), rel=1e-12)


@given(progress)
def test_values_stay_between_their_ends(t):
    assert constant(0.3)(t) == 0.3
    assert 0.01 <= cosine(0.1, 0.01)(t) <= 0.1 + 1e-15
    assert 0 <= cyclic(0.2, 0.4)(t) <= 0.2
    assert warm_up(constant(2.0), 0.1)(t) == pytest.approx(2 * min(1, 10 * t))
    assert from_progress(0.3, constant(1.0))(t) == (t >= 0.3)


def test_ends_and_peaks():
    assert cosine(0.1, 0.02)(0) == 0.1
    assert cosine(0.1, 0.02)(1) == 0.02
    assert cyclic(0.2, 0.4)(0.4) == 0.2
    assert cyclic(0.2)(0) == cyclic(0.2)(1) == 0
    assert cosine(1.0)(1 / 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


def test_late_start_begins_with_the_first_step_of_its_epoch():
    gamma = from_progress(10 / 200, constant(5e-3))
    assert gamma((10 * 391 - 1) / (200 * 391)) == 0
    assert gamma(10 * 391 / (200 * 391)) == 5e-3


@pytest.mark.parametrize(
    "make", [lambda t: piecewise(1, {t: 0.1}), lambda t: cyclic(1, t), lambda t: warm_up(constant(1), t)]
)
@pytest.mark.parametrize("t", [0.0, 1.0, -0.1, 2.0])
def test_refuses_progress_outside(make, t):
    with pytest.raises(ValueError, match="progress"):
        make(t)
