"""Images that stay on disk, against the same files read into memory; every file was made here."""

import gc
import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image as pillow
import pyarrow
import pyarrow.parquet
import pytest
import torch
from damaged import pixels, read_or_refused, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saltflat.data import (
    Images,
    Stored,
    alone,
    batches,
    digits,
    folder,
    order,
    parquet,
    shape_of,
    stored_folder,
    stored_parquet,
    stored_shards,
)
from saltflat.data.stored import WINDOW, block_of

# which DataLoader does, on systems where that is how processes begin
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

NUMBER, CLASSES = 23, 3
PICTURES = pixels(0, NUMBER, 5, 4, 3)
LABELS = [int(label) for label in np.random.default_rng(1).integers(0, CLASSES, NUMBER)]
LABELS[0] = CLASSES - 1


def png(image: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pillow.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


FILES = [png(image) for image in PICTURES]


def write_folder(root: Path, files: Sequence[bytes] = FILES, labels: Sequence[int] = LABELS) -> Path:
    for split in ("train", "test"):
        for number, (data, label) in enumerate(zip(files, labels, strict=True)):
            place = root / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04d}.png").write_bytes(data)
    return root


def write_parquet(
    file: Path, files: Sequence[bytes | None] = FILES, labels: Sequence[Any] = LABELS, rows: int = 2
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if data is None else {"bytes": data, "path": None} for data in files]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {"image": pyarrow.array(structs, kind), "label": labels if isinstance(labels, pyarrow.Array) else list(labels)}
    )
    pyarrow.parquet.write_table(table, file, row_group_size=rows)
    return file


def write_hub(root: Path) -> Path:
    half = NUMBER // 2
    write_parquet(root / "data" / "train-0.parquet", FILES[:half], LABELS[:half])
    write_parquet(root / "data" / "train-1.parquet", FILES[half:], LABELS[half:], 3)
    write_parquet(root / "data" / "test-0.parquet", FILES[::-1], LABELS[::-1])
    return root


Member = tuple[str, bytes]


def write_shard(file: Path, members: Sequence[Member | tarfile.TarInfo]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size, entry.mtime = len(member[1]), 1.5  # of which tarfile makes an extended header
                archive.addfile(entry, io.BytesIO(member[1]))
    return file


def sample(number: int, label: int | bytes | None = None, data: bytes | None = None, kind: str = "png") -> list[Member]:
    label = LABELS[number] if label is None else label
    text = label if isinstance(label, bytes) else b"%d" % label
    return [(f"{number:06d}.{kind}", FILES[number] if data is None else data), (f"{number:06d}.cls", text)]


def write_shards(root: Path) -> Path:
    for shard, numbers in enumerate((range(9), range(9, 10), range(10, NUMBER))):
        write_shard(root / f"train-{shard}.tar", [member for number in numbers for member in sample(number)])
    return root


FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Stored]]] = {
    "folder": (write_folder, stored_folder),
    "parquet": (write_hub, stored_parquet),
    "shards": (write_shards, stored_shards),
}


