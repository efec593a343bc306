"""The oracles against closed forms."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.losses import cross_entropy, cw_margin, finite_difference_gradient, kl, mart
from oracles.naive_pgd import naive_l2_pgd, naive_linf_pgd
from oracles.proxy_awp import Loss, at_loss, proxy_displacement, proxy_step, trades_loss


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(norm: bool = False) -> nn.Sequential:
    """Linear, BatchNorm or tanh, Linear: 3 features, 2 classes, float64, weights from fixed seeds."""
    middle: nn.Module = nn.BatchNorm1d(4) if norm else nn.Tanh()
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return model


def half_square(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """½ Σ w² over all parameters: its gradient is w."""
    return 0.5 * torch.stack([(w**2).sum() for w in model.parameters()]).sum()


X, Y = random(5, 3, seed=10), torch.tensor([0, 1, 1, 0, 1])
X_ADV = X + 0.1 * random(5, 3, seed=11)


def test_linf_on_a_linear_function_gains_eps_times_the_l1_norm() -> None:
    w, x = tensor(0.5, -2.0, 1.0), random(4, 3)
    x_adv = naive_linf_pgd(lambda z: z @ w, x, torch.zeros_like(x), eps=0.3, step_size=0.07, steps=6, box=None)
    torch.testing.assert_close((x_adv - x) @ w, torch.full((4,), 0.3 * 3.5, dtype=torch.float64))


def test_linf_stays_in_the_box_and_uses_the_start_as_given() -> None:
    w, x = tensor(1.0, -1.0), tensor([0.95, 0.5], [0.5, 0.02])
    x_adv = naive_linf_pgd(lambda z: z @ w, x, torch.zeros_like(x), eps=0.1, step_size=0.1, steps=3)
    torch.testing.assert_close(x_adv, tensor([1.0, 0.4], [0.6, 0.0]))
    start = tensor([0.03, -5.0], [0.0, 0.0])
    torch.testing.assert_close(naive_linf_pgd(lambda z: z @ w, x, start, eps=0.1, step_size=0.1, steps=0), x + start)


def test_l2_on_a_linear_function_gains_eps_times_the_l2_norm() -> None:
    w, x = tensor(3.0, -4.0), random(4, 2)
    short = naive_l2_pgd(lambda z: z @ w, x, torch.zeros_like(x), eps=0.3, step_size=0.1, steps=2, box=None)
    long = naive_l2_pgd(lambda z: z @ w, x, torch.zeros_like(x), eps=0.3, step_size=0.1, steps=9, box=None)
    torch.testing.assert_close((short - x) @ w, torch.full((4,), 0.2 * 5, dtype=torch.float64))
    torch.testing.assert_close((long - x) @ w, torch.full((4,), 0.3 * 5, dtype=torch.float64))


def test_l2_projects_before_the_box_and_leaves_examples_without_slope() -> None:
    x = tensor([0.9, 0.5], [0.5, 0.5])
    slopes = tensor([3.0, 4.0], [0.0, 0.0])
    x_adv = naive_l2_pgd(lambda z: (z * slopes).sum(1), x, torch.zeros_like(x), eps=0.5, step_size=2.0, steps=1)
    torch.testing.assert_close(x_adv, tensor([1.0, 0.9], [0.5, 0.5]))


def test_one_ascent_step_ends_at_gamma_times_norm_along_the_gradient() -> None:
    model = network(norm=True)
    before = copy.deepcopy(model.state_dict())
    v = proxy_displacement(model, at_loss, X, X_ADV, Y, gamma=0.02, steps=1)
    assert set(v) == {"0.weight", "2.weight"}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())

    weights = [dict(model.named_parameters())[name] for name in v]
    gradients = torch.autograd.grad(F.cross_entropy(model(X_ADV), Y), weights)
    for part, w, g in zip(v.values(), weights, gradients, strict=True):
        torch.testing.assert_close(part, 0.02 * w.detach().norm() * g / g.norm(), rtol=1e-12, atol=1e-14)


def test_for_a_loss_linear_in_w_three_ascent_steps_equal_one() -> None:
    model = nn.Linear(3, 2).double()
    slope = random(2, 3, seed=3)

    def linear(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(w * slope).sum() for w in model.parameters() if w.ndim == 2]).sum()

    one = proxy_displacement(model, linear, X, X_ADV, Y, gamma=0.1, steps=1)
    three = proxy_displacement(model, linear, X, X_ADV, Y, gamma=0.1, steps=3)
    far = proxy_displacement(model, linear, X, X_ADV, Y, gamma=0.1, steps=3, step_size=5.0)
    torch.testing.assert_close(three, one, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(far, one, rtol=1e-12, atol=1e-14)


def test_ascent_goes_on_from_its_start_and_stays_in_the_ball() -> None:
    model = network()
    once = proxy_displacement(model, at_loss, X, X_ADV, Y, gamma=0.3, steps=1, step_size=0.2)
    twice = proxy_displacement(model, at_loss, X, X_ADV, Y, gamma=0.3, steps=1, step_size=0.2, start=once)
    torch.testing.assert_close(
        twice, proxy_displacement(model, at_loss, X, X_ADV, Y, gamma=0.3, steps=2, step_size=0.2), rtol=0, atol=0
    )
    for name, w in model.named_parameters():
        if name in twice:
            assert float(once[name].norm() / w.detach().norm()) == pytest.approx(0.2)
            assert float(twice[name].norm() / w.detach().norm()) <= 0.3 * (1 + 1e-12)


def test_tensors_without_gradient_keep_their_displacement() -> None:
    model = network()
    model[0].requires_grad_(False)
    v = proxy_displacement(model, at_loss, X, X_ADV, Y, gamma=0.1, steps=2)
    assert float(v["0.weight"].norm()) == 0
    assert float(v["2.weight"].norm()) > 0


@pytest.mark.parametrize("inside", [True, False])
def test_step_on_a_quadratic(inside: bool) -> None:
    """With loss ½w²: v = γw, the gradient at w + v is (1 + γ)w, and decay acts on w + v (inside) or on w."""
    model = nn.Linear(3, 2, bias=False).double()
    w = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    step = proxy_step(
        model, optimizer, X, Y, loss=half_square, attack_at=lambda m, start: X_ADV, gamma=0.2, inside=inside
    )
    torch.testing.assert_close(step["v"]["weight"], 0.2 * w)
    torch.testing.assert_close(step["perturbed"]["weight"], 1.2 * w)
    torch.testing.assert_close(step["gradient"]["weight"], 1.2 * w)
    assert step["loss"] == pytest.approx(0.5 * float((w**2).sum()))
    assert step["perturbed_loss"] == pytest.approx(0.72 * float((w**2).sum()))
    decayed = 1.2 if inside else 1.0
    torch.testing.assert_close(model.weight.detach(), w - 0.1 * (1.2 * w + 0.5 * decayed * w))


def test_alternations_attack_at_the_perturbed_weights_from_the_last_input() -> None:
    model = network().train()
    w = model.get_parameter("0.weight").detach().clone()
    seen: list[tuple[Tensor, Tensor | None, bool]] = []

    def attack_at(proxy: nn.Module, start: Tensor | None) -> Tensor:
        seen.append((proxy.get_parameter("0.weight").detach().clone(), start, proxy.training))
        return X_ADV + len(seen)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = proxy_step(model, optimizer, X, Y, loss=at_loss, attack_at=attack_at, gamma=0.1, alternations=2, inside=True)
    first = proxy_displacement(model, at_loss, X, X_ADV + 1, Y, gamma=0.1, steps=1)
    second = proxy_displacement(model, at_loss, X, X_ADV + 2, Y, gamma=0.1, steps=1, start=first)
    (at_w, start, training), (at_v, resumed, _) = seen
    assert start is None
    assert not training
    torch.testing.assert_close(at_w, w)
    torch.testing.assert_close(at_v, w + first["0.weight"])
    torch.testing.assert_close(resumed, X_ADV + 1)
    torch.testing.assert_close(step["x_adv"], X_ADV + 2)
    torch.testing.assert_close(step["v"], second)
    torch.testing.assert_close(model.get_parameter("0.weight").detach(), w)
    assert step["loss"] == pytest.approx(at_loss(model, X, X_ADV + 1, Y).item())


@pytest.mark.parametrize(("loss", "forwards"), [(at_loss, 1), (trades_loss(6.0), 2)])
def test_only_the_training_pass_updates_batch_norm(loss: Loss, forwards: int) -> None:
    model = network(norm=True).train()
    twin = copy.deepcopy(model)

    def attack_at(proxy: nn.Module, start: Tensor | None) -> Tensor:
        proxy(X)
        return X_ADV

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = proxy_step(
        model, optimizer, X, Y, loss=loss, attack_at=attack_at, gamma=0.1, steps=2, alternations=2, inside=True
    )
    twin.load_state_dict(step["perturbed"], strict=False)
    loss(twin, X, X_ADV, Y)
    assert int(model.get_buffer("1.num_batches_tracked")) == forwards
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_trades_loss_and_its_gradient() -> None:
    """Against the decimal losses, and its weight gradient (through both arguments of the KL) against differences."""
    model, loss = network(), trades_loss(6.0)
    clean, adversarial = model(X).detach(), model(X_ADV).detach()
    rows = [cross_entropy(clean[i], Y[i]) + 6 * kl(clean[i], adversarial[i]) for i in range(5)]
    value = loss(model, X, X_ADV, Y)
    assert float(value.detach()) == pytest.approx(sum(rows) / 5, rel=1e-12)
    assert at_loss(model, X, X_ADV, Y).item() == pytest.approx(
        sum(cross_entropy(adversarial[i], int(Y[i])) for i in range(5)) / 5, rel=1e-12
    )

    def at_weight(w: Tensor) -> Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.get_parameter("2.weight").copy_(w)
            return loss(moved, X, X_ADV, Y)

    (gradient,) = torch.autograd.grad(value, [model.get_parameter("2.weight")])
    torch.testing.assert_close(
        gradient, finite_difference_gradient(at_weight, model.get_parameter("2.weight")), rtol=1e-6, atol=1e-8
    )


def test_finite_differences_of_a_cubic() -> None:
    x = random(2, 3)
    torch.testing.assert_close(finite_difference_gradient(lambda z: (z**3).sum(), x), 3 * x**2, rtol=1e-7, atol=1e-8)


def test_cross_entropy_and_kl() -> None:
    assert cross_entropy([0.7, 0.7, 0.7], 1) == pytest.approx(math.log(3), rel=1e-15)
    assert cross_entropy([0.0, 1000.0], torch.tensor(0)) == 1000.0
    assert cross_entropy([0.0, math.log(3)], [0.5, 0.5]) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))
    assert kl([1.0, -2.0, 0.5], [1.0, -2.0, 0.5]) == 0
    assert kl([3.0, 0.0], [4.0, 1.0]) == pytest.approx(0, abs=1e-30)
    # p = (1/2, 1/2), q = (1/4, 3/4)
    assert kl([0.0, 0.0], [0.0, math.log(3)]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_mart_on_two_classes_by_hand() -> None:
    """Clean p = (3/4, 1/4), adversarial q = (1/3, 2/3), y = 0; then the same with y = 1."""
    clean, adversarial = [math.log(3), 0.0], [0.0, math.log(2)]
    divergence = 0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3 / 2)
    as_0 = -2 * math.log(1 / 3) + 5 * divergence * 0.25
    as_1 = -2 * math.log(2 / 3) + 5 * divergence * 0.75
    assert mart([clean], [adversarial], [0], 5.0) == pytest.approx(as_0, rel=1e-14)
    both = mart(tensor(clean, clean), tensor(adversarial, adversarial), torch.tensor([0, 1]), 5.0)
    assert both == pytest.approx((as_0 + as_1) / 2, rel=1e-14)


def test_mart_takes_the_greatest_rival_of_three() -> None:
    """q = (1/2, 1/3, 1/6), y = 2 with p = q: only the boosted cross-entropy is left, −log(1/6) − log(1 − 1/2)."""
    row = [math.log(3), math.log(2), 0.0]
    assert mart([row], [row], [2], 5.0) == pytest.approx(math.log(12), rel=1e-14)
    assert math.isfinite(mart([[90.0, 0.0, 0.0]], [[90.0, 0.0, 0.0]], [1], 5.0))


def test_cw_margin() -> None:
    assert cw_margin([1.0, 4.0, 2.5], 1) == -1.5
    assert cw_margin(tensor(1.0, 4.0, 2.5), 2) == 1.5
