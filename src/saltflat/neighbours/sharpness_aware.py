"""SAM and ASAM: one ball around all weights, biases and norm layers too.

    SAM     v = rho g / ‖g‖                              {v : ‖v‖_2 <= rho}, `Global`
    ASAM    v = rho T^2 g / ‖T g‖,  T = |w| + offset     {v : ‖v / T‖_2 <= rho}, `Ellipsoid`

g is the gradient at w; the descent takes the gradient at w + v. AWP differs by its ball alone, whose radius is relative
to each layer's norm.

Under DistributedDataParallel g is the average over ranks, so that v is one for all. The published SAM takes each
device's own g instead (its "m-sharpness"), and the number of devices is then part of the method.

Sources: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412; Kwon, Kim, Park, Choi, ICML 2021, arXiv
2102.11600.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from saltflat.balls import Ellipsoid, Global
from saltflat.weights import Ascent, Closure, Where, perturbed, trained


def sam(
    model: nn.Module, loss: Closure | Sequence[Closure], rho: float = 0.05, *, where: Where = trained
) -> AbstractContextManager[Ascent]:
    """w + v inside the block, w to the bit afterwards, as `perturbed`.

    Args:
        rho: ‖v‖_2 over all tensors, in units of the weights.

    >>> import torch
    >>> model, x = nn.Linear(4, 2), torch.rand(8, 4)
    >>> with sam(model, lambda: model(x).square().mean()):
    ...     model(x).square().mean().backward()
    """
    return perturbed(model, loss, Global(rho), where=where)


def asam(
    model: nn.Module,
    loss: Closure | Sequence[Closure],
    rho: float = 0.5,
    *,
    offset: float = 0.01,
    where: Where = trained,
) -> AbstractContextManager[Ascent]:
    """w + v inside the block, w to the bit afterwards, as `perturbed`.

    Args:
        rho: relative to the size of each weight.
        offset: what lets weights near 0 move, in units of the weights (the authors' eta).

    Deviation: T = |w| + offset for every tensor. The authors' code has T = 1 for whatever is not called "weight",
    which moves biases as SAM would; `where=default` leaves them alone.

    >>> import torch
    >>> model, x = nn.Linear(4, 2), torch.rand(8, 4)
    >>> with asam(model, lambda: model(x).square().mean()):
    ...     model(x).square().mean().backward()
    """
    return perturbed(model, loss, Ellipsoid(rho, offset), where=where)
