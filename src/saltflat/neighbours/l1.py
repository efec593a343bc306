"""An objective with a penalty on the size of the weights, which makes many of them small.

    inner  as the objective's
    outer  the objective's + weight sum_j |w_j|        j over all entries of parameters of more than one dimension

Biases and norm layers are left alone, as in the scripts that compare such penalties as remedies of robust overfitting:
Rice, Wong, Kolter, "Overfitting in adversarially robust deep learning", ICML 2020, arXiv 2002.11569.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.objectives import Objective, Value


@dataclass(frozen=True)
class L1:
    """An objective plus `weight` times the L1 norm of the weights, at w or wherever the weights are when it is asked.

    `each` is the objective's own: the penalty is no example's.

    Args:
        objective: a pair of losses, in nats.
        weight: >= 0 and finite, in nats per unit of the weights.

    Raises ValueError for another weight. Weights in shards (FSDP2) are not for it.

    >>> from saltflat import Natural
    >>> model = nn.Linear(2, 2)
    >>> _ = torch.nn.init.constant_(model.weight, -3.0)
    >>> x, y = torch.zeros(1, 2), torch.tensor([0])
    >>> (L1(Natural(), 0.5).outer(model, x, x, y) - Natural().outer(model, x, x, y)).item()  # 0.5 of |-3| four times
    6.0
    """

    objective: Objective
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: expected a finite number, at least 0, got {self.weight!r}")

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return self.objective.inner(model, x, y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        norm = torch.stack([weight.abs().sum() for weight in weights]).sum() if weights else 0.0
        return self.objective.outer(model, x, x_adv, y) + self.weight * norm

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        found: Tensor = self.objective.each(model, x, x_adv, y)  # type: ignore[attr-defined]  # all of ours have it
        return found
