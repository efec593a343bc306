"""Random crop, horizontal flip, rotation and cutout of a whole batch at once, without a loop over images.

Image n with offsets (r_n, c_n) and flip f_n becomes out[i, j] = padded[i + r_n, j' + c_n], with j' = W - 1 - j when
f_n, else j. This is the augmentation of He et al. 2015 (arXiv 1512.03385, section 4.2) with a `padding` of 4; `mode`
says what lies outside the image.

Rotated counter-clockwise by t_n around its centre (a, b) = ((H - 1) / 2, (W - 1) / 2), it becomes out[i, j] = the pixel
nearest to (a + (i - a) cos t_n + (j - b) sin t_n, b + (j - b) cos t_n - (i - a) sin t_n), or 0 where there is none.

Cut out around (r_n, c_n), uniform over its pixels, it becomes 0 in the square of a given side around that pixel, which
may reach over the border (DeVries and Taylor 2017, arXiv 1708.04552).
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
    return _pixels(images, rows[:, :, None], columns[:, None, :]) if padding > 0 or flip else images


def rotate(images: Tensor, *, degrees: float, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W), of any dtype, turned around its centre by an angle of its own, uniform in [-`degrees`,
    `degrees`); see `rotated`.

    Draws come from `generator` alone, on its device: N uniform numbers (`torch.rand`, fp64). With `degrees` 0 nothing
    is drawn, and the images come back as they are.

    Raises ValueError for images of another rank, and for degrees outside of [0, 180].

    >>> batch = torch.arange(4.0).view(1, 1, 1, 4)
    >>> rotate(batch, degrees=15, generator=torch.Generator().manual_seed(0))
    tensor([[[[0., 1., 2., 3.]]]])
    """
    _check_shape(images)
    if not 0 <= degrees <= 180:
        raise ValueError(f"degrees: expected a number in [0, 180], got {degrees!r}")
    if degrees == 0:
        return images
    u = torch.rand(len(images), dtype=torch.float64, generator=generator, device=generator.device)
    return rotated(images, (2 * u - 1) * degrees)


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Each image (N, C, H, W), of any dtype, turned around its centre by its angle (N,), in degrees: counter-clockwise
    if positive, as one looks at the image with row 0 on top.

    Every pixel takes the value that is nearest to where it comes from (between two that are equally near, rounding
    decides), and 0 if it comes from outside; so no value is new but 0. Multiples of 90 degrees are exact where
    the pixels allow it: for squares, and half turns.

    Raises ValueError for images of another rank, and for other than one angle an image.

    >>> rotated(torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8), torch.tensor([90.0]))
    tensor([[[[2, 4],
              [1, 3]]]], dtype=torch.uint8)
    """
    _check_shape(images)
    if angles.shape != images.shape[:1]:
        raise ValueError(f"angles: expected shape {tuple(images.shape[:1])}, got {tuple(angles.shape)}")
    (height, width), device = images.shape[2:], images.device
    angles = angles.to(device, torch.float64).deg2rad()[:, None, None]
    cos, sin = angles.cos(), angles.sin()
    a, b = (height - 1) / 2, (width - 1) / 2
    down = torch.arange(height, dtype=torch.float64, device=device)[:, None] - a
    right = torch.arange(width, dtype=torch.float64, device=device) - b
    rows = (a + down * cos + right * sin).round().long()
    columns = (b + right * cos - down * sin).round().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = _pixels(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return torch.where(inside[:, None], found, 0)


def cutout(images: Tensor, *, side: int, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W), of any dtype, with a square of `side` pixels in it set to 0.

    The square covers rows r - side // 2 ... r - side // 2 + side - 1 of those there are, and columns likewise; draws
    come from `generator` alone, on its device: N rows r in 0 ... H - 1 (`torch.randint`), then N columns c in 0 ...
    W - 1. With a `side` of 0 nothing is drawn, and the images come back as they are.

    Raises ValueError for images of another rank, and for a negative side.

    >>> cutout(torch.ones(1, 1, 1, 5), side=3, generator=torch.Generator().manual_seed(0))
    tensor([[[[1., 1., 1., 0., 0.]]]])
    """
    _check_shape(images)
    if side < 0:
        raise ValueError(f"side must be at least 0, got {side}")
    if side == 0:
        return images
    inside = [_near(size, side, len(images), images.device, generator) for size in images.shape[2:]]
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def _near(size: int, side: int, number: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """(N, size): which places along one axis are in the square, around a place of each image's own."""
    centre = torch.randint(0, size, (number, 1), generator=generator, device=generator.device).to(device)
    after = torch.arange(size, device=device) - (centre - side // 2)
    return (after >= 0) & (after < side)


def _check_shape(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")


def _check(images: Tensor, padding: int, mode: PaddingMode) -> None:
    _check_shape(images)
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
    """out[n, c, i, j] = images[n, c, rows[n, i, j], columns[n, i, j]]: (N, C, ., .) and two that broadcast to (N, H, W)
    -> (N, C, H, W).
    """
    number, channels, _, width = images.shape
    index = rows * width + columns
    gathered = images.flatten(2).gather(2, index.flatten(1)[:, None, :].expand(number, channels, -1))
    return gathered.view(number, channels, *index.shape[1:])
