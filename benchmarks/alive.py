"""How many bytes of tensors are alive at once, counted operation by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """A block in which every storage that an operation makes is followed until it dies: `peak` is the most bytes that
    were alive at once. Views are not counted again, and what was there before is not counted at all; nor is what a
    kernel asks for and gives back before it is done.

    >>> with Alive() as alive:
    ...     x = torch.zeros(300)
    ...     y = x[:100] + 1
    ...     del x
    >>> alive.held(), alive.peak
    (400, 1600)
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, dict[StorageWeakRef, int]()

    def held(self) -> int:
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        return sum(self._alive.values())

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(storage) for storage in _storages((args, kwargs))}
        made = operation(*args, **(kwargs or {}))
        for storage in _storages(made):
            if StorageWeakRef(storage) not in given:
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.held())
        return made


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    ]
