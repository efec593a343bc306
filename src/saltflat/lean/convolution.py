"""A convolution whose weights are fixed, on CPUs: laid out once, with what follows it done before the map is written.

    y = relu( W * x + b + r ),      dL/dx = Wᵀ * g,    dL/dr = g,      g = dL/dy  where y > 0,  else 0

W * x is the convolution, Wᵀ * g its transpose: for a stride of 1, or a filter of one pixel, that is the convolution of
g with the weights turned around (rows and columns reversed, channels exchanged). b comes from the norm after the
convolution, r is the branch that is added, and both they and the ReLU may be missing. W has no gradient.

Where x is itself a ReLU, relu(s u + t), the gradient can be given of u at once, in place and with s within the weights:

    dL/du = (x > 0) (s W)ᵀ * g

Which way it is computed, `packed` or `winograd`, is a matter of shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltflat.lean.packed import Packed
from saltflat.lean.winograd import Winograd, pays

LAST = torch.channels_last


class Fixed:
    """relu(W * x + b + r), with a gradient of x, or of u, and of r.

    Args:
        module: gives W, its stride and so on; zeros around the map.
        norm: scale and shift of every output channel, fp64, of a norm that follows: (W * x + bias) scale + shift.
        relu: whether there is one at the end.
        dtype: what is computed in, and what x is in.
        within: x is a ReLU, and dL/du is what backward gives, not dL/dx. For modules without groups.
        scale: s, of every channel of u; None for ones.
        given_within: all who take y give the gradient of what is within its ReLU, so that backward need not ask where
            y > 0.
    """

    def __init__(
        self,
        module: nn.Conv2d,
        norm: tuple[Tensor, Tensor] | None,
        relu: bool,
        dtype: torch.dtype,
        *,
        within: bool = False,
        scale: Tensor | None = None,
        given_within: bool = False,
    ) -> None:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if norm is not None:
            factor, shift = norm
            weight = weight * factor.to(weight.dtype)[:, None, None, None]
            bias = (shift if bias is None else bias.double() * factor + shift).to(weight.dtype)
        self.weight = self.backward_weight = weight.to(dtype).contiguous(memory_format=LAST)
        if scale is not None:
            weight = weight * scale.to(weight.dtype)[:, None, None]
            self.backward_weight = weight.to(dtype).contiguous(memory_format=LAST)
        self.bias, self.relu, self.within, self.given_within = bias, relu, within, given_within
        self.stride, self.dilation = list(module.stride), list(module.dilation)
        self.padding, self.groups = [int(size) for size in module.padding], module.groups
        self.mirrored = [d * (k - 1) - p for k, p, d in zip(weight.shape[2:], self.padding, self.dilation, strict=True)]
        self.forwards: dict[torch.Size, Packed | Winograd] = {}  # by height and width
        self.backwards: dict[torch.Size, Packed | Winograd] = {}

    def __call__(self, x: Tensor, r: Any = None) -> Tensor:
        y: Tensor
        if r is None or (isinstance(r, Tensor) and (r.shape, r.dtype) == (self.shape(x), x.dtype)):
            y = _Function.apply(x, r, self, self.relu)  # type: ignore[no-untyped-call]
            return y
        y = _Function.apply(x, None, self, False) + r  # type: ignore[no-untyped-call]
        return F.relu(y) if self.relu else y

    def shape(self, x: Tensor) -> torch.Size:
        """Of the map that it makes of x."""
        of = zip(x.shape[2:], self.weight.shape[2:], self.padding, self.dilation, self.stride, strict=True)
        sizes = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, p, d, s in of)
        return torch.Size((len(x), len(self.weight), *sizes))

    def forward(self, x: Tensor, r: Tensor | None, relu: bool) -> Tensor:
        if x.shape[2:] not in self.forwards:
            self.forwards[x.shape[2:]] = _computed(
                self.weight, self.padding, self.stride, self.dilation, self.groups, x.shape
            )
        return self.forwards[x.shape[2:]](x, self.bias, r, relu)

    def input_gradient(self, g: Tensor, shape: torch.Size) -> Tensor:
        """Wᵀ * g, or (s W)ᵀ * g, for an input of that shape."""
        one_pixel = self.weight.shape[2:] == (1, 1) and self.padding == [0, 0]
        if not (self.stride == [1, 1] or one_pixel) or self.groups != 1 or min(self.mirrored) < 0:
            like = torch.empty(shape, dtype=g.dtype, memory_format=LAST)
            found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                g,
                like,
                self.backward_weight,
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
        if g.shape[2:] not in self.backwards:
            turned = self.backward_weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=LAST)
            self.backwards[g.shape[2:]] = _computed(turned, self.mirrored, [1, 1], self.dilation, 1, g.shape)
        x = self.backwards[g.shape[2:]](g)
        if self.stride == [1, 1]:
            return x
        spread = torch.empty(shape, dtype=g.dtype, memory_format=LAST).zero_()
        spread[:, :, :: self.stride[0], :: self.stride[1]] = x
        return spread


def _computed(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: torch.Size
) -> Packed | Winograd:
    """The convolution of images of that shape, in the way that is fastest."""
    if pays(weight, padding, stride, dilation, groups, shape):
        return Winograd(weight, shape)
    return Packed(weight, padding, stride, dilation, groups, shape)


class _Function(torch.autograd.Function):
    """The above, with the gradients that stand at the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor | None, fixed: Fixed, relu: bool) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # types are as they were made
            x = x.contiguous(memory_format=LAST)
            y = fixed.forward(x, None if r is None else r.contiguous(memory_format=LAST), relu)
        ctx.fixed, ctx.shape = fixed, x.shape
        ctx.save_for_backward(y if relu and not fixed.given_within else None, x if fixed.within else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            g = g.contiguous(memory_format=LAST)
            y, x = ctx.saved_tensors
            if y is not None:
                g = torch.ops.aten.threshold_backward(g, y, 0)
            found = ctx.fixed.input_gradient(g, ctx.shape) if ctx.needs_input_grad[0] else None
            if found is not None and x is not None:
                torch.ops.aten.threshold_backward.grad_input(found, x, 0, grad_input=found)
        return found, g if ctx.needs_input_grad[1] else None, None, None
