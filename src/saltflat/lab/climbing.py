"""What a training's input adversary climbs on: the network itself, or one that gives the same logits up to rounding, in
less time, and has no gradient of the weights.

In eval mode alone, in which BatchNorm is an affine map and an attack changes nothing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.lab.config import BadInput, Train
from saltflat.lean import leaner
from saltflat.step import AttackOn

LEAN = {"fp32": None, "bf16": torch.bfloat16}  # in fp16, CPUs have no such convolutions


def attack_on(config: Train, precision: str, device: torch.device) -> AttackOn | None:
    """What a step's `attack_on` is, for a (resolved) precision; None for the model itself."""
    if config.attack.mode == "train" or config.attack.replays > 0:
        return None
    if config.compute.compile:
        return Compiled()
    if config.compute.lean and device.type == "cpu" and precision in LEAN:
        return leaner(LEAN[precision])
    return None


class Compiled:
    """model -> torch.compile of it in eval mode. It shares the model's weights and buffers, so it follows them, and has
    no gradient of them, which a compiled backward pass would compute unasked.

    The last model is remembered. Each size of a batch is compiled for itself. On a GPU this was not run, so it has
    torch's default mode there, without CUDA graphs.
    """

    def __init__(self) -> None:
        self.of: Callable[[], nn.Module | None] = lambda: None
        self.network: Callable[[Any], Tensor] | None = None

    def __call__(self, model: nn.Module) -> Callable[[Any], Tensor]:
        if self.network is None or self.of() is not model:
            self.of = weakref.ref(model)
            self.network = torch.compile(sharing(model), dynamic=False)
        return self.network


def sharing(model: nn.Module) -> nn.Module:
    """A copy in eval mode, of the same weights and buffers, whose weights are not trained.

    >>> model = nn.Linear(2, 1)
    >>> other = sharing(model)
    >>> _ = nn.init.ones_(model.weight)
    >>> other.weight
    Parameter containing:
    tensor([[1., 1.]])
    """
    same: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    same |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, same).eval()


def check_compiles(device: torch.device) -> None:
    """BadInput where torch.compile cannot be used: it needs a C++ compiler on CPUs, and Triton on GPUs."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # whatever is raised by what compiles, which is many packages
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(f"compute.compile: torch.compile does not work here, expected false: {line}") from None
