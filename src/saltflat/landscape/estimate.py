"""A number that was estimated from random draws, and how far off it may be.

    value +- standard_error,   standard_error = s / sqrt(n),   s the sample standard deviation over n draws

The standard error is that of the draws alone: the data are held fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    value: in the unit of what was estimated.
    standard_error: in the same unit; 0 for what is exact, NaN where one draw says nothing of it.
    draws: how many there were.
    """

    value: float
    standard_error: float
    draws: int


def mean(draws: Tensor) -> Estimate:
    """The mean of independent draws (n,).

    >>> import torch
    >>> mean(torch.tensor([1.0, 2.0, 3.0]))
    Estimate(value=2.0, standard_error=0.5773502691896258, draws=3)
    """
    values, n = draws.detach().double(), len(draws)
    error = values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return Estimate(values.mean().item(), error, n)
