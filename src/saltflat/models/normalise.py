"""Input normalisation as the first layer of a network: x -> (x - mean) / std, channel by channel.

An attack moves pixels inside [0, 1], so its radius means the same for every network only when the normalisation belongs
to the network; the official AWP code attacks CIFAR in pixel space as well (Wu, Xia, Wang 2020, arXiv 2004.05884). The
two constants are not weights: they are left out of the state dict, whose names stay those of published checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(x - mean) / std along dimension 1.

    `mean` and `std` have one value per channel, or one value for all channels, in the units of x. They follow `.to()`
    and `.double()` and are absent from `state_dict()`. Input and output: (N, C, ...).

    Raises ValueError for lengths that differ, for no value at all, for a `std` that is not positive, and, when called,
    for an input with another number of channels.

    >>> layer = Normalise(mean=(0.5,), std=(0.25,))
    >>> layer(torch.tensor([[0.5, 1.0]]))
    tensor([[0., 2.]])
    >>> list(layer.state_dict())
    []
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise ValueError(f"mean and std need equally many values, at least one: got {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.register_buffer("mean", torch.tensor([float(value) for value in mean]), persistent=False)
        self.register_buffer("std", torch.tensor([float(value) for value in std]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.mean.numel()
        if channels not in (1, x.shape[1]):  # broadcasting would make a 3-channel image of a grey one
            raise ValueError(f"mean and std have {channels} values, the input has {x.shape[1]} channels")
        shape = (channels, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


def input_layer(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The first layer of every network here: `Normalise`, or the identity when neither constant is given.

    Raises ValueError when only one of the two is given.

    >>> input_layer(None, None)
    Identity()
    """
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None:
        raise ValueError("mean and std go together: give both or neither")
    return Normalise(mean, std)
