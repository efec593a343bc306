"""Images, splits, crop-and-flip and the readers; every archive that is read here was made here."""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
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
    crop_flip,
    digits,
    parquet,
    pickles,
    stratified_split,
    stratified_subset,
    to_float,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


# --- Images ---

GOOD = {"images": random_images(4, 1, 2, 2), "labels": torch.tensor([0, 1, 2, 1]), "num_classes": 3, "name": "toy"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": torch.rand(4, 1, 2, 2)}, "toy: images must be uint8, got torch.float32"),
        ({"images": random_images(4, 2, 2)}, r"toy: images must have shape \(N, C, H, W\), got \(4, 2, 2\)"),
        ({"images": random_images(0, 1, 2, 2), "labels": torch.tensor([]).long()}, "at least one image"),
        ({"images": random_images(4, 0, 2, 2)}, "at least one pixel"),
        ({"labels": torch.tensor([0, 1, 2, 1], dtype=torch.int32)}, "toy: labels must be int64, got torch.int32"),
        ({"labels": torch.tensor([0, 1, 2])}, r"toy: needs one label per image, \(4,\), got \(3,\)"),
        ({"labels": torch.tensor([[0], [1], [2], [1]])}, r"one label per image, \(4,\), got \(4, 1\)"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"toy: labels must lie in 0 \.\.\. 2, got 0 \.\.\. 3"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, r"toy: labels must lie in 0 \.\.\. 2, got -1 \.\.\. 2"),
        ({"labels": torch.empty(4, dtype=torch.int64, device="meta")}, "must share a device, got cpu and meta"),
    ],
)
def test_images_refuse_what_is_wrong_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Images(**(GOOD | wrong))
    assert "\n" not in str(caught.value)


def test_images_are_frozen_and_have_a_length_and_a_short_repr() -> None:
    images = Images(**GOOD)
    assert len(images) == 4
    assert repr(images) == "Images(num_classes=3, name='toy')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.name = "other"  # type: ignore[misc]


def test_a_subset_takes_the_examples_in_the_given_order() -> None:
    images = Images(**GOOD)
    subset = images.subset(torch.tensor([3, 0, 3]))
    assert torch.equal(subset.images, torch.stack([images.images[i] for i in (3, 0, 3)]))
    assert (subset.labels.tolist(), subset.num_classes, subset.name) == ([1, 0, 1], 3, "toy")


@pytest.mark.parametrize("indices", [[], [4], [-1], [[0, 1]], [0.0], [True, False, True, True]])
def test_a_subset_refuses_indices_that_are_no_positions(indices: list[Any]) -> None:
    with pytest.raises(ValueError, match="indices must"):
        Images(**GOOD).subset(torch.tensor(indices) if indices else torch.tensor([], dtype=torch.int64))


def test_to_float_divides_by_255() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(values), torch.arange(256.0) / 255)
    assert torch.equal(to_float(values, torch.float64), torch.arange(256, dtype=torch.float64) / 255)
    with pytest.raises(ValueError, match=r"images must be uint8, got torch\.float32"):
        to_float(torch.rand(2))
    with pytest.raises(ValueError, match=r"dtype must be floating, got torch\.int64"):
        to_float(values, torch.int64)


# --- splits ---


