"""The same network, cheaper to ask: what attacks climb on while another decides.

    BatchNorm in eval mode   (x - mean) / sqrt(var + eps) * weight + bias  =  x * scale + shift

so its backward need not compute gradients of weights that nobody wants. Weights lie channels-last; under a lower dtype
those of convolutions and linear layers are rounded once instead of in every forward. Answers differ from the network's
by rounding, which is why `find` asks the network itself before it believes any.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from saltflat.lean.layers import Untraceable
from saltflat.lean.norms import Affine, is_affine
from saltflat.lean.windows import Windows

CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # what autocast runs in lower precision


def lean(model: nn.Module, dtype: torch.dtype | None = None) -> Lean:
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
        return Lean(model, dtype, copied=False)
    _simplify_norms(network)
    _lay_out(network, dtype)
    return Lean(network, dtype, copied=True)


class Lean:
    """x' -> logits; and the same where only windows change, on CPUs."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None, copied: bool) -> None:
        self.network, self.dtype, self.copied = network, dtype, copied
        self.device = next(iter(network.parameters()), torch.empty(0)).device.type

    def __call__(self, x: Tensor) -> Tensor:
        with self.precision():
            try:
                z: Tensor = self.network(x)
            except RuntimeError:  # some views are of maps that lie row by row only
                if not self.copied:
                    raise
                self.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                z = self.network(x)
        return z

    def precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def windows(self) -> Windows | None:
        if self.device != "cpu":  # elsewhere, a patch costs as much as a small map
            return None
        try:
            return Windows(self.network, lambda module: isinstance(vars(module).get("forward"), Affine), self.precision)
        except Untraceable:
            return None


def _simplify_norms(network: nn.Module) -> None:
    """Only the forward of a norm changes, so that whoever reads its numbers finds them."""
    for norm in network.modules():
        if is_affine(norm):
            norm.forward = Affine(norm)  # type: ignore[method-assign]


def _lay_out(network: nn.Module, dtype: torch.dtype | None) -> None:
    for module in network.modules():
        if type(module) in CAST:
            if dtype is not None and module.weight.dtype == torch.float32:
                module.to(dtype)
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
