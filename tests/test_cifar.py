"""CIFAR archives and their pickles, hostile ones too; every archive that is read here was made here."""

import codecs
import contextlib
import dataclasses
import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saltflat.data import (
    Images,
    Splits,
    cifar10,
    cifar100,
    pickles,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


# --- CIFAR archives ---


@dataclasses.dataclass(frozen=True)
class Kind:
    """One published archive: how it is read, and how its files are written."""

    read: Callable[[Path], Splits]
    folder: str
    classes: int
    train: tuple[str, ...]
    test: str
    write: Callable[[Tensor, Tensor], bytes]


def records(images: Tensor, labels: Tensor) -> bytes:
    return b"".join(
        bytes([label]) + image.numpy().tobytes() for image, label in zip(images, labels.tolist(), strict=True)
    )


def records_with_coarse_label(images: Tensor, labels: Tensor) -> bytes:
    return b"".join(
        bytes([label // 5, label]) + image.numpy().tobytes()
        for image, label in zip(images, labels.tolist(), strict=True)
    )


def pickled_by_python_2(images: Tensor, labels: Tensor, key: bytes = b"labels") -> bytes:
    """As Python 2 and the numpy of 2009 wrote it: protocol 2, 8-bit strings, a dtype with flags 0 and 1."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    rows, columns = images.flatten(1).shape
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR("
    dtype += integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    state = b"(" + integer(1) + integer(rows) + integer(columns) + b"\x86" + dtype + b"\x89"
    state += string(images.numpy().tobytes()) + b"tb"
    numbers = b"](" + b"".join(integer(label) for label in labels.tolist()) + b"e"
    entries = string(b"data") + array + state + string(key) + numbers + string(b"batch_label") + string(b"one")
    return b"\x80\x02}(" + entries + b"u."


def pickled_by_python_3(images: Tensor, labels: Tensor, protocol: int = 4) -> bytes:
    content = {"data": images.flatten(1).numpy(), "labels": labels.tolist(), "fine_labels": labels.tolist()}
    return pickle.dumps(content, protocol=protocol)


def pickled_with_coarse_labels(images: Tensor, labels: Tensor) -> bytes:
    content = {
        b"data": images.flatten(1).numpy(),
        b"fine_labels": labels.tolist(),
        b"coarse_labels": [19] * len(labels),
    }
    return pickle.dumps(content, protocol=2)


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
KINDS = {
    "cifar-10-binary": Kind(
        cifar10, "cifar-10-batches-bin", 10, tuple(f"{name}.bin" for name in BATCHES), "test_batch.bin", records
    ),
    "cifar-10-python": Kind(cifar10, "cifar-10-batches-py", 10, BATCHES, "test_batch", pickled_by_python_2),
    "cifar-10-python, written anew": Kind(
        cifar10, "cifar-10-batches-py", 10, BATCHES, "test_batch", pickled_by_python_3
    ),
    "cifar-100-binary": Kind(cifar100, "cifar-100-binary", 100, ("train.bin",), "test.bin", records_with_coarse_label),
    "cifar-100-python": Kind(cifar100, "cifar-100-python", 100, ("train",), "test", pickled_with_coarse_labels),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def examples(kind: Kind) -> dict[str, tuple[Tensor, Tensor]]:
    """Two images per file: one would hide a wrong stride, and more only take time."""
    return {
        name: (
            random_images(2, 3, 32, 32, seed=seed),
            torch.randint(0, kind.classes, (2,), generator=seeded(seed)),
        )
        for seed, name in enumerate((*kind.train, kind.test))
    }


def contents(kind: Kind) -> dict[str, bytes]:
    return {name: kind.write(*pair) for name, pair in examples(kind).items()}


def folder(at: Path, files: dict[str, bytes]) -> Path:
    at.mkdir()
    for name, data in files.items():
        (at / name).write_bytes(data)
    return at


def archive(at: Path, files: dict[str, bytes], prefix: str, mode: Any = "w:gz") -> Path:
    with tarfile.open(at, mode) as tar:
        for name, data in {"readme.html": b"hello", **files}.items():
            member = tarfile.TarInfo(f"{prefix}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return at


def refusal(read: Callable[[Path], Splits], path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@every_kind
def test_archives_and_folders_are_read_the_same(kind: Kind, tmp_path: Path) -> None:
    written, files = examples(kind), contents(kind)
    sources = [
        folder(tmp_path / kind.folder, files),
        archive(tmp_path / "any.name", files, kind.folder),
        archive(tmp_path / "plain.tar", dict(reversed(files.items())), f"./some/where/{kind.folder}", mode="w"),
    ]
    for source in sources:
        splits = kind.read(source)
        assert torch.equal(splits.train.images, torch.cat([written[name][0] for name in kind.train])), source
        assert torch.equal(splits.train.labels, torch.cat([written[name][1] for name in kind.train])), source
        assert torch.equal(splits.test.images, written[kind.test][0]), source
        assert torch.equal(splits.test.labels, written[kind.test][1]), source
        assert splits.train.num_classes == splits.test.num_classes == kind.classes
    assert [splits.train.name, splits.test.name] == [f"{kind.read.__name__} train", f"{kind.read.__name__} test"]
    splits.train.images[0] = 0  # memory of its own, writable
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kind.folder, "any.name", "plain.tar"])


@every_kind
def test_a_single_image_per_file_is_read(kind: Kind, tmp_path: Path) -> None:
    files = {name: kind.write(images[:1], labels[:1]) for name, (images, labels) in examples(kind).items()}
    assert len(kind.read(folder(tmp_path / "one", files)).train) == len(kind.train)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_every_common_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    images, labels = random_images(2, 3, 32, 32), torch.tensor([9, 1])
    files = {name: pickled_by_python_3(images, labels, protocol) for name in (*BATCHES, "test_batch")}
    assert torch.equal(cifar10(folder(tmp_path / "py", files)).test.images, images)


@every_kind
def test_a_missing_or_cut_file_is_named(kind: Kind, tmp_path: Path) -> None:
    files = contents(kind)
    for number, name in enumerate(files):
        others = {other: data for other, data in files.items() if other != name}
        for source in (
            folder(tmp_path / f"missing {number}", others),
            archive(tmp_path / f"missing {number}.tar.gz", others, kind.folder),
        ):
            message = refusal(kind.read, source)
            assert f"{name} is missing" in message or len(files) == 1
        cut = folder(tmp_path / f"cut {number}", {**files, name: files[name][:-7]})
        message = refusal(kind.read, cut)
        assert f"{name} has" in message or f"{name}: not a whole pickle" in message
        empty = folder(tmp_path / f"empty {number}", {**files, name: b""})
        assert name in refusal(kind.read, empty)


@every_kind
def test_labels_out_of_range_are_refused_with_the_name_of_the_file(kind: Kind, tmp_path: Path) -> None:
    files = contents(kind)
    files[kind.test] = kind.write(random_images(2, 3, 32, 32), torch.tensor([0, kind.classes]))
    message = refusal(kind.read, folder(tmp_path / "wrong", files))
    assert f"{kind.test} has labels 0 ... {kind.classes}" in message


def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    kind = KINDS["cifar-10-binary"]
    for mode in ("w:gz", "w"):
        whole = archive(tmp_path / "whole", contents(kind), kind.folder, mode).read_bytes()
        for part in (1, 200, len(whole) // 3, len(whole) // 2, len(whole) - 12_000):
            cut = tmp_path / f"cut at {part}"
            cut.write_bytes(whole[:part])
            refusal(cifar10, cut)
    damaged = bytearray(gzip.compress(whole))
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "damaged").write_bytes(damaged)
    refusal(cifar10, tmp_path / "damaged")


@pytest.mark.parametrize(
    "data",
    [b"", b"no archive at all" * 100, gzip.compress(b"no archive in here" * 100, mtime=0)],
    ids=["empty", "text", "another gzip"],
)
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(data)
    assert "not a tar archive" in refusal(cifar10, path)


def test_the_other_data_set_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    ten = archive(tmp_path / "ten.tar.gz", contents(KINDS["cifar-10-binary"]), "x")
    hundred = folder(tmp_path / "hundred", contents(KINDS["cifar-100-python"]))
    assert "holds neither train.bin nor train; expected cifar-100-binary.tar.gz" in refusal(cifar100, ten)
    assert "holds neither data_batch_1.bin nor data_batch_1; expected cifar-10-binary" in refusal(cifar10, hundred)


@pytest.mark.parametrize("read", [cifar10, cifar100])
def test_a_missing_path_says_what_is_accepted(read: Callable[[Path], Splits], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not found; cifar100? reads cifar-100?-binary\.tar\.gz") as caught:
        read(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "needs an array 'data'"),
        ({"labels": [0, 1]}, "needs an array 'data'"),
        ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, "needs an array 'data' of uint8"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, r"needs .* shape \(N, 3072\)"),
        ({"data": np.zeros(3072, np.uint8), "labels": [0]}, r"needs .* shape \(N, 3072\)"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "needs a list 'labels'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1.5]}, "needs a list 'labels' of whole numbers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "has 2 images and 1 labels"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "has 0 images and 0 labels"),
    ],
)
def test_a_pickle_with_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    files = contents(KINDS["cifar-10-python"]) | {"data_batch_3": pickle.dumps(content, protocol=4)}
    with pytest.raises(ValueError, match=f"data_batch_3 {message}"):
        cifar10(folder(tmp_path / "py", files))


# --- pickles with code in them ---


class Runs:
    """Pickles as a call of `function`: what a hostile archive would hold."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def hostile(mark: Path) -> dict[str, Any]:
    """Objects whose unpickling would create the file `mark`."""
    return {
        "os.system": Runs(os.system, f"touch '{mark}'"),
        "builtins.exec": Runs(exec, f"open({str(mark)!r}, 'w').close()"),
        "builtins.eval": Runs(eval, f"open({str(mark)!r}, 'w').close()"),
        "builtins.open": Runs(open, str(mark), "w"),
        "builtins.getattr": Runs(getattr, "os", "system"),
        "importlib": Runs(__import__, "os"),
        "numpy.fromfile": Runs(np.fromfile, str(mark)),
        "codecs.lookup": Runs(codecs.lookup, "rot13"),
        "a class": Images,
        "a path": mark,
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", hostile(Path("mark")))
def test_a_pickle_with_code_is_refused_before_it_runs(name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = hostile(mark)[name]
    image, label = np.zeros((1, 3072), np.uint8), [0]
    payloads = [
        code,
        [code],
        {"data": image, "labels": label, "more": code},
        {"data": code, "labels": label},
        {"data": image, "labels": [code]},
        {"data": image, "labels": label, "deep": [{"er": (1, [code])}]},
    ]
    for payload in payloads:
        with pytest.raises(ValueError, match=r"batch: refused, the pickle names '.*'; only plain data") as caught:
            pickles.load(pickle.dumps(payload, protocol=protocol), "batch")
        assert "\n" not in str(caught.value)
        assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_hostile_pickle_is_live_ammunition(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Runs(os.system, f"touch '{mark}'"), protocol=protocol))
    assert mark.exists()


def test_cifar_refuses_an_archive_with_code_in_it(tmp_path: Path) -> None:
    mark, kind = tmp_path / "mark", KINDS["cifar-10-python"]
    files = contents(kind) | {"data_batch_2": pickle.dumps({"data": Runs(os.system, f"touch '{mark}'")}, protocol=2)}
    for source in (folder(tmp_path / "py", files), archive(tmp_path / "py.tar.gz", files, kind.folder)):
        message = refusal(cifar10, source)
        assert "data_batch_2: refused, the pickle names 'posix.system'" in message
        assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x02c__builtin__\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93.",
        b"(S'true'\niposix\nsystem\n.",
        b"c_codecs\nencode\n(S'x'\nS'zlib_codec'\ntR.",
    ],
    ids=["global", "python 2 builtin", "stack global", "dotted name", "inst", "another codec"],
)
def test_every_way_to_name_a_function_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="batch: refused, "):
        pickles.load(data, "batch")


@pytest.mark.parametrize("array", [np.array([print], dtype=object), np.array(["a"]), np.zeros(2, [("a", "u1")])])
def test_arrays_of_anything_but_numbers_are_refused(array: Any) -> None:
    with pytest.raises(ValueError, match=r"refused, the pickle (names|holds an array of)"):
        pickles.load(pickle.dumps(array, protocol=2), "batch")


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "f4", ">f8", "?"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_of_numbers_come_back(dtype: str, protocol: int) -> None:
    array = np.arange(12).astype(dtype).reshape(3, 4)
    for written in (array, np.asfortranarray(array), array[::2]):
        data = pickle.dumps({"data": written, "number": 1, "text": "x", "none": None}, protocol=protocol)
        content = pickles.load(data, "batch")
        assert (content["number"], content["text"], content["none"]) == (1, "x", None)
        assert content["data"].dtype == array.dtype
        assert np.array_equal(content["data"], written)
        assert content["data"].flags.writeable


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_pickle_gives_a_value_or_a_value_error(data: st.DataObject) -> None:
    whole = pickled_by_python_2(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([1]))
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:position] + bytes([data.draw(st.integers(0, 255))]) + whole[position + 1 :]
    with contextlib.suppress(ValueError):
        pickles.load(damaged, "batch")
