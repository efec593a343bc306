"""Small float64 networks and batches that several tests share."""

import torch
from torch import Tensor, nn


def convolutional(batch_norm: bool = True) -> nn.Module:
    """Two convolutions, 3 classes, 6 x 6 RGB images; with BatchNorm, biases, and a layer of each kind."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if batch_norm else nn.Identity(), nn.Tanh()]
    layers += [nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)]
    return nn.Sequential(*layers).double()


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 6, 6, dtype=torch.float64), torch.arange(n) % 3


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
