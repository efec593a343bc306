"""One micro-batch among those that an optimiser's step adds up, left out where its gradient is not finite.

    .grad  <-  kept + g    if g is finite, else    kept,        kept: the sum over the micro-batches before

`dropping` makes all gradients 0, and gives the buffers back. These two go around what it returns: they are called
before the micro-batch's backward, and what comes back after it, in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Drop = Callable[[], Tensor]


def keeping(optimizer: torch.optim.Optimizer, drop: Drop) -> Drop:
    """The gradients that stood before the micro-batch stay. Costs a copy of them, where there are any.

    >>> from saltflat.step import dropping
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters())
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> drop = keeping(optimizer, dropping(model, optimizer))
    >>> (model(torch.ones(1, 2)) * torch.inf).sum().backward()
    >>> drop(), model.weight.grad
    (tensor(1), tensor([[1., 1.]]))
    """
    kept = [(p, p.grad.clone()) for p in _stepped(optimizer) if p.grad is not None]

    @torch.no_grad()
    def drop_one() -> Tensor:
        bad = drop()
        for parameter, before in kept:
            if parameter.grad is not None:
                parameter.grad.add_(before * bad)  # to the 0 that `drop` left
        return bad

    return drop_one


def telling(optimizer: torch.optim.Optimizer, drop: Drop) -> Drop:
    """All gradients become NaN in place of 0. A GradScaler has to see that, or it would never lower its scale; it then
    leaves out the step itself, with all of its micro-batches.
    """

    @torch.no_grad()
    def drop_all() -> Tensor:
        bad = drop()
        for parameter in _stepped(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(torch.where(bad > 0, math.nan, 1.0))
        return bad

    return drop_all


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
