"""The same network, cheaper to ask: what attacks climb on while another decides.

    BatchNorm in eval mode   (x - mean) / sqrt(var + eps) * weight + bias  =  x * scale + shift

so its backward need not compute gradients of weights that nobody wants. Weights lie channels-last; under a lower dtype
those of convolutions and linear layers are rounded once instead of in every forward. Answers differ from the network's
by rounding, which is why `find` asks the network itself before it believes any.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from saltflat.evaluation.search import Logits

CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # what autocast runs in lower precision
HALF = (torch.bfloat16, torch.float16)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def lean(model: nn.Module, dtype: torch.dtype | None = None) -> Logits:
    """x' -> logits, of a copy of the model in eval mode.

    Args:
        model: any; it is not changed, and later changes of its weights are not seen.
        dtype: `torch.bfloat16` or `torch.float16` for a forward under autocast, with logits in that dtype.

    A BatchNorm of a subclass or with hooks may compute something else and stays as it is; so does a network that cannot
    be copied.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    >>> x = torch.rand(2, 1, 4, 4)
    >>> torch.allclose(lean(model)(x), model(x), atol=1e-6)
    True
    """
    try:
        network = copy.deepcopy(model).eval().requires_grad_(False)
    except (RuntimeError, TypeError):
        network = model
    else:
        _replace_norms(network)
        _lay_out(network, dtype)
    if dtype is None:
        return network
    device = next(iter(model.parameters()), torch.empty(0)).device.type

    def lower(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            z: Tensor = network(x)
        return z

    return lower


class _Affine(nn.Module):
    """x * scale + shift for each channel, (N, C, ...) -> (N, C, ...)."""

    scale: Tensor
    shift: Tensor
    spread: tuple[Tensor, Tensor] | None = None

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        self.register_buffer("scale", scale.to(norm.running_mean.dtype))
        self.register_buffer("shift", shift.to(norm.running_mean.dtype))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self._spread(x) if x.dtype in HALF else self._by_channel(x)
        return torch.addcmul(shift, x, scale)

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


def _replace_norms(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm) and _is_affine(child):
                setattr(module, name, _Affine(child))


def _is_affine(norm: _BatchNorm) -> bool:
    hooks = [*norm._forward_pre_hooks, *norm._forward_hooks, *norm._backward_pre_hooks, *norm._backward_hooks]
    return type(norm) in NORMS and norm.running_mean is not None and not hooks


def _lay_out(network: nn.Module, dtype: torch.dtype | None) -> None:
    for module in network.modules():
        if type(module) in CAST:
            if dtype is not None and module.weight.dtype == torch.float32:
                module.to(dtype)
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