@settings(deadline=None, max_examples=80)
@given(
    data=st.data(), counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), seed=st.integers(0, 2**32)
)
def test_splits_are_exact_proportional_and_complete(data: st.DataObject, counts: list[int], seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    size = data.draw(st.integers(1, len(labels)))
    rest, held_out = stratified_split(labels, size, seed)
    assert rest.dtype == held_out.dtype == torch.int64
    assert len(held_out) == size
    assert sorted(rest.tolist() + held_out.tolist()) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    for label, count in enumerate(counts):
        assert abs(int((labels[held_out] == label).sum()) - count * size / len(labels)) < 1
    assert torch.equal(stratified_subset(labels, size, seed), held_out)


def test_a_split_depends_on_its_seed_alone() -> None:
    labels = torch.arange(300) % 3
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = stratified_subset(labels, 100, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator has moved"
    torch.manual_seed(2)
    assert torch.equal(stratified_subset(labels, 100, seed=5), first)
    assert not torch.equal(stratified_subset(labels, 100, seed=6), first)


def test_every_example_of_a_class_is_held_out_equally_often() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    counts = torch.zeros(6)
    for seed in range(600):
        counts[stratified_subset(labels, 3, seed)] += 1
    assert ((counts - 300).abs() < 5 * (600 / 4) ** 0.5).all(), counts


@pytest.mark.parametrize("size", [0, -1, 4])
def test_splits_refuse_impossible_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size must lie in 1 \.\.\. 3 .*, got {size}"):
        stratified_split(torch.tensor([0, 1, 1]), size, seed=0)


def test_splits_refuse_labels_that_are_no_vector() -> None:
    with pytest.raises(ValueError, match="labels must be a vector"):
        stratified_split(torch.zeros(2, 2), 1, seed=0)


# --- crop and flip ---


def one_by_one(images: Tensor, padding: int, mode: str, flip: bool, generator: torch.Generator) -> Tensor:
    """The same augmentation as a loop over images, with padding by numpy and the draws in the documented order."""
    number, _, height, width = images.shape
    if padding:
        down = torch.randint(0, 2 * padding + 1, (number,), generator=generator).tolist()
        right = torch.randint(0, 2 * padding + 1, (number,), generator=generator).tolist()
    else:
        down = right = [0] * number
    mirrored = (torch.rand(number, generator=generator) < 0.5).tolist() if flip else [False] * number
    out = []
    for image, top, left, mirror in zip(images.numpy(), down, right, mirrored, strict=True):
        border = ((0, 0), (padding, padding), (padding, padding))
        padded = np.pad(image, border, mode="constant" if mode == "zero" else "reflect")
        window = padded[:, top : top + height, left : left + width]
        out.append(torch.from_numpy((window[:, :, ::-1] if mirror else window).copy()))
    return torch.stack(out)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_crop_flip_equals_a_loop_over_images(dtype: torch.dtype, padding: int, mode: Any, flip: bool) -> None:
    images = random_images(40, 3, 7, 5).to(dtype)
    ours, theirs = seeded(3), seeded(3)
    out = crop_flip(images, padding=padding, mode=mode, flip=flip, generator=ours)
    assert out.dtype == dtype
    assert torch.equal(out, one_by_one(images, padding, mode, flip, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state()), "another number of draws"


def test_crop_flip_reads_any_memory_layout_and_leaves_its_input_alone() -> None:
    images = random_images(6, 3, 8, 8)
    before = images.clone()
    expected = crop_flip(images, generator=seeded())
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(crop_flip(strided, generator=seeded()), expected)
    assert torch.equal(images, before)
    assert crop_flip(images[:0], generator=seeded()).shape == (0, 3, 8, 8)


def test_crop_flip_without_anything_to_do_draws_nothing() -> None:
    images, generator = random_images(3, 1, 4, 4), seeded()
    before = generator.get_state()
    assert crop_flip(images, padding=0, flip=False, generator=generator) is images
    assert torch.equal(generator.get_state(), before)


def test_crop_flip_reaches_every_offset_and_both_sides() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2000, 1, 3, 3)
    results = {tuple(out.flatten().tolist()) for out in crop_flip(image, padding=1, generator=seeded())}
    assert len(results) == 3 * 3 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(3, 4, 4)}, r"must have shape \(N, C, H, W\)"),
        ({"mode": "edge"}, "mode must be 'zero' or 'reflect', got 'edge'"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
        ({"mode": "reflect", "padding": 4}, r"padding must be below the height and the width \(4, 6\), got 4"),
    ],
)
def test_crop_flip_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crop_flip(**({"images": torch.zeros(2, 1, 4, 6), "generator": seeded()} | arguments))


# --- digits ---


def test_digits_are_the_bundled_file_split_once_and_for_all() -> None:
    splits = digits()
    assert (splits.train.images.shape, splits.test.images.shape) == ((1200, 1, 8, 8), (597, 1, 8, 8))
    assert splits.train.num_classes == splits.test.num_classes == 10
    both = torch.cat([splits.train.labels, splits.test.labels])
    assert both.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    shares = both.bincount() * 597 / 1797
    assert ((splits.test.labels.bincount() - shares).abs() < 1).all()
    scaled = {int(np.floor(value * 255 / 16 + 0.5)) for value in range(17)}
    assert set(torch.cat([splits.train.images, splits.test.images]).unique().tolist()) == scaled
    # If this changes, no figure on digits can be compared with an earlier one.
    found = hashlib.sha256(splits.test.images.numpy().tobytes() + splits.test.labels.numpy().tobytes()).hexdigest()
    assert found == "2b654c907663b1916215f6ae21a673502ac9c2abdad4f287c5d976d355bbea00"
    assert torch.equal(digits().train.images, splits.train.images)


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


