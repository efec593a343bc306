"""Free adversarial training: one backward gives the gradient for the weights and the one for the inputs.

    for every batch, m times:   g_w, g_x = gradients of L(x + d; w)
                                w <- w - lr g_w
                                d <- P( d + s(eps, g_x) )

d is kept from batch to batch; P and s are the projection and the steepest step of the attack's ball. With AWP, both
gradients are those at w + v.

Deviation: the learning rate is that of the batch in all m replays, where the authors' code moves it on in each; and d
is put into the new images' box before their first replay, there only after it.

Source: Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, arXiv 1904.12843.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from saltflat.balls import WeightBall
from saltflat.inputs import PGD
from saltflat.objectives import Objective
from saltflat.random import Generator
from saltflat.step import Climb, Step, beside, cleared, dropping, fixing
from saltflat.weights import Where, perturbed

NAME = "free_displacement"  # of d, in a memory


def free_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: PGD | None,
    ball: WeightBall | None,
    optimizer: torch.optim.Optimizer,
    memory: dict[str, Tensor],
    replays: int = 8,
    climb: Climb = perturbed,
    climbed: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None,
    steps: int = 1,
    step_size: float | None = None,
    where: Where | None = None,
    generator: Generator = None,
) -> Step:
    """One batch, m times; called like `double_perturbation_step`.

    Args:
        attack: its ball and step size are used (published: a step of eps); its number of steps is not, since every
            replay is one.
        ball: the weight adversary's, or None.
        memory: {"free_displacement": d}, empty at first, changed; a smaller batch uses, and changes, its first rows.
        replays: m; each is an optimiser's step.
        climb, climbed, steps, step_size, where: as in `double_perturbation_step`.
        generator: nothing is drawn.

    The model stays in the mode that it is in. `Step` tells of the last replay; `skipped` is of all together, `dropped`
    whether any was, and `x_adv` is x + d as the next replay would begin.

    Costs m forwards and backwards; twice that with AWP.

    Raises: ValueError for fewer than one replay, no attack, and a loss that does not look at x_adv.
    """
    if replays < 1:
        raise ValueError(f"replays: expected an integer >= 1, got {replays!r}")
    if attack is None:
        raise ValueError("attack: expected PGD, whose ball and step size are used, got None")
    climb = climb if where is None else partial(climb, where=where)
    x, eps_step = x.detach(), replace(attack.ball, radius=attack.step_size)
    kept = _fitting(memory.get(NAME), x)
    d = kept[: len(x)].to(x)
    skipped, dropped = [], []
    for _ in range(replays):
        drop = dropping(model, optimizer)
        cleared(model, optimizer)
        x_adv = (x + attack.ball.project(d, x)).requires_grad_()

        if ball is None or ball.radius == 0:
            value = objective.outer(model, x, x_adv, y)
            at_w = value.detach()
            value.backward()  # type: ignore[no-untyped-call]
        else:
            height = fixing(beside(model, optimizer), partial(climbed or objective.outer, model, x, x_adv.detach(), y))
            with climb(model, height, ball, steps=steps, step_size=step_size) as ascent:
                value = objective.outer(model, x, x_adv, y)
                value.backward()  # type: ignore[no-untyped-call]
            at_w = value.detach() if ascent.value is None or climbed is not None else ascent.value
            skipped.append(ascent.skipped)
        if x_adv.grad is None:
            raise ValueError(f"objective: expected a loss that looks at x_adv, got {objective!r}")
        dropped.append(drop())
        optimizer.step()
        ahead = attack.ball.project(x_adv.detach() - x + eps_step.steepest(x_adv.grad, x), x)
        d = torch.where(dropped[-1] > 0, d, ahead)  # a batch that is not finite is forgotten
    memory[NAME] = torch.cat([d, kept[len(x) :].to(x)])
    counted = torch.stack(skipped).sum() if skipped else torch.zeros((), dtype=torch.int64, device=x.device)
    return Step(at_w, value.detach(), x + attack.ball.project(d, x), counted, torch.stack(dropped).amax())


def _fitting(kept: Tensor | None, x: Tensor) -> Tensor:
    """At least as many rows as x; 0 where there was none, or one of another shape."""
    if kept is None or kept.shape[1:] != x.shape[1:]:
        return torch.zeros_like(x)
    return torch.cat([kept.to(x), torch.zeros_like(x[len(kept) :])])
