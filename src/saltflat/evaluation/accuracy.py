"""Accuracy and loss under attack, example by example.

    outcome i:  x'_i = attack of x_i,   loss_i = CE(f_w(x'_i), y_i),   correct_i = [ argmax f_w(x'_i) = y_i ]

Always with the weights as they stand, in eval mode, on images as they are. The outcomes are the record; every accuracy
is derived from them. The attack's starts are drawn per example, by its place in the data set,
so that an outcome does not depend on the batch that it was computed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.data.images import Images, to_float
from saltflat.inputs import PGD
from saltflat.objectives import AT, Value, ce, margin
from saltflat.random import PerExample
from saltflat.step import AttackOn, in_mode, itself

Inner = Callable[[Any, Tensor, Tensor], Value]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Value:
    """What PGD and FGSM maximise: CE(model(x'), y)."""
    return AT().inner(model, x, y)


def carlini_wagner(model: nn.Module, x: Tensor, y: Tensor) -> Value:
    """What CW-PGD maximises: the margin max_{k != y} z'_k - z'_y."""
    return lambda x_adv: margin(model(x_adv), y)


@dataclass(frozen=True)
class Outcomes:
    """One row per example, on the CPU.

    Attributes:
        loss: (N,) cross-entropy at x_adv, in nats.
        correct: (N,) bool, the prediction at x_adv is the label.
    """

    loss: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """The share of examples that are answered rightly, in [0, 1]."""
        return self.correct.double().mean().item()

    @property
    def mean_loss(self) -> float:
        """The mean over examples, in the loss's unit."""
        return self.loss.double().mean().item()


def outcomes(
    model: nn.Module,
    data: Images,
    attack: PGD | None,
    *,
    inner: Inner = cross_entropy,
    attack_on: AttackOn = itself,
    batch_size: int = 256,
    seed: int = 0,
    rows: Tensor | None = None,
) -> Outcomes:
    """Attack every example and look at the answers.

    Args:
        model: evaluated on its own device and in its own precision, in eval mode; modes come back, nothing is changed.
        data: (N, C, H, W) uint8 images and their labels.
        attack: None for clean images.
        inner: (model, x, y) -> f, what the attack maximises.
        attack_on: makes what it climbs on of the model, in eval mode: `saltflat.lean.leaner()` is for CPUs. The answers
            are the model's own.
        batch_size: examples at a time; it does not change what is drawn.
        seed: of the attack's starts.
        rows: (k,) int64, which examples, in which order; None for all. What is drawn for one is drawn whoever is asked
            for beside it.

    >>> from saltflat.data import Images
    >>> data = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), 2, "nothing to see")
    >>> outcomes(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), data, None).accuracy
    0.5
    """
    settings: dict[str, Any] = {"inner": inner, "attack_on": attack_on, "batch_size": batch_size}
    return collect(outcomes_by_batch(model, data, attack, **settings, seed=seed, rows=rows))


def outcomes_by_batch(
    model: nn.Module,
    data: Images,
    attack: PGD | None,
    *,
    inner: Inner = cross_entropy,
    attack_on: AttackOn = itself,
    batch_size: int = 256,
    seed: int = 0,
    rows: Tensor | None = None,
) -> Iterator[Outcomes]:
    """`outcomes`, a batch at a time, for whoever shows progress."""
    like = next(iter(model.parameters()), torch.empty(0))
    for ids in torch.split(torch.arange(len(data)) if rows is None else rows, batch_size):
        x = to_float(data.images[ids].to(like.device), like.dtype)
        y = data.labels[ids].to(like.device)
        x_adv = attacked(model, x, y, attack, inner=inner, attack_on=attack_on, seed=seed, ids=ids)
        yield answers(model, x_adv, y)


def attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD | None,
    *,
    inner: Inner = cross_entropy,
    attack_on: AttackOn = itself,
    seed: int = 0,
    ids: Tensor | None = None,
) -> Tensor:
    """One batch x (N, ...) in pixel units, attacked in eval mode; x itself if `attack` is None. Row i's start is drawn
    from (seed, ids[i]); ids default to 0 ... N - 1. `attack_on` as in `outcomes`.
    """
    if attack is None:
        return x
    with in_mode(model, "eval"):
        names = torch.arange(len(x)) if ids is None else ids
        return attack(inner(attack_on(model), x, y), x, generator=PerExample(seed, names))


def answers(model: nn.Module, x: Tensor, y: Tensor) -> Outcomes:
    """What the model says of one batch as it is, in eval mode."""
    with in_mode(model, "eval"), torch.no_grad():
        logits = model(x)
    return Outcomes(ce(logits, y).cpu(), right(logits, y).cpu())


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each row (N, C) is highest at its class y (N,): (N,), bool. A row with a NaN, which torch takes for the
    highest number, is not.

    >>> right(torch.tensor([[2.0, 1.0], [torch.nan, 1.0]]), torch.tensor([0, 0]))
    tensor([ True, False])
    """
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def collect(batches: Iterable[Outcomes]) -> Outcomes:
    """All batches as one."""
    parts = list(batches)
    return Outcomes(torch.cat([part.loss for part in parts]), torch.cat([part.correct for part in parts]))


def interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion, by Wilson's score (1927): right also near 0 and 1.

    >>> [round(end, 4) for end in interval(50, 100)]
    [0.4038, 0.5962]
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"correct: expected 0 <= correct <= n with n >= 1, got {correct!r} of {n!r}")
    z, p = 1.959963984540054, correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
