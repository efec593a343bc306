import pytest
import torch

from saltflat import L2
from saltflat.evaluation.stretch import stretch


@pytest.mark.parametrize("box", [None, (0.0, 1.0), (-1.0, 0.5)])
@pytest.mark.parametrize("radius", [0.05, 0.7, 3.0])
def test_what_is_stretched_is_the_multiple_that_clamped_to_the_box_has_the_radius(box, radius):
    """By bisection; where no multiple is long enough, all of them are clamped."""
    ball, x = L2(radius, box), torch.rand(40, 3, 2, 2, dtype=torch.float64)
    x = torch.where(torch.rand_like(x) < 0.3, x.round(), x)
    x = x if box is None else x.clamp(*box)
    u = torch.where(torch.rand_like(x) < 0.2, 0, torch.randn_like(x))
    clamped = lambda s: s * u if box is None else (x + s * u).clamp(*box) - x
    norm = lambda v: v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    low, high = torch.zeros(40, 1, 1, 1).double(), torch.full((40, 1, 1, 1), 1e6).double()
    for _ in range(100):
        s = (low + high) / 2
        low, high = torch.where(norm(clamped(s)) < radius, s, low), torch.where(norm(clamped(s)) < radius, high, s)
    assert torch.allclose(stretch(ball, u, x), clamped(high), atol=1e-9)
    assert torch.allclose(stretch(ball, 1e-30 * u, x), clamped(high), atol=1e-9)


def test_what_has_no_direction_is_not_stretched():
    x = torch.rand(2, 3)
    assert torch.equal(stretch(L2(0.5), torch.zeros(2, 3), x), torch.zeros(2, 3))
    assert stretch(L2(0.5), torch.tensor([[torch.nan, 1.0, 0.0]]), x[:1]).tolist() == [[0.0, 0.0, 0.0]]
    assert stretch(L2(0.5), x[:0], x[:0]).shape == (0, 3)