@pytest.mark.parametrize("data", [b"", b"no archive at all" * 100, gzip.compress(b"no archive in here" * 100)])
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


# --- parquet ---

pyarrow = pytest.importorskip("pyarrow")
pillow = pytest.importorskip("PIL.Image")


def encoded(image: Any, kind: str = "PNG") -> bytes:
    """image: (H, W) or (H, W, 3) uint8, or a Pillow image."""
    buffer = io.BytesIO()
    (pillow.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(
    file: Path, images: list[bytes | None], labels: list[Any], names: tuple[str, str] = ("img", "label")
) -> None:
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if data is None else {"bytes": data, "path": f"{row}.png"} for row, data in enumerate(images)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"id": list(range(len(labels))), names[0]: pyarrow.array(structs, kind), names[1]: labels})
    pyarrow.parquet.write_table(table, file, row_group_size=2)


def colour(number: int, seed: int = 0, height: int = 5, width: int = 4) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def as_tensor(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("place", [".", "data", "plain_text"])
@pytest.mark.parametrize("names", [("img", "label"), ("image", "fine_label")])
def test_parquet_reads_a_hub_folder(place: str, names: tuple[str, str], tmp_path: Path) -> None:
    train, test = colour(5), colour(2, seed=1)
    where = tmp_path / "toys" / place
    write_parquet(where / "train-00001-of-00002.parquet", [encoded(i) for i in train[3:]], [2, 0], names)
    write_parquet(where / "train-00000-of-00002.parquet", [encoded(i) for i in train[:3]], [0, 1, 2], names)
    write_parquet(where / "test-00000-of-00001.parquet", [encoded(i) for i in test], [1, 3], names)
    splits = parquet(tmp_path / "toys")
    assert torch.equal(splits.train.images, as_tensor(train))
    assert torch.equal(splits.test.images, as_tensor(test))
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 1, 2, 2, 0], [1, 3])
    assert splits.train.num_classes == splits.test.num_classes == 4
    assert (splits.train.name, splits.test.name) == ("toys train", "toys test")
    assert splits.train.images.is_contiguous()
    assert parquet(tmp_path / "toys", num_classes=9).test.num_classes == 9


def pair(tmp_path: Path, train: list[bytes | None], test: list[bytes | None], labels: list[Any] | None = None) -> Path:
    write_parquet(tmp_path / "train-0.parquet", train, [0] * len(train) if labels is None else labels)
    write_parquet(tmp_path / "test-0.parquet", test, [0] * len(test))
    return tmp_path


