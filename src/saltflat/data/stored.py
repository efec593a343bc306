"""Images that stay on disk, for sets that memory does not hold: read batch by batch, in an order that is cheap to read.

    order = blocks in a random order; then rows in a random order within every W blocks that follow each other

A block is a stretch of rows that are read together, such as a row group of a parquet file; where each row is read by
itself, W does not matter, and the order is a plain permutation: the one that `torch.randperm` gives. The order of an
epoch is a function of a generator, and what has been trained on is the beginning of it, so that training goes on in the
middle of an epoch from the rest of the same order, and nothing else has to be kept.

Processes that read ahead are those of torch's DataLoader. Shuffling within a window of shards is WebDataset's.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saltflat.data.encoded import Encoded, channels_of, pixels_of, size_of
from saltflat.data.image_arrays import MOST_CLASSES
from saltflat.data.images import Images

HEEDED = (signal.SIGTERM, signal.SIGUSR1) if sys.platform != "win32" else ()
WINDOW = 8  # blocks whose rows are mixed; so many are in memory at once, in each process that reads


class Unreadable(OSError, ValueError):
    """An image that cannot be read, in one line that names its file: a fault of the disk, and of a value."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Images on disk, of one size, with their classes in memory; checked when made.

    reader: rows (n,), int64 -> images (n, C, H, W), uint8, in the order of the rows. It has to pickle for workers to
        have it, and opens what it needs when it is called.
    labels: (N,), int64, 0 ... num_classes - 1. name: for tables and figures. shape: (C, H, W) of every image.
    blocks: (B,), int64, how many rows each block has; they follow each other. `alone(N)` where each is its own.

    Raises ValueError, in one line that names what is wrong and what is allowed.

    >>> pixels = torch.arange(60, dtype=torch.uint8).reshape(5, 1, 3, 4)  # or an array that numpy maps from a file
    >>> letters = Stored(lambda rows: pixels[rows], torch.tensor([0, 1, 1, 0, 1]), 2, "letters", (1, 3, 4), alone(5))
    >>> letters, len(letters), letters.read(torch.tensor([4, 0]))[:, 0, 0, 0].tolist()
    (Stored(num_classes=2, name='letters', shape=(1, 3, 4)), 5, [48, 0])
    """

    reader: Callable[[Tensor], Tensor] = field(repr=False)
    labels: Tensor = field(repr=False)
    num_classes: int
    name: str
    shape: tuple[int, int, int]
    blocks: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1 or len(self.labels) == 0:
            got = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise ValueError(f"{self.name}: labels must be a non-empty int64 vector, got {got}")
        low, high = (int(value) for value in self.labels.aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"{self.name}: labels must lie in 0 ... {self.num_classes - 1}, got {low} ... {high}")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"{self.name}: shape must be (C, H, W), at least one pixel, got {self.shape}")
        if self.blocks.dtype != torch.int64 or self.blocks.ndim != 1 or bool((self.blocks < 0).any()):
            raise ValueError(f"{self.name}: blocks must be an int64 vector of numbers of rows, got {self.blocks}")
        if (total := int(self.blocks.sum())) != len(self.labels):
            raise ValueError(
                f"{self.name}: blocks must have the {len(self.labels)} rows that are labelled, got {total}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Tensor) -> Tensor:
        """Images (n, C, H, W), uint8, of the rows (n,), int64, in that order.

        Raises ValueError for rows that are not such a vector, that are none, or that lie outside 0 ... N - 1, and
        `Unreadable`, which is a ValueError and an OSError, for an image that cannot be read or is not of the shape.
        """
        self._check(rows)
        try:
            images = self.reader(rows)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        if images.dtype != torch.uint8 or images.shape != (len(rows), *self.shape):
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(
                f"{self.name}: expected uint8 of shape {(len(rows), *self.shape)} from its reader, got {got}"
            )
        return images

    def subset(self, indices: Tensor) -> Images:
        """Those examples, in that order, in memory. Raises what `read` raises."""
        return Images(self.read(indices), self.labels[indices], self.num_classes, self.name)

    def part(self, indices: Tensor) -> "Stored":
        """Those examples, on disk still. `indices` ascend, as those of `stratified_split` do: blocks stay blocks.

        >>> pixels = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1)
        >>> whole = Stored(lambda rows: pixels[rows], torch.zeros(6).long(), 1, "toy", (1, 1, 1), torch.tensor([4, 2]))
        >>> rest = whole.part(torch.tensor([1, 3, 5]))
        >>> rest.blocks.tolist(), rest.read(torch.tensor([2, 0])).flatten().tolist()
        ([2, 1], [5, 1])
        """
        self._check(indices)
        if bool((indices.diff() <= 0).any()):
            raise ValueError("indices: expected them to ascend, each there once")
        blocks = torch.bincount(block_of(self.blocks, indices))
        return replace(self, reader=_Part(self.reader, indices), labels=self.labels[indices], blocks=blocks[blocks > 0])

    def _check(self, rows: Tensor) -> None:
        if rows.dtype != torch.int64 or rows.ndim != 1 or len(rows) == 0:
            raise ValueError(f"rows must be a non-empty int64 vector, got {rows.dtype} of shape {tuple(rows.shape)}")
        low, high = (int(value) for value in rows.aminmax())
        if low < 0 or high >= len(self):
            raise ValueError(f"rows must lie in 0 ... {len(self) - 1}, got {low} ... {high}")


def alone(number: int) -> Tensor:
    """Blocks of so many rows that are read each by itself; takes no memory."""
    return torch.ones(1, dtype=torch.int64).expand(number)


def block_of(blocks: Tensor, rows: Tensor) -> Tensor:
    """Which block each of the rows is in.

    >>> block_of(torch.tensor([2, 0, 3]), torch.tensor([0, 1, 2, 4]))
    tensor([0, 0, 2, 2])
    """
    return torch.searchsorted(blocks.cumsum(0), rows, right=True)


def order(stored: Stored, generator: torch.Generator) -> Tensor:
    """The rows of an epoch, each once, (N,), int64: a function of the generator, which advances.

    At no point of it have more than `WINDOW` blocks been begun and not been finished.

    >>> generator = torch.Generator().manual_seed(0)
    >>> stored = Stored(lambda rows: rows, torch.zeros(5).long(), 1, "toy", (1, 1, 1), alone(5))
    >>> order(stored, generator).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    number, blocks = len(stored), stored.blocks
    if bool((blocks == 1).all()):
        return torch.randperm(number, generator=generator)
    shuffled = torch.randperm(len(blocks), generator=generator)
    sizes = blocks[shuffled]
    begin, begin_shuffled = blocks.cumsum(0)[shuffled] - sizes, sizes.cumsum(0) - sizes
    rows = torch.arange(number) + (begin - begin_shuffled).repeat_interleave(sizes)
    windows = (torch.arange(len(blocks)) // WINDOW).repeat_interleave(sizes)
    mixed = torch.randperm(number, generator=generator)
    return rows[mixed[windows[mixed].argsort(stable=True)]]  # window by window, shuffled within each


def batches(stored: Stored, rows: Iterable[Tensor], workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (n, C, H, W), uint8, labels (n,)) of each of the vectors of rows, in their order.

    workers: processes that read ahead, two batches each; with 0, this process reads, when it is asked. Batches are the
        same with any number, and nothing random happens in them: torch's global generators are neither used nor moved.

    To go on after batch k of an epoch, give the rest, `rows[k:]`. Several epochs may follow each other in one call, for
    which an iterator will do; the processes then stay. They end with the iterator, whether it was used up or dropped,
    and within seconds of this process, however it ends. On Linux, SIGTERM and SIGUSR1 are lost on them, if not sent by
    this process: a job that is told to end is often told in all its processes, and has to save first.

    Raises ValueError for a number of workers below 0, what `Stored.read` raises, and ChildProcessError, an OSError, for
    a worker that was killed: also between two batches, where torch's handler of SIGCHLD notices it first.

    >>> pixels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
    >>> stored = Stored(lambda rows: pixels[rows], torch.tensor([0, 1, 0, 1]), 2, "toy", (1, 1, 1), alone(4))
    >>> [(images.flatten().tolist(), labels.tolist()) for images, labels in batches(stored, [torch.tensor([3, 2])])]
    [([3, 2], [1, 0])]
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers!r}")
    return _batches(stored, rows, workers)


