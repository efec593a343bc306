"""BatchNorm in eval mode, whose statistics and weights stay, is an affine map of each channel:

(x - mean) / sqrt(var + eps) * weight + bias  =  x * scale + shift
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from saltflat.lean.layers import is_changed

HALF = (torch.bfloat16, torch.float16)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Affine:
    """input * scale + shift for each channel, (N, C, ...) -> (N, C, ...)."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        self.scale, self.shift = (values.to(norm.running_mean.dtype) for values in scale_and_shift(norm))
        self.spread: tuple[Tensor, Tensor] | None = None

    def __call__(self, input: Tensor) -> Tensor:
        scale, shift = self._spread(input) if input.dtype in HALF else self._by_channel(input)
        return torch.addcmul(shift, input, scale)

    def _by_channel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.ndim - 2))
        return self.scale.to(x.dtype).view(shape), self.shift.to(x.dtype).view(shape)

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both for every pixel, laid out as x is: in half precision, torch's CPU kernels broadcast channels one number
        at a time, which takes up to ten times as long.
        """
        if self.spread is None or self.spread[0].shape[1:] != x.shape[1:] or self.spread[0].dtype != x.dtype:
            scale, shift = (torch.empty_like(x[:1]).copy_(values) for values in self._by_channel(x))
            self.spread = scale, shift
        return self.spread


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Of each channel, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def is_affine(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    """It is such a map, and nothing else. (One of a subclass or with hooks may compute something else.)"""
    return (
        isinstance(norm, _BatchNorm)
        and type(norm) in NORMS
        and not norm.training
        and norm.running_mean is not None
        and not is_changed(norm)
    )
