"""What a step of training does, counted at the network while somebody's code trains it.

    forwards           convolutions run, over the convolutions that one network has
    backwards          their backwards, likewise
    weight gradients   those backwards that were asked for the gradient of the kernel
    statistics         updates of the running statistics of the trained network's BatchNorm

All in batches: half a batch through the network is half a forward. A second network of the same architecture counts
like the first, since it costs the same. What happens between two steps of the trained network's optimiser is one step
of training, so the code that trains is not touched, and what it does after its optimiser's step is counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

Counts = dict[str, float]


class Convolutions(TorchDispatchMode):
    """Counts rows of batches that pass convolutions, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.rows["forwards"] += args[0].shape[0]
        elif func is torch.ops.aten.convolution_backward.default:
            self.rows["backwards"] += args[0].shape[0]
            _, of_kernel, _ = args[-1]
            self.rows["weight gradients"] += args[0].shape[0] * of_kernel
        return func(*args, **(kwargs or {}))


@contextmanager
def observed(model: nn.Module, batch_size: int) -> Iterator[list[Counts]]:
    """What every step of training did but the first, which is only where counting begins; filled as steps are made.

    Args:
        model: the network that is trained. A step ends when an optimiser that has its first weight has stepped.
        batch_size: rows of a batch.
    """
    first = next(model.parameters())
    of_batch = batch_size * sum(isinstance(module, nn.Conv2d) for module in model.modules())
    norm = next(module for module in model.modules() if isinstance(module, _BatchNorm))
    seen = Convolutions()
    marks: list[Counts] = []
    steps: list[Counts] = []

    def mark(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(p is first for group in optimizer.param_groups for p in group["params"]):
            return
        assert norm.num_batches_tracked is not None
        passes = {name: seen.rows[name] / of_batch for name in ("forwards", "backwards", "weight gradients")}
        marks.append({**passes, "statistics": float(norm.num_batches_tracked)})
        if len(marks) > 1:
            steps.append({name: now - marks[-2][name] for name, now in marks[-1].items()})

    handle = register_optimizer_step_post_hook(mark)
    try:
        with seen:
            yield steps
    finally:
        handle.remove()


def the_same(steps: list[Counts]) -> Counts:
    """What each of several steps did; ValueError if they did not all do the same.

    >>> the_same([{"forwards": 2.0}, {"forwards": 2.0}])
    {'forwards': 2.0}
    """
    if not steps or any(step != steps[0] for step in steps):
        raise ValueError(f"steps: expected some, all alike, got {steps}")
    return steps[0]