def test_parquet_keeps_grey_only_when_everything_is_grey(tmp_path: Path) -> None:
    grey, coloured = colour(3)[..., 0], colour(1)
    all_grey = pair(tmp_path / "grey", [encoded(i) for i in grey], [encoded(grey[0])])
    splits = parquet(all_grey)
    assert torch.equal(splits.train.images, torch.from_numpy(grey)[:, None])
    mixed = parquet(pair(tmp_path / "mixed", [encoded(i) for i in grey], [encoded(coloured[0])]))
    assert torch.equal(mixed.train.images, torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(mixed.test.images, as_tensor(coloured))


def test_parquet_converts_palettes_and_transparency_to_rgb(tmp_path: Path) -> None:
    image = np.zeros((5, 4, 3), np.uint8)
    image[:3] = (255, 0, 51)
    palette = pillow.fromarray(image).convert("P", palette=pillow.Palette.ADAPTIVE)
    transparent = pillow.fromarray(np.dstack([image, np.full((5, 4), 128, np.uint8)]))
    assert (palette.mode, transparent.mode) == ("P", "RGBA")
    splits = parquet(pair(tmp_path, [encoded(palette), encoded(transparent)], [encoded(image)]))
    assert torch.equal(splits.train.images, as_tensor(np.stack([image, image])))


def test_parquet_decodes_jpeg_as_pillow_does(tmp_path: Path) -> None:
    data = encoded(colour(1)[0], "JPEG")
    splits = parquet(pair(tmp_path, [data], [data]))
    expected = np.asarray(pillow.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(splits.train.images, as_tensor(expected[None].copy()))


GOOD_ROW = encoded(colour(1)[0])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            [GOOD_ROW] * 3 + [encoded(colour(1, width=6)[0])],
            [GOOD_ROW],
            r"train-0.parquet, row 3: has 6x5 pixels; .* 4x5",
        ),
        ([GOOD_ROW], [GOOD_ROW, encoded(colour(1, height=6)[0])], r"test-0.parquet, row 1: has 4x6 pixels; .* 4x5"),
        ([GOOD_ROW] * 4 + [b"no image"], [GOOD_ROW], "train-0.parquet, row 4: not an image that can be decoded"),
        ([GOOD_ROW, GOOD_ROW[:-30]], [GOOD_ROW], "train-0.parquet, row 1: not an image that can be decoded"),
        ([b"no image"], [GOOD_ROW], "train-0.parquet, row 0: not an image that can be decoded"),
        ([GOOD_ROW] * 2 + [None], [GOOD_ROW], "train-0.parquet, row 2: has no image bytes"),
        (
            [GOOD_ROW, encoded(pillow.new("I;16", (4, 5)))],
            [GOOD_ROW],
            "row 1: has mode I;16; expected 8 bits per channel",
        ),
    ],
)
def test_parquet_names_the_row_that_is_wrong(
    train: list[bytes | None], test: list[bytes | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parquet(pair(tmp_path, train, test))
    assert "\n" not in str(caught.value)


def test_parquet_refuses_labels_that_are_missing_or_out_of_range(tmp_path: Path) -> None:
    rows: list[bytes | None] = [GOOD_ROW] * 3
    with pytest.raises(ValueError, match=r"train-0\.parquet, row 2: has no label"):
        parquet(pair(tmp_path / "none", rows, rows, [0, 1, None]))
    with pytest.raises(ValueError, match=r"train-0\.parquet: column label must hold whole numbers, got double"):
        parquet(pair(tmp_path / "float", rows, rows, [0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 1, got 0 \.\.\. 2"):
        parquet(pair(tmp_path / "many", rows, rows, [0, 1, 2]), num_classes=2)
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 1, got -1 \.\.\. 1"):
        parquet(pair(tmp_path / "negative", rows, rows, [0, 1, -1]))


def test_parquet_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: not found; expected a folder"):
        parquet(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"expected train-\*\.parquet and test-\*\.parquet, there, in data/ or in"):
        parquet(tmp_path)
    write_parquet(tmp_path / "data" / "train-0.parquet", [], pyarrow.array([], pyarrow.int64()))
    with pytest.raises(ValueError, match=r"data: expected .* found train-0\.parquet only"):
        parquet(tmp_path)
    write_parquet(tmp_path / "data" / "test-0.parquet", [GOOD_ROW], [0], names=("picture", "label"))
    with pytest.raises(ValueError, match=r"train-0\.parquet: expected at least one row"):
        parquet(tmp_path)
    write_parquet(tmp_path / "data" / "train-0.parquet", [GOOD_ROW], [0])
    with pytest.raises(ValueError, match=r"test-0\.parquet: expected a column img or image, found id, picture, label"):
        parquet(tmp_path)
    write_parquet(tmp_path / "data" / "test-0.parquet", [GOOD_ROW], [0], names=("img", "class"))
    with pytest.raises(ValueError, match=r"expected a column label or fine_label, found id, img, class"):
        parquet(tmp_path)
    (tmp_path / "data" / "test-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"test-0\.parquet: not a parquet file") as caught:
        parquet(tmp_path)
    assert "\n" not in str(caught.value)


def test_parquet_refuses_images_that_are_no_struct(tmp_path: Path) -> None:
    import pyarrow.parquet

    write_parquet(tmp_path / "train-0.parquet", [GOOD_ROW], [0])
    pyarrow.parquet.write_table(pyarrow.table({"img": [b"x"], "label": [0]}), tmp_path / "test-0.parquet")
    with pytest.raises(ValueError, match=r"column img must be struct<bytes, path>, got binary"):
        parquet(tmp_path)


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet", "PIL"])
def test_parquet_without_its_extra_gives_advice(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pair(tmp_path, [GOOD_ROW], [GOOD_ROW])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"reading parquet needs the `data` extra: pip install 'saltflat\[data\]'"):
        parquet(source)
