import pytest
import torch
from torch import nn

from saltflat import ema, swa
from saltflat.averaging import reestimate_statistics


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


def test_swa_weighs_all_that_it_is_updated_with_alike_and_copies_buffers():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average, seen = swa(model), []
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    for n in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.rand(4, 3, dtype=torch.float64))
        average.update_parameters(model)
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        for i, parameter in enumerate(average.module.parameters()):  # the weights that it began with have no share
            mean = torch.stack([weights[i] for weights in seen]).mean(0)
            torch.testing.assert_close(parameter.detach(), mean, rtol=1e-12, atol=1e-14)
        for one, other in zip(average.module.buffers(), model.buffers(), strict=True):
            assert torch.equal(one, other)
        assert average.n_averaged == n
    assert all(a is not b for a, b in zip(average.module.parameters(), model.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(initial, average.module.parameters(), strict=True))


def network():
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("sizes", [[5, 5, 5], [5, 5, 2]])
def test_statistics_become_the_means_over_the_batches(sizes):
    """Every batch counts once, the smaller one too; running variances are the unbiased ones, as torch keeps them."""
    model, batches = network(), [torch.rand(n, 2, 4, 4, dtype=torch.float64) for n in sizes]
    model.train()
    model(10 * torch.rand(7, 2, 4, 4, dtype=torch.float64))  # statistics that are to be forgotten
    reestimate_statistics(model.eval(), (batch for batch in batches))

    def rows(values):  # (numbers, channels)
        return values.transpose(0, 1).flatten(1).T

    found = {1: [], 5: []}
    for batch in batches:
        first = model[0](batch)
        found[1].append(rows(first))
        numbers = rows(first)
        normal = (first - numbers.mean(0)[:, None, None]) / (numbers.var(0, correction=0) + 1e-5).sqrt()[:, None, None]
        found[5].append(model[2:5](normal))
    for i, parts in found.items():
        mean = torch.stack([part.mean(0) for part in parts]).mean(0)
        variance = torch.stack([part.var(0) for part in parts]).mean(0)
        torch.testing.assert_close(model[i].running_mean, mean.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model[i].running_var, variance.detach(), rtol=1e-12, atol=1e-14)
        assert model[i].num_batches_tracked == len(sizes)


def test_reestimating_changes_the_statistics_alone_and_twice_is_once():
    model = network()
    model[1].momentum = 0.3
    model.train()[2].eval()
    model[5].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches, ends = [torch.rand(5, 2, 4, 4, dtype=torch.float64) for _ in range(2)], []
    for _ in range(2):
        reestimate_statistics(model, batches)
        ends.append([buffer.clone() for buffer in model.buffers()])
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.3
    assert model[5].momentum == 0.1
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_a_model_without_batch_norm_is_not_run():
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)).eval()
    model.register_forward_hook(lambda *_: pytest.fail("a forward"))
    reestimate_statistics(model, [torch.rand(3, 2)])
    assert not model.training


def test_modes_and_momentum_come_back_if_a_batch_fails():
    model = network().eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        reestimate_statistics(model, [torch.rand(3, 2, 4, 4, dtype=torch.float64), torch.rand(3, 9, 4, 4)])
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.1
