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

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from saltflat.balls import WeightBall
from saltflat.inputs import PGD
from saltflat.objectives import Objective
from saltflat.random import Generator
from saltflat.step import Climb, Step, dropping
from saltflat.weights import Where, default, perturbed

NAME = "free_displacement"  # of d, in a memory


def free_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: PGD,
    ball: WeightBall | None,
    optimizer: torch.optim.Optimizer,
    memory: dict[str, Tensor],
    replays: int = 8,
    climb: Climb = perturbed,
    where: Where = default,
    generator: Generator = None,
) -> Step:
    """One batch, m times; called like `double_perturbation_step`.

    Args:
        attack: its ball and step size are used (published: a step of eps); its number of steps is not, since every
            replay is one.
        ball: the weight adversary's, or None.
        memory: {"free_displacement": d}, empty at first, changed; a smaller batch uses, and changes, its first rows.
        replays: m; each is an optimiser's step.
        generator: nothing is drawn.

    The model stays in the mode that it is in. `Step` tells of the last replay, and of all replays together what was
    skipped and dropped; its `x_adv` is x + d as the next replay would begin.

    Costs m forwards and backwards; twice that with AWP.
    """
    if replays < 1:
        raise ValueError(f"replays: expected an integer >= 1, got {replays!r}")
    eps_step = replace(attack.ball, radius=attack.step_size)
    kept = memory.get(NAME)
    if kept is None or kept.shape[1:] != x.shape[1:] or len(kept) < len(x):
        kept = torch.zeros_like(x) if kept is None or kept.shape[1:] != x.shape[1:] else _padded(kept, x)
    d = kept[: len(x)].to(x)
    skipped, dropped = [], []
    for _ in range(replays):
        drop = dropping(model)
        optimizer.zero_grad()
        x_adv = (x + attack.ball.project(d, x)).requires_grad_()

        def loss(x_adv: Tensor = x_adv) -> Tensor:
            return objective.outer(model, x, x_adv, y)

        if ball is None or ball.radius == 0:
            value = loss()
            at_w = value.detach()
            value.backward()  # type: ignore[no-untyped-call]
        else:
            with climb(model, partial(loss, x_adv.detach()), ball, where=where) as ascent:
                value = loss()
                value.backward()  # type: ignore[no-untyped-call]
            at_w = value.detach() if ascent.value is None else ascent.value
            skipped.append(ascent.skipped)
        dropped.append(drop())
        optimizer.step()
        assert x_adv.grad is not None
        d = attack.ball.project(x_adv.detach() - x + eps_step.steepest(x_adv.grad, x), x)
        d = torch.where(d.isfinite(), d, 0)  # a batch that is not finite is forgotten
    memory[NAME] = torch.cat([d, kept[len(x) :].to(x)])
    counted = torch.stack(skipped).sum() if skipped else torch.zeros((), dtype=torch.int64, device=x.device)
    return Step(at_w, value.detach(), x + d, counted, torch.stack(dropped).sum())


def _padded(kept: Tensor, x: Tensor) -> Tensor:
    return torch.cat([kept.to(x), torch.zeros_like(x[len(kept) :])])
