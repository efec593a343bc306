"""More training data out of published kinds of files, and every file that does not fit."""

import os
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.data import Images, labelled

LIKE = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), num_classes=10, name="cifar10 train")
X = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
Y = np.array([3, 9, 0, 3, 1])
PUBLISHED = {"data": X, "extrapolated_targets": Y}


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pickled(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def refusal(path: Path, like: Images = LIKE) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        labelled(path, like=like)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_or_refused(path: Path) -> Images | str:
    try:
        return labelled(path, like=LIKE)
    except ValueError as error:
        return str(error)


def are_the_images(read: Images) -> bool:
    return np.array_equal(read.images.numpy(), X.transpose(0, 3, 1, 2)) and np.array_equal(read.labels.numpy(), Y)


@pytest.mark.parametrize("image", ["image", "x"])
@pytest.mark.parametrize("label", ["label", "y"])
@pytest.mark.parametrize("x", [X, np.ascontiguousarray(X.transpose(0, 3, 1, 2))], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_is_read_in_either_layout(image: str, label: str, x: Any, save: Any, tmp_path: Path) -> None:
    save(tmp_path / "generated.npz", **{image: x, label: Y.astype(np.int32), "more": np.zeros(2)})
    read = labelled(tmp_path / "generated.npz", like=LIKE)
    assert are_the_images(read)
    assert (read.num_classes, read.name) == (10, "generated")
    assert read.images.is_contiguous()


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_a_pickle_is_read_whatever_its_name(protocol: int, keys: Any, tmp_path: Path) -> None:
    content = {keys(name): array for name, array in PUBLISHED.items()} | {
        "prediction_model": "checkpoint",
        "epoch": 200,
    }
    read = labelled(pickled(tmp_path / "pseudo.npz", content, protocol), like=LIKE)
    assert are_the_images(read)
    read.images[0] = 0  # memory of its own, writable


def test_grey_images_need_no_axis_for_their_one_channel(tmp_path: Path) -> None:
    grey = Images(LIKE.images[:, :1], LIKE.labels, num_classes=10, name="grey")
    for x in (X[..., :1], X[..., 0], X[..., None, 0].transpose(0, 3, 1, 2)):
        read = labelled(npz(tmp_path / "grey.npz", x=x, y=Y), like=grey)
        assert np.array_equal(read.images[:, 0].numpy(), X[..., 0])


def test_another_shape_is_refused(tmp_path: Path) -> None:
    for x, shape in ((X[:, :28, :28], "(3, 28, 28)"), (X[:, :28], "(3, 28, 32)"), (X[..., :1], "(1, 32, 32)")):
        message = refusal(npz(tmp_path / "other.npz", image=x, label=Y))
        assert f"images: expected shape (3, 32, 32), (C, H, W) of cifar10 train, got {shape}" in message
        message = refusal(pickled(tmp_path / "other.pickle", {"data": x, "extrapolated_targets": Y}))
        assert f"images: expected shape (3, 32, 32), (C, H, W) of cifar10 train, got {shape}" in message


def test_another_number_of_classes_is_refused_and_fewer_are_not(tmp_path: Path) -> None:
    for labels in (Y + 1, Y.astype(np.uint8) * 28):
        message = refusal(npz(tmp_path / "hundred.npz", image=X, label=labels))
        assert f"labels: expected 0 ... 9, as cifar10 train has, got {labels.max()}" in message
    assert labelled(npz(tmp_path / "one.npz", image=X, label=Y * 0), like=LIKE).num_classes == 10


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


BAD = {
    "no image": ({"images": X, "label": Y}, "expected one array image or x in it, found 0"),
    "no label": ({"image": X, "labels": Y}, "expected one array label or y in it, found 0"),
    "two sets of images": ({"image": X, "x": X, "label": Y}, "expected one array image or x in it, found 2"),
    "two sets of labels": ({"image": X, "y": Y, "label": Y}, "expected one array label or y in it, found 2"),
    "floats": ({"image": X / 255, "label": Y}, "images: expected uint8, 0 ... 255, got float64"),
    "two axes": ({"x": X[:, :3], "y": Y}, "images: expected 1 or 3 channels, on either axis 1 or axis 3"),
    "soft labels": (
        {"image": X, "label": np.eye(5, 10)},
        "labels: expected one class an image, got soft labels (5, 10)",
    ),
    "scores": ({"image": X, "label": Y / 1}, "labels: expected whole numbers of shape (5,), got float64"),
    "fewer labels": (
        {"image": X, "label": Y[1:]},
        "labels: expected whole numbers of shape (5,), got int64 of shape (4,)",
    ),
    "negative": ({"image": X, "label": Y - 1}, "labels: expected classes >= 0, got -1"),
    "code": ({"image": X, "label": np.array([Harmful()] * 5)}, "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_npz_file_of_anything_else_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, words = BAD[name]
    assert words in refusal(npz(Path("bad.npz"), **content))
    assert not (tmp_path / "harmed").exists()


BAD_PICKLES = {
    "a list": ([X, Y], "expected a dictionary with the arrays data and extrapolated_targets"),
    "no data": ({"extrapolated_targets": Y}, "expected a dictionary with the arrays data and extrapolated_targets"),
    "no labels": ({"data": X}, "expected a dictionary with the arrays data and extrapolated_targets"),
    "labels in a list": ({**PUBLISHED, "extrapolated_targets": Y.tolist()}, "expected a dictionary with the arrays"),
    "rows": (
        {**PUBLISHED, "data": X.reshape(5, -1)},
        "images: expected images (N, C, H, W), (N, H, W, C) or (N, H, W)",
    ),
    "soft labels": ({**PUBLISHED, "extrapolated_targets": np.eye(5)}, "got soft labels (5, 5), which are not read"),
    "code": ({**PUBLISHED, "more": Harmful()}, "refused, the pickle names 'posix.mkdir'"),
    "code for labels": ({**PUBLISHED, "extrapolated_targets": Harmful()}, "refused, the pickle names 'posix.mkdir'"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_pickle_of_anything_else_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, words = BAD_PICKLES[name]
    assert words in refusal(pickled(Path("bad.pickle"), content))
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_neither_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match="not found; expected an npz file or a pickle of images and labels"):
            labelled(path, like=LIKE)
    for data in (b"", b"text", b"\x80"):
        (tmp_path / "other").write_bytes(data)
        assert (
            "expected a whole npz file" in (message := refusal(tmp_path / "other")) or "not a whole pickle" in message
        )


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_a_file_that_is_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    whole = (
        npz(tmp_path / "whole.npz", image=X, label=Y) if kind == "npz" else pickled(tmp_path / "whole", PUBLISHED)
    ).read_bytes()
    for length in [*range(300), *range(300, len(whole) - 300, 499), *range(len(whole) - 300, len(whole))]:
        file.write_bytes(whole[:length])
        refusal(file)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), kind=st.sampled_from(["npz", "pickle"]))
def test_an_altered_file_gives_images_or_one_line(data: Any, kind: str, tmp_path_factory: Any) -> None:
    """An npz file has checksums, and gives the same images then; a pickle has none."""
    folder = tmp_path_factory.mktemp("altered")
    file = npz(folder / "a.npz", image=X, label=Y) if kind == "npz" else pickled(folder / "a", PUBLISHED)
    damaged = bytearray(file.read_bytes())
    near_the_ends = st.one_of(st.integers(0, 250), st.integers(len(damaged) - 250, len(damaged) - 1))
    damaged[data.draw(st.one_of(near_the_ends, st.integers(0, len(damaged) - 1)))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    read = read_or_refused(file)
    if isinstance(read, str):
        assert "\n" not in read
    else:
        assert kind == "pickle" or are_the_images(read)


def test_a_large_npz_file_is_in_memory_once(tmp_path: Path) -> None:
    x = np.zeros((5000, 32, 32, 3), np.uint8)
    file = npz(tmp_path / "generated.npz", image=x, label=np.zeros(5000, int))
    tracemalloc.start()
    try:
        read = labelled(file, like=LIKE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read.images.numel() == x.nbytes
    assert x.nbytes <= peak < 1.2 * x.nbytes
