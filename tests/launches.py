"""How many operations compute something: what a GPU would be asked to launch."""

from collections import Counter
from itertools import chain

import torch
from torch import Tensor
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
DIVIDING = {"_foreach_div", "_foreach_div_"}


class Launches(TorchDispatchMode):
    """A block in which operations are counted by name; views and storages that are not filled are left out. A
    `_foreach_` operation counts once if torch has one kernel for all of its tensors (its `can_use_fast_route` for GPUs;
    of a hundred tensors or so, where there are more), and else once for each.

    On the meta device, what is chosen by device is chosen as on a GPU, and nothing can be waited for.

    >>> x, y = torch.zeros(3), torch.zeros(2, 2)
    >>> with Launches() as launches:
    ...     _ = torch._foreach_add_([x, y], 1.0)
    ...     _ = torch._foreach_mul_([x, y], [torch.tensor(2.0), torch.tensor(3.0)])
    >>> launches.counts
    Counter({'_foreach_mul_': 2, '_foreach_add_': 1})
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        if name not in NONE and not operation.is_view:
            self.counts[name] += 1 if not name.startswith("_foreach_") or in_one(name, args) else len(args[0])
        return operation(*args, **(kwargs or {}))


def in_one(name, args):
    """Whether torch has one kernel for what it is asked to do to many tensors."""
    lists = [given for given in args if isinstance(given, (list, tuple)) and isinstance(given[0], Tensor)]
    for_all = [given for given in args if isinstance(given, (Tensor, bool, int, float, complex))]
    first, dtype = lists[0], lists[0][0].dtype
    plain = all(is_plain(tensor) and tensor.device == first[0].device for tensor in chain(*lists))
    uniform = all(tensor.dtype == given[0].dtype for given in lists for tensor in given)
    if name == "_foreach_norm":
        return plain and uniform and dtype.is_floating_point
    if name == "_foreach_copy_":  # from one type to another, too
        return plain and uniform and all(map(lie_alike, *lists))
    if name in DIVIDING and not (dtype.is_floating_point or dtype.is_complex):
        return False
    return (
        plain
        and uniform
        and all(given[0].dtype == dtype for given in lists)
        and all(lie_alike(one, other) for given in lists[1:] for one, other in zip(first, given, strict=True))
        and all(keeps(dtype, number) for number in for_all)
    )


def is_plain(tensor):
    """Strided, without gaps or overlap."""
    return tensor.layout is torch.strided and torch.ops.aten.is_non_overlapping_and_dense(tensor)


def lie_alike(one, other):
    strides = zip(one.shape, one.stride(), other.stride(), strict=False)
    return one.shape == other.shape and all(size == 1 or left == right for size, left, right in strides)


def keeps(dtype, number):
    """Whether a number, or a tensor of one, that all are multiplied by leaves their type what it is."""
    if isinstance(number, Tensor):
        return number.dtype == dtype
    return torch.result_type(torch.empty(1, dtype=dtype), number) == dtype