def _batches(stored: Stored, rows: Iterable[Tensor], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        cast(Dataset[tuple[Tensor, Tensor] | Exception], _Batch(stored)),
        batch_size=None,
        sampler=(chosen.tolist() for chosen in rows),  # numbers: a tensor would take shared memory on its way
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_outlasts_signals,
        generator=torch.Generator(),  # of seeds that nothing uses; torch would draw them from the global one
    )
    with _lost_in_one_line():
        for found in _started(loader):
            if isinstance(found, Exception):
                raise found
            yield found


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    found = iter(loader)
    if loader.num_workers > 0 and sys.platform != "win32" and current_thread() is main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not isinstance(handler, _Missing):
            signal.signal(signal.SIGCHLD, _Missing(handler))
    return found


@dataclass(frozen=True)
class _Missing:
    """torch's handler, which raises wherever this process is when a worker is lost, in a step for the most part."""

    handler: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        with _lost_in_one_line():
            self.handler(number, frame)


@contextmanager
def _lost_in_one_line() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        said = " ".join(f"{error}".split()).rstrip(".") or type(error).__name__
        if isinstance(error, RuntimeError) and not said.startswith("DataLoader worker (pid"):
            raise
        if current_thread() is main_thread() and sys.platform != "win32":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or it would be told again while this is on its way
        raise ChildProcessError(
            f"a process that reads images ahead was lost ({said}), perhaps for want of memory"
        ) from None


