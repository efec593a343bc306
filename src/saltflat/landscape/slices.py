"""The weight loss landscape along a line: g(alpha) = rho(w + alpha d).

rho is whatever is measured at the weights as they stand. For the robust landscape of the AWP paper (Wu, Xia, Wang,
arXiv 2004.05884, section 3) it is the loss under an attack that is made afresh at every alpha: examples attacked once,
at w, and kept, would underestimate g away from 0 (Stutz et al., arXiv 2104.04448). Measured with per-example starts,
the same at every alpha and for every model, the curve does not jitter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from saltflat.balls import Weights
from saltflat.weights import displaced

Measured = TypeVar("Measured")


def along(
    model: nn.Module, direction: Weights, alphas: Sequence[float], measure: Callable[[], Measured]
) -> Iterator[tuple[float, Measured]]:
    """Yields (alpha, measure()) with the weights at w + alpha d, one alpha after the other; w is back whenever the
    caller has the turn.

    Args:
        model: given back to the bit; its mode and buffers are `measure`'s business.
        direction: {name: d}, from `random_direction`.
        alphas: in units of d.
        measure: () -> anything, such as `lambda: outcomes(model, data, attack)`.

    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> list(along(model, {"weight": torch.ones(1, 1)}, [-1.0, 0.0, 1.0], lambda: model.weight.item() ** 2))
    [(-1.0, 4.0), (0.0, 9.0), (1.0, 16.0)]
    """
    for alpha in alphas:
        with displaced(model, {name: alpha * d for name, d in direction.items()}):
            found = measure()
        yield alpha, found
