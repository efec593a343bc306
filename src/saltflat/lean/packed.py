"""Convolutions and products by oneDNN, which torch's convolutions are on x86, with their weights laid out once.

oneDNN lays out weights anew in every call, and a ReLU that follows reads and writes a map once more; a packed weight
and a "post-op" spare both. Their names in torch, `torch.ops.mkldnn`, are those that its own compiler uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def supported(dtype: torch.dtype) -> bool:
    """This machine has such convolutions."""
    if not torch.backends.mkldnn.is_available() or dtype not in DTYPES:  # type: ignore[no-untyped-call]
        return False
    try:
        return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


class Packed:
    """relu(W * x + b + r), where b, r and the ReLU may be missing; without gradients.

    Args:
        weight: W, (K, C / groups, height, width).
        padding, stride, dilation, groups: of the convolution.
        shape: (N, C, H, W), of the input, as a hint: W lies as is best for it. Others are computed, too.
    """

    def __init__(
        self, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: torch.Size
    ) -> None:
        self.settings = padding, stride, dilation, groups
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
            weight.to_mkldnn(), padding, stride, dilation, groups, list(shape)
        )

    def __call__(self, x: Tensor, b: Tensor | None = None, r: Tensor | None = None, relu: bool = False) -> Tensor:
        after = "relu" if relu and r is None else "none"
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.weight, b, *self.settings, after, [], "")
        if r is None:
            return y
        y.add_(r)  # in place takes half as long as oneDNN's post-op, which reads r while it computes
        return y.relu_() if relu else y


class Product:
    """x Wᵀ, (N, C) -> (N, K); without gradients.

    Args:
        weight: W, (K, C).
        rows: N, as a hint.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return y
