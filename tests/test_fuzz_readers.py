"""Every reader against damage of every kind: the data as they were, or one line; never a crash, a wait, or a flood.

A reader is tried in a process of its own, so that the end of the interpreter, too, is an outcome.
"""

import gzip
import io
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from damaged import damages, in_child, pixels, refusal
from PIL import Image
from test_svhn import compressed, header, matrix

from saltflat.data import (
    Images,
    Splits,
    Stored,
    arrays,
    cifar10,
    cifar100,
    folder,
    image_arrays,
    labelled,
    parquet,
    pickles,
    stored_folder,
    stored_parquet,
    stored_shards,
    svhn_extra,
    tiny_imagenet,
)

LONGEST = 5.0  # seconds for one reading


@dataclass(frozen=True)
class Kind:
    """How a valid file, or folder of files, is made, and how it is read.

    make: writes into an empty folder; returns what `read` is given. told: whether the format has checksums over all of
    it, so that whatever is read is what was written; PNG has, but Pillow overlooks some. number: how many damages of
    each kind.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    told: bool
    number: int = 12


def png(image: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_files(binary: bool, protocol: int = 2) -> dict[str, bytes]:
    found = {}
    for seed, name in enumerate(BATCHES):
        x, y = pixels(seed, 2, 3072), [seed, 9 - seed]
        rows = b"".join(bytes([label]) + image.tobytes() for image, label in zip(x, y, strict=True))
        found[f"{name}.bin" if binary else name] = (
            rows if binary else pickle.dumps({"data": x, "labels": y}, protocol=protocol)
        )
    return found


def cifar_archive(mode: Any, binary: bool) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        with tarfile.open(at / "archive", mode) as archive:
            for name, data in cifar_files(binary).items():
                member = tarfile.TarInfo(f"cifar-10/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return at / "archive"

    return make


def cifar_folder(binary: bool, protocol: int = 2) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        for name, data in cifar_files(binary, protocol).items():
            (at / name).write_bytes(data)
        return at

    return make


def cifar100_folder(at: Path) -> Path:
    for seed, name in enumerate(("train", "test")):
        content = {"data": pixels(seed, 2, 3072), "fine_labels": [99, 3], "coarse_labels": [1, 2]}
        (at / name).write_bytes(pickle.dumps(content, protocol=4))
    return at


def mat(packed: bool) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        variables = [matrix("X", pixels(0, 32, 32, 3, 2)), matrix("y", np.array([[10], [3]], np.uint8))]
        parts = [compressed(variable) if packed else variable for variable in variables]
        (at / "extra_32x32.mat").write_bytes(header() + b"".join(parts))
        return at

    return make


def hub(kind: str) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        for seed, split in enumerate(("train", "test")):
            images = [{"bytes": png(image, kind), "path": "a"} for image in pixels(seed, 3, 5, 4, 3)]
            table = pyarrow.table({"img": images, "label": [0, 1, 2]})
            pyarrow.parquet.write_table(table, at / f"{split}-0.parquet", write_page_checksum=kind == "PNG")
        return at

    return make


def image_folder(kind: str) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        for seed, name in enumerate(("train/a", "train/b", "test/a")):
            (at / name).mkdir(parents=True)
            (at / name / "image").write_bytes(png(pixels(seed, 5, 4, 3), kind))
        return at

    return make


def shards(at: Path) -> Path:
    with tarfile.open(at / "train-0.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, image in enumerate(pixels(0, 3, 5, 4, 3)):
            for name, data in ((f"{number}.png", png(image)), (f"{number}.cls", b"%d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return at


def all_rows(stored: Stored) -> list[Any]:
    return [stored.read(torch.arange(len(stored))), stored.labels]


def tiny(at: Path) -> Path:
    for seed, name in enumerate(("train/n1/images/1", "train/n2/images/2", "val/images/0")):
        (at / name).parent.mkdir(parents=True)
        (at / name).write_bytes(png(pixels(seed, 5, 4, 3)))
    (at / "val" / "val_annotations.txt").write_text("0\tn2\t0\t0\t1\t1\n")
    return at


def npz(save: Any, **content: Any) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        save(at / "mine.npz", **content)
        return at / "mine.npz"

    return make


def pickled(protocol: int) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        content = {"data": pixels(0, 3, 8, 8, 3), "extrapolated_targets": np.arange(3)}
        (at / "mine.pickle").write_bytes(pickle.dumps(content, protocol=protocol))
        return at / "mine.pickle"

    return make


LIKE = Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), 10, "set at hand")
FOUR = {"x_train": pixels(0, 3, 5, 4, 3), "y_train": np.arange(3), "x_test": pixels(1, 2, 5, 4, 3), "y_test": [0, 1]}
LABELLED = {"image": pixels(0, 3, 8, 8, 3), "label": np.arange(3)}


def as_like(path: Path) -> Images:
    return labelled(path, like=LIKE)


KINDS = {
    "CIFAR-10, gzip of pickles": Kind(cifar_archive("w:gz", False), cifar10, True),
    "CIFAR-10, xz of pickles": Kind(cifar_archive("w:xz", False), cifar10, True, 6),
    "CIFAR-10, bzip2 of records": Kind(cifar_archive("w:bz2", True), cifar10, True, 6),
    "CIFAR-10, tar of records": Kind(cifar_archive("w", True), cifar10, False, 6),
    "CIFAR-10, pickles": Kind(cifar_folder(False), cifar10, False),
    "CIFAR-10, pickles of protocol 0": Kind(cifar_folder(False, 0), cifar10, False, 6),
    "CIFAR-10, pickles of protocol 5": Kind(cifar_folder(False, 5), cifar10, False, 6),
    "CIFAR-10, records": Kind(cifar_folder(True), cifar10, False, 6),
    "CIFAR-100, pickles": Kind(cifar100_folder, cifar100, False, 6),
    "SVHN, compressed": Kind(mat(True), svhn_extra, True, 40),
    "SVHN, plain": Kind(mat(False), svhn_extra, False, 40),
    "parquet of PNG": Kind(hub("PNG"), parquet, False, 40),
    "parquet of JPEG": Kind(hub("JPEG"), parquet, False, 20),
    **{f"folder of {kind}": Kind(image_folder(kind), folder, False) for kind in (
        "PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")},
    "parquet on disk": Kind(hub("PNG"), lambda path: all_rows(stored_parquet(path)), False, 15),
    "folder on disk": Kind(image_folder("PNG"), lambda path: all_rows(stored_folder(path)), False, 8),
    "shards on disk": Kind(shards, lambda path: all_rows(stored_shards(path)), False, 40),
    "Tiny ImageNet": Kind(tiny, tiny_imagenet, False, 8),
    "npz of four": Kind(npz(np.savez, **FOUR), image_arrays, True, 30),
    "npz of four, compressed": Kind(npz(np.savez_compressed, **FOUR), image_arrays, True, 30),
    "npz of inputs": Kind(npz(np.savez, x=np.random.default_rng(0).random((3, 7)), y=np.arange(3)), arrays, True, 20),
    "npz of labelled images": Kind(npz(np.savez_compressed, **LABELLED), as_like, True, 30),
    "pickle of labelled images": Kind(pickled(2), as_like, False, 30),
    "pickle of labelled images, protocol 5": Kind(pickled(5), as_like, False, 30),
}  # fmt: skip


def plain(read: Any) -> list[Any]:
    """What was read, to be compared."""
    if isinstance(read, Splits):
        return [*plain(read.train), *plain(read.test)]
    if isinstance(read, Images):
        return [read.images.tolist(), read.labels.tolist()]
    return [part.tolist() for part in read]


def outcomes(kind: Kind, path: Path, written: list[Any]) -> list[str]:
    """What went wrong. Every file is damaged in turn, in place."""
    wrong = []
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    for seed, file in enumerate(files[:3]):
        whole = file.read_bytes()
        for what, data in damages(whole, kind.number, seed):
            file.write_bytes(data)
            began, line = time.perf_counter(), ""
            try:
                if kind.told and plain(kind.read(path)) != written:
                    line = "reads other data"
            except ValueError as error:
                if "\n" in str(error) or not str(error):
                    line = f"not one line: {error!r}"
            except BaseException as error:
                line = f"raises {type(error).__name__}: {error}"
            if time.perf_counter() - began > LONGEST:
                line = f"takes {time.perf_counter() - began:.0f} s {line}"
            if line:
                wrong.append(f"{file.name}, {what}: {line}")
        file.write_bytes(whole)
    return wrong


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_in_one_line_or_read_as_they_were(name, tmp_path):
    kind = KINDS[name]
    path = kind.make(tmp_path)
    try:
        written = plain(kind.read(path))
    except ValueError as error:
        if "WEBP" in name or "JPEG2000" in name:
            pytest.skip(str(error))  # Pillow was built without it
        raise
    assert in_child(lambda: outcomes(kind, path, written)) == []


def test_kinds_are_read_whole(tmp_path):
    """So that what is refused is refused for its damage."""
    for number, kind in enumerate(KINDS.values()):
        (at := tmp_path / str(number)).mkdir()
        assert kind.read(kind.make(at))


# --- what claims, or unpacks to, more than there is ---


def npy(shape: tuple[int, ...], data: bytes, descr: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def archive_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def claiming(at: Path) -> Path:
    return archive_of(at / "a.npz", x=npy((2**40, 3, 32, 32), b"\0" * 100), y=npy((2**40,), b"", "<i8"))


def overflowing(at: Path) -> Path:
    return archive_of(at / "a.npz", x=npy((2**32, 2**32), b""), y=npy((0,), b"", "<i8"))


def wide(at: Path) -> Path:
    return archive_of(at / "a.npz", x=npy((1, 1), b"\0", f"|S{2**31 - 1}"), y=npy((1,), bytes(8), "<i8"))


def long_header(at: Path) -> Path:
    return archive_of(at / "a.npz", x=b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 5000, y=b"")


def tar_of(at: Path, member: tarfile.TarInfo, behind: bytes, pack: Any = gzip.compress) -> Path:
    (at / "a.tar.gz").write_bytes(pack(member.tobuf(tarfile.GNU_FORMAT) + behind))
    return at / "a.tar.gz"


def claimed_member(at: Path) -> Path:
    member = tarfile.TarInfo("data_batch_1")
    member.size = 2**43
    return tar_of(at, member, bytes(10**6))


def passed_over(at: Path) -> Path:
    member = tarfile.TarInfo("readme.html")
    member.size = 2**43
    return tar_of(at, member, bytes(10**6))


def sparse(at: Path) -> Path:
    """GNU's form of a file that is nothing but a hole of a terabyte."""
    member = tarfile.TarInfo("data_batch_1")
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[345 + 138 : 345 + 150] = struct.pack(">BxxxQ", 0x80, 2**40)  # the size with its holes
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    (at / "a.tar.gz").write_bytes(gzip.compress(bytes(block) + bytes(10240)))
    return at / "a.tar.gz"


