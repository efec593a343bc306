"""SVHN out of MATLAB files, damaged ones too; they are written here byte by byte, and once by SciPy."""

import struct
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import pixels, read_or_refused, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.data import svhn, svhn_extra

TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9, "i8": 12, "u8": 13}
CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}


def element(kind: int, data: bytes, order: str, small: bool = True) -> bytes:
    if small and 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(name: str, array: Any, order: str = "<", flags: int = 0) -> bytes:
    """One variable, stored as it is; MATLAB would store doubles that are whole numbers as such."""
    code = array.dtype.str[1:]
    return element(
        14,
        element(6, struct.pack(f"{order}II", flags or CLASSES[code], 0), order)
        + element(5, struct.pack(f"{order}{array.ndim}i", *array.shape), order)
        + element(1, name.encode(), order)
        + element(TYPES[code], array.astype(array.dtype.newbyteorder(order)).tobytes(order="F"), order),
        order,
    )


def overlong(variable: bytes) -> bytes:
    """Its flags as a small element that says to have eight bytes, though these hold four at most."""
    return variable[:8] + struct.pack("<I", 8 << 16 | 6) + variable[16:20] + variable[24:]


def compressed(variable: bytes, order: str = "<", cut: int = 0) -> bytes:
    """Without the last `cut` bytes of the stream, whose last four are its checksum."""
    data = zlib.compress(variable, 1)
    data = data[: len(data) - cut]
    return struct.pack(f"{order}II", 15, len(data)) + data


def header(order: str = "<") -> bytes:
    return b"MATLAB 5.0 MAT-file".ljust(124) + {"<": b"\x00\x01IM", ">": b"\x01\x00MI"}[order]


def digits(number: int, seed: int = 0) -> tuple[Any, Any]:
    labels = np.random.default_rng(seed).permutation(np.arange(number, dtype=np.uint8) % 10 + 1)
    return pixels(seed, 32, 32, 3, number), labels[:, None]


def write(folder: Path, split: str, variables: Iterable[bytes], order: str = "<") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}_32x32.mat").write_bytes(header(order) + b"".join(variables))
    return folder


def refused(folder: Path) -> str:
    message = refusal(svhn_extra, folder)
    assert "extra_32x32.mat" in message
    return message


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("label", [np.uint8, np.int32, np.float64])
def test_what_was_written_comes_back_and_ten_is_zero(order: str, packed: bool, label: Any, tmp_path: Path) -> None:
    for split, number in (("train", 12), ("test", 3)):
        x, y = digits(number, seed=number)
        variables = [matrix("X", x, order), matrix("y", y.astype(label), order)]
        write(tmp_path, split, [compressed(v, order) for v in variables] if packed else variables, order)
    splits = svhn(tmp_path)
    for split, number in ((splits.train, 12), (splits.test, 3)):
        x, y = digits(number, seed=number)
        for index, image in enumerate(split.images):
            for colour in range(3):
                assert np.array_equal(image[colour].numpy(), x[:, :, colour, index])
        assert split.labels.tolist() == [0 if value == 10 else value for value in y[:, 0].tolist()]
        assert split.num_classes == 10
    assert 0 in splits.train.labels
    assert [splits.train.name, splits.test.name] == ["svhn train", "svhn test"]
    assert splits.train.images.is_contiguous()
    splits.train.images[0] = 0  # memory of its own, writable


def test_the_extra_images_are_read_alone(tmp_path: Path) -> None:
    x, y = digits(1)
    extra = svhn_extra(write(tmp_path, "extra", [matrix("X", x), matrix("y", y)]))
    assert (len(extra), extra.name, extra.labels.tolist()) == (1, "svhn extra", [1])
    assert torch.equal(extra.images[0], torch.from_numpy(x[..., 0]).permute(2, 0, 1))


