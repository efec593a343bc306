"""A convolution whose weights are fixed, on CPUs: laid out once, with what follows it done before the map is written.

    y = relu( W * x + b + r ),      dL/dx = Wᵀ * g,    dL/dr = g,      g = dL/dy  where y > 0,  else 0

W * x is the convolution, Wᵀ * g its transpose: for a stride of 1, that is the convolution of g with the weights turned
around (rows and columns reversed, channels exchanged). b comes from the norm after the convolution, r is the branch
that is added, and both they and the ReLU may be missing. W has no gradient.

oneDNN, which torch's convolutions are on x86, lays out weights anew in every call, and every other operation would read
and write a map once more; a packed weight and "post-ops" spare both. Their names in torch, `torch.ops.mkldnn`, are
those that its own compiler uses.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16)
LAST = torch.channels_last


def supported(dtype: torch.dtype) -> bool:
    """This machine has such convolutions."""
    if not torch.backends.mkldnn.is_available() or dtype not in DTYPES:  # type: ignore[no-untyped-call]
        return False
    try:
        return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


class Fixed:
    """relu(W * x + b + r), for one shape of images.

    Args:
        module: gives W, its stride and so on; zeros around the map.
        scale, shift: of every output channel, fp64, as of a norm that follows: (W * x + bias) scale + shift.
        relu: whether there is one at the end.
        dtype: what is computed in; x and r are in it, too.
    """

    def __init__(
        self, module: nn.Conv2d, scale: Tensor | None, shift: Tensor | None, relu: bool, dtype: torch.dtype
    ) -> None:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if scale is not None and shift is not None:
            weight = weight * scale.to(weight.dtype)[:, None, None, None]
            bias = (shift if bias is None else bias.double() * scale + shift).to(weight.dtype)
        self.weight = weight.to(dtype).contiguous(memory_format=LAST)
        self.bias, self.relu = bias, relu
        self.stride, self.dilation = list(module.stride), list(module.dilation)
        self.padding, self.groups = [int(size) for size in module.padding], module.groups
        self.mirrored = [d * (k - 1) - p for k, p, d in zip(weight.shape[2:], self.padding, self.dilation, strict=True)]
        self.forwards: _Packed | None = None
        self.backwards: _Packed | None = None

    def __call__(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        if r is not None and r.shape != self.shape(x):  # one of them is broadcast
            y: Tensor = _Function.apply(x, None, self.without_relu()) + r  # type: ignore[no-untyped-call]
            return F.relu(y) if self.relu else y
        y = _Function.apply(x, None if r is None else r.to(x.dtype), self)  # type: ignore[no-untyped-call]
        return y

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Of the map that it makes of x."""
        of = zip(x.shape[2:], self.weight.shape[2:], self.padding, self.dilation, self.stride, strict=True)
        return (len(x), len(self.weight), *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, p, d, s in of))

    def without_relu(self) -> Fixed:
        other = copy.copy(self)
        other.relu = False
        return other

    def forward(self, x: Tensor, r: Tensor | None) -> Tensor:
        if self.forwards is None:
            self.forwards = _Packed(self.weight, self.padding, self.stride, self.dilation, self.groups, x.shape)
        return self.forwards(x, self.bias, r, self.relu)

    def input_gradient(self, g: Tensor, shape: torch.Size) -> Tensor:
        """Wᵀ * g, for an input of that shape."""
        if self.stride != [1, 1] or self.groups != 1 or min(self.mirrored) < 0:
            like = torch.empty(shape, dtype=g.dtype, memory_format=LAST)
            found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                g,
                like,
                self.weight,
                None,
                self.stride,
                self.padding,
                self.dilation,
                False,
                [0, 0],
                self.groups,
                [True, False, False],
            )
            return found[0]
        if self.backwards is None:
            turned = self.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=LAST)
            self.backwards = _Packed(turned, self.mirrored, self.stride, self.dilation, 1, g.shape)
        return self.backwards(g, None, None, False)


class _Packed:
    """A weight as oneDNN wants it for images of some shape; others are computed, too."""

    def __init__(
        self, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: torch.Size
    ) -> None:
        self.settings = padding, stride, dilation, groups
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
            weight.to_mkldnn(), padding, stride, dilation, groups, list(shape)
        )

    def __call__(self, x: Tensor, b: Tensor | None, r: Tensor | None, relu: bool) -> Tensor:
        after = "relu" if relu else "none"
        y: Tensor
        if r is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, b, *self.settings, after, [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, r, self.weight, b, *self.settings, "add", 1.0, "relu" if relu else None, [], None
            )
        return y


class _Function(torch.autograd.Function):
    """The above, with the gradients that stand at the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor | None, fixed: Fixed) -> Tensor:
        y = fixed.forward(x.contiguous(memory_format=LAST), None if r is None else r.contiguous(memory_format=LAST))
        ctx.fixed, ctx.shape = fixed, x.shape
        if fixed.relu:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g = g.contiguous(memory_format=LAST)
        if ctx.fixed.relu:
            g = torch.ops.aten.threshold_backward(g, ctx.saved_tensors[0], 0)
        x = ctx.fixed.input_gradient(g, ctx.shape) if ctx.needs_input_grad[0] else None
        return x, g if ctx.needs_input_grad[1] else None, None
