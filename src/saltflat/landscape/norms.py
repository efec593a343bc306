"""How large the weights are: what a measure of flatness has to do better than.

    ‖w‖_2        sum_l log ‖w_l‖_F        ‖w - w_0‖_2

over the tensors l that are perturbed. The second is the logarithm of the product of the layers' norms, which does not
change when one layer of a ReLU network is multiplied by a number and the next divided by it. All are computed in
float64.

Source: Jiang et al., arXiv 1912.02178, who compare such norms, and others, with flatness.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saltflat.balls import Weights
from saltflat.weights import Where, chosen_weights, default


def weight_norm(model: nn.Module, *, where: Where = default) -> float:
    """‖w‖_2, in units of the weights. Tied weights count once.

    >>> model = nn.Linear(2, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> weight_norm(model)
    5.0
    """
    return math.hypot(*(_norm(w) for w in chosen_weights(model, where).values()))


def log_norms(model: nn.Module, *, where: Where = default) -> float:
    """sum_l log ‖w_l‖_F; minus infinity where a layer is 0.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> _ = model[0].weight.data.fill_(8.0), model[1].weight.data.fill_(-0.125)
    >>> log_norms(model)
    0.0
    """
    norms = [_norm(w) for w in chosen_weights(model, where).values()]
    return sum(math.log(norm) if norm != 0 else -math.inf for norm in norms)


def distance(model: nn.Module, initial: Weights, *, where: Where = default) -> float:
    """‖w - w_0‖_2, in units of the weights.

    Args:
        initial: {name: w_0} by the names of `model.named_parameters()`, on any device, such as the `state_dict` before
            training. Names that are not chosen are not looked at.

    Raises: KeyError if a chosen weight has no initial one.

    >>> model = nn.Linear(2, 1)
    >>> initial = {name: w.clone() for name, w in model.state_dict().items()}
    >>> _ = model.weight.data.add_(torch.tensor([[3.0, 4.0]]))
    >>> round(distance(model, initial), 5)
    5.0
    """
    return math.hypot(*(_norm(w, initial[name]) for name, w in chosen_weights(model, where).items()))


def _norm(w: Tensor, origin: Tensor | None = None) -> float:
    wide = w.detach().double()
    return float(torch.linalg.vector_norm(wide if origin is None else wide - origin.to(wide)))
