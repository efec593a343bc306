"""AutoAttack as published (pyautoattack 0.2.0, MIT), asked for what ours is asked for: which examples stay right."""

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn


def standard(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, *, batch_size: int, seed: int) -> Tensor:
    """(N,) bool, right after AutoAttack's standard version; x in [0, 1]. torch's global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        attack = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard")
        _, answers = attack.run_standard_evaluation(x, y, batch_size=batch_size)
    return answers == y
