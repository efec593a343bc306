"""WebDataset's shards: tar files of images and classes, `000001.png` and `000001.cls`, read where they lie.

Members whose names are equal up to the first dot of the last part belong together. An image is a file that ends in
.png, .jpg, .jpeg or .webp, and its class a whole number, as text, in a file that ends in .cls; whatever else there is
(.json, .txt, ...) is passed over. Where the images lie is looked up once, and kept; nothing is ever extracted.

Source: "WebDataset format" in the documentation of the library webdataset.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from saltflat.data.images import Images
from saltflat.data.stored import Stored, alone, files_of, stored_files

T = TypeVar("T")
IMAGES = ("png", "jpg", "jpeg", "webp")
CLASS = "cls"
LONGEST_CLASS = 32  # bytes; more are no number
AT_A_TIME = 1 << 20  # bytes of padding


def stored_shards(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    num_classes: int | None = None,
    like: Images | Stored | None = None,
) -> Stored:
    """Images on disk, from tar files: `train-*.tar` of a folder, in the order of their names, or the files given.

    Args:
        path: a folder, a tar file, or tar files in the order in which they count; not compressed.
        split: of a folder, which files: those whose names begin with it and a hyphen.
        num_classes: without it and `like`, one more than the largest label, which has to be below 100,000.
        like: a set whose shape of images and number of classes this one has to have.

    Rows keep their order within a shard. Images are decoded as by `parquet`: RGB, or grey when all of them (or those of
    `like`) are; to learn that of a grey set, the headers of all images are read. The names of all members are looked
    at, which takes a while for millions; an image is read by its place, and its file opened each time. Folders within
    are passed over, as are files whose names begin with a dot. Needs the extra `data` (pillow).

    Raises FileNotFoundError for a missing path, and ValueError, in one line, for a folder without such files, for a
    shard that is cut or altered, or has no images; for members that are links, or neither files nor folders, or whose
    names lead out of it; for an image without a class or the reverse, or with two; for classes that are no whole
    numbers or out of range, and for images as `Stored.read` says.

    >>> stored_shards("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; expected a folder with train-*.tar
    """
    shards, name = files_of(path, [f"{split}-*.tar"], split)
    places, labels = zip(*(_index(shard) for shard in shards), strict=True)
    which = torch.arange(len(shards)).repeat_interleave(torch.tensor([len(each) for each in places]))
    members = _Members(shards, torch.cat([which[:, None], torch.cat(places)], dim=1))
    number = len(which)
    return stored_files(members, torch.cat(labels), num_classes=num_classes, name=name, blocks=alone(number), like=like)


class _Member(NamedTuple):
    """One image in a tar file: where it begins and how long it is, in bytes."""

    shard: Path
    begin: int
    size: int

    def __str__(self) -> str:
        try:
            with self.shard.open("rb") as opened:
                opened.seek(self.begin - tarfile.BLOCKSIZE)  # where its header is
                member = tarfile.TarInfo.frombuf(opened.read(tarfile.BLOCKSIZE), "utf-8", "backslashreplace")
            return _named(self.shard, member.name)
        except (OSError, tarfile.TarError):
            return f"{self.shard}, byte {self.begin}"

    @property
    def data(self) -> bytes:
        try:
            with self.shard.open("rb") as opened:
                return _read(opened, self.begin, self.size)
        except EOFError:
            raise ValueError(f"{self}: ends before the image does") from None
        except OSError as error:
            raise ValueError(f"{self}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class _Members:
    """The images of some rows. places: (N, 3), int64: shard, begin, size."""

    shards: Sequence[Path]
    places: Tensor

    def __call__(self, rows: Sequence[int]) -> list[_Member]:
        return [_Member(self.shards[shard], begin, size) for shard, begin, size in self.places[rows].tolist()]


def _index(shard: Path) -> tuple[Tensor, Tensor]:
    """Where the images are, (n, 2), int64: begin and size; and their classes, (n,), int64; in the shard's order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with shard.open("rb") as opened:
            for member in _members(shard):
                key, kind = _key(member.name)
                if kind in IMAGES:
                    _add(images, key, (member.offset_data, member.size), _named(shard, member.name), "image")
                elif kind == CLASS:
                    number = _class(opened, member, _named(shard, member.name))
                    _add(labels, key, number, _named(shard, member.name), "class")
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read: {error.strerror}") from error
    if unlike := images.keys() ^ labels.keys():
        key = min(unlike)
        missing = "class, in a member .cls" if key in images else f"image, in a member .{', .'.join(IMAGES)}"
        raise ValueError(f"{_named(shard, key)}: has no {missing}")
    if not images:
        raise ValueError(f"{shard}: expected at least one image with its class")
    return torch.tensor(list(images.values())), torch.tensor([labels[key] for key in images])


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The files in it that are not hidden. Raises ValueError for all that a shard should not have."""
    end, length = 0, shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                named = _named(shard, member.name)
                within = PureWindowsPath(member.name)  # which sees what would lead out of a folder on any system
                if within.anchor or ".." in within.parts or not member.name.isprintable():
                    raise _RefusedError(f"{named}: expected a relative, printable name that stays within the archive")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise _RefusedError(f"{named}: expected a file or a folder, no link or anything else")
                if member.offset < end or member.size < 0:  # tarfile would go round in circles
                    raise _RefusedError(f"{named}: lies before the end of the member before it")
                end = member.offset_data + (-(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE) * member.isreg()
                if end > length:
                    raise _RefusedError(f"{named}: ends behind the end of the archive")
                if member.isreg():
                    yield member
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged archive can fail in any of its parts
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{shard}: not a tar file that can be read to its end: {words[:200]}") from None
    _check_end(shard, end)


class _RefusedError(Exception):
    """What a shard should not have."""


def _check_end(shard: Path, end: int) -> None:
    """A tar file ends with empty blocks. tarfile takes a damaged header for the end, and does without one."""
    with shard.open("rb") as opened:
        opened.seek(end)
        padding = opened.read(AT_A_TIME)
        whole = len(padding) >= tarfile.BLOCKSIZE
        while padding and whole:
            whole = not padding.strip(b"\0")
            padding = opened.read(AT_A_TIME)
    if not whole:
        raise ValueError(f"{shard}: expected the empty blocks that end a tar file at byte {end}; it is cut or altered")


def _named(shard: Path, name: str) -> str:
    return f"{shard}, {name if name.isprintable() else ascii(name)}"


def _key(name: str) -> tuple[str, str]:
    """What its members have in common, and which of them this is: "a/1.png" -> "a/1", "png"; "" for a hidden one."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, kind = last.partition(".")
    return f"{folder}{slash}{stem}", kind.lower() if stem else ""


def _add(found: dict[str, T], key: str, value: T, named: str, what: str) -> None:
    if key in found:
        raise ValueError(f"{named}: there is another {what} of {key}")
    found[key] = value


def _class(opened: BinaryIO, member: tarfile.TarInfo, named: str) -> int:
    text = _read(opened, member.offset_data, min(member.size, LONGEST_CLASS + 1))
    if len(text) > LONGEST_CLASS or re.fullmatch(rb"\s*[0-9]{1,9}\s*", text) is None:
        raise ValueError(f"{named}: expected a class, a whole number as text, got {ascii(text[:LONGEST_CLASS])[1:]}")
    return int(text)


def _read(opened: BinaryIO, begin: int, size: int) -> bytes:
    opened.seek(begin)
    data = opened.read(size)
    if len(data) != size:
        raise EOFError
    return data
