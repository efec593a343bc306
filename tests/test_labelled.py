"""More training data out of published kinds of files, and every file that does not fit."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import Harmful, pixels, read_or_refused, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from saltflat.data import Images, labelled, pickles

LIKE = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), num_classes=10, name="cifar10 train")
X = pixels(0, 5, 32, 32, 3)
Y = np.array([3, 9, 0, 3, 1])
PUBLISHED = {"data": X, "extrapolated_targets": Y}


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pickled(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def as_like(path: Path) -> Images:
    return labelled(path, like=LIKE)


def refused(path: Path) -> str:
    return refusal(as_like, path)


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", [str, str.encode])
@pytest.mark.parametrize("x", [X, np.asfortranarray(X), X[:, ::-1][:, ::-1], X.transpose(0, 3, 1, 2)])
def test_a_pickle_is_read_whatever_its_name(protocol: int, keys: Any, x: Any, tmp_path: Path) -> None:
    content = {keys(name): array for name, array in {**PUBLISHED, "data": x}.items()} | {
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
        message = refused(npz(tmp_path / "other.npz", image=x, label=Y))
        assert f"images: expected shape (3, 32, 32), (C, H, W) of cifar10 train, got {shape}" in message
        message = refused(pickled(tmp_path / "other.pickle", {"data": x, "extrapolated_targets": Y}))
        assert f"images: expected shape (3, 32, 32), (C, H, W) of cifar10 train, got {shape}" in message


def test_another_number_of_classes_is_refused_and_fewer_are_not(tmp_path: Path) -> None:
    for labels in (Y + 1, Y.astype(np.uint8) * 28):
        message = refused(npz(tmp_path / "hundred.npz", image=X, label=labels))
        assert f"labels: expected 0 ... 9, as cifar10 train has, got {labels.max()}" in message
    assert labelled(npz(tmp_path / "one.npz", image=X, label=Y * 0), like=LIKE).num_classes == 10


BAD = {
    "no image": ({"images": X, "label": Y}, "there is no array 'image' or 'x' in it"),
    "no label": ({"image": X, "labels": Y}, "there is no array 'label' or 'y' in it"),
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
    assert words in refused(npz(Path("bad.npz"), **content))
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
    "code": ({**PUBLISHED, "more": Harmful()}, f"refused, the pickle names '{Harmful.NAME}'"),
    "code for labels": (
        {**PUBLISHED, "extrapolated_targets": Harmful()},
        f"refused, the pickle names '{Harmful.NAME}'",
    ),
}


A = pixels(1, 5, 4, 3, 2)
LAYOUTS = [
    A, np.asfortranarray(A), A.transpose(0, 3, 1, 2), A.transpose(3, 0, 2, 1), A[::2, :, ::-2], A[0, 0, 0, 0, ...],
    A.astype(">i4"), A.astype(">f8").T, A / np.float32(3), A > 99,
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("x", LAYOUTS, ids=lambda x: f"{x.dtype.str}{x.strides}")
def test_an_array_comes_out_of_a_pickle_as_it_went_in(x: Any, protocol: int) -> None:
    read = pickles.load(pickle.dumps({"x": x}, protocol=protocol), "x")["x"]
    assert read.dtype == x.dtype
    assert np.array_equal(read, x)
    read[...] = 0


def test_no_two_arrays_of_a_pickle_share_memory() -> None:
    shared = bytearray(8)
    first, second = (Pickled(shared, np.dtype("u1"), (8,), "C") for _ in range(2))
    read = pickles.load(pickle.dumps({"first": first, "second": second}, protocol=5), "x")
    assert not np.shares_memory(read["first"], read["second"])


class Pickled:
    """An object whose pickle is a call of numpy's `_frombuffer`, by whatever arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return from_buffer, self.arguments