def long_name(at: Path) -> Path:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**43
    return tar_of(at, member, bytes(10**6))


def endless(at: Path) -> Path:
    """Two blocks of zeros, which end a tar file, and then four gigabytes more in four megabytes."""
    (at / "a.tar.gz").write_bytes(gzip.compress(bytes(2**26), 1) * 2**6)
    return at / "a.tar.gz"


def as_batch(data: bytes) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        cifar_folder(False)(at)
        (at / "data_batch_1").write_bytes(data)
        return at

    return make


def doubled_tuples() -> bytes:
    """A key of a dictionary: tuples within tuples, each twice the one before."""
    parts = [b"\x80\x04}", b")\x94"]
    for place in range(60):
        parts += [b"h" + bytes([place]), b"\x86\x94"]
    return b"".join([*parts, b"K\x01s."])


def doubled_by_dup() -> bytes:
    return b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s."


def doubled_encoding() -> bytes:
    """An encoding that is lists within lists, which nobody can write out."""
    parts = [b"\x80\x04c_codecs\nencode\nX\x01\0\0\0a", b"]\x94"]
    for place in range(60):
        parts += [b"]\x94(h" + bytes([place]) * 1 + b"h" + bytes([place]) + b"e"]
    return b"".join([*parts, b"\x86R."])


