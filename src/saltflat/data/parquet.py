"""Image data sets in the layout of the Hugging Face hub: parquet files of encoded images and labels, some per split.

One row is one image: a struct<bytes, path> with a whole PNG or JPEG file in `bytes`, and an integer label. All images
are decoded once, into one uint8 tensor. Source: "Image dataset" in the documentation of the Hugging Face hub.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from saltflat.data.image_arrays import MOST_CLASSES
from saltflat.data.images import Images, Splits

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
SUBFOLDERS = (".", "data", "plain_text")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # others lose depth on their way to RGB
EXTRA_ADVICE = "needs the `data` extra: pip install 'saltflat[data]'"


def parquet(path: str | os.PathLike[str], *, num_classes: int | None = None) -> Splits:
    """Images (N, C, H, W) from `train-*.parquet` and `test-*.parquet` in a folder, or in its `data/` or `plain_text/`.

    Columns: the image in `img` or `image`, its class in `label` or `fine_label`. Images become RGB (C = 3; transparency
    is dropped), or stay grey (C = 1) when all of them, of both splits, are stored as 8-bit grey, and stand upright as
    their EXIF orientation says, as in the hub's own library. `num_classes` is, when not given, one more than the
    largest label of both splits, which has to be below 100,000. Rows keep their order; files are read in the order of
    their names. Needs the extra `data` (pyarrow, pillow).

    Raises FileNotFoundError for a missing folder, and ValueError, in one line, for a missing split, column or extra,
    for an image that cannot be decoded or differs in size from the first training image (file and row are named, rows
    counted from 0), and for labels that are missing or out of range.

    >>> parquet("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; expected a folder with train-*.parquet and test-*.parquet
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; expected a folder with train-*.parquet and test-*.parquet")
    train_files, test_files = _files(folder)
    train_rows, train_labels = _read(train_files)
    test_rows, test_labels = _read(test_files)
    train_images, test_images = decoded(train_rows, test_rows)
    largest = int(torch.cat([train_labels, test_labels]).max())
    if num_classes is None and largest >= MOST_CLASSES:
        raise ValueError(f"{folder}: expected classes below {MOST_CLASSES}, got {largest}")
    classes = largest + 1 if num_classes is None else num_classes
    name = folder.resolve().name
    return Splits(
        Images(train_images, train_labels, classes, f"{name} train"),
        Images(test_images, test_labels, classes, f"{name} test"),
    )


class Encoded(Protocol):
    """One image as a whole file: its bytes, and, as a string, where it was found."""

    @property
    def data(self) -> bytes: ...


def decoded(train: Sequence[Encoded], test: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """All images of both splits as (N, C, H, W), uint8: grey (C = 1) when all of them are 8-bit grey, else RGB (C = 3).
    They stand as their EXIF orientation says; an EXIF that cannot be read says nothing.

    Raises ValueError, in one line, that names the image that cannot be decoded or differs in size from the first one.
    """
    # The first colour image decides: only a grey data set has all its headers read before it is decoded.
    mode = "L" if all(_mode(image) == "L" for images in (train, test) for image in images) else "RGB"
    size = _size(train[0])
    return _decoded(train, mode, size), _decoded(test, mode, size)


class _Row(NamedTuple):
    """One encoded image, and where it was found."""

    file: Path
    number: int
    data: bytes

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of both splits, from the first place in the folder that has any."""
    for place in (folder / name for name in SUBFOLDERS):
        train, test = sorted(place.glob("train-*.parquet")), sorted(place.glob("test-*.parquet"))
        if train and test:
            return train, test
        if train or test:
            raise ValueError(
                f"{place}: expected train-*.parquet and test-*.parquet, found {(train + test)[0].name} only"
            )
    raise ValueError(f"{folder}: expected train-*.parquet and test-*.parquet, there, in data/ or in plain_text/")


def _read(files: Sequence[Path]) -> tuple[list[_Row], Tensor]:
    """All rows and labels (N,), int64, of one split."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"reading parquet {EXTRA_ADVICE}") from None
    rows: list[_Row] = []
    labels: list[Tensor] = []
    for file in files:
        start = len(rows)
        try:
            with ParquetFile(file) as opened:
                columns = _columns(opened.schema_arrow, file)
                for batch in opened.iter_batches(columns=list(columns)):
                    images, classes = (batch.column(column) for column in columns)
                    first = len(rows) - start
                    rows += _rows(images, file, first)
                    labels.append(_labels(classes, file, first))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: not a parquet file that can be read to its end") from error
    if not rows:
        raise ValueError(f"{files[0]}: expected at least one row")
    return rows, torch.cat(labels)


def _columns(schema: Any, file: Path) -> tuple[str, str]:
    """The names of the image and the label column."""
    from pyarrow.types import is_integer, is_struct

    def first(names: Sequence[str]) -> str:
        for name in names:
            if name in schema.names:
                return name
        raise ValueError(f"{file}: expected a column {' or '.join(names)}, found {', '.join(schema.names)}")

    image, label = first(IMAGE_COLUMNS), first(LABEL_COLUMNS)
    kind = schema.field(image).type
    if not (is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise ValueError(f"{file}: column {image} must be struct<bytes, path>, got {kind}")
    if not is_integer(schema.field(label).type):
        raise ValueError(f"{file}: column {label} must hold whole numbers, got {schema.field(label).type}")
    return image, label


def _rows(images: Any, file: Path, first: int) -> list[_Row]:
    encoded = images.flatten()[images.type.get_field_index("bytes")]  # flatten, unlike field, minds a missing struct
    rows = [_Row(file, number, data) for number, data in enumerate(encoded.to_pylist(), start=first)]
    if encoded.null_count:
        raise ValueError(f"{next(row for row in rows if row.data is None)}: has no image bytes")
    return rows


def _labels(classes: Any, file: Path, first: int) -> Tensor:
    if classes.null_count:
        raise ValueError(f"{file}, row {first + classes.to_pylist().index(None)}: has no label")
    labels = classes.to_numpy(zero_copy_only=False)
    if labels.size and labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{file}: expected classes below {MOST_CLASSES}, got {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


@contextmanager
def _opened(row: Encoded) -> "Iterator[PillowImage]":
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"decoding images {EXTRA_ADVICE}") from None
    data = row.data  # whose errors are no decoder's
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Corrupt|Possibly corrupt) EXIF data")  # common, and no damage to the pixels
        try:
            with Image.open(io.BytesIO(data)) as image:
                yield image
        except Exception as error:  # a damaged image can fail in any part of its decoder
            raise ValueError(f"{row}: not an image that can be decoded") from error


def _mode(row: Encoded) -> str:
    with _opened(row) as image:
        return image.mode


def _size(row: Encoded) -> tuple[int, int]:
    with _opened(row) as image:
        return _upright(image).size


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


def _decoded(rows: Sequence[Encoded], mode: str, size: tuple[int, int]) -> Tensor:
    """All images as (N, C, H, W), uint8; `size` is (W, H), as Pillow has it."""
    width, height = size
    pixels = np.empty((len(rows), height, width, len(mode)), np.uint8)  # "L" has one channel, "RGB" has three
    for number, row in enumerate(rows):
        with _opened(row) as image:
            upright = _upright(image)
            found, stored = upright.size, upright.mode
            if found == size and stored in EIGHT_BIT_MODES:
                pixels[number] = np.asarray(_converted(upright, mode)).reshape(height, width, len(mode))
        if found != size:
            raise ValueError(f"{row}: has {found[0]}x{found[1]} pixels; the first training image has {width}x{height}")
        if stored not in EIGHT_BIT_MODES:
            raise ValueError(f"{row}: has mode {stored}; expected 8 bits per channel: {', '.join(EIGHT_BIT_MODES)}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
