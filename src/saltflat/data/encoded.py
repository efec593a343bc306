"""Images as whole encoded files (PNG, JPEG, ...), wherever they lie, decoded into uint8.

A file becomes (C, H, W): RGB (C = 3; transparency is dropped), or grey (C = 1) where all files of a set are 8-bit grey.
It stands as its EXIF orientation says; an EXIF that cannot be read says nothing. Pillow decodes; it is asked for late.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from saltflat.data.images import check_fits

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # others lose depth on their way to RGB
# Formats of images that are numbers in a file. Pillow knows others; some, like EPS, are programs, which it has run.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
EXTRA_ADVICE = "needs the `data` extra: pip install 'saltflat[data]'"


class Encoded(Protocol):
    """One image as a whole file: its bytes, and, as a string, where it was found."""

    @property
    def data(self) -> bytes: ...


def decoded(train: Sequence[Encoded], test: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """All images of both splits as (N, C, H, W), uint8: grey (C = 1) when all of them are 8-bit grey, else RGB (C = 3).

    Raises ValueError, in one line, that names the image that cannot be decoded or differs in size from the first one.
    """
    channels = channels_of(image for images in (train, test) for image in images)
    size = size_of(train[0])
    return pixels_of(train, channels, size), pixels_of(test, channels, size)


def channels_of(images: Iterable[Encoded]) -> int:
    """1 when all are 8-bit grey, else 3. The first in colour decides: only of a grey set are all headers read."""
    return 1 if all(_mode(image) == "L" for image in images) else 3


def size_of(image: Encoded) -> tuple[int, int]:
    """(H, W), upright."""
    with _opened(image) as opened:
        width, height = _upright(opened).size
    return height, width


def pixels_of(images: Sequence[Encoded], channels: int, size: tuple[int, int]) -> Tensor:
    """All images as (N, C, H, W), uint8, that have `size` (H, W).

    Raises ValueError, in one line that names the image, for one that cannot be decoded, that has another size or more
    than 8 bits a channel, or that is not grey where one channel is asked for.
    """
    height, width = size
    check_fits(len(images) * height * width * channels, f"{images[0]} and the others")
    mode = {1: "L", 3: "RGB"}[channels]
    pixels = np.empty((len(images), height, width, channels), np.uint8)
    for number, image in enumerate(images):
        with _opened(image) as opened:
            upright = _upright(opened)
            found, stored = upright.size, upright.mode
            fits = found == (width, height) and (stored == mode or (channels == 3 and stored in EIGHT_BIT_MODES))
            if fits:
                pixels[number] = np.asarray(_converted(upright, mode)).reshape(height, width, channels)
        if found != (width, height):
            raise ValueError(
                f"{image}: has {found[0]}x{found[1]} pixels; the first training image has {width}x{height}"
            )
        if stored not in EIGHT_BIT_MODES:
            raise ValueError(f"{image}: has mode {stored}; expected 8 bits per channel: {', '.join(EIGHT_BIT_MODES)}")
        if not fits:
            raise ValueError(f"{image}: has mode {stored}; expected 8-bit grey, L, as the training images are")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _opened(encoded: Encoded) -> "Iterator[PillowImage]":
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"decoding images {EXTRA_ADVICE}") from None
    data = encoded.data  # whose errors are no decoder's
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Corrupt|Possibly corrupt) EXIF data")  # common, and no damage to the pixels
        try:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                yield image
        except Exception as error:  # a damaged image can fail in any part of its decoder
            raise ValueError(f"{encoded}: not an image that can be decoded") from error


def _mode(image: Encoded) -> str:
    with _opened(image) as opened:
        return opened.mode


def _upright(image: "PillowImage") -> "PillowImage":
    from PIL import ImageOps

    image.load()  # before errors count as those of its EXIF
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # it, too, can fail in any of its parts
        return image


def _converted(image: "PillowImage", mode: str) -> "PillowImage":
    if image.mode == "P":
        image = image.convert("RGBA")  # with levels of transparency, Pillow warns of any other way
    return image if image.mode == mode else image.convert(mode)
