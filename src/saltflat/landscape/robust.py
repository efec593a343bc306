"""The robust loss as a function of the weights, to be measured, climbed or differentiated around w:

    rho(w) = (1/n) sum_i  max_{x' in B(x_i)}  l(f_w(x'), y_i)

It is handed out in shares, one closure per batch, whose *sum* is rho: what `perturbed`, `gradient` and every measure of
this room take. A closure looks at the weights as they stand when it is called. What it maximises over x' with, and what
it then returns, is the objective's pair of functions (cross-entropy for both in `AT`); the inner maximum is

    afresh      attacked again, in full, every time a closure is called: rho itself
    continued   taken up where it stood and attacked for a step or so more: for ascents in x' and w together
    frozen      attacked once, at the weights of that moment, and kept: less than rho wherever w has moved

The attack's starts belong to the examples and are the same at every call (common random numbers), so that rho is a
function, and differences of it are differences of the weights. Gradients are those of Danskin's theorem: x' is held
fixed in them.

Sources: Wu, Xia, Wang, arXiv 2004.05884, section 3 (rho, and that x' is made afresh); Stutz, Hein, Schiele, arXiv
2104.04448, section 3.2 (that kept examples underestimate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from saltflat.inputs import PGD
from saltflat.objectives import AT, Objective
from saltflat.random import PerExample
from saltflat.step import AttackOn, Mode, in_mode, itself
from saltflat.weights import Closure, buffers_kept

Losses = Sequence[Closure]


def afresh(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD | None,
    *,
    objective: Objective | None = None,
    attack_on: AttackOn = itself,
    batch_size: int = 256,
    seed: int = 0,
    ids: Tensor | None = None,
    mode: Mode = "eval",
) -> list[Closure]:
    """rho in shares; each call of one attacks its batch in full.

    Args:
        model: looked at as it stands at each call.
        x, y: (N, ...) in pixel units and (N,), on the model's device.
        attack: the input adversary, `PGD(...)`; None measures the clean loss.
        objective: what the attack maximises, and what is returned; default `AT()`, cross-entropy in nats.
        attack_on: makes what the attack climbs on of the model, as it stands; `saltflat.lean.leaner()` is for CPUs.
        batch_size: examples a closure; with `AT` it changes no value but by rounding.
        seed, ids: of the starts: row i draws from (seed, ids[i]); ids default to 0 ... N - 1.
        mode: of the model, in the attack and after it. With "train", BatchNorm sees batch statistics, and its running
            ones move with every call, by the forwards of the outer loss alone; `perturbed`, `gradient` and the measures
            of this room undo that.

    Returns: closures () -> scalar with a graph to the weights; their sum is the mean over all N.

    >>> from saltflat import Linf
    >>> model, x, y = nn.Linear(4, 2), torch.rand(6, 4), torch.arange(6) % 2
    >>> losses = afresh(model, x, y, PGD(Linf(0.1), 0.05, 4), batch_size=4)
    >>> len(losses), total(losses) > total(afresh(model, x, y, None))
    (2, True)
    """

    batches = _batches(model, x, y, attack, objective, attack_on, batch_size, seed, ids, mode)
    return [batch.afresh for batch in batches]


def continued(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD,
    *,
    objective: Objective | None = None,
    attack_on: AttackOn = itself,
    batch_size: int = 256,
    seed: int = 0,
    ids: Tensor | None = None,
    mode: Mode = "eval",
    steps: int = 1,
) -> list[Closure]:
    """The same shares, but each closure keeps its x' and every call takes it `steps` steps of the attack further: joint
    ascent, when whoever calls climbs in w. x' begins at the attack's start.

    Arguments and what comes back: as in `afresh`.
    """

    def going_on(batch: _Batch) -> Closure:
        x_adv: Tensor | None = None

        def loss() -> Tensor:
            nonlocal x_adv
            x_adv = batch.attacked(x_adv)
            return batch.loss(x_adv)

        return loss

    some = replace(attack, steps=steps)
    return [going_on(batch) for batch in _batches(model, x, y, some, objective, attack_on, batch_size, seed, ids, mode)]


def frozen(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD | None,
    *,
    objective: Objective | None = None,
    attack_on: AttackOn = itself,
    batch_size: int = 256,
    seed: int = 0,
    ids: Tensor | None = None,
    mode: Mode = "eval",
) -> list[Closure]:
    """The same shares at examples that are attacked now, at the weights as they stand, and kept: differentiable twice,
    cheap, and less than rho away from these weights.

    Arguments and what comes back: as in `afresh`.
    """

    batches = _batches(model, x, y, attack, objective, attack_on, batch_size, seed, ids, mode)
    return [partial(batch.loss, batch.attacked()) for batch in batches]


def total(losses: Losses) -> float:
    """rho at the weights as they stand: the sum of all shares, without a graph."""
    with torch.no_grad():
        return sum(loss().double().item() for loss in losses)


@dataclass(frozen=True, eq=False)
class _Batch:
    """One batch of n examples out of N, and what is asked about it; `share` is n / N."""

    model: nn.Module
    objective: Objective
    attack: PGD | None
    attack_on: AttackOn
    x: Tensor
    y: Tensor
    seed: int
    ids: Tensor
    mode: Mode
    share: float

    def attacked(self, start: Tensor | None = None) -> Tensor:
        """x' at the weights as they stand; from `start`, or from the attack's own draw."""
        if self.attack is None:
            return self.x
        with in_mode(self.model, self.mode), buffers_kept(self.model):
            f = self.objective.inner(self.attack_on(self.model), self.x, self.y)
            return self.attack(f, self.x, start=start, generator=PerExample(self.seed, self.ids))

    def afresh(self) -> Tensor:
        return self.loss(self.attacked())

    def loss(self, x_adv: Tensor) -> Tensor:
        with in_mode(self.model, self.mode):
            return self.objective.outer(self.model, self.x, x_adv, self.y) * self.share


def _batches(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD | None,
    objective: Objective | None,
    attack_on: AttackOn,
    batch_size: int,
    seed: int,
    ids: Tensor | None,
    mode: Mode,
) -> list[_Batch]:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    if not len(x) == len(y) > 0:
        raise ValueError(f"y: expected as many labels as images, and some, got {len(y)} for {len(x)}")
    names, of = torch.arange(len(x)) if ids is None else ids, AT() if objective is None else objective
    parts = zip(*(torch.split(tensor, batch_size) for tensor in (x, y, names)), strict=True)
    return [
        _Batch(model, of, attack, attack_on, x_b, y_b, seed, ids_b, mode, len(x_b) / len(x))
        for x_b, y_b, ids_b in parts
    ]
