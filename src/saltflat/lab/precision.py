"""In which precision a training step computes; and that whatever is measured is measured in strict fp32.

    fp32   24 bits everywhere
    tf32   on GPUs, convolutions and matrix products read 11 bits of their factors, and add in fp32
    bf16   they run on 8 bits, under autocast; so does what autocast puts between them
    fp16   on 11 bits with a small exponent, so that the loss is scaled:  g = grad(s L) / s

Weights, the optimiser's state and BatchNorm's statistics are fp32 in all of them. s is halved when a batch is dropped,
since its gradient was not finite, and doubled after 2000 that were not; it is 1 at least, and a batch that is dropped
above that tells of s, not of the training (`searched`). The attack climbs a sum over examples, not a mean, and is not
scaled.

TRADES' attack begins at x + 0.001 N(0, 1), where its KL term is below the rounding of bf16's logits, so that its first
step goes astray more often, and training has a weaker attack. Cross-entropy, which AT and MART climb on, has no such
beginning.

Forwards are under autocast, one at a time, and nothing else is: what objectives and balls do with logits and gradients
is in fp32, and no copy of a weight outlives a change of it.

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, arXiv 1710.03740.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.objectives import Objective, Value
from saltflat.step import Step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AMPERE = (8, 0)  # the first compute capability with tf32
SCALE, GOOD, SEARCHED = "loss_scale", "good_steps", "dropped_by_scale"  # in a memory
FIRST, LARGEST = 2.0**12, 2.0**24  # of s
PATIENCE = 2000


def resolved(precision: str, device: torch.device) -> str:
    """What is computed where that is asked for: `auto` and `tf32` are tf32 on a GPU that has it, else fp32.

    >>> resolved("auto", torch.device("cpu")), resolved("bf16", torch.device("cpu"))
    ('fp32', 'bf16')
    """
    if precision not in ("auto", "tf32"):
        return precision
    return "tf32" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE else "fp32"


@contextmanager
def exact() -> Iterator[None]:
    """fp32 is strictly that inside: torch by itself lets a GPU's convolutions take tf32. Whatever was set before is set
    again. May be used as a decorator.
    """
    with _rounding(False):
        yield


def running(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A step of that (resolved) precision, but for its autocast: tf32 where it is asked for, and nowhere else."""
    return nullcontext() if device.type == "cpu" else _rounding(precision == "tf32")


def taken_in(
    precision: str,
    take: Callable[[Objective], Step],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    memory: dict[str, Tensor],
    device: torch.device,
) -> Step:
    """The step that `take` makes of an objective, in a (resolved) precision.

    Args:
        memory: {"loss_scale": s, "good_steps": how many since it last changed, "dropped_by_scale": what `searched`
            tells}, for fp16 alone; empty at first, changed, on the device.

    With fp16, `optimizer` divides by s before it steps; its gradients until then are s times larger. `Step` tells of
    losses as they are.
    """
    with running(precision, device):
        if precision not in DTYPES:
            return take(objective)
        cast = Cast(objective, device.type, DTYPES[precision])
        if precision == "bf16":
            return take(cast)
        scale = memory.setdefault(SCALE, torch.full((), FIRST, device=device))
        with _divided(optimizer, scale):
            found = take(Scaled(cast, scale))
        _learn(memory, found.dropped)
        return replace(found, loss=found.loss / scale, perturbed_loss=found.perturbed_loss / scale)


@dataclass(frozen=True)
class Cast:
    """An objective whose forwards run under autocast."""

    objective: Objective
    device: str
    dtype: torch.dtype

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        with torch.autocast(self.device, self.dtype):
            f = self.objective.inner(model, x, y)

        def value(x_adv: Tensor) -> Tensor:
            with torch.autocast(self.device, self.dtype):
                return f(x_adv)

        return value

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            return self.objective.outer(model, x, x_adv, y)

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            found: Tensor = self.objective.each(model, x, x_adv, y)  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True)
class Scaled:
    """An objective whose outer loss is s times larger."""

    objective: Objective
    scale: Tensor

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return self.objective.inner(model, x, y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.objective.outer(model, x, x_adv, y) * self.scale


@contextmanager
def _divided(optimizer: torch.optim.Optimizer, scale: Tensor) -> Iterator[None]:
    """Steps inside divide all gradients by s first. No host waits for it."""

    @torch.no_grad()
    def divide(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)

    hook = optimizer.register_step_pre_hook(divide)
    try:
        yield
    finally:
        hook.remove()


def _learn(memory: dict[str, Tensor], dropped: Tensor) -> None:
    """s after a batch, which was dropped (1) or not (0)."""
    scale, bad = memory[SCALE], dropped > 0
    good = torch.where(bad, 0, memory.get(GOOD, torch.zeros_like(dropped)) + 1)
    grown = torch.where(good >= PATIENCE, 2 * scale, scale)
    memory[SEARCHED] = memory.get(SEARCHED, torch.zeros_like(dropped)) + (bad & (scale > 1))
    memory[SCALE] = torch.where(bad, scale / 2, grown).clamp(1.0, LARGEST)
    memory[GOOD] = torch.where(good >= PATIENCE, 0, good)


def searched(memory: dict[str, Tensor]) -> Tensor:
    """How many batches were dropped while s could still come down: it halved, and the next may fit. Counted in all."""
    return memory.get(SEARCHED, torch.zeros((), dtype=torch.int64))


@contextmanager
def _rounding(allowed: bool) -> Iterator[None]:
    """tf32 for convolutions and matrix products inside, or not.

    torch has two sets of switches for it since 2.9, and refuses to read the older one where they disagree. The older
    one sets both, and the newer one always can be read.
    """
    kept = _switches()
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
        if not allowed:  # the older switch leaves the newer one to what stands for all backends
            for place in _places()[1:]:
                place.fp32_precision = "ieee"
        yield
    finally:
        _switch_back(*kept)


def _switches() -> tuple[str | None, bool | None, list[str]]:
    _hush()
    matmul = cudnn = None
    with suppress(RuntimeError):  # where the two sets disagree
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    return matmul, cudnn, [place.fp32_precision for place in _places()]


def _switch_back(matmul: str | None, cudnn: bool | None, newer: list[str]) -> None:
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn
    for place, value in zip(_places(), newer, strict=True):
        place.fp32_precision = "none"  # what stands above it: if that is what was read, it may have been that
        if place.fp32_precision != value:
            place.fp32_precision = value


def _places() -> list[Any]:
    """The newer switches, if there are any."""
    of: Any = torch.backends
    if not hasattr(of.cudnn, "conv"):
        return []
    return [of.cuda.matmul, of.cudnn.conv, of.cudnn.rnn, of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn]


@functools.cache
def _hush() -> None:
    """torch 2.9 warns of the older switches, once."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.get_float32_matmul_precision()
