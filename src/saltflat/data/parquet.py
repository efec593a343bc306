"""Image data sets in the layout of the Hugging Face hub: parquet files of encoded images and labels, some per split.

One row is one image: a struct<bytes, path> with a whole PNG or JPEG file in `bytes`, and an integer label. All images
are decoded once, into one uint8 tensor, or, where they stay on disk, each time that they are read. Source: "Image
dataset" in the documentation of the Hugging Face hub.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saltflat.data.encoded import EXTRA_ADVICE, decoded
from saltflat.data.image_arrays import MOST_CLASSES
from saltflat.data.images import Images, Splits, check_fits
from saltflat.data.stored import WINDOW, Stored, block_of, files_of, stored_files

ROW = 100  # bytes in memory of a row, beside its image, at least
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
SUBFOLDERS = (".", "data", "plain_text")


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


def stored_parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    num_classes: int | None = None,
    like: Images | Stored | None = None,
) -> Stored:
    """Images on disk, from parquet files, as `parquet` reads them into memory: the same rows in the same order.

    Args:
        path: a folder in the hub's layout, a parquet file, or such files in the order in which they count.
        split: of a folder, which files: those whose names begin with it and a hyphen.
        num_classes: without it and `like`, one more than the largest label, which has to be below 100,000.
        like: a set whose shape of images and number of classes this one has to have, as a test set those of the
            training set.

    A block is a row group, and the last few that were read are kept, in every process, as encoded bytes: groups of some
    hundred rows, as the hub's own library writes them, read fast and take little; a file of one group is in memory
    whole. Images are grey (C = 1) when all of these, or those of `like`, are; to learn that of a grey set, all of it is
    read. Needs the extra `data` (pyarrow, pillow).

    Raises what `parquet` does, for images other than the first when they are read.

    >>> stored_parquet("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; expected a folder with train-*.parquet
    """
    files, name = files_of(path, [f"{place}/{split}-*.parquet".removeprefix("./") for place in SUBFOLDERS], split)
    groups: list[_Group] = []
    labels: list[Tensor] = []
    for file in files:
        with _opened(file) as opened:
            image, label = _columns(opened.schema_arrow, file)
            sizes = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
            first = 0
            for number, size in enumerate(sizes):
                groups.append(_Group(file, image, number, first, size))
                first += size
            first = 0
            for batch in opened.iter_batches(columns=[label]):
                labels.append(_labels(batch.column(label), file, first))
                first += len(batch)
    if not sum(map(len, labels)):
        raise ValueError(f"{files[0]}: expected at least one row")
    blocks = torch.tensor([group.size for group in groups])
    return stored_files(
        _Groups(groups, blocks), torch.cat(labels), num_classes=num_classes, name=name, blocks=blocks, like=like
    )


class _Row(NamedTuple):
    """One encoded image, and where it was found."""

    file: Path
    number: int
    data: bytes

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


class _Group(NamedTuple):
    """A row group: the file, its column of images, which group of it, its first row in it, how many rows."""

    file: Path
    column: str
    number: int
    first: int
    size: int

    def encoded(self) -> Any:
        """The bytes of its images, in Arrow's memory."""
        import pyarrow

        with _opened(self.file) as opened:
            images = opened.read_row_group(self.number, columns=[self.column], use_threads=False).column(self.column)
            index = images.type.get_field_index("bytes")
            found = pyarrow.chunked_array([chunk.flatten()[index] for chunk in images.chunks], images.type[index].type)
        if len(found) != self.size:
            raise ValueError(f"{self.file}: has changed since it was read first")
        return found


@dataclass(frozen=True, eq=False)
class _Groups:
    """The images of some rows; the groups that were used last are kept, by each process for itself."""

    groups: Sequence[_Group]
    blocks: Tensor
    kept: dict[int, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}

    def __call__(self, rows: Sequence[int]) -> list[_Row]:
        ends = self.blocks.cumsum(0)
        blocks = block_of(self.blocks, torch.tensor(rows)).tolist()
        turns = {block: turn for turn, block in enumerate(dict.fromkeys(blocks))}
        found: dict[int, _Row] = {}
        for at in sorted(range(len(rows)), key=lambda at: turns[blocks[at]]):  # group by group: each is read once
            group = self.groups[blocks[at]]
            within = rows[at] - int(ends[blocks[at]]) + group.size
            data = self._encoded(blocks[at])[within].as_py()
            found[at] = _Row(group.file, group.first + within, data)
            if data is None:
                raise ValueError(f"{found[at]}: has no image bytes")
        return [found[at] for at in range(len(rows))]

    def _encoded(self, block: int) -> Any:
        encoded = self.kept.pop(block, None)
        if encoded is None:
            while len(self.kept) >= WINDOW:
                del self.kept[next(iter(self.kept))]  # the one that was not used for longest: dicts keep their order
            encoded = self.groups[block].encoded()
        self.kept[block] = encoded
        return encoded


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
    rows: list[_Row] = []
    labels: list[Tensor] = []
    for file in files:
        start = len(rows)
        with _opened(file) as opened:
            columns = _columns(opened.schema_arrow, file)
            check_fits(ROW * opened.metadata.num_rows, str(file))
            for batch in opened.iter_batches(columns=list(columns)):
                images, classes = (batch.column(column) for column in columns)
                first = len(rows) - start
                rows += _rows(images, file, first)
                labels.append(_labels(classes, file, first))
    if not rows:
        raise ValueError(f"{files[0]}: expected at least one row")
    return rows, torch.cat(labels)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A ParquetFile; what fails in it is a ValueError of one line."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"reading parquet {EXTRA_ADVICE}") from None
    try:
        with ParquetFile(file, page_checksum_verification=True) as opened:  # where it has any
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a parquet file that can be read to its end") from error


def _columns(schema: Any, file: Path) -> tuple[str, str]:
    """The names of the image and the label column."""
    from pyarrow.types import is_integer, is_struct

    def first(names: Sequence[str]) -> str:
        for name in names:
            if name in schema.names:
                return name
        raise ValueError(f"{file}: expected a column {' or '.join(names)}, found {schema.names}")

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
