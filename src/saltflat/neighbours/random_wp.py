"""RandomWP: descend from a point drawn around the weights, instead of the worst one.

    w <- w - lr grad L(w + e),    e_j ~ N(0, sigma^2 ‖w_j‖^2 I)          plain
    g = (1 - share) grad L_1(w) + share grad L_2(w + e)                  m-RWP: two batches, L_1 and L_2

j runs over filters: the first dimension of a tensor, or all of a bias or a norm layer's scale. Sigma is the standard
deviation of every number of a filter, so that ‖e_j‖ is about sigma sqrt(n_j) ‖w_j‖ for n_j numbers: 0.01 means 24 % of
the norm of a 3x3 filter over 64 channels, and is not to be compared with AWP's gamma.

One forward and backward, as in plain training. `drawn` takes any ball: `Layerwise(gamma)` draws v_l uniformly where AWP
would climb.

Source: Li, Tao, Yan, Lei, Wu, Fang, He, Huang, "Revisiting Random Weight Perturbation for Efficiently Improving
Generalization", TMLR 2024, arXiv 2404.00357; `increasing` is the course of sigma in its authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saltflat.balls import Weights, check_radius
from saltflat.inputs import InputAdversary
from saltflat.objectives import Objective
from saltflat.random import Generator, Rows, base, normal
from saltflat.schedules import Schedule
from saltflat.step import Mode, Step, cleared, double_perturbation_step, dropping, in_mode, itself
from saltflat.weights import Ascent, Closure, Where, buffers_kept, chosen_weights, given_back, held, place, trained


class Draws(Protocol):
    """What `drawn` needs to know of a distribution around the weights: every weight ball, and `Gaussian`."""

    @property
    def radius(self) -> float: ...
    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Gaussian:
    """N(0, radius^2 ‖w_j‖^2 I) for every filter j: not a ball, and its `radius`, sigma, no bound.

    >>> noise = Gaussian(0.01).sample({"l": torch.ones(4, 3)}, torch.Generator().manual_seed(0))
    >>> noise["l"].shape
    torch.Size([4, 3])
    """

    radius: float

    def __post_init__(self) -> None:
        check_radius(self.radius)

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        """One normal number for every weight, tensor by tensor; `surface` says nothing here, since there is none."""
        return {name: normal(w, generator) * (self.radius * _filter_norms(w)) for name, w in centre.items()}


def increasing(sigma: float, increase: float = 10.0) -> Schedule:
    """sigma (1 + increase (1 - cos(pi t)) / 2): from sigma to (1 + increase) sigma along half a cosine.

    >>> [round(increasing(0.001)(t), 4) for t in (0.0, 0.5, 1.0)]
    [0.001, 0.006, 0.011]
    """
    return lambda t: sigma * (1 + increase * (1 - math.cos(math.pi * t)) / 2)


def random_wp(
    model: nn.Module, sigma: float, generator: Generator, *, where: Where = trained
) -> AbstractContextManager[Ascent]:
    """w + e inside the block, w to the bit afterwards.

    Args:
        sigma: relative to the norm of each filter, for every number of it (about 0.01).
        generator: what e is drawn from, on the weights' device; it is advanced.
        where: which tensors; the default takes biases and norm layers too, as the authors do.

    >>> model = nn.Linear(4, 2)
    >>> with random_wp(model, 0.01, torch.Generator().manual_seed(0)):
    ...     model(torch.rand(8, 4)).sum().backward()
    """
    return drawn(model, None, Gaussian(sigma), where=where, generator=generator)


@contextmanager
def drawn(
    model: nn.Module,
    loss: Closure | Sequence[Closure] | None,
    ball: Draws,
    *,
    steps: int = 1,
    step_size: float | None = None,
    start: Weights | None = None,
    where: Where = trained,
    step_inside: bool = False,
    generator: Generator = None,
) -> Iterator[Ascent]:
    """A climb that is called like `perturbed`, and does not climb: v is a draw, and the loss is not looked at.

    Under DistributedDataParallel, ranks with equal generators draw the same v; of `Rows`, what they are rows of draws.

    Raises: ValueError for steps, a step size or a start, which a draw does not have.
    """
    if steps != 1:
        raise ValueError(f"steps: a draw has none, expected 1, got {steps!r}")
    if step_size is not None:
        raise ValueError(f"step_size: a draw has none, expected None, got {step_size!r}")
    if start:
        raise ValueError(f"start: a draw begins at w (no alternations), expected none, got {len(start)} tensors")
    parameters = chosen_weights(model, where)
    with given_back(parameters) as centre:
        v = ball.sample(centre, base(generator))
        place(parameters, centre, v)
        skipped = torch.stack([(e == 0).all() for e in v.values()]).sum()
        del v
        with held(parameters, centre, None, skipped, step_inside) as ascent:
            yield ascent


def two_batch_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    ball: Draws | None,
    optimizer: torch.optim.Optimizer,
    share: float = 0.5,
    attack_mode: Mode = "eval",
    attack_on: Callable[[nn.Module], Callable[[Any], Tensor]] = itself,
    where: Where = trained,
    generator: Generator = None,
) -> Step:
    """m-RWP, called like `double_perturbation_step`: one half of the batch at w, the other half at w + e.

    g = (1 - share) grad L_1(w) + share grad L_2(w + e)

    Args:
        x, y: both batches, one after the other, in random order (an even number of examples, so that each half is what
            the authors call a batch; a single example is the first half, or both, where it is a rank's of more).
        ball: `Gaussian(sigma)`; None or radius 0 is plain training on all of x.
        share: the paper's lambda; 0 is plain training on the first half.

    Buffers see the first half alone, as the authors' code has it. `Step.loss` is that of the first half at w,
    `Step.perturbed_loss` that of the second at w + e. Everything else is as in `double_perturbation_step`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share!r}")
    half = (len(y) + 1) // 2
    # of all ranks, which have to take as many backwards as each other
    total = generator.total if isinstance(generator, Rows) else len(y)
    if ball is None or ball.radius == 0 or share == 0 or total == 1:
        rows = slice(0, half if share == 0 else len(y))
        return double_perturbation_step(
            model, x[rows], y[rows], objective=objective, attack=attack, ball=None, optimizer=optimizer,
            attack_mode=attack_mode, attack_on=attack_on, generator=Rows(generator, rows, len(y)),
        )  # fmt: skip
    drop = dropping(model, optimizer)
    cleared(model, optimizer)
    x_adv: Any = x
    if attack is not None:
        with in_mode(model, attack_mode):
            x_adv = attack(objective.inner(attack_on(model), x, y), x, generator=generator)

    def loss(rows: slice) -> Tensor:
        return objective.outer(model, x[rows], x_adv[rows], y[rows])

    first, second = slice(0, half), slice(half if len(y) > 1 else 0, None)
    at_w = loss(first)
    ((1 - share) * at_w).backward()  # type: ignore[no-untyped-call]
    with drawn(model, None, ball, where=where, generator=generator) as found, buffers_kept(model):
        away = loss(second)
        (share * away).backward()  # type: ignore[no-untyped-call]
    dropped = drop()
    optimizer.step()
    return Step(at_w.detach(), away.detach(), x_adv, found.skipped, dropped)


def _filter_norms(w: Tensor) -> Tensor:
    """‖w_j‖, in a shape that multiplies w."""
    filters = w.reshape(1, -1) if w.ndim <= 1 else w.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(filters, dim=1)
    return norms.reshape([-1, *[1] * (w.ndim - 1)] if w.ndim > 0 else [])
