"""ARWP: RandomWP with less noise where gradients are large.

    e = u s(F),    u_j ~ N(0, sigma^2 ‖w_j‖^2 I)
    F <- beta F + g^2,    g = grad L(w + e)

    by_filter        s_j = (1 + eta sum_i F_ji)^(-1/2)      the authors' code: one factor a filter j
                                                            (a number, in tensors of one dimension)
    by_coordinate    s_ji = (1 + eta F_ji)^(-1/4)           the paper's covariance, sigma^2 / sqrt(1 + eta F)

The two do not agree, so both are here. F is what steps remember: it stands in a dictionary that the caller keeps, and
saves with the optimiser's state. It begins at 0, so that the first draw is RandomWP's, to the bit.

Source: Li, Tao, Yan, Lei, Wu, Fang, He, Huang, TMLR 2024, arXiv 2404.00357.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saltflat.balls import Weights, norms, own
from saltflat.neighbours.random_wp import Draws, Gaussian, drawn
from saltflat.objectives import raised
from saltflat.parallel import everywhere, raw
from saltflat.random import Generator
from saltflat.weights import Ascent, Closure, Where, chosen_weights, trained

Shrink = Callable[[Tensor, float], Tensor]
PREFIX = "squared_gradients."  # of the names in a memory


def by_filter(squares: Tensor, eta: float) -> Tensor:
    """(1 + eta sum_i F_ji)^(-1/2), one number a filter, in a shape that multiplies F.

    >>> by_filter(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), 1.0)
    tensor([[0.5000],
            [1.0000]])
    """
    if squares.ndim <= 1:
        return (1 + eta * squares).rsqrt()
    return (1 + eta * squares.flatten(1).sum(1)).rsqrt().reshape(-1, *[1] * (squares.ndim - 1))


def by_coordinate(squares: Tensor, eta: float) -> Tensor:
    """(1 + eta F)^(-1/4), one number a weight.

    >>> by_coordinate(torch.tensor([[15.0, 0.0]]), 1.0)
    tensor([[0.5000, 1.0000]])
    """
    return (1 + eta * squares).pow(-0.25)


def adaptive_random_wp(
    model: nn.Module,
    sigma: float,
    generator: Generator,
    *,
    memory: dict[str, Tensor],
    eta: float = 0.1,
    beta: float = 0.99,
    shrink: Shrink = by_filter,
    where: Where = trained,
) -> AbstractContextManager[Ascent]:
    """w + e inside the block, w to the bit afterwards; the memory learns from the block's gradients.

    Args:
        sigma: as in `random_wp`.
        memory: {"squared_gradients." + name: F}, empty at first, in fp32 at least; changed when the block ends without
            an exception, by what the block has added to `.grad`: let that be the gradient at w + e alone, and unscaled.
        eta, beta: as published for CIFAR-100.
        shrink: `by_filter` or `by_coordinate`.

    >>> model, memory = nn.Linear(4, 2), {}
    >>> with adaptive_random_wp(model, 0.01, torch.Generator().manual_seed(0), memory=memory):
    ...     model(torch.rand(8, 4)).sum().backward()
    >>> list(memory)
    ['squared_gradients.weight', 'squared_gradients.bias']
    """
    return adaptively_drawn(
        model, None, Gaussian(sigma), where=where, generator=generator,
        memory=memory, eta=eta, beta=beta, shrink=shrink,
    )  # fmt: skip


@contextmanager
def adaptively_drawn(
    model: nn.Module,
    loss: Closure | Sequence[Closure] | None,
    ball: Draws,
    *,
    memory: dict[str, Tensor],
    eta: float = 0.1,
    beta: float = 0.99,
    shrink: Shrink = by_filter,
    steps: int = 1,
    step_size: float | None = None,
    start: Weights | None = None,
    where: Where = trained,
    step_inside: bool = False,
    generator: Generator = None,
) -> Iterator[Ascent]:
    """A climb that is called like `perturbed`: `drawn`, with the memory's factors.

    Gradients are remembered all together, or not at all if any is not finite, or all are 0; by the names that weights
    have without DistributedDataParallel.

    Raises: as `drawn`; ValueError for an eta below 0, a beta outside [0, 1], and a memory of another model's names.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta: expected a finite number >= 0, got {eta!r}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
    known = [name for name in memory if name.startswith(PREFIX)]
    parameters = chosen_weights(model, where)
    wrapper = "" if raw(model) is model else "module."
    keys = {name: PREFIX + name.removeprefix(wrapper) for name in parameters}
    if known and not set(known) & set(keys.values()):
        expected = next(iter(keys.values())).removeprefix(PREFIX)
        raise ValueError(f"memory: expected squared gradients of such as {expected!r}, got {known[0]!r}")
    before = {keys[name]: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    law = _Shrunk(ball, {name: memory[key] for name, key in keys.items() if key in memory}, eta, shrink)
    with drawn(
        model, loss, law, steps=steps, step_size=step_size, start=start,
        where=where, step_inside=step_inside, generator=generator,
    ) as ascent:  # fmt: skip
        yield ascent
    _remember(memory, {keys[name]: parameter for name, parameter in parameters.items()}, before, beta)


@dataclass(frozen=True)
class _Shrunk:
    """The draws of a law, times the factors of F, which has the names of weights."""

    law: Draws
    squares: Mapping[str, Tensor]
    eta: float
    shrink: Shrink

    @property
    def radius(self) -> float:
        return self.law.radius

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        found = self.law.sample(centre, generator, surface)
        known = self.squares
        return {name: e * self.shrink(known[name], self.eta) if name in known else e for name, e in found.items()}


@torch.no_grad()
def _remember(memory: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], had: Weights, beta: float) -> None:
    given = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    found = {name: g - had[name] if name in had else g for name, g in given.items()}
    squares = {name: raised(g.to_dense() if g.is_sparse else g).abs().square() for name, g in found.items()}
    if not squares:
        return
    largest = norms(own(squares.values()), math.inf)
    finite = everywhere(largest.isfinite().all(), parameters.values())
    none = everywhere((largest == 0).all(), parameters.values())  # if a batch was dropped inside the block
    usable = finite & ~none
    for name, square in squares.items():
        before = memory[name] if name in memory else torch.zeros_like(square)
        memory[name] = torch.where(usable, beta * before + square, before)
