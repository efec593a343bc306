"""Averages of weights over the steps of training.

    EMA: w_bar <- decay w_bar + (1 - decay) w after every step; the first call copies w
    SWA: w_bar <- w_bar + (w - w_bar) / n after the n-th call

Only parameters are averaged; buffers, BatchNorm's running statistics among them, are copied from the newest model. For
an average over much of a training those do not fit, and `reestimate_statistics` makes them anew.

Sources: Izmailov et al., arXiv 1803.05407 (SWA); in adversarial training: Gowal et al., arXiv 2010.03593 (EMA, decay
0.995), Chen et al., ICLR 2021 (SWA, "Robust Overfitting May Be Mitigated by Properly Learned Smoothening").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the model: `average.update_parameters(model)` after each step; the network is
    `average.module`.

    Args:
        model: copied; not changed.
        decay: in [0, 1), what each step keeps of the average.

    Raises: ValueError for another decay.

    >>> model = nn.Linear(2, 1)
    >>> average = ema(model, 0.9)
    >>> average.update_parameters(model)
    >>> bool((average.module.weight == model.weight).all())
    True
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def swa(model: nn.Module) -> AveragedModel:
    """An average with equal weights of all that it is updated with: `average.update_parameters(model)`; the network is
    `average.module`.

    Args:
        model: copied; not changed.

    >>> model = nn.Linear(2, 1)
    >>> average = swa(model)
    >>> average.update_parameters(model)
    >>> bool((average.module.weight == model.weight).all())
    True
    """
    return AveragedModel(model)


def reestimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """BatchNorm's running statistics become the means over these batches, each of which counts alike, by forwards in
    train mode (torch's `update_bn`; dropout draws) of a copy of the model. A model without BatchNorm is not run.

    Raises: ValueError for no batch.

    >>> import torch
    >>> norm = nn.BatchNorm1d(1)
    >>> reestimate_statistics(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    >>> norm.running_mean
    tensor([4.])
    """
    twin, first = copy.deepcopy(model), next(iterator := iter(batches), None)  # a forward that fails changes the twin
    if first is None:
        raise ValueError("batches: expected at least one, got none")
    update_bn(chain([first], iterator), twin)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(module, _BatchNorm):
            module.load_state_dict(dict(other.named_buffers()), strict=False)
