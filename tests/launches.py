"""How many operations compute something: what a GPU would be asked to launch."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

NONE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "alias",
    "unbind",
    "_unsafe_view",
}  # nothing runs


class Launches(TorchDispatchMode):
    """A block in which operations are counted by name; views and storages that are not filled are left out. A
    `_foreach_` operation counts once, whatever the number of its tensors.

    >>> import torch
    >>> x = torch.zeros(3)
    >>> with Launches() as launches:
    ...     _ = torch._foreach_add_([x, x.view(1, 3)], 1.0)
    >>> launches.counts
    Counter({'_foreach_add_': 1})
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        if name not in NONE and not operation.is_view:
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))
