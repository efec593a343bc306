"""Averages of weights over the steps of training.

    EMA: w_bar <- decay w_bar + (1 - decay) w after every step; the first call copies w

(Izmailov et al., arXiv 1803.05407; in adversarial training: Gowal et al., arXiv 2010.03593, with decay 0.995.) Only
parameters are averaged; buffers, BatchNorm's running statistics among them, are copied from the newest model.
"""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the model: `average.update_parameters(model)` after each step; the network is
    `average.module`.

    Args:
        model: copied; not changed.
        decay: in [0, 1), what each step keeps of the average.

    >>> model = nn.Linear(2, 1)
    >>> average = ema(model, 0.9)
    >>> average.update_parameters(model)
    >>> bool((average.module.weight == model.weight).all())
    True
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
