"""The Weight-Curvature Index: norms of weights times curvature, layer by layer.

    WCI(w) = sum_k ‖W_k‖_F sqrt( max(tr H_k, 0) )

W_k is the weight of layer k, H_k its diagonal block of the Hessian of the adversarial loss. Where it comes from: noise
nu_k ~ N(0, sigma_k^2 I) on the weights raises the loss by sum_k sigma_k^2 tr H_k / 2, to second order around a minimum.
A PAC-Bayes bound adds to that, as 1 / beta of it, the divergence between these noisy weights and equally noisy ones
around 0, sum_k ‖W_k‖^2 / (2 sigma_k^2). In each layer,

    min over sigma_k^2 of   sigma_k^2 tr H_k / 2  +  ‖W_k‖^2 / (2 sigma_k^2 beta)   =   ‖W_k‖ sqrt(tr H_k) / sqrt(beta)

at sigma_k^2 = ‖W_k‖ / sqrt(beta tr H_k): the index is what is left, up to beta. Multiplying one layer of a ReLU network
by a and dividing the next by a scales tr H_k by a^-2 and a^2, and leaves the index alone, unlike the trace or the
largest eigenvalue.

After Xu, Zhang, arXiv 2410.07719v1, who build their index from these norms and traces; the formula is derived above and
not quoted. Later versions of that paper have another title and subject, and replaced the index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from saltflat.landscape.estimate import Estimate


@dataclass(frozen=True)
class WeightCurvature:
    """Attributes:
    index: in nats^(1/2); its error is that of the traces, and `draws` their smallest number of probes.
    negative: the layers whose trace is negative and counts as 0. The Hessian of an adversarial loss is indefinite away
        from minima; with many of them the index says little.
    """

    index: Estimate
    negative: tuple[str, ...]


def weight_curvature(model: nn.Module, traces: Mapping[str, Estimate]) -> WeightCurvature:
    """WCI of the model's weights as they stand.

    Args:
        model: gives ‖W_k‖_F.
        traces: {name: tr H_k} by the names of its parameters, from `layer_traces`.

    The error of sqrt(t) is half of what t +- error becomes, which is error / (2 sqrt t) for a small error and stays
    finite at t = 0. Layers share their probes and err together, so their errors are added: an upper bound.

    Raises: ValueError for no traces, or a name that the model does not have.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> weight_curvature(model, {"weight": Estimate(2.0, 0.0, 1)})
    WeightCurvature(index=Estimate(value=6.0, standard_error=0.0, draws=1), negative=())
    """
    weights = dict(model.named_parameters())
    if strange := [name for name in traces if name not in weights]:
        raise ValueError(f"traces: expected names of the model's {len(weights)} weights, got {strange[0]!r}")
    if not traces:
        raise ValueError(f"traces: expected at least one, got {traces!r}")
    norms = {name: weights[name].detach().double().norm().item() for name in traces}
    value = sum(norms[name] * _root(found.value) for name, found in traces.items())
    error = sum(norms[name] * _error(found) for name, found in traces.items())
    draws = min(found.draws for found in traces.values())
    return WeightCurvature(
        Estimate(value, error, draws), tuple(name for name, found in traces.items() if found.value < 0)
    )


def _root(number: float) -> float:
    return math.sqrt(max(number, 0.0))  # a NaN stays one


def _error(found: Estimate) -> float:
    return (_root(found.value + found.standard_error) - _root(found.value - found.standard_error)) / 2