from_buffer = np.ones(1).__reduce_ex__(5)[0]
EIGHT = bytes(8)
BAD_BUFFERS = {
    "objects": ((EIGHT, np.dtype(object), (1,), "C"), "refused, the pickle holds an array of 'O8'"),
    "text": ((EIGHT, np.dtype("S8"), (1,), "C"), "refused, the pickle holds an array of 'S8'"),
    "records": ((EIGHT, np.dtype("i4,i4"), (1,), "C"), "refused, the pickle holds an array of 'V8'"),
    "a type by name": ((EIGHT, "O", (1,), "C"), "refused, the pickle holds an array of something else than bytes"),
    "a buffer that is none": (("text", np.dtype("i8"), (1,), "C"), "refused, the pickle holds an array of something"),
    "a list": (([0] * 8, np.dtype("u1"), (8,), "C"), "refused, the pickle holds an array of something else than bytes"),
    "another array": ((np.zeros(8), np.dtype("i8"), (8,), "C"), "refused, the pickle holds an array of something else"),
    "fewer bytes": ((EIGHT, np.dtype("i8"), (2,), "C"), "not a whole pickle (ValueError: cannot reshape array"),
    "more bytes": ((EIGHT, np.dtype("i4"), (1,), "C"), "not a whole pickle (ValueError: cannot reshape array"),
    "half of a number": ((EIGHT[:7], np.dtype("i4"), (1,), "C"), "not a whole pickle (ValueError: buffer size"),
    "no order": ((EIGHT, np.dtype("i8"), (1,), "X"), "not a whole pickle (ValueError: order must be"),
}


@pytest.mark.parametrize("name", BAD_BUFFERS)
def test_a_buffer_of_anything_else_than_numbers_is_refused(name: str, tmp_path: Path) -> None:
    arguments, words = BAD_BUFFERS[name]
    content = {**PUBLISHED, "extrapolated_targets": Pickled(*arguments)}
    assert words in refused(pickled(tmp_path / "bad.pickle", content, protocol=5))


def test_buffers_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(PUBLISHED, protocol=5, buffer_callback=buffers.append)
    assert buffers
    (tmp_path / "bad.pickle").write_bytes(data)
    assert "not a whole pickle (UnpicklingError" in refused(tmp_path / "bad.pickle")


@pytest.mark.parametrize("state", [{"kept": None}, (None, {"__defaults__": ()})], ids=["in its dict", "by setattr"])
@pytest.mark.parametrize(
    "part",
    ["numpy._core.numeric _frombuffer", "numpy._core.multiarray _reconstruct", "numpy dtype", "numpy ndarray",
     "_codecs encode"],
)  # fmt: skip
def test_a_pickle_cannot_change_its_reader(part: str, state: Any, tmp_path: Path) -> None:
    """BUILD, the operation b, gives a state to any object, and so to the parts of the reader that a pickle may name."""
    name = b"c" + part.replace(" ", "\n").encode() + b"\n"
    frame = pickle.dumps(state, protocol=2)[2:-1]
    (tmp_path / "bad.pickle").write_bytes(b"\x80\x02" + name + frame + b"b.")
    assert "not a whole pickle" in refused(tmp_path / "bad.pickle")


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_pickle_of_anything_else_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, words = BAD_PICKLES[name]
    assert words in refused(pickled(Path("bad.pickle"), content))
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_neither_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match="not found; expected an npz file or a pickle of images and labels"):
            labelled(path, like=LIKE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected a whole npz file of numbers: File is not a zip file"),
        (b"text", "expected a whole npz file of numbers: File is not a zip file"),
        (b"\x80", "not a whole pickle (ValueError: not enough data in stream to read uint1)"),
    ],
)
def test_a_file_is_taken_for_what_it_begins_as(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(data)
    assert refused(tmp_path / "other") == f"{tmp_path / 'other'}: {words}"


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_a_file_that_is_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    whole = (
        npz(tmp_path / "whole.npz", image=X, label=Y) if kind == "npz" else pickled(tmp_path / "whole", PUBLISHED)
    ).read_bytes()
    for length in [*range(300), *range(300, len(whole) - 300, 499), *range(len(whole) - 300, len(whole))]:
        file.write_bytes(whole[:length])
        refused(file)


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
    read = read_or_refused(as_like, file)
    if not isinstance(read, str):
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
