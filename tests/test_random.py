import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.random import PerExample, derived_seed, normal, seeded, uniform


@settings(deadline=None, max_examples=30)
@given(st.permutations(list(range(12))), st.integers(1, 12), st.integers(-(2**63), 2**63 - 1))
def test_a_row_s_draws_do_not_depend_on_batch_or_order(order, batch_size, seed):
    ids = torch.arange(12) * 1_000_003 - 5
    whole = PerExample(seed, ids)
    expected = [uniform(torch.zeros(12, 2, 3), whole), normal(torch.zeros(12, 4), whole)]
    for rows in torch.tensor(order).split(batch_size):
        part = PerExample(seed, ids[rows])
        assert torch.equal(uniform(torch.zeros(len(rows), 2, 3), part), expected[0][rows])
        assert torch.equal(normal(torch.zeros(len(rows), 4), part), expected[1][rows])


def test_moments_and_range():
    generator = PerExample(0, torch.arange(2000))
    u = uniform(torch.zeros(2000, 100, dtype=torch.float64), generator)
    z = normal(torch.zeros(2000, 100, dtype=torch.float64), generator)
    n = u.numel()
    assert u.min() >= 0
    assert u.max() < 1
    # each within 5 of its own standard errors
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    neighbours = torch.corrcoef(u[:, :50])
    assert (neighbours - torch.eye(2000)).abs().max() < 6.5 / math.sqrt(50)
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 6 / math.sqrt(2000)


def test_seeds_ids_and_draws_all_matter():
    like = torch.zeros(1, 1000)
    first = uniform(like, PerExample(0, torch.tensor([0])))
    generator = PerExample(0, torch.tensor([0]))
    assert torch.equal(uniform(like, generator), first)
    for other in (generator, PerExample(1, torch.tensor([0])), PerExample(0, torch.tensor([1]))):
        assert abs(torch.corrcoef(torch.cat([first, uniform(like, other)]))[0, 1]) < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_are_the_rounded_ones_and_stay_below_1(dtype):
    like = torch.zeros(300, 400)
    ids = torch.arange(300)
    full, half = (uniform(like.to(kind), PerExample(0, ids)) for kind in (torch.float32, dtype))
    assert half.dtype == dtype
    assert half.max() < 1
    assert torch.equal(full.to(dtype)[half < half.max()], half[half < half.max()])
    normals = normal(like.to(dtype), PerExample(0, ids))
    assert normals.isfinite().all()
    assert abs(normals.float().std() - 1) < 0.02


def test_derived_seeds_differ_and_fit_torch():
    seeds = {
        derived_seed(seed, *stream) for seed in range(-3, 30) for stream in ((), (0,), (1,), (0, 0), (1, 0), (0, 1))
    }
    assert len(seeds) == 33 * 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(3, generator=seeded(4, 2)), torch.rand(3, generator=seeded(4, 2)))


def test_refuses_ids_and_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="ids: expected int64"):
        PerExample(0, torch.zeros(3))
    with pytest.raises(ValueError, match="first dimension must be the 3 ids"):
        uniform(torch.zeros(2, 3), PerExample(0, torch.arange(3)))
