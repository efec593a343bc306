"""The weight loss landscape along a line, g(alpha) = rho(w + alpha d), or over a plane, rho(w + alpha d + beta e).

rho is whatever is measured at the weights as they stand. For the robust landscape of the AWP paper (Wu, Xia, Wang,
arXiv 2004.05884, section 3) it is the loss under an attack that is made afresh at every alpha: examples attacked once,
at w, and kept, would underestimate g away from 0 (Stutz et al., arXiv 2104.04448). Measured with per-example starts,
the same at every alpha and for every model, the curve does not jitter.

Planes: Li et al., arXiv 1712.09913. Two random directions are not made orthogonal; in many dimensions they nearly are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from saltflat.balls import Weights
from saltflat.weights import displaced

Measured = TypeVar("Measured")
Point = tuple[float, ...]


def along(
    model: nn.Module, direction: Weights, alphas: Sequence[float], measure: Callable[[], Measured]
) -> Iterator[tuple[float, Measured]]:
    """Yields (alpha, measure()) with the weights at w + alpha d, one alpha after the other; w is back whenever the
    caller has the turn.

    Args:
        model: given back to the bit; its mode and buffers are `measure`'s business.
        direction: {name: d}, from `random_direction` or `adversarial_direction`.
        alphas: in units of d.
        measure: () -> anything, such as `lambda: outcomes(model, data, attack)` or `lambda: total(losses)`.

    Holds one backup of the weights, beside the direction.

    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> list(along(model, {"weight": torch.ones(1, 1)}, [-1.0, 0.0, 1.0], lambda: model.weight.item() ** 2))
    [(-1.0, 4.0), (0.0, 9.0), (1.0, 16.0)]
    """
    for (alpha,), found in over(model, [direction], [(alpha,) for alpha in alphas], measure):
        yield alpha, found


def over(
    model: nn.Module, directions: Sequence[Weights], points: Iterable[Point], measure: Callable[[], Measured]
) -> Iterator[tuple[Point, Measured]]:
    """Yields (point, measure()) with the weights at w + alpha d + beta e + ..., for points (alpha, beta, ...) in units
    of the directions; for the rest as `along`.

    >>> import torch
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> d, e = {"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 1.0]])}
    >>> list(over(model, [d, e], [(0.0, 0.0), (1.0, 2.0)], lambda: model.weight.tolist()))
    [((0.0, 0.0), [[3.0, 3.0]]), ((1.0, 2.0), [[4.0, 5.0]])]
    """
    for point in points:
        with displaced(model, _Combined(directions, point)):
            found = measure()
        yield point, found


class _Combined(Mapping[str, Tensor]):
    """alpha d + beta e + ..., tensor by tensor when it is asked for: no copy of all weights is made for a point."""

    def __init__(self, directions: Sequence[Weights], point: Point) -> None:
        if len(directions) != len(point):
            raise ValueError(f"points: expected {len(directions)} numbers, one a direction, got {point!r}")
        self.terms = list(zip(directions, point, strict=True))
        self.names = list(dict.fromkeys(name for direction in directions for name in direction))

    def __getitem__(self, name: str) -> Tensor:
        first, *others = [coordinate * d[name] for d, coordinate in self.terms if name in d]
        return sum(others, start=first)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
