"""Adversarial weight perturbation by way of a second model, as the paper's authors do it.

    min_w max_{v: ‖v_l‖ ≤ γ‖w_l‖} max_{x' near x} loss(w + v; x, x', y)

Independent because every evaluation away from w, but the one that trains, happens in a fresh deep copy of the model,
and because losses are written from probabilities. Slow on purpose. Parameters with more than one dimension are
perturbed; norms are Frobenius norms, one per parameter, of w where the step began (the centre of the ball).
"""

import copy
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""loss(model, x, x_adv, y): the mean over the batch, a tensor without dimensions."""

AttackAt = Callable[[nn.Module, Tensor | None], Tensor]
"""attack_at(model, start): adversarial inputs for that model, going on from the inputs `start` where there are any."""

Displacement = dict[str, Tensor]
"""v, by parameter name."""


class ProxyStep(TypedDict):
    """What one step of training did."""

    v: Displacement
    perturbed: dict[str, Tensor]
    gradient: dict[str, Tensor]
    loss: float
    perturbed_loss: float
    x_adv: Tensor


def _mean_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−(1/N) Σ_i log p_i[y_i]."""
    p = torch.softmax(logits, dim=1)
    terms = [-torch.log(p[i, int(y[i])]) for i in range(len(y))]
    return torch.stack(terms).mean()


def at_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """(1/N) Σ_i CE(f(x'_i), y_i). One forward; `x` is not looked at.

    Independent: from probabilities, example by example.
    """
    return _mean_cross_entropy(model(x_adv), y)


def trades_loss(beta: float) -> Loss:
    """(1/N) Σ_i CE(f(x_i), y_i) + β·(1/N) Σ_i KL(p(x_i) ‖ p(x'_i)), with the gradient through both p(x) and p(x').

    Two forwards, first clean and then adversarial: where BatchNorm keeps statistics, they are updated in that order.
    Independent: KL(p ‖ q) = Σ_k p_k·(log p_k − log q_k) from probabilities, without torch's kl_div.
    """

    def loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        clean = model(x)
        adversarial = model(x_adv)
        p = torch.softmax(clean, dim=1)
        q = torch.softmax(adversarial, dim=1)
        divergence = (p * (torch.log(p) - torch.log(q))).sum(dim=1)
        return _mean_cross_entropy(clean, y) + beta * divergence.sum() / len(y)

    return loss


def _zero_displacement(model: nn.Module) -> Displacement:
    """v = 0 for every parameter that may be perturbed."""
    return {name: torch.zeros_like(w.detach()) for name, w in model.named_parameters() if w.ndim > 1}


def _proxy_at(model: nn.Module, v: Displacement) -> nn.Module:
    """A deep copy of `model` (same modes, same buffers) that holds w + v, without gradients."""
    proxy = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in proxy.named_parameters():
            parameter.grad = None
            if name in v:
                parameter.copy_(parameter + v[name])
    return proxy


def _norm(tensor: Tensor) -> float:
    """‖tensor‖_F as the root of the sum of squares."""
    return float((tensor.detach() ** 2).sum().sqrt())


def _ascend(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    gamma: float,
    steps: int,
    step_size: float | None,
    start: Displacement | None,
) -> tuple[Displacement, float | None]:
    """The displacement after `steps` steps, and the loss where the first of them began (None without steps)."""
    size = gamma / steps if step_size is None and steps > 0 else step_size
    centre = {name: _norm(w) for name, w in model.named_parameters()}
    v = _zero_displacement(model) if start is None else {name: part.detach().clone() for name, part in start.items()}
    first: float | None = None
    for _ in range(steps):
        assert size is not None
        proxy = _proxy_at(model, v)
        value = loss(proxy, x, x_adv, y)
        value.backward()  # type: ignore[no-untyped-call]
        if first is None:
            first = value.item()
        for name, parameter in proxy.named_parameters():
            if name not in v or parameter.grad is None:
                continue
            slope = _norm(parameter.grad)
            if slope == 0:
                continue
            moved = v[name] + size * centre[name] * parameter.grad / slope
            length, radius = _norm(moved), gamma * centre[name]
            if length > radius:
                moved = moved * (radius / length)
            v[name] = moved
    return v, first


def proxy_displacement(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    *,
    gamma: float,
    steps: int,
    step_size: float | None = None,
    start: Displacement | None = None,
) -> Displacement:
    """v_l ← Π_l(v_l + η·‖w_l‖·g_l/‖g_l‖) with g = ∇loss(w + v), `steps` times, from `start` (else 0); η is γ/steps.

    Π_l rescales v_l so that ‖v_l‖ ≤ γ‖w_l‖. A tensor whose gradient is missing or zero keeps its v_l.
    Independent: each gradient is taken in a deep copy that holds w + v and is thrown away afterwards, so the model
    keeps its weights, its gradients and its buffers; the copy is in the modes (train or eval) the model is in.
    """
    v, _ = _ascend(model, loss, x, x_adv, y, gamma, steps, step_size, start)
    return v


def proxy_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss,
    attack_at: AttackAt,
    gamma: float,
    steps: int = 1,
    step_size: float | None = None,
    alternations: int = 1,
    inside: bool,
) -> ProxyStep:
    """One training step: `alternations` times (attack at w + v, ascent of v), then the update with ∇loss(w + v).

    Round a: x' = attack_at(w + v, previous x' or None), then v by `proxy_displacement` from the previous v (0 at
    first). Then g = ∇loss(w + v; x, x', y) in the model itself, and with U the optimizer's rule
        inside=True:  w ← U(w + v, g) − v   (weight decay and the like see w + v)
        inside=False: w ← U(w, g)           (w is copied back before the optimizer runs)

    Independent: the attack runs on an eval-mode deep copy, the ascent on deep copies, so only the pass that gives g
    can update the model's buffers, and v is subtracted, or w copied back, by a plain loop over the parameters.

    Returned: "v"; "perturbed", w + v as used, by the same names; "gradient", g of every parameter that has one;
    "loss", the value at the first evaluation of the first ascent (at w, with the first x'); "perturbed_loss", the
    value at w + v in the pass that gives g; "x_adv", the last x'.
    """
    if steps < 1 or alternations < 1:
        raise ValueError("a step needs at least one ascent step and one alternation")
    v = _zero_displacement(model)
    x_adv: Tensor | None = None
    first: float | None = None
    for _ in range(alternations):
        x_adv = attack_at(_proxy_at(model, v).eval(), x_adv).detach()
        v, value = _ascend(model, loss, x, x_adv, y, gamma, steps, step_size, v)
        if first is None:
            first = value
    assert x_adv is not None
    assert first is not None

    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in v}
    perturbed = {name: before[name] + v[name] for name in v}
    with torch.no_grad():
        for name in v:
            parameters[name].copy_(perturbed[name])

    for parameter in parameters.values():
        parameter.grad = None
    at_perturbed = loss(model, x, x_adv, y)
    at_perturbed.backward()  # type: ignore[no-untyped-call]
    gradient = {name: w.grad.detach().clone() for name, w in parameters.items() if w.grad is not None}

    if inside:
        optimizer.step()
        with torch.no_grad():
            for name in v:
                parameters[name].sub_(v[name])
    else:
        with torch.no_grad():
            for name in v:
                parameters[name].copy_(before[name])
        optimizer.step()

    return {
        "v": v,
        "perturbed": perturbed,
        "gradient": gradient,
        "loss": first,
        "perturbed_loss": at_perturbed.item(),
        "x_adv": x_adv,
    }
