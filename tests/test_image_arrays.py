"""Images of one's own out of an npz file, and every file that is none."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import Harmful, pixels, read_or_refused, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.data import image_arrays
from saltflat.data.image_arrays import MOST_CLASSES, channels_first

Y = np.array([0, 2, 1])


def four(x: Any, y: Any = Y) -> dict[str, Any]:
    return {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": np.array([0, 1])}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("label", [np.uint8, np.int64, np.dtype(">i4")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_layout_gives_the_same_images(save: Any, label: Any, channels: int, tmp_path: Path) -> None:
    x = pixels(0, 3, channels, 5, 4)
    layouts = [x, np.moveaxis(x, 1, 3), np.asfortranarray(x), np.asfortranarray(np.moveaxis(x, 1, 3))]
    for layout in layouts + ([x[:, 0]] if channels == 1 else []):
        save(tmp_path / "mine.npz", **four(layout, Y.astype(label)))
        splits = image_arrays(tmp_path / "mine.npz")
        assert np.array_equal(splits.train.images.numpy(), x)
        assert np.array_equal(splits.test.images.numpy(), x[:2])
        assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 2, 1], [0, 1])
        assert splits.train.images.is_contiguous()
    assert splits.train.num_classes == splits.test.num_classes == 3
    assert (splits.train.name, splits.test.name) == ("mine train", "mine test")


@pytest.mark.parametrize("largest", [5, MOST_CLASSES - 1])
def test_a_class_may_be_in_the_test_set_alone(largest: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **{**four(pixels(0, 3, 4, 4)), "y_test": np.array([largest, 0], np.uint64)})
    assert image_arrays(tmp_path / "mine.npz").train.num_classes == largest + 1


@settings(deadline=None, max_examples=40)
@given(
    number=st.integers(1, 8),
    channels=st.sampled_from([1, 3]),
    height=st.sampled_from([2, 4, 5]),
    width=st.integers(1, 5),
    at_a_time=st.integers(1, 4),
)
def test_moving_the_channels_within_the_array_is_a_permutation_of_axes(
    number: int, channels: int, height: int, width: int, at_a_time: int
) -> None:
    x = pixels(0, number, height, width, channels)
    expected = torch.from_numpy(x.copy()).permute(0, 3, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(channels_first.__globals__, "AT_A_TIME", at_a_time)
        moved = channels_first(x, "x")
    assert torch.equal(moved, expected)
    assert moved.data_ptr() == x.ctypes.data


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_never_in_memory_twice(save: Any, tmp_path: Path) -> None:
    train = pixels(0, 4000, 32, 32, 3)
    save(tmp_path / "mine.npz", x_train=train, y_train=np.zeros(4000, int), x_test=train[:2], y_test=np.zeros(2, int))
    image_arrays(tmp_path / "mine.npz")  # what is imported late has been
    tracemalloc.start()
    try:
        splits = image_arrays(tmp_path / "mine.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert splits.train.images.numel() == train.nbytes
    assert train.nbytes <= peak < 1.2 * train.nbytes


X = pixels(0, 3, 1, 4, 4)
BAD = {
    "no x_test": ({"x_train": X, "y_train": Y, "y_test": Y}, "there is no array 'x_test' in it"),
    "floats": (four(X / 255), "x_train: expected uint8, 0 ... 255, got float64"),
    "another integer": (four(X.astype(np.int64)), "x_train: expected uint8, 0 ... 255, got int64"),
    "rows": (four(X.reshape(3, 16)), "x_train: expected images (N, C, H, W), (N, H, W, C) or (N, H, W), at least one"),
    "nothing": (four(X[:0], Y[:0]), "x_train: expected images (N, C, H, W)"),
    "two channels": (four(pixels(0, 3, 2, 4, 4)), "x_train: expected 1 or 3 channels, on either axis 1 or axis 3, got"),
    "two axes": (four(pixels(0, 3, 3, 4, 1)), "x_train: expected 1 or 3 channels, on either axis 1 or axis 3, got"),
    "one row": (four(pixels(0, 3, 1, 4, 3)), "x_train: expected 1 or 3 channels, on either axis 1 or axis 3, got"),
    "two shapes": ({**four(X), "x_test": pixels(0, 2, 4, 5)}, "one shape (C, H, W), got (1, 4, 4) and (1, 4, 5)"),
    "fewer labels": (four(X, Y[:2]), "y_train: expected whole numbers of shape (3,), got int64 of shape (2,)"),
    "a column": (four(X, Y[:, None]), "y_train: expected whole numbers of shape (3,), got int64 of shape (3, 1)"),
    "labels in floats": (four(X, Y / 1), "y_train: expected whole numbers of shape (3,), got float64"),
    "soft labels": (four(X, np.eye(3)), "y_train: expected one class an image, got soft labels (3, 3), which are not"),
    "negative labels": (four(X, Y - 1), "y_train: expected classes >= 0, got -1"),
    "wide labels": (
        four(X, Y + MOST_CLASSES - 2),
        f"y_train: expected classes below {MOST_CLASSES}, got {MOST_CLASSES}",
    ),
    "huge labels": (four(X, Y * 10**12), f"y_train: expected classes below {MOST_CLASSES}, got 2000000000000"),
    "labels that are no int64": (
        four(X, Y.astype(np.uint64) + np.uint64(2**63)),
        f"y_train: expected classes below {MOST_CLASSES}, got 9223372036854775810",
    ),
    "code": (
        four(X, np.array([Harmful()] * 3)),
        "expected a whole npz file of numbers: Object arrays cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, words = BAD[name]
    np.savez("bad.npz", **content)
    assert words in refusal(image_arrays, Path("bad.npz"))
    assert not (tmp_path / "harmed").exists()


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match="not found; expected an npz file"):
            image_arrays(path)
    np.save(tmp_path / "one.npy", X)
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "empty.npz"):
        assert "expected a whole npz file of numbers" in refusal(image_arrays, tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_that_is_cut_anywhere_is_refused(save: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    save(file, **four(X))
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert "expected a whole npz file of numbers" in refusal(image_arrays, file)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), packed=st.booleans())
def test_an_altered_file_gives_the_same_or_one_line(data: Any, packed: bool, tmp_path_factory: Any) -> None:
    """Every array has a checksum in a zip file, and its header is under it, too."""
    content = four(X)
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **content)
    damaged = bytearray(buffer.getvalue())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.mktemp("altered") / "mine.npz"
    file.write_bytes(damaged)
    read = read_or_refused(image_arrays, file)
    if not isinstance(read, str):
        assert np.array_equal(read.train.images.numpy(), X)
        assert np.array_equal(read.train.labels.numpy(), Y)


def test_an_array_that_is_shorter_than_its_member_is_refused(tmp_path: Path) -> None:
    """A header that asks for half of the numbers, or for half of each, would give others without a word."""
    np.savez(tmp_path / "whole.npz", **four(X))
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "mine.npz", "w") as mine:
        for member in whole.namelist():
            mine.writestr(member, whole.read(member).replace(b"<i8", b"<i4"))
    assert "y_train.npy goes on behind its array" in refusal(image_arrays, tmp_path / "mine.npz")