@pytest.fixture(params=FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    write, read = FORMATS[request.param]
    return read(write(tmp_path / "toys"))


def everything(stored: Stored) -> Images:
    return stored.subset(torch.arange(len(stored)))


def assert_same(one: Images, other: Images) -> None:
    assert torch.equal(one.images, other.images)
    assert one.images.is_contiguous()
    assert torch.equal(one.labels, other.labels)
    assert (one.num_classes, one.name) == (other.num_classes, other.name)


# --- readers ---


def test_a_folder_is_what_it_is_in_memory(tmp_path: Path) -> None:
    write_folder(tmp_path / "toys")
    (tmp_path / "toys" / "test" / "class 0" / "0000 more.png").write_bytes(FILES[3])
    splits = folder(tmp_path / "toys")
    train = stored_folder(tmp_path / "toys")
    assert_same(everything(train), splits.train)
    assert_same(everything(stored_folder(tmp_path / "toys", split="test", like=train)), splits.test)
    (tmp_path / "toys" / "test").rename(tmp_path / "toys" / "val")
    assert_same(everything(stored_folder(tmp_path / "toys", split="test")), splits.test)
    assert stored_folder(tmp_path / "toys", split="val").name == "toys val"


def test_parquet_files_are_what_they_are_in_memory(tmp_path: Path) -> None:
    splits = parquet(write_hub(tmp_path / "toys"))
    train = stored_parquet(tmp_path / "toys")
    assert train.blocks.tolist() == [2, 2, 2, 2, 2, 1, 3, 3, 3, 3]
    assert_same(everything(train), splits.train)
    assert_same(everything(stored_parquet(tmp_path / "toys", split="test", like=train)), splits.test)
    files = [tmp_path / "toys" / "data" / f"train-{number}.parquet" for number in (0, 1)]
    assert torch.equal(everything(stored_parquet(files)).images, splits.train.images)
    assert torch.equal(everything(stored_parquet(files[0])).images, splits.train.images[: NUMBER // 2])
    assert (stored_parquet(files).name, stored_parquet(files[0]).name) == ("data", "train-0")
    assert stored_parquet(tmp_path / "toys", num_classes=9).num_classes == 9


def test_shards_are_what_was_put_into_them(tmp_path: Path) -> None:
    train = stored_shards(write_shards(tmp_path / "toys"))
    assert repr(train) == "Stored(num_classes=3, name='toys train', shape=(3, 5, 4))"
    assert torch.equal(everything(train).images, torch.from_numpy(PICTURES).permute(0, 3, 1, 2))
    assert train.labels.tolist() == LABELS
    (tmp_path / "toys" / "test-0.tar").write_bytes((tmp_path / "toys" / "train-1.tar").read_bytes())
    test = stored_shards(tmp_path / "toys", split="test", like=train)
    assert (test.labels.tolist(), test.num_classes, test.name) == ([LABELS[9]], 3, "toys test")
    some = stored_shards([tmp_path / "toys" / "train-2.tar", tmp_path / "toys" / "train-0.tar"])
    assert some.labels.tolist() == LABELS[10:] + LABELS[:9]
    assert torch.equal(some.read(torch.tensor([NUMBER - 10])), train.read(torch.tensor([0])))


def test_shards_may_hold_folders_other_members_and_images_of_other_kinds(tmp_path: Path) -> None:
    jpeg, inner = png(PICTURES[0], "JPEG"), tarfile.TarInfo("./dogs.and.cats")
    inner.type = tarfile.DIRTYPE
    long = "dogs.and.cats/" + "x" * 150
    members: list[Member | tarfile.TarInfo] = [
        inner,
        ("./dogs.and.cats/1.cls", b" 1\n"),
        ("./dogs.and.cats/1.JPG", jpeg),
        ("dogs.and.cats/1.json", b"{}"),
        ("./dogs.and.cats/._1.jpg", b"of another system"),
        (f"{long}.png", FILES[2]),
        (f"{long}.cls", b"0"),
        ("lonely.txt", b"beside the images"),
    ]
    train = stored_shards(write_shard(tmp_path / "train-0.tar", members))
    expected = [np.asarray(pillow.open(io.BytesIO(jpeg))), PICTURES[2]]
    assert torch.equal(everything(train).images, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
    assert train.labels.tolist() == [1, 0]


def test_grey_is_kept_only_when_everything_is_grey(tmp_path: Path) -> None:
    grey = [png(image[..., 0]) for image in PICTURES]
    assert stored_folder(write_folder(tmp_path / "grey", grey)).shape == (1, 5, 4)
    one = stored_folder(write_folder(tmp_path / "one", [*grey[:-1], FILES[-1]]))
    assert_same(everything(one), folder(tmp_path / "one").train)
    assert one.shape == (3, 5, 4)


def test_a_set_takes_shape_and_classes_from_another(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(
        ValueError, match=r"train-0\.tar, 000000\.png: has 4x5 pixels; the first training image has 8x8"
    ):
        stored_shards(tmp_path, like=digits().train)
    like = Images(torch.zeros(1, 3, 5, 4, dtype=torch.uint8), torch.tensor([0]), 2, "two")
    assert shape_of(like) == shape_of(stored_shards(tmp_path)) == (3, 5, 4)
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 1, got 0 \.\.\. 2"):
        stored_shards(tmp_path, like=like)
    grey = Images(torch.zeros(1, 1, 5, 4, dtype=torch.uint8), torch.tensor([0]), 3, "grey")
    with pytest.raises(ValueError, match=r"000000\.png: has mode RGB; expected 8-bit grey, L, as the training images"):
        stored_shards(tmp_path, like=grey)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no: not found; expected a folder with train/"):
        stored_folder(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"no: not found; expected a folder with train-\*\.parquet"):
        stored_parquet(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"no\.tar: not found; expected a file"):
        stored_shards([tmp_path / "no.tar"])
    with pytest.raises(ValueError, match=r"path: expected a folder, or at least one file"):
        stored_shards([])
    assert "expected train/ in it, with a folder for each class" in refusal(stored_folder, tmp_path)
    assert "train-*.parquet or data/train-*.parquet" in refusal(stored_parquet, tmp_path)
    assert f"{tmp_path}: expected train-*.tar in it" in refusal(stored_shards, tmp_path)
    write_folder(tmp_path)
    (tmp_path / "test" / "class 9").mkdir()
    assert "class 9: expected one of the classes in" in refusal(
        lambda path: stored_folder(path, split="test"), tmp_path
    )
    assert "expected at least one row" in refusal(
        stored_parquet, write_parquet(tmp_path / "0.parquet", [], pyarrow.array([], "int64"))
    )


def test_labels_are_checked_at_once(tmp_path: Path) -> None:
    labels: list[Any] = [0, 1, None]
    file = write_parquet(tmp_path / "a.parquet", FILES[:3], labels, rows=1)
    assert f"{file}, row 2: has no label" in refusal(stored_parquet, file)
    file = write_parquet(tmp_path / "b.parquet", FILES[:2], [0, 10**6])
    with pytest.raises(ValueError, match="b: expected classes below 100000, got 1000000"):
        stored_parquet(file)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(pixels(0, 6, 4, 3)), "has 4x6 pixels; the first training image has 4x5"),
        (FILES[0][:-30], "not an image that can be decoded"),
        (b"no image", "not an image that can be decoded"),
    ],
)
def test_an_image_that_is_wrong_is_named_when_it_is_read(data: bytes, said: str, tmp_path: Path) -> None:
    files = [*FILES[:3], data]
    labels = [0] * 4
    write_folder(tmp_path / "f", files, labels)
    write_parquet(tmp_path / "p.parquet", files, labels)
    write_shard(tmp_path / "s.tar", [member for number in range(4) for member in sample(number, 0, files[number])])
    for stored, where in (
        (stored_folder(tmp_path / "f"), "f/train/class 0/0003.png"),
        (stored_parquet(tmp_path / "p.parquet"), "p.parquet, row 3"),
        (stored_shards(tmp_path / "s.tar"), "s.tar, 000003.png"),
    ):
        stored.read(torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{where}: {said}")) as caught:
            stored.read(torch.tensor([1, 3]))
        assert "\n" not in str(caught.value)


def test_a_first_image_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    files = [b"no image", FILES[1]]
    write_folder(tmp_path / "f", files, [0, 0])
    assert "0000.png: not an image" in refusal(stored_folder, tmp_path / "f")
    assert "row 0: not an image" in refusal(stored_parquet, write_parquet(tmp_path / "p.parquet", files, [0, 0]))
    shard = write_shard(tmp_path / "s.tar", sample(0, 0, b"no image") + sample(1))
    assert "000000.png: not an image" in refusal(stored_shards, shard)


def test_parquet_names_rows_without_an_image_and_files_that_changed(tmp_path: Path) -> None:
    files: list[bytes | None] = [*FILES[:3], None]
    stored = stored_parquet(write_parquet(tmp_path / "p.parquet", files, [0] * 4))
    with pytest.raises(ValueError, match=r"p\.parquet, row 3: has no image bytes"):
        stored.read(torch.tensor([3]))
    stored = stored_parquet(write_parquet(tmp_path / "p.parquet", FILES, LABELS))
    write_parquet(tmp_path / "p.parquet", FILES, LABELS, rows=3)
    with pytest.raises(ValueError, match=r"p\.parquet: has changed since it was read first"):
        stored.read(torch.tensor([2]))
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"p\.parquet: not a parquet file that can be read to its end"):
        stored.read(torch.tensor([4]))


def test_files_that_vanish_or_shrink_are_named(tmp_path: Path) -> None:
    stored = stored_folder(write_folder(tmp_path / "f"))
    (file,) = tmp_path.glob("f/train/*/0005.png")
    file.unlink()
    with pytest.raises(ValueError, match=r"0005\.png: cannot be read: No such file"):
        everything(stored)
    shard = write_shard(tmp_path / "s.tar", sample(0) + sample(1))
    stored = stored_shards(shard)
    os.truncate(shard, stored.reader.files.places[1, 1] + 10)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"s\.tar, 000001\.png: ends before the image does"):
        stored.read(torch.tensor([1]))
    shard.unlink()
    with pytest.raises(ValueError, match=r"s\.tar, byte \d+: cannot be read: No such file"):
        stored.read(torch.tensor([1]))


# --- shards that are no good ---


def linked(name: str, kind: bytes, to: str = "000000.png") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "expected at least one image with its class"),
        ([("readme.txt", b"nothing else")], "expected at least one image with its class"),
        (sample(0)[:1], "000000: has no class, in a member .cls"),
        (sample(0)[1:], "000000: has no image, in a member .png, .jpg"),
        (sample(0) + sample(0)[:1], "000000.png: there is another image of 000000"),
        ([*sample(0), ("000000.webp", b"")], "000000.webp: there is another image of 000000"),
        ([*sample(0), ("./000000.cls", b"0")], "000000.cls: there is another class of 000000"),
        (sample(0, b"cat"), "000000.cls: expected a class, a whole number as text, got 'cat'"),
        (sample(0, b"1.5"), "expected a class, a whole number as text, got '1.5'"),
        (sample(0, b"-1"), "expected a class, a whole number as text, got '-1'"),
        (sample(0, b""), "expected a class, a whole number as text, got ''"),
        (sample(0, b"1\n2"), r"expected a class, a whole number as text, got '1\n2'"),
        (sample(0, b"\xff\n"), r"expected a class, a whole number as text, got '\xff\n'"),
        (sample(0, b"1" * 40), "expected a class, a whole number as text, got '11111111111111111111111111111111'"),
        ([*sample(0), ("../1.png", FILES[1])], "../1.png: expected a relative, printable name"),
        ([*sample(0), ("a/../../1.png", FILES[1])], "a/../../1.png: expected a relative, printable name"),
        ([*sample(0), (r"..\1.png", FILES[1])], r"..\1.png: expected a relative, printable name"),
        ([*sample(0), ("/etc/1.png", FILES[1])], "/etc/1.png: expected a relative, printable name"),
        ([*sample(0), ("C:/1.png", FILES[1])], "C:/1.png: expected a relative, printable name"),
        ([*sample(0), ("1\n.png", FILES[1])], r"'1\n.png': expected a relative, printable name"),
        ([*sample(0), ("\udcff.png", FILES[1])], r"'\udcff.png': expected a relative, printable name"),
        ([*sample(0), linked("1.png", tarfile.SYMTYPE)], "1.png: expected a file or a folder, no link"),
        ([*sample(0), linked("1.png", tarfile.LNKTYPE)], "1.png: expected a file or a folder, no link"),
        ([*sample(0), linked("1.png", tarfile.SYMTYPE, "/etc/passwd")], "1.png: expected a file or a folder, no link"),
        ([*sample(0), linked("1.png", tarfile.FIFOTYPE)], "1.png: expected a file or a folder, no link"),
        ([*sample(0), linked("1.png", tarfile.CHRTYPE)], "1.png: expected a file or a folder, no link"),
    ],
)
def test_a_shard_with_other_members_is_refused(
    members: list[Member | tarfile.TarInfo], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shard = write_shard(tmp_path / "s.tar", members)
    before = sorted(tmp_path.parent.rglob("*"))
    assert said in refusal(stored_shards, shard)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_class_beyond_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s: expected classes below 100000, got 100000"):
        stored_shards(write_shard(tmp_path / "s.tar", sample(0, 100_000)))


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    assert "not a tar file that can be read to its end" in refusal(stored_shards, tmp_path / "s.tar")


def negative_size() -> bytes:
    """A member of -1,024 bytes, after which tarfile looks for the next one at the member itself."""
    header = bytearray(tarfile.TarInfo("1.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_member_of_negative_size_is_refused_instead_of_read_for_ever(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", sample(0))
    whole = shard.read_bytes()
    shard.write_bytes(negative_size() + whole)
    assert "s.tar" in refusal(stored_shards, shard)


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", sample(0) + sample(1))
    whole, end = shard.read_bytes(), stored_shards(shard).reader.files.places  # type: ignore[attr-defined]
    data = len(whole.rstrip(b"\0"))
    assert int(end[-1, 1]) < data < len(whole)
    for length in [*range(0, data, 97), *range(0, data, tarfile.BLOCKSIZE), data]:
        shard.write_bytes(whole[:length])
        refusal(stored_shards, shard)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_shard_with_a_changed_byte_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shard = write_shard(tmp_path_factory.getbasetemp() / "flipped.tar", sample(0) + sample(1))
    damaged = bytearray(shard.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    shard.write_bytes(damaged)
    found = read_or_refused(lambda path: everything(stored_shards(path)), shard)
    assert isinstance(found, str) or len(found) == 2  # no member is lost without a word


# --- orders ---


def of_blocks(sizes: Sequence[int]) -> Stored:
    blocks = torch.tensor(sizes, dtype=torch.int64)
    total = int(blocks.sum())
    return Stored(lambda rows: rows, torch.zeros(total, dtype=torch.int64), 1, "toy", (1, 1, 1), blocks)


SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=60).filter(any)


@given(SIZES, st.integers(0, 2**40))
def test_an_order_has_every_row_once_and_few_blocks_at_a_time(sizes: list[int], seed: int) -> None:
    stored = of_blocks(sizes)
    rows = order(stored, torch.Generator().manual_seed(seed))
    assert torch.equal(rows.sort().values, torch.arange(sum(sizes)))
    assert torch.equal(rows, order(stored, torch.Generator().manual_seed(seed)))
    if sizes != [1] * len(sizes):
        left, begun = dict(enumerate(sizes)), set()
        for block in block_of(stored.blocks, rows).tolist():
            left[block] -= 1
            begun.add(block)
            assert len(begun) <= WINDOW
            if not left[block]:
                begun.remove(block)


def test_an_order_of_rows_by_themselves_is_the_permutation_that_memory_has() -> None:
    stored, generator = of_blocks([1] * 100), torch.Generator().manual_seed(3)
    assert torch.equal(order(stored, generator), torch.randperm(100, generator=generator.manual_seed(3)))
    assert not torch.equal(order(stored, generator), torch.randperm(100, generator=generator.manual_seed(3)))


def test_every_place_of_an_order_is_as_likely_for_every_row() -> None:
    stored, generator = of_blocks([2] * 2 * WINDOW), torch.Generator().manual_seed(0)
    orders = torch.stack([order(stored, generator) for _ in range(4000)])
    rows = 4 * WINDOW
    counts = torch.stack([torch.bincount(orders[:, place], minlength=rows) for place in range(rows)])
    expected = len(orders) / rows
    assert (counts - expected).abs().max() < 6 * expected**0.5


@given(SIZES, st.data())
def test_a_part_has_its_rows_in_the_blocks_that_they_had(sizes: list[int], data: st.DataObject) -> None:
    whole = of_blocks(sizes)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(whole) - 1), min_size=1))))
    part = Stored(
        lambda rows: (rows % 251).to(torch.uint8).reshape(-1, 1, 1, 1), whole.labels, 1, "toy", (1, 1, 1), whole.blocks
    ).part(kept)
    assert torch.equal(part.read(torch.arange(len(kept))).flatten(), (kept % 251).to(torch.uint8))
    assert part.blocks.sum() == len(kept)
    counts = block_of(whole.blocks, kept).unique_consecutive(return_counts=True)[1]
    assert torch.equal(part.blocks, counts)