@pytest.mark.parametrize("packed", [True, False])
def test_what_scipy_writes_and_reads_is_read_the_same(packed: bool, tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io")
    x, y = digits(7)
    others = {"text": "abc", "cells": np.array([[1, "a"]], object), "record": {"a": 1.0}, "z": np.array([[1j]])}
    io.savemat(tmp_path / "extra_32x32.mat", {**others, "X": x, "y": y}, do_compression=packed)
    extra, read = svhn_extra(tmp_path), io.loadmat(tmp_path / "extra_32x32.mat")
    assert np.array_equal(extra.images.numpy(), read["X"].transpose(3, 2, 0, 1))
    assert np.array_equal(extra.labels.numpy(), read["y"][:, 0] % 10)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for read in (svhn, svhn_extra):
        with pytest.raises(FileNotFoundError, match=r"nothing: not found; svhn.* reads a folder with"):
            read(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"train_32x32\.mat is missing"):
        svhn(tmp_path)
    x, y = digits(2)
    write(tmp_path, "train", [matrix("X", x), matrix("y", y)])
    with pytest.raises(ValueError, match=r"test_32x32\.mat is missing"):
        svhn(tmp_path)


X, Y = digits(3)
WRONG = {
    "no X": ([matrix("x", X), matrix("y", Y)], "there is no array X in it"),
    "no y": ([matrix("X", X)], "there is no array y in it"),
    "floats": ([matrix("X", X / 1), matrix("y", Y)], "X: expected uint8 of shape (32, 32, 3, N), got float64"),
    "another size": ([matrix("X", X[:28]), matrix("y", Y)], "got uint8 of shape (28, 32, 3, 3)"),
    "images first": ([matrix("X", X.transpose(3, 0, 1, 2)), matrix("y", Y)], "got uint8 of shape (3, 32, 32, 3)"),
    "one image alone": ([matrix("X", X[..., 0]), matrix("y", Y)], "got uint8 of shape (32, 32, 3)"),
    "fewer labels": ([matrix("X", X), matrix("y", Y[:2])], "y: expected one label an image, (3, 1), at least one, got"),
    "a row of labels": (
        [matrix("X", X), matrix("y", Y.T)],
        "y: expected one label an image, (3, 1), at least one, got",
    ),
    "nothing": ([matrix("X", X[..., :0]), matrix("y", Y[:0])], "at least one, got (0, 1)"),
    "a zero": ([matrix("X", X), matrix("y", Y - 1)], "y: expected labels 1 ... 10, got 0 ... 2"),
    "an eleven": ([matrix("X", X), matrix("y", Y + 8)], "y: expected labels 1 ... 10, got 9 ... 11"),
    "a half": ([matrix("X", X), matrix("y", Y + 0.5)], "y: expected labels 1 ... 10, got 1.5 ... 3.5"),
    "not a number": ([matrix("X", X), matrix("y", Y * np.nan)], "y: expected labels 1 ... 10, got nan"),
    "text": ([matrix("X", X), matrix("y", Y, flags=4)], "it holds other things than real numbers"),
    "complex numbers": ([matrix("X", X, flags=0x0809), matrix("y", Y)], "it holds other things than real numbers"),
    "another element": ([matrix("X", X), element(5, b"12345678", "<")], "it holds an element of type 5"),
    "five bytes in four": ([overlong(matrix("X", X)), matrix("y", Y)], "it ends within an element"),
    "two in one": ([compressed(matrix("X", X) + matrix("y", Y))], "expected a whole MATLAB 5 file"),
    "a stream that is cut": ([compressed(matrix("X", X), cut=5)], "it ends within a compressed element"),
    "a damaged checksum": ([compressed(matrix("X", X))[:-1] + b"\0"], "expected a whole MATLAB 5 file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_content_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    variables, words = WRONG[name]
    assert words in refused(write(tmp_path, "extra", variables))


@pytest.mark.parametrize("data", [b"", b"no mat file", b"\x89HDF\r\n\x1a\n".ljust(200), bytes(1000)])
def test_another_kind_of_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "extra_32x32.mat").write_bytes(data)
    assert "expected a whole MATLAB 5 file" in refused(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_that_is_cut_anywhere_is_refused(packed: bool, tmp_path: Path) -> None:
    variables = [matrix("X", X), matrix("y", Y.astype(np.int32))]
    write(tmp_path, "extra", [compressed(v) for v in variables] if packed else variables)
    file = tmp_path / "extra_32x32.mat"
    whole = file.read_bytes()
    svhn_extra(tmp_path)
    for length in [*range(200), *range(200, len(whole) - 200, 997), *range(len(whole) - 200, len(whole))]:
        file.write_bytes(whole[:length])
        refused(tmp_path)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), packed=st.booleans())
def test_an_altered_file_gives_the_same_or_one_line(data: Any, packed: bool, tmp_path_factory: Any) -> None:
    """Without a checksum, what can be promised is one line or images."""
    folder = tmp_path_factory.mktemp("altered")
    variables = [matrix("X", X), matrix("y", Y)]
    write(folder, "extra", [compressed(v) for v in variables] if packed else variables)
    file = folder / "extra_32x32.mat"
    damaged = bytearray(file.read_bytes())
    near_the_ends = st.one_of(st.integers(100, 260), st.integers(len(damaged) - 100, len(damaged) - 1))
    position = data.draw(st.one_of(near_the_ends, st.integers(0, len(damaged) - 1)))
    damaged[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    read = read_or_refused(svhn_extra, folder)
    if packed and not isinstance(read, str):
        assert np.array_equal(read.images.numpy(), X.transpose(3, 2, 0, 1))
        assert np.array_equal(read.labels.numpy(), Y[:, 0] % 10)


@pytest.mark.parametrize("packed", [True, False])
def test_images_are_never_in_memory_twice(packed: bool, tmp_path: Path) -> None:
    x, y = digits(4000)
    variables = [matrix("X", x), matrix("y", y)]
    write(tmp_path, "extra", [compressed(v) for v in variables] if packed else variables)
    svhn_extra(tmp_path)  # what is imported late has been
    tracemalloc.start()
    try:
        extra = svhn_extra(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(extra.images.numpy(), x.transpose(3, 2, 0, 1))
    assert x.nbytes <= peak < 1.2 * x.nbytes