@dataclass(frozen=True)
class _Batch:
    """What DataLoader takes for a data set whose examples are batches."""

    stored: Stored

    def __getitem__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | Exception:
        chosen = torch.tensor(rows)
        try:
            return self.stored.read(chosen), self.stored.labels[chosen]
        except (ValueError, OSError) as error:  # handed over, since torch would raise it with a traceback for its text
            return error


def _as_it_is(found: Any) -> Any:  # for `default_convert`, which would make lists of tuples
    return found


def _outlasts_signals(worker: int) -> None:
    """A job that is told to end may be told in all its processes, and saves first: a worker heeds its parent alone."""
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
        Thread(target=_heeds, args=(os.getppid(),), daemon=True).start()


def _heeds(parent: int) -> None:
    if sys.platform == "linux":
        while (told := signal.sigwaitinfo(HEEDED)).si_signo != signal.SIGTERM or told.si_pid != parent:
            pass
        os._exit(0)


@dataclass(frozen=True, eq=False)
class _Part:
    """A reader of some of the rows."""

    reader: Callable[[Tensor], Tensor]
    indices: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.reader(self.indices[rows])


# Readers of encoded files: folders, parquet files, shards

Files = Callable[[Sequence[int]], Sequence[Encoded]]  # the files of some rows, in the order of the rows


def stored_files(
    files: Files,
    labels: Tensor,
    *,
    num_classes: int | None,
    name: str,
    blocks: Tensor,
    like: Images | Stored | None,
) -> Stored:
    """Encoded images as `Stored`, of the shape and classes of `like`, or as the first image and the labels have them.

    Reads the first image at once. Raises ValueError, in one line, for one that cannot be read or has another shape.
    """
    if like is not None:
        shape = shape_of(like)
        num_classes = like.num_classes if num_classes is None else num_classes
    else:
        height, width = size_of(files([0])[0])
        shape = (channels_of(file for row in range(len(labels)) for file in files([row])), height, width)
    if num_classes is None:
        num_classes = 1 + int(labels.max())
        if num_classes > MOST_CLASSES:
            raise ValueError(f"{name}: expected classes below {MOST_CLASSES}, got {num_classes - 1}")
    stored = Stored(_Decoding(files, shape), labels, num_classes, name, shape, blocks)
    stored.read(torch.tensor([0]))
    return stored


def files_of(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], patterns: Sequence[str], split: str
) -> tuple[list[Path], str]:
    """The files that are given, or those of a folder that match the first pattern that any does; and a name for them.

    Raises FileNotFoundError for a missing one, and ValueError for a folder without such files.
    """
    if not isinstance(path, str | os.PathLike):
        files = [Path(each) for each in path]
        if not files:
            raise ValueError("path: expected a folder, or at least one file")
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: not found; expected a file")
        return files, files[0].stem if len(files) == 1 else files[0].resolve().parent.name
    folder = Path(path)
    if folder.is_file():
        return [folder], folder.stem
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; expected a folder with {patterns[0]}")
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found, f"{folder.resolve().name} {split}"
    raise ValueError(f"{folder}: expected {' or '.join(patterns)} in it")


def shape_of(images: Images | Stored) -> tuple[int, int, int]:
    """(C, H, W) of every image."""
    if isinstance(images, Stored):
        return images.shape
    channels, height, width = images.images.shape[1:]
    return channels, height, width


@dataclass(frozen=True, eq=False)
class _Decoding:
    """A reader of encoded files."""

    files: Files
    shape: tuple[int, int, int]

    def __call__(self, rows: Tensor) -> Tensor:
        channels, height, width = self.shape
        return pixels_of(self.files(rows.tolist()), channels, (height, width))
