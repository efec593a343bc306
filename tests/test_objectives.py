"""One contract over every objective, and independent values for each."""

import pytest
import torch
from oracles.losses import cross_entropy, cw_margin, finite_difference_gradient
from oracles.losses import kl as oracle_kl
from oracles.losses import mart as oracle_mart
from torch import nn

from saltflat.neighbours.logit_pairing import ALP
from saltflat.objectives import AT, MART, TRADES, Natural, ce, kl, margin

OBJECTIVES = [Natural(), AT(), TRADES(6.0), MART(5.0), ALP(0.5)]
SOFT = [Natural(), AT(), TRADES(6.0), ALP(0.5)]


class Logits(nn.Module):
    """A network whose output is what it is given: gradients with respect to logits, directly."""

    def forward(self, z):
        return z


def logits(n=6, classes=5, scale=2.0):
    return scale * torch.randn(n, classes, dtype=torch.float64)


def soft_labels(n=6, classes=5):
    return torch.rand(n, classes, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_shapes_and_gradients(objective):
    """(N,) inside, a scalar outside; both arguments' gradients agree with finite differences."""
    x, x_adv, y = logits(), logits(), torch.arange(6) % 5
    model = Logits()
    f = objective.inner(model, x, y)
    assert f(x_adv).shape == (6,)
    assert objective.outer(model, x, x_adv, y).shape == ()

    def against_differences(function, at):
        at = at.clone().requires_grad_()
        value = function(at) + 0 * at.sum()  # Natural's outer never looks at x_adv, AT's never at x
        (gradient,) = torch.autograd.grad(value, at)
        expected = finite_difference_gradient(lambda z: function(z).detach(), at.detach())
        assert torch.allclose(gradient, expected, atol=1e-7)

    against_differences(lambda z: f(z).sum(), x_adv)
    against_differences(lambda z: objective.outer(model, x, z, y), x_adv)
    against_differences(lambda z: objective.outer(model, z, x_adv, y), x)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_values_are_per_example(objective):
    x, x_adv, y = logits(), logits(), torch.arange(6) % 5
    model = Logits()
    together = objective.inner(model, x, y)(x_adv)
    alone = torch.cat([objective.inner(model, x[i : i + 1], y[i : i + 1])(x_adv[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    outer = torch.stack([objective.outer(model, x[i : i + 1], x_adv[i : i + 1], y[i : i + 1]) for i in range(6)])
    assert objective.outer(model, x, x_adv, y) == pytest.approx(outer.mean().item(), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e4, 90.0, 20.0])
def test_extreme_logits_give_finite_values_and_gradients(objective, dtype, size):
    grid = torch.tensor(
        [[a, b, c] for a in (-size, 0, size) for b in (-size, 0, size) for c in (-size, 0, size)], dtype=dtype
    )
    x = grid.repeat_interleave(27, 0).requires_grad_()
    x_adv = grid.repeat(27, 1).requires_grad_()
    for label in range(3):
        y = torch.full((729,), label)
        loss = objective.outer(Logits(), x, x_adv, y)
        inner = objective.inner(Logits(), x, y)(x_adv)
        gradients = torch.autograd.grad(loss, (x, x_adv), allow_unused=True) + torch.autograd.grad(inner.sum(), x_adv)
        assert loss.isfinite()
        assert inner.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("scale", [0.1, 2.0, 40.0])
def test_values_against_arithmetic_on_probabilities(scale):
    """No clamp moves a value: 200 decimal digits agree, also where p is 1e-80."""
    x, x_adv, y, soft = logits(scale=scale), logits(scale=scale), torch.arange(6) % 5, soft_labels()
    model = Logits()

    def oracle(function, *columns):
        return torch.tensor([function(*row) for row in zip(*columns, strict=True)], dtype=torch.float64)

    def same(value, expected):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)

    divergence = oracle(oracle_kl, x, x_adv)
    same(ce(x_adv, y), oracle(cross_entropy, x_adv, y.tolist()))
    same(ce(x_adv, soft), oracle(cross_entropy, x_adv, soft))
    same(kl(x, x_adv), divergence)
    same(margin(x, y), oracle(cw_margin, x, y.tolist()))
    same(TRADES(6.0).outer(model, x, x_adv, y), (oracle(cross_entropy, x, y.tolist()) + 6 * divergence).mean())
    same(MART(5.0).outer(model, x, x_adv, y), torch.tensor(oracle_mart(x, x_adv, y, 5.0), dtype=torch.float64))


@pytest.mark.parametrize("objective", SOFT, ids=repr)
def test_soft_labels_that_are_hard_change_nothing(objective):
    x, x_adv, y = logits(), logits(), torch.arange(6) % 5
    one_hot = nn.functional.one_hot(y, 5).double()
    torch.testing.assert_close(objective.inner(Logits(), x, one_hot)(x_adv), objective.inner(Logits(), x, y)(x_adv))
    torch.testing.assert_close(objective.outer(Logits(), x, x_adv, one_hot), objective.outer(Logits(), x, x_adv, y))


def test_mart_and_margin_refuse_soft_labels():
    x = logits()
    for refused in (
        lambda: MART().inner(Logits(), x, soft_labels()),
        lambda: MART().outer(Logits(), x, x, soft_labels()),
        lambda: margin(x, soft_labels()),
    ):
        with pytest.raises(ValueError, match="needs classes of shape"):
            refused()


def test_trades_inner_freezes_the_clean_side_and_runs_it_once():
    forwards = []
    model = nn.Linear(4, 3).double()
    model.register_forward_hook(lambda *_: forwards.append(1))
    x, y = torch.rand(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    f = TRADES().inner(model, x, y)
    for _ in range(3):
        f(torch.rand(2, 4, dtype=torch.float64))
    assert len(forwards) == 4
    assert torch.autograd.grad(f(x.requires_grad_()).sum(), x)[0].abs().max() < 1e-12  # a minimum: KL(p ‖ p) = 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_each_is_outer_example_by_example(objective):
    """(N,) whose mean is `outer` to the bit, with its gradient; an example's own value knows nothing of the others."""
    x, x_adv, y = logits().requires_grad_(), logits().requires_grad_(), torch.arange(6) % 5
    each = objective.each(Logits(), x, x_adv, y)
    assert each.shape == (6,)
    assert torch.equal(each.mean(), objective.outer(Logits(), x, x_adv, y))
    inputs, allowed = (x, x_adv), {"allow_unused": True, "materialize_grads": True}
    of_mean = torch.autograd.grad(each.mean(), inputs, retain_graph=True, **allowed)
    of_outer = torch.autograd.grad(objective.outer(Logits(), x, x_adv, y), inputs, **allowed)
    assert all(torch.equal(a, b) for a, b in zip(of_mean, of_outer, strict=True))
    for i in range(6):
        alone = objective.outer(Logits(), x[i : i + 1], x_adv[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(each[i], alone, rtol=1e-12, atol=1e-14)
        others = torch.autograd.grad(each[i], inputs, retain_graph=True, **allowed)
        assert not any(torch.cat([g[:i], g[i + 1 :]]).any() for g in others)


def test_each_runs_the_network_in_the_order_of_outer():
    """Which BatchNorm's running statistics see."""
    for objective, order in (
        (Natural(), ["x"]),
        (AT(), ["x_adv"]),
        (TRADES(), ["x_adv", "x"]),
        (MART(), ["x", "x_adv"]),
        (ALP(), ["x", "x_adv"]),
    ):
        x, x_adv, y, seen = logits(), logits(), torch.arange(6) % 5, []
        model = Logits()
        model.register_forward_hook(lambda _, z, __, x=x, seen=seen: seen.append("x" if z[0] is x else "x_adv"))
        objective.outer(model, x, x_adv, y)
        objective.each(model, x, x_adv, y)
        assert seen == order * 2


@pytest.mark.parametrize("objective", SOFT, ids=repr)
def test_each_takes_soft_labels(objective):
    x, x_adv, y = logits(), logits(), soft_labels()
    each = objective.each(Logits(), x, x_adv, y)
    assert each.shape == (6,)
    assert torch.equal(each.mean(), objective.outer(Logits(), x, x_adv, y))


@pytest.mark.parametrize("make", [TRADES, MART, ALP])
@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_refuses_a_beta_that_is_none(make, beta):
    with pytest.raises(ValueError, match="beta: expected"):
        make(beta)
