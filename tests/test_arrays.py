"""Inputs of one's own out of an npz file, and every file that is none."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from damaged import Harmful, read_or_refused, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.data import arrays

Y = np.array([0, 1, 1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4, 4)])
def test_what_was_saved_comes_back(dtype, shape, tmp_path):
    x = (np.random.default_rng(0).random(shape) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    np.savez(tmp_path / "mine.npz", x=x, y=Y.astype(np.int32), more=Y)
    inputs, labels = arrays(tmp_path / "mine.npz")
    assert np.array_equal(inputs.numpy(), x)
    assert inputs.dtype == (torch.float32 if dtype == np.float16 else torch.from_numpy(x).dtype)
    assert torch.equal(labels, torch.from_numpy(Y))


BAD = {
    "no x": ({"y": Y}, "there is no array 'x' in it"),
    "no y": ({"x": np.zeros((3, 2))}, "there is no array 'y' in it"),
    "integers": ({"x": np.zeros((3, 2), np.int64), "y": Y}, "x: expected uint8 or floating numbers, got int64"),
    "a vector": ({"x": np.zeros(3), "y": Y}, "x: expected shape (N, ...)"),
    "empty": ({"x": np.zeros((0, 2)), "y": Y[:0]}, "with at least one number, got (0, 2)"),
    "other labels": (
        {"x": np.zeros((3, 2)), "y": Y[:2]},
        "y: expected integers of shape (3,), got int64 of shape (2,)",
    ),
    "labels of a column": ({"x": np.zeros((3, 2)), "y": Y[:, None]}, "y: expected integers of shape (3,)"),
    "labels in floats": ({"x": np.zeros((3, 2)), "y": Y / 1}, "y: expected integers of shape (3,), got float64"),
    "negative labels": ({"x": np.zeros((3, 2)), "y": Y - 1}, "y: expected classes >= 0, got -1"),
    "huge labels": ({"x": np.zeros((3, 2)), "y": Y * 10**12}, "y: expected classes below 100000, got 1000000000000"),
    "labels that are no int64": (
        {"x": np.zeros((3, 2)), "y": Y.astype(np.uint64) + np.uint64(2**63)},
        "y: expected classes below 100000, got 9223372036854775809",
    ),
    "0 to 255": (
        {"x": np.full((3, 2), 255.0), "y": Y},
        "x: expected numbers in [0, 1], got 255 to 255; divide by 255?",
    ),
    "NaN": ({"x": np.full((3, 2), np.nan), "y": Y}, "x: expected numbers in [0, 1], got nan"),
    "code": ({"x": np.array([Harmful()] * 3), "y": Y}, "expected a whole npz file of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = BAD[name]
    np.savez("bad.npz", **content)
    assert words in refusal(arrays, "bad.npz")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("cut", [0, 10, 0.5, 0.9])
def test_a_file_that_is_cut_is_refused(cut, tmp_path):
    np.savez(tmp_path / "whole.npz", x=np.zeros((3, 200)), y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: int(cut * len(whole)) if cut < 1 else cut])
    assert "expected a whole npz file of numbers" in refusal(arrays, tmp_path / "cut.npz")


@pytest.mark.parametrize("name", ["y.npy", "x.npy"])
def test_an_array_that_is_shorter_than_its_member_is_refused(name, tmp_path):
    """A header that asks for half of the bytes of each number would give others without a word."""
    np.savez(tmp_path / "whole.npz", x=np.zeros((3, 200)), y=Y)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "mine.npz", "w") as mine:
        for member in whole.namelist():
            data = whole.read(member)
            mine.writestr(member, data.replace(b"<i8", b"<i4").replace(b"<f8", b"<f4") if member == name else data)
    assert f"expected a whole npz file of numbers: {name} goes on behind its array" in refusal(
        arrays, tmp_path / "mine.npz"
    )


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_an_altered_file_gives_the_same_or_one_line(data, tmp_path_factory):
    x, buffer = np.random.default_rng(0).random((3, 5)), io.BytesIO()
    np.savez(buffer, x=x, y=Y)
    damaged = bytearray(buffer.getvalue())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.mktemp("altered") / "mine.npz"
    file.write_bytes(damaged)
    read = read_or_refused(arrays, file)
    if not isinstance(read, str):
        assert np.array_equal(read[0].numpy(), x)
        assert np.array_equal(read[1].numpy(), Y)


def test_numbers_keep_their_precision_in_either_byte_order(tmp_path):
    x = np.random.default_rng(0).random((3, 5))
    np.savez(tmp_path / "mine.npz", x=x.astype(">f8"), y=Y.astype(">i4"))
    inputs, labels = arrays(tmp_path / "mine.npz")
    assert torch.equal(inputs, torch.from_numpy(x))
    assert torch.equal(labels, torch.from_numpy(Y))


def test_files_that_are_no_npz_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((3, 2)))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": 1}))
    for path in (tmp_path / "one.npy", tmp_path / "pickle.npz", tmp_path / "none.npz", tmp_path):
        assert "expected a whole npz file of numbers" in refusal(arrays, path)