def doubled_order() -> bytes:
    """The same in the place of a type."""
    parts = [b"\x80\x04cnumpy\ndtype\n", b"]\x94"]
    for place in range(60):
        parts += [b"]\x94(h" + bytes([place]) + b"h" + bytes([place]) + b"e"]
    return b"".join([*parts, b"\x85R."])


def more_than_said(at: Path) -> Path:
    data = zlib.compress(struct.pack("<II", 14, 64) + bytes(2**28), 9)
    (at / "extra_32x32.mat").write_bytes(header() + struct.pack("<II", 15, len(data)) + data)
    return at


def png_claiming(width: int, height: int) -> Callable[[Path], Path]:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def make(at: Path) -> Path:
        image_folder("PNG")(at)
        sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = chunk(b"IHDR", sizes) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        (at / "train" / "a" / "image").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        return at

    return make


def postscript(at: Path) -> Path:
    """A program, which Pillow would hand to an interpreter."""
    image_folder("PNG")(at)
    (at / "train" / "a" / "image").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 5\nshowpage\n")
    return at


BOMBS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "npz that claims terabytes": (claiming, arrays),
    "npz that claims terabytes of images": (lambda at: archive_of(
        at / "a.npz", image=npy((2**40, 8, 8, 3), b""), label=npy((2**40,), b"")), as_like),
    "npz whose shape overflows": (overflowing, arrays),
    "npz of wide items": (wide, arrays),
    "npz of a long header": (long_header, arrays),
    "tar that claims terabytes": (claimed_member, cifar10),
    "tar that claims terabytes beside": (passed_over, cifar10),
    "tar with a hole": (sparse, cifar10),
    "tar with a long name": (long_name, cifar10),
    "tar that goes on": (endless, cifar10),
    "pickle of a far place": (as_batch(b"\x80\x04}r\xff\xff\xff\x7f."), cifar10),
    "pickle of a far place in words": (as_batch(b"}p2147483647\n."), cifar10),
    "pickle of long bytes": (as_batch(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."), cifar10),
    "pickle of a long text": (as_batch(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"."), cifar10),
    "pickle of a long bytearray": (as_batch(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), cifar10),
    "pickle of a long frame": (as_batch(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}."), cifar10),
    "pickle of doubled tuples": (as_batch(doubled_tuples()), cifar10),
    "pickle of tuples doubled at once": (as_batch(doubled_by_dup()), cifar10),
    "pickle of a doubled encoding": (as_batch(doubled_encoding()), cifar10),
    "pickle of a doubled type": (as_batch(doubled_order()), cifar10),
    "pickle of deep lists": (as_batch(b"\x80\x04" + b"(" * 10**6 + b"l" * 10**6 + b"."), cifar10),
    "MATLAB file of more than it says": (more_than_said, svhn_extra),
    "PNG that claims gigabytes": (png_claiming(2**31 - 1, 2**31 - 1), folder),
    "PNG that claims a little less": (png_claiming(13_000, 13_000), folder),
    "PNG that claims less than Pillow warns of": (png_claiming(9_000, 9_000), folder),
    "PostScript": (postscript, folder),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_claims_more_than_there_is_is_refused_at_once(name, tmp_path):
    make, read = BOMBS[name]
    path = make(tmp_path)
    began = time.perf_counter()
    assert str(path) in in_child(lambda: refusal(read, path), seconds=60)
    assert time.perf_counter() - began < 20


def test_pickles_of_real_sizes_are_read(tmp_path):
    """What bounds a pickle does not get into the way of one that a data set is."""
    content = {
        b"data": pixels(0, 100, 3072),
        b"labels": list(range(10)) * 1000,
        b"names": [b"x%d" % i for i in range(10**4)],
    }
    for protocol in range(6):
        read = pickles.load(pickle.dumps(content, protocol=protocol), "batch")
        assert read[b"labels"] == content[b"labels"]
        assert np.array_equal(read[b"data"], content[b"data"])
