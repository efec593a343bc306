import pytest
import torch
from torch import nn

from saltflat import ema


def test_parameters_are_averaged_and_buffers_copied():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average, expected = ema(model, 0.9), None
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.rand(4, 3, dtype=torch.float64))
        average.update_parameters(model)
        now = [parameter.detach().clone() for parameter in model.parameters()]
        expected = now if expected is None else [0.9 * old + 0.1 * new for old, new in zip(expected, now, strict=True)]
    for parameter, value in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)
    for one, other in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_refuses_a_decay_that_is_none(decay):
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\)"):
        ema(nn.Linear(1, 1), decay)
