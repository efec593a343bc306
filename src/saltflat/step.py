"""One step of training against both adversaries: Algorithm 1 of the AWP paper.

    min_w  max_{v in V}  (1/n) sum_i  max_{x'_i in B(x_i)}  l(f_{w+v}(x'_i), y_i)

    repeat A times:   x' <- K1 steps of ascent in the input ball, at w + v
                      v  <- K2 steps of ascent in the weight ball, at x'
    w <- w - eta g,   g = grad_w of the loss at w + v

A batch walks through the file's one public function from top to bottom. Source: Wu, Xia, Wang, NeurIPS 2020, arXiv
2004.05884.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saltflat.balls import WeightBall, Weights
from saltflat.inputs import InputAdversary
from saltflat.objectives import Objective
from saltflat.random import Generator
from saltflat.weights import Where, default, displaced, perturbed

Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class Step:
    """What one step found. Tensors stay on the device: reading one is the caller's decision to wait.

    Attributes:
        loss: at w, before the step (with `ball=None`, the same as `perturbed_loss`).
        perturbed_loss: at w + v.
        x_adv: the attacked batch.
        skipped: how many weight tensors, summed over all ascent steps, had no finite, non-zero gradient.
    """

    loss: Tensor
    perturbed_loss: Tensor
    x_adv: Any
    skipped: Tensor


def double_perturbation_step(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    ball: WeightBall | None,
    optimizer: torch.optim.Optimizer,
    attack_mode: Mode = "eval",
    steps: int = 1,
    step_size: float | None = None,
    alternations: int = 1,
    step_inside: bool = False,
    where: Where = default,
    generator: Generator = None,
) -> Step:
    """Attack x, climb in w, step down.

    Args:
        model: in the mode to train in; that is its mode in every forward but the attack's.
        x, y: a batch. With `attack=None`, x may be whatever the model takes.
        objective: `AT()`, `TRADES(6.0)`, `MART(6.0)`, or any pair of `inner` and `outer`.
        attack: the input adversary, `PGD(...)` (K1 is its `steps`), or None to leave x alone.
        ball: the weight adversary's, `Layerwise(gamma)`; None or radius 0 skips the ascent.
        optimizer: stepped once; its gradients are cleared first and left for inspection.
        attack_mode: "eval", the attack sees running BatchNorm statistics and changes none; "train", batch statistics,
            and its forwards update the running ones, as in the official AT code.
        steps, step_size: K2 and eta_2 of the weight ascent, as in `perturbed`.
        alternations: A; each goes on from where both adversaries stand.
        step_inside: the optimiser steps at w + v, as in `perturbed`.
        where: which weights are perturbed, as in `perturbed`.
        generator: what the attack's start is drawn from.

    Changes the weights, the optimiser's state, `.grad`, the generator, and the buffers as the outer forwards do; modes
    come back as they were.

    Costs for AT with K2 = A = 1: K1 forwards and input gradients, then 2 forwards and weight gradients.

    >>> from saltflat import AT, PGD, Layerwise, Linf
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = double_perturbation_step(model, torch.rand(8, 4), torch.arange(8) % 2, objective=AT(),
    ...                                 attack=PGD(Linf(0.1), 0.025, 10), ball=Layerwise(5e-3), optimizer=optimizer)
    >>> bool(step.perturbed_loss > step.loss)
    True
    """
    if alternations < 1:
        raise ValueError(f"alternations: expected an integer >= 1, got {alternations!r}")
    if ball is not None and ball.radius == 0:
        ball = None
    if ball is None and alternations > 1:
        raise ValueError(
            f"alternations: with no weight adversary there is nothing to alternate with, got {alternations!r}"
        )
    optimizer.zero_grad()

    def attacked(v: Weights, x_adv: Any) -> Any:
        if attack is None:
            return x
        with in_mode(model, attack_mode), displaced(model, v):
            return attack(objective.inner(model, x, y), x, start=x_adv, generator=generator)

    def loss() -> Tensor:
        return objective.outer(model, x, x_adv, y)

    x_adv = attacked({}, None)
    if ball is None:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return Step(value.detach(), value.detach(), x_adv, value.new_zeros((), dtype=torch.int64))

    v: Weights = {}
    losses, skipped = [], []
    for _ in range(alternations - 1):
        with perturbed(model, loss, ball, steps=steps, step_size=step_size, start=v, where=where) as ascent:
            v = ascent.displacement
        losses.append(ascent.value)
        skipped.append(ascent.skipped)
        x_adv = attacked(v, x_adv)

    with perturbed(
        model, loss, ball, steps=steps, step_size=step_size, start=v, where=where, step_inside=step_inside
    ) as ascent:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if step_inside:
            optimizer.step()
    if not step_inside:
        optimizer.step()
    first_loss = [*losses, ascent.value][0]
    assert first_loss is not None  # a closure was climbed
    return Step(first_loss, value.detach(), x_adv, torch.stack([*skipped, ascent.skipped]).sum())


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The whole model in "eval" or "train" mode inside the block; every module has its own mode back afterwards.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with in_mode(model, "eval"):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode: expected 'eval' or 'train', got {mode!r}")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            module.training = training
