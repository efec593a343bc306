"""The paper's procedure as its authors run it, written anew from the formulas and from what is known of its parts.

One iteration of AT-AWP (Wu, Xia, Wang, arXiv 2004.05884), with w the weights of the model and u those of a second
network, the proxy:

    1  delta uniform in the ball; K1 times: loss.backward(), weight gradients included, and
       delta <- clamp(clamp(delta + alpha sign(g), -eps, eps), -x, 1 - x); one forward more, for the losses it ends at
    2  u <- w, by state dict;  u <- one step of SGD on -CE at x + delta, in train mode;  d_l = ‖w_l‖ (u_l - w_l) /
       (‖u_l - w_l‖ + 1e-20) for tensors called weight with more than one dimension
    3  w <- w + gamma d;  forward, backward, step of the optimiser at w + gamma d;  w <- w - gamma d
    4  a forward of the clean batch in train mode, whose accuracy is logged

It is what a step of ours is timed against, so it is neither slower nor faster than it has to be: nothing is added, and
what the procedure wastes (weight gradients of the attack, the second network, its state dict in every step) stays.
Nor is anything set that its authors leave alone: maps lie in torch's own layout, not channels-last, SGD is not fused,
freed memory goes back to the kernel as torch's default allocator has it (`training_step` has contenders in which it
stays), and on a GPU convolutions, but not products of matrices, compute fp32 in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = 1e-20
Displacement = dict[str, Tensor]


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int, start: Tensor | None = None
) -> Tensor:
    """Stage 1, in the mode that the model is in: x + delta; the `.grad` of all weights is left full."""
    delta = torch.empty_like(x).uniform_(-eps, eps) if start is None else start.clone()
    delta = delta.clamp(-x, 1 - x).requires_grad_()
    for _ in range(steps):
        F.cross_entropy(model(x + delta), y).backward()  # type: ignore[no-untyped-call]
        assert delta.grad is not None
        moved = (delta.detach() + step_size * delta.grad.sign()).clamp(-eps, eps).clamp(-x, 1 - x)
        delta.data = moved
        delta.grad.zero_()
    losses = F.cross_entropy(model(x + delta), y, reduction="none")
    kept = torch.zeros_like(x)
    better = losses >= torch.zeros_like(losses)  # the best of several starts, of which there is one
    kept[better] = delta.detach()[better]
    return (x + kept).clamp(0, 1)


def direction(
    model: nn.Module, proxy: nn.Module, proxy_optimizer: torch.optim.Optimizer, height: Callable[[nn.Module], Tensor]
) -> Displacement:
    """Stage 2: d by name; the proxy is changed, the model is not."""
    proxy.load_state_dict(model.state_dict())
    proxy.train()
    downhill = -height(proxy)
    proxy_optimizer.zero_grad()
    downhill.backward()  # type: ignore[no-untyped-call]
    proxy_optimizer.step()
    found: Displacement = {}
    for (name, before), after in zip(model.state_dict().items(), proxy.state_dict().values(), strict=True):
        if before.dim() > 1 and "weight" in name:
            moved = after - before
            found[name] = before.norm() / (moved.norm() + TINY) * moved
    return found


@torch.no_grad()
def add(model: nn.Module, d: Displacement, share: float) -> None:
    """w <- w + share d, in place."""
    for name, parameter in model.named_parameters():
        if name in d:
            parameter.add_(share * d[name])


def at_awp_step(
    model: nn.Module,
    proxy: nn.Module,
    optimizer: torch.optim.Optimizer,
    proxy_optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    gamma: float,
    attack_mode: Literal["eval", "train"],
    start: Tensor | None = None,
) -> Tensor:
    """One iteration, stages 1 to 4; the loss at w + v.

    Args:
        proxy: a network like the model, with an optimiser of its own (SGD, rate 0.01).
        attack_mode: the script for CIFAR-100 attacks in train mode, that for CIFAR-10 in train mode but for the first
            batch of an epoch.
        start: delta to begin with, instead of a draw.
    """
    model.train(attack_mode == "train")
    x_adv = pgd(model, x, y, eps=eps, step_size=step_size, steps=steps, start=start)
    model.train()
    d = direction(model, proxy, proxy_optimizer, lambda network: F.cross_entropy(network(x_adv), y))
    add(model, d, gamma)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    add(model, d, -gamma)
    model(x)
    return loss.detach()


def trades_awp_step(
    model: nn.Module,
    proxy: nn.Module,
    optimizer: torch.optim.Optimizer,
    proxy_optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    gamma: float,
    beta: float = 6.0,
    start: Tensor | None = None,
) -> Tensor:
    """The same for TRADES, whose attack is in eval mode and runs the clean batch anew in each of its steps; so do both
    losses, which hold two forwards of it each.
    """
    model.eval()
    x_adv = x + (0.001 * torch.randn_like(x) if start is None else start)
    for _ in range(steps):
        x_adv.requires_grad_()
        (slope,) = torch.autograd.grad(_divergence(model(x_adv), model(x), "sum"), x_adv)
        x_adv = (x_adv.detach() + step_size * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    model.train()

    def loss(network: nn.Module) -> Tensor:
        divergence = _divergence(network(x_adv), network(x), "batchmean")
        return F.cross_entropy(network(x), y) + beta * divergence

    d = direction(model, proxy, proxy_optimizer, loss)
    add(model, d, gamma)
    value = loss(model)
    optimizer.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    add(model, d, -gamma)
    return value.detach()


def _divergence(attacked: Tensor, clean: Tensor, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(attacked, dim=1), F.softmax(clean, dim=1), reduction=reduction)