def test_parts_and_rows_are_checked(tmp_path: Path) -> None:
    stored = stored_shards(write_shards(tmp_path))
    with pytest.raises(ValueError, match="indices: expected them to ascend"):
        stored.part(torch.tensor([2, 1]))
    for rows in (torch.tensor([]), torch.tensor([], dtype=torch.int64), torch.tensor([[1]]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="rows must be a non-empty int64 vector"):
            stored.read(rows)
    for rows in (torch.tensor([-1]), torch.tensor([NUMBER])):
        with pytest.raises(ValueError, match=r"rows must lie in 0 \.\.\. 22"):
            stored.read(rows)
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        batches(stored, [], workers=-1)


def test_stored_sets_are_checked_when_made() -> None:
    zero = torch.zeros(3, dtype=torch.int64)

    def made(**changed: Any) -> Stored:
        fields: dict[str, Any] = {"reader": None, "labels": zero, "num_classes": 1, "name": "toy", "blocks": alone(3)}
        return Stored(**{**fields, "shape": (1, 2, 2), **changed})

    for changed, said in (
        ({"labels": zero[:0]}, "toy: labels must be a non-empty int64 vector"),
        ({"labels": zero.float()}, "toy: labels must be a non-empty int64 vector, got torch.float32"),
        ({"num_classes": 0}, "toy: labels must lie in 0 ... -1, got 0 ... 0"),
        ({"shape": (1, 0, 2)}, "toy: shape must be (C, H, W)"),
        ({"blocks": torch.tensor([2, 2])}, "toy: blocks must have the 3 rows that are labelled, got 4"),
        ({"blocks": torch.tensor([4, -1])}, "toy: blocks must be an int64 vector of numbers of rows"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            made(**changed)
    with pytest.raises(
        ValueError, match=r"toy: expected uint8 of shape \(1, 1, 2, 2\) from its reader, got torch.float32"
    ):
        made(reader=lambda rows: torch.zeros(1, 1, 2, 2)).read(zero[:1])


# --- batches ---


def epoch(stored: Stored, seed: int = 0) -> tuple[Tensor, ...]:
    return order(stored, torch.Generator().manual_seed(seed)).split(4)


def assert_batches(found: Iterator[tuple[Tensor, Tensor]], whole: Images, rows: Sequence[Tensor]) -> None:
    for chosen, (images, labels) in zip(rows, found, strict=True):
        assert torch.equal(images, whole.images[chosen])
        assert torch.equal(labels, whole.labels[chosen])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_an_epoch_was_left(stored: Stored, workers: int) -> None:
    whole, rows = everything(stored), epoch(stored)
    state = torch.get_rng_state()
    assert_batches(batches(stored, rows, workers), whole, rows)
    assert_batches(batches(stored, rows[3:], workers), whole, rows[3:])
    assert_batches(batches(stored, iter([*rows, *epoch(stored, 1)]), workers), whole, [*rows, *epoch(stored, 1)])
    assert torch.equal(torch.get_rng_state(), state)
    assert list(batches(stored, [], workers)) == []


def test_stored_sets_pickle_and_leave_what_they_have_open_behind(stored: Stored) -> None:
    whole = everything(stored)
    copy = pickle.loads(pickle.dumps(stored))
    assert len(pickle.dumps(stored)) < 10_000 < whole.images.numel() * 10
    assert_same(everything(copy), whole)
    part = pickle.loads(pickle.dumps(stored.part(torch.tensor([1, 5]))))
    assert torch.equal(part.read(torch.tensor([1])), whole.images[5:6])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_worker_arrives_as_one_line(workers: int, tmp_path: Path) -> None:
    stored = stored_folder(write_folder(tmp_path, [*FILES[:-1], b"no image"], [0] * NUMBER))
    others = multiprocessing.active_children()
    found = batches(stored, torch.arange(NUMBER).split(8), workers)
    for _ in range(2):
        next(found)
    with pytest.raises(ValueError, match=r"^\S+/train/class 0/0022\.png: not an image that can be decoded$") as caught:
        next(found)
    assert isinstance(caught.value, OSError)  # the disk's fault, not the program's
    del found, caught  # whose traceback holds the iterator
    assert processes_beside(others) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_gone_in_the_middle_arrives_as_one_line(workers: int, tmp_path: Path) -> None:
    stored = stored_folder(write_folder(tmp_path))
    (file,) = tmp_path.glob("train/*/0022.png")
    file.unlink()
    with pytest.raises(OSError, match=r"^\S+/train/class \d/0022\.png: cannot be read: No such file"):
        list(batches(stored, torch.arange(NUMBER).split(8), workers))


def processes_beside(others: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Those of this process that are none of the others, which earlier tests may have left to end by themselves."""
    gc.collect()
    return [child for child in multiprocessing.active_children() if child not in others]


@pytest.mark.parametrize("leave", ["close", "forget", "error"])
def test_iterators_that_are_left_leave_no_process_behind(leave: str, stored: Stored) -> None:
    others = multiprocessing.active_children()
    found = batches(stored, epoch(stored), workers=2)
    next(found)
    assert len(processes_beside(others)) == 2
    if leave == "close":
        found.close()  # type: ignore[attr-defined]
    elif leave == "error":
        with pytest.raises(RuntimeError, match="in the training"):
            for _ in found:
                raise RuntimeError("in the training")
    del found
    assert processes_beside(others) == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks who sent a signal")
def test_workers_outlast_signals_that_a_job_is_told_to_end_by(stored: Stored) -> None:
    whole, rows, others = everything(stored), epoch(stored), multiprocessing.active_children()
    found = batches(stored, rows, workers=2)
    first = [next(found), next(found)]  # one of each worker: both have begun
    workers = [str(child.pid) for child in processes_beside(others)]
    for told in ("-TERM", "-TERM", "-USR1"):
        subprocess.run(["kill", told, *workers], check=True)
    assert_batches(iter([*first, *found]), whole, rows)


LOST = r"^ChildProcessError: a process that reads images ahead was lost \(.*\), perhaps for want of memory$"


MISSED = """
import multiprocessing, sys, time, torch
from saltflat.data import batches, stored_folder
stored = stored_folder(sys.argv[1])
found = batches(stored, torch.arange(len(stored)).split(1), workers=2)
next(found)
multiprocessing.active_children()[0].kill()
if sys.argv[2] == "in a step":
    time.sleep(30)
list(found)
"""


@pytest.mark.parametrize("when", ["at a batch", "in a step"])
def test_a_worker_that_is_killed_is_missed(when: str, tmp_path: Path) -> None:
    """In a process of its own, since what torch raises then is raised wherever that is."""
    folder = write_folder(tmp_path, FILES, [0] * NUMBER)
    script = [sys.executable, "-c", MISSED, str(folder), when]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert re.search(LOST, ended.stderr, re.MULTILINE), ended.stderr
    assert ended.stderr.count("ChildProcessError: ") == 1


KILLED = """
import sys, torch, multiprocessing
from saltflat.data import batches, stored_folder
stored = stored_folder(sys.argv[1])
found = batches(stored, torch.arange(len(stored)).split(1), workers=2)
next(found)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "kill":
    sys.stdin.read()
raise SystemExit("the training failed")  # with the iterator alive
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("end", ["kill", "exit"])
def test_workers_end_when_their_process_does(end: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(write_folder(tmp_path)), end]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        try:
            assert end == "kill" or process.wait(timeout=20) == 1
            assert end == "exit" or all(map(alive, workers))
        finally:
            process.kill()
    until = time.monotonic() + 20  # torch's workers look every 5 seconds
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))


# --- memory ---


@dataclass(frozen=True)
class Counting:
    """A reader that adds a byte to a file for every batch that any process reads."""

    log: Path

    def __call__(self, rows: Tensor) -> Tensor:
        with self.log.open("ab") as opened:
            opened.write(b"x")
        return torch.zeros(len(rows), 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 2])
def test_few_batches_are_read_ahead(workers: int, tmp_path: Path) -> None:
    stored = Stored(Counting(tmp_path / "log"), torch.zeros(120, dtype=torch.int64), 1, "toy", (1, 2, 2), alone(120))
    for taken, _ in enumerate(batches(stored, torch.arange(120).split(2), workers), start=1):
        assert taken <= (tmp_path / "log").stat().st_size <= taken + 2 * workers
    assert taken == 60


@pytest.mark.parametrize("form", FORMATS)
def test_a_set_that_is_read_is_never_in_memory_whole(form: str, tmp_path: Path) -> None:
    number, size = 240, 48
    data = [png(image) for image in pixels(2, number, size, size, 3)]
    labels = [0] * number
    if form == "folder":
        stored = stored_folder(write_folder(tmp_path, data, labels))
    elif form == "parquet":
        stored = stored_parquet(write_parquet(tmp_path / "p.parquet", data, labels, rows=2))
    else:
        members = [(f"{i}.{kind}", text) for i in range(number) for kind, text in (("png", data[i]), ("cls", b"0"))]
        stored = stored_shards(write_shard(tmp_path / "s.tar", members))
    del data
    rows = epoch(stored)
    found = batches(stored, rows)
    next(found)
    arrow = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        most = max(pyarrow.total_allocated_bytes() for _ in found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batch = 4 * 3 * size * size
    assert peak < 6 * batch < number / 4 * batch / 8  # of numpy and Python; torch's own copy is one batch more
    assert most - arrow <= 2 * (WINDOW + 1) * 2 * 3 * size * size


def test_row_groups_are_read_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 20 * WINDOW
    file = write_parquet(tmp_path / "p.parquet", (FILES * 8)[:number], [0] * number, rows=2)
    stored, read = stored_parquet(file), []

    class Watched(pyarrow.parquet.ParquetFile):
        def read_row_group(self, i: int, *arguments: Any, **named: Any) -> Any:
            read.append(i)
            return super().read_row_group(i, *arguments, **named)

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Watched)
    stored = pickle.loads(pickle.dumps(stored))  # without what the first look has kept
    for _ in batches(stored, order(stored, torch.Generator().manual_seed(1)).split(7)):
        assert len(stored.reader.files.kept) <= WINDOW
    assert sorted(read) == list(range(number // 2))


# --- docs ---


def test_the_python_blocks_on_large_data_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "large-data.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "imagenet")
    write_hub(tmp_path / "hub")
    write_shards(tmp_path / "shards")
    np.save(tmp_path / "pixels.npy", PICTURES.transpose(0, 3, 1, 2))
    np.save(tmp_path / "classes.npy", np.array(LABELS))
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
