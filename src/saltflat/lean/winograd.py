"""3x3 convolutions by fewer multiplications: Winograd's minimal filtering, F(m x m, 3 x 3).

    Y = Aᵀ [ sum_c (G g_c Gᵀ) ⊙ (Bᵀ d_c B) ] A

d_c is a tile of m + 2 pixels on a side of input channel c, g_c the filter, Y the m x m pixels that come of it, ⊙ the
product number by number. A direct convolution takes 9 m^2 multiplications a tile and pair of channels, this one
(m + 2)^2: with m = 4 a quarter. For all tiles and channels together, each of the (m + 2)^2 numbers is a product of two
matrices, (tiles, channels in) and (channels in, channels out), and so are the transforms before and after.

These read and write larger maps than a direct convolution does, so that it pays where channels are many and maps are
small: there, weights are most of what is read. Rounding errors are some five times larger, 1e-5 of the map's size in
fp32; in less than that it is not used.

Source: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saltflat.lean.packed import Product

M, N = 4, 6  # pixels on a side, of what comes of a tile and of the tile
CHANNELS = 512
B_T = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
A_T = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)


class Winograd:
    """relu(W * x + b + r) with a ring of zeros around x, (N, C, H, W) -> (N, K, H, W), where H and W are multiples of
    4, and b, r and the ReLU may be missing; without gradients.

    Args:
        weight: W, (K, C, 3, 3), fp32; transformed now.
        shape: (N, C, H, W), as a hint.

    >>> x, weight = torch.rand(2, 8, 4, 8), torch.rand(16, 8, 3, 3)
    >>> y = Winograd(weight, x.shape)(x.contiguous(memory_format=torch.channels_last))
    >>> torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-3)
    True
    """

    def __init__(self, weight: Tensor, shape: torch.Size) -> None:
        g, self.channels = torch.tensor(G), len(weight)
        filters = weight.permute(2, 3, 0, 1).reshape(9, -1)
        tiles = shape[0] * (shape[2] // M) * (shape[3] // M)
        self.products = [
            Product(product, tiles) for product in (torch.kron(g, g) @ filters).view(N * N, *weight.shape[:2])
        ]
        self.before, self.after = (torch.kron(side, side) for side in (torch.tensor(B_T), torch.tensor(A_T)))

    def __call__(self, x: Tensor, b: Tensor | None = None, r: Tensor | None = None, relu: bool = False) -> Tensor:
        y = self._convolved(x)
        if b is not None:
            y.add_(b[:, None, None])
        if r is not None:
            y.add_(r)
        return y.relu_() if relu else y

    def _convolved(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if n == 0:
            return x.new_empty(0, self.channels, height, width)
        ringed = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        image, row, pixel, _ = ringed.stride()
        grid = (n, height // M, width // M)
        tiles = ringed.as_strided((N, N, *grid, channels), (row, pixel, image, M * row, M * pixel, 1))
        numbers = (self.before @ tiles.reshape(N * N, -1)).view(N * N, -1, channels).unbind()
        found = torch.stack([times(of) for times, of in zip(self.products, numbers, strict=True)])
        y = (self.after @ found.view(N * N, -1)).view(M, M, *grid, -1)
        return y.permute(2, 3, 0, 4, 1, 5).reshape(n, height, width, -1).permute(0, 3, 1, 2)


def pays(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: torch.Size
) -> bool:
    """Winograd's way can compute this, and there are channels enough for it to gain something."""
    same = padding == stride == dilation == [1, 1] and groups == 1 and weight.shape[2:] == (3, 3)
    whole = shape[2] % M == shape[3] % M == 0
    return same and whole and weight.dtype is torch.float32 and min(weight.shape[:2]) >= CHANNELS
