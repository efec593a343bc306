"""How many large tensors are alive at once, counted operation by operation."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """A block in which every storage of at least `size` numbers that an operation makes is followed until it dies.
    Views are not counted again, and what was there before is not counted at all, whatever happens to it.

    `held()` and `peak` are in units of `size` numbers.

    >>> with Memory(100) as memory:
    ...     x = torch.zeros(300)
    ...     y = x[:100] + 1
    ...     del x
    >>> memory.held(), memory.peak
    (1.0, 4.0)
    """

    def __init__(self, size):
        super().__init__()
        self.size, self.peak, self.alive = size, 0.0, {}

    def held(self):
        self.alive = {storage: units for storage, units in self.alive.items() if not storage.expired()}
        return sum(self.alive.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {StorageWeakRef(storage) for storage, _ in storages((args, kwargs))}
        made = operation(*args, **(kwargs or {}))
        for storage, numbers in storages(made):
            if numbers >= self.size and StorageWeakRef(storage) not in given:
                self.alive[StorageWeakRef(storage)] = numbers / self.size
        self.peak = max(self.peak, self.held())
        return made


def storages(tree):
    """The storages of the tensors in it, each with how many numbers it has room for."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [(x.untyped_storage(), x.untyped_storage().nbytes() // x.element_size()) for x in tensors]
