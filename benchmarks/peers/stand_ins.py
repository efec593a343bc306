"""What peers' code wants beside torch, replaced so that it runs on a CPU, without downloads.

Modules that it imports but does not need for what is measured here are mocks; `.cuda()` gives the tensor or module
itself; data are random images. Nothing that computes is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

CLASSES = 10
MODULES = {
    "torchvision": ["datasets", "datasets.utils", "transforms", "utils"],
    "progress": ["bar"],
    "matplotlib": ["pylab", "pyplot"],
    "h5py": [],
    "PIL": [],
    "pandas": [],
    "requests": [],
}


def network(seed: int = 0) -> nn.Sequential:
    """Two convolutions with BatchNorm and biases, and a linear layer, for 32 x 32 images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) in [0, 1], multiples of 1/255, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=generator) / 255
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


@contextmanager
def without_cuda() -> Iterator[None]:
    """`.cuda()` leaves tensors and modules where they are."""
    with patch.object(Tensor, "cuda", lambda self, *_: self), patch.object(nn.Module, "cuda", lambda self, *_: self):
        yield


@contextmanager
def mocked(*names: str) -> Iterator[None]:
    """These modules, and those below them, are mocks; what was imported meanwhile stays."""
    made: dict[str, MagicMock] = {}
    for name in names:
        made[name] = MagicMock()
        for below in MODULES[name]:
            found = made[name]
            for part in below.split("."):
                found = getattr(found, part)
            made[f"{name}.{below}"] = found
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
