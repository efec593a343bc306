"""The floor that direct convolutions set: a training step's, alone and back to back; and what the machine can do.

    floor = time of aten.convolution and aten.convolution_backward, call by call as a step made them, on tensors of the
            same shapes, strides and dtypes
    peak  = the most multiplications and additions a second that matrix products or a 1x1 convolution reach

These are the convolutions of the plain step, on the network itself: what every call lays out anew of its weights is
in them, as it is in torch's. Who packs weights beforehand, or convolves in a way of fewer operations, can be under
this floor. A multiplication and an addition are two operations (flops), and a convolution's are those of computing it
directly; Winograd's way is 36 products here, each of which counts for itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PACKED = "mkldnn::_convolution_pointwise"  # of a lean network, forward and input gradient alike
FORWARD, BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Like:
    """What a tensor was, without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        packed = tensor.layout is not torch.strided
        return cls(tuple(tensor.shape), () if packed else tensor.stride(), tensor.dtype)

    def made(self, device: str) -> Tensor:
        if len(self.strides) != len(self.shape):
            raise ValueError("calls: expected convolutions of the network itself, got some whose weights are packed")
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device).normal_()


@dataclass(frozen=True)
class Call:
    """One convolution, or one backward of it: what was computed, from what, in how many operations."""

    operation: Any
    arguments: tuple[Any, ...]
    forward: bool
    input_gradient: bool
    weight_gradient: bool
    flops: float


class Convolutions(TorchDispatchMode):
    """A block whose convolutions are written down, in order, in `calls`. One of packed weights, which a lean network
    makes for a convolution or for its input gradient, counts as a forward.

    >>> with Convolutions() as seen:
    ...     _ = torch.nn.Conv2d(3, 8, 3, padding=1)(torch.rand(2, 3, 4, 4)).sum().backward()
    >>> [(call.forward, call.input_gradient, call.weight_gradient) for call in seen.calls]
    [(True, False, False), (False, False, True)]
    >>> seen.calls[0].flops == 2 * (2 * 8 * 4 * 4) * (3 * 3 * 3)
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        if operation is FORWARD:
            self._note(operation, args, args[1], made, True, False, False)
        elif operation is BACKWARD:
            wanted = args[10]
            self._note(operation, args, args[2], args[0], False, wanted[0], wanted[1])
        elif operation.name().startswith(PACKED):
            branch = operation is not torch.ops.mkldnn._convolution_pointwise.default  # added, and named first
            self._note(operation, args, args[2 if branch else 1], made, True, False, False)
        return made

    def _note(self, operation: Any, args: Any, weight: Tensor, result: Tensor, *parts: bool) -> None:
        flops = 2.0 * result.numel() * math.prod(weight.shape[1:]) * sum(parts)
        like = tuple(Like.of(arg) if isinstance(arg, Tensor) else arg for arg in args)
        self.calls.append(Call(operation, like, *parts, flops))


def recorded(step: Callable[[], Any]) -> list[Call]:
    """The convolutions of one step."""
    with Convolutions() as seen:
        step()
    return seen.calls


def counted(calls: Sequence[Call]) -> dict[str, int]:
    """How many forwards, input gradients and weight gradients."""
    parts = ("forward", "input_gradient", "weight_gradient")
    return {f"{part}s": sum(getattr(call, part) for call in calls) for part in parts}


def flops(calls: Sequence[Call]) -> float:
    """Of all of them."""
    return sum(call.flops for call in calls)


def replayed(calls: Sequence[Call], device: str = "cpu") -> Callable[[], None]:
    """A function that makes all calls again, on numbers drawn once; tensors of one shape, strides and dtype that have
    the same place in a call are one tensor.
    """
    made: dict[tuple[int, Like], Tensor] = {}

    def ready(place: int, argument: Any) -> Any:
        if not isinstance(argument, Like):
            return argument
        if (place, argument) not in made:
            made[place, argument] = argument.made(device)
        return made[place, argument]

    prepared = [(call.operation, tuple(ready(*each) for each in enumerate(call.arguments))) for call in calls]

    def step() -> None:
        with torch.no_grad():
            for operation, arguments in prepared:
                operation(*arguments)

    return step


def peak(dtype: torch.dtype, device: str, repeats: int = 5, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Operations a second of the fastest of some matrix products and 1x1 convolutions, and which of them that was. For
    fp32 on a GPU torch's switches say whether that is tf32.
    """
    gpu = torch.device(device).type == "cuda"
    found = {}
    for size in sizes or ((4096, 8192, 16384) if gpu else (512, 1024, 2048)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"product of two {size} x {size}"] = 2 * size**3 / _fastest(lambda a=a, b=b: a @ b, gpu, repeats)
    for channels in (128, 256, 512):
        n, side = (256 if gpu else 64, 16)
        x = torch.randn(n, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 1, 1, device=device).to(dtype, memory_format=torch.channels_last)
        work = 2 * n * side**2 * channels**2
        found[f"1x1 convolution of {channels} channels"] = work / _fastest(
            lambda x=x, w=w: F.conv2d(x, w), gpu, repeats
        )
    best = max(found, key=found.__getitem__)
    return {"flops_per_second": found[best], "by": best, "all": found}


def _fastest(work: Callable[[], Tensor], gpu: bool, repeats: int) -> float:
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
