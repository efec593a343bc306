"""A convolution by oneDNN, which torch's convolutions are on x86, with its weights laid out once.

oneDNN lays out weights anew in every call, and every operation that follows reads and writes a map once more; a packed
weight and "post-ops" spare both. Their names in torch, `torch.ops.mkldnn`, are those that its own compiler uses.
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
        after = "relu" if relu else "none"
        y: Tensor
        if r is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, b, *self.settings, after, [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, r, self.weight, b, *self.settings, "add", 1.0, "relu" if relu else None, [], None
            )
        return y
