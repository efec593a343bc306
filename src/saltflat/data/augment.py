"""Random crop and horizontal flip of a whole batch at once: one gather of pixels, no loop over images.

Image n with offsets (r_n, c_n) and flip f_n becomes out[i, j] = padded[i + r_n, j' + c_n], with j' = W - 1 - j when
f_n, else j. This is the augmentation of He et al. 2015 (arXiv 1512.03385, section 4.2) with a `padding` of 4; `mode`
says what lies outside the image.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

PaddingMode = Literal["zero", "reflect"]


def crop_flip(
    images: Tensor,
    *,
    padding: int = 4,
    mode: PaddingMode = "zero",
    flip: bool = True,
    generator: torch.Generator,
) -> Tensor:
    """Each image (N, C, H, W), of any dtype, moved by up to `padding` pixels and, every second one or so, mirrored.

    `mode` "zero" fills with 0, "reflect" mirrors the image at its outermost pixels. Draws come from `generator` alone,
    on its device, in this order: N row offsets in 0 ... 2 `padding` (`torch.randint`), N column offsets, N flips
    (`torch.rand` < 1/2). A `padding` of 0 draws no offsets and `flip=False` no flips; with both, the images come back
    as they are.

    Raises ValueError for images of another rank, for an unknown mode, for a negative padding, and for a reflection that
    is wider than the image allows (padding < H and W).

    >>> batch = torch.arange(4.0).view(1, 1, 1, 4)
    >>> crop_flip(batch, padding=0, generator=torch.Generator().manual_seed(0))
    tensor([[[[3., 2., 1., 0.]]]])
    """
    _check(images, padding, mode)
    number, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(number, height)
    columns = torch.arange(width, device=device).expand(number, width)
    if padding > 0:
        down, right = (_offsets(number, padding, generator).to(device) for _ in range(2))
    if flip:
        mirrored = torch.rand(number, generator=generator, device=generator.device).to(device) < 0.5
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    if padding > 0:
        rows, columns = rows + down[:, None], columns + right[:, None]
        if mode == "zero":
            images = F.pad(images, (padding,) * 4)
        else:  # torch pads no uint8 by reflection: reflect the indices
            rows, columns = _reflect(rows - padding, height), _reflect(columns - padding, width)
    return _pixels(images, rows, columns) if padding > 0 or flip else images


def _check(images: Tensor, padding: int, mode: PaddingMode) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if mode not in get_args(PaddingMode):
        raise ValueError(f"mode must be 'zero' or 'reflect', got {mode!r}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    if mode == "reflect" and padding >= min(images.shape[2:]):
        raise ValueError(f"padding must be below the height and the width {tuple(images.shape[2:])}, got {padding}")


def _offsets(number: int, padding: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2 * padding + 1, (number,), generator=generator, device=generator.device)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices mirrored at 0 and at `size` - 1, without repeating these two: -1 -> 1, size -> size - 2."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[n, c, i, j] = images[n, c, rows[n, i], columns[n, j]]: (N, C, ., .), (N, H), (N, W) -> (N, C, H, W)."""
    number, channels, _, width = images.shape
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    gathered = images.flatten(2).gather(2, index[:, None, :].expand(number, channels, -1))
    return gathered.view(number, channels, rows.shape[1], columns.shape[1])
