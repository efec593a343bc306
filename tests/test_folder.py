"""Folders of image files, one a class; every one was made here."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image as pillow
import pytest
import torch
from damaged import pixels, read_or_refused, refusal
from PIL import ExifTags
from torch import Tensor

from saltflat.data import folder, tiny_imagenet


def noise(seed: int, *shape: int) -> Any:
    return pixels(seed, *(shape or (5, 4, 3)))


def save(file: Path, image: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (pillow.fromarray(image) if isinstance(image, np.ndarray) else image).save(file)
    return file


def as_tensor(*images: Any) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


FILES = {  # in the order in which they are read
    "train/Zebra/1.png": 0, "train/Zebra/2.png": 0, "train/ant/1.png": 1, "train/ant/10.bmp": 1, "train/ant/9.png": 1,
    "train/bee/b.PNG": 2, "test/ant/1.png": 1, "test/bee/0.png": 2, "test/bee/1.png": 2,
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in reversed(list(enumerate(FILES))):
        save(tmp_path / "insects" / name, noise(seed))
    return tmp_path / "insects"


def test_classes_and_files_are_in_the_order_of_their_names(root: Path) -> None:
    (root / "train" / "readme.txt").write_text("beside the classes")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / ".DS_Store").write_bytes(b"hidden")
    splits = folder(root)
    for split, part in (("train", splits.train), ("test", splits.test)):
        read = [(seed, label) for seed, (name, label) in enumerate(FILES.items()) if name.startswith(split)]
        assert torch.equal(part.images, as_tensor(*(noise(seed) for seed, _ in read)))
        assert part.labels.tolist() == [label for _, label in read]
        assert (part.num_classes, part.name) == (3, f"insects {split}")
        assert part.images.is_contiguous()


def test_val_is_the_test_set_where_there_is_no_other(root: Path) -> None:
    expected = folder(root).test
    (root / "test").rename(root / "val")
    assert torch.equal(folder(root).test.images, expected.images)
    save(root / "test" / "ant" / "1.png", noise(77))
    assert torch.equal(folder(root).test.images, as_tensor(noise(77)))


def test_links_are_followed(root: Path, tmp_path: Path) -> None:
    expected = folder(root)
    (tmp_path / "links").mkdir()
    (root / "train" / "ant").rename(tmp_path / "ants")
    (root / "train" / "ant").symlink_to(tmp_path / "ants")
    (root / "test" / "bee" / "0.png").rename(tmp_path / "bee.png")
    (root / "test" / "bee" / "0.png").symlink_to(tmp_path / "bee.png")
    (tmp_path / "links" / "all").symlink_to(root)
    read = folder(tmp_path / "links" / "all")
    assert torch.equal(read.train.images, expected.train.images)
    assert torch.equal(read.test.images, expected.test.images)


def test_grey_is_kept_only_when_everything_is_grey(tmp_path: Path) -> None:
    train, test = noise(0, 5, 4), noise(1, 5, 4)
    save(tmp_path / "train" / "a" / "0.png", train)
    save(tmp_path / "test" / "a" / "0.png", test)
    splits = folder(tmp_path)
    assert torch.equal(splits.train.images[0, 0], torch.from_numpy(train))
    assert splits.test.images.shape == (1, 1, 5, 4)
    save(tmp_path / "test" / "a" / "1.png", noise(2))
    assert torch.equal(folder(tmp_path).train.images, as_tensor(np.dstack([train] * 3)))


def test_jpeg_is_decoded_as_pillow_does(tmp_path: Path) -> None:
    file = save(tmp_path / "train" / "a" / "0.JPEG", noise(0))
    save(tmp_path / "test" / "a" / "0.jpg", noise(0))
    splits = folder(tmp_path)
    assert torch.equal(splits.train.images, as_tensor(np.asarray(pillow.open(file))))
    assert torch.equal(splits.test.images, splits.train.images)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nothing: not found; expected a folder with train/ and test/ \(or val/"
    ):
        folder(tmp_path / "nothing")
    assert "expected train/ in it, with a folder for each class" in refusal(folder, tmp_path)
    (tmp_path / "train").mkdir()
    assert "expected test/ or val/ in it, with a folder for each class" in refusal(folder, tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(b"beside the classes")
    assert f"{tmp_path / 'train'}: expected a folder for each class in it, found none" in refusal(folder, tmp_path)
    save(tmp_path / "train" / "a" / "0.png", noise(0))
    assert f"{tmp_path / 'test'}: expected a folder for each class in it, found none" in refusal(folder, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_named(split: str, root: Path) -> None:
    for file in (root / split / "bee").iterdir():
        file.unlink()
    (root / split / "bee" / ".hidden").touch()
    assert f"{root / split / 'bee'}: expected images in it, found none" in refusal(folder, root)


def test_a_class_of_the_test_set_has_to_be_one_of_the_training_set(root: Path) -> None:
    save(root / "test" / "wasp" / "0.png", noise(0))
    assert f"{root / 'test' / 'wasp'}: expected one of the classes in {root / 'train'}" in refusal(folder, root)


@pytest.mark.parametrize("flat", ["test/1.png", "test/images/1.png"])
def test_a_test_set_without_labels_is_refused_with_its_remedy(flat: str, root: Path) -> None:
    (root / "test").rename(root / "val")
    expected = folder(root).test.images
    save(root / flat, noise(0))
    message = refusal(folder, root)
    assert "expected one of the classes" in message or "expected a folder for each class in it, found none" in message
    assert message.endswith(f"; without labels it is of no use: move {root / 'test'} away to have val/ as the test set")
    (root / "test").rename(root / "unlabelled")
    assert torch.equal(folder(root).test.images, expected)


def test_no_remedy_is_offered_where_there_is_none(root: Path) -> None:
    save(root / "test" / "wasp" / "0.png", noise(0))
    assert refusal(folder, root).endswith("which has none of that name")
    (root / "test").rename(root / "val")
    assert refusal(folder, root).endswith("which has none of that name")


@pytest.mark.parametrize("name", ["train/bee/c.png", "test/bee/2.png"])
def test_a_file_that_does_not_fit_is_named(name: str, root: Path) -> None:
    file = root / name
    save(file, noise(0, 6, 4, 3))
    assert f"{file}: has 4x6 pixels; the first training image has 4x5" in refusal(folder, root)
    save(file, pillow.new("I;16", (4, 5)))
    assert f"{file}: has mode I;16; expected 8 bits per channel" in refusal(folder, root)
    file.write_text("no image")
    assert f"{file}: not an image that can be decoded" in refusal(folder, root)
    file.unlink()
    file.symlink_to(root / "nowhere")
    assert f"{file}: cannot be read: No such file or directory" in refusal(folder, root)
    file.unlink()
    file.mkdir()
    assert f"{file}: cannot be read: Is a directory" in refusal(folder, root)


def test_a_file_that_may_not_be_read_is_named_as_such(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == root / "test" / "bee" / "1.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return reading(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refusal(folder, root) == f"{root / 'test' / 'bee' / '1.png'}: cannot be read: Permission denied"


# What an image becomes by each orientation of TIFF 6.0: which side of the picture its first row and column are.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_images_stand_as_their_exif_says(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    expected = np.ascontiguousarray(UPRIGHT[orientation](noise(0)))
    for name in ("train", "test"):
        (tmp_path / name / "a").mkdir(parents=True)
        pillow.fromarray(noise(0)).save(tmp_path / name / "a" / f"turned.{kind}", exif=exif)
        save(tmp_path / name / "a" / "upright.png", expected)
    splits = folder(tmp_path)
    assert torch.equal(splits.train.images, as_tensor(expected, expected))
    assert torch.equal(splits.test.images, as_tensor(expected, expected))


def test_the_exif_of_a_jpeg_counts_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    exif = pillow.Exif()
    exif[ExifTags.Base.Orientation] = 6
    good = exif.tobytes()
    for name, data in (("train", good), ("test", b"Exif\0\0no exif"), ("test", good[:-6]), ("test", good[:12])):
        (tmp_path / name / "a").mkdir(parents=True, exist_ok=True)
        turned = noise(0) if name == "train" else noise(0).swapaxes(0, 1)
        pillow.fromarray(turned).save(tmp_path / name / "a" / f"{len(data)}.jpg", exif=data)
    pillow.fromarray(noise(0, 4, 5, 3)).save(tmp_path / "test" / "a" / "0.png", exif=b"no exif")
    splits = folder(tmp_path)
    stored = np.asarray(pillow.open(tmp_path / "train" / "a" / f"{len(good)}.jpg"))
    assert torch.equal(splits.train.images, as_tensor(UPRIGHT[6](stored).copy()))
    assert splits.test.images.shape == (4, 3, 4, 5)


def test_transparent_palettes_are_read_without_a_warning(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 51], [0, 0, 0], [9, 200, 3]], np.uint8)
    index = noise(0, 5, 4) % 3
    image = pillow.fromarray(index).convert("P")
    image.putpalette(colours.flatten())
    for name in ("train", "test"):
        (tmp_path / name / "a").mkdir(parents=True)
        image.save(tmp_path / name / "a" / "0.png", transparency=bytes([0, 128, 255]))
        image.save(tmp_path / name / "a" / "1.png", transparency=1)
        image.save(tmp_path / name / "a" / "2.gif", transparency=1)
    assert torch.equal(folder(tmp_path).train.images, as_tensor(*[colours[index]] * 3))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
def test_a_file_that_is_cut_is_named_unless_its_pixels_are_all_there(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pillow.fromarray(noise(0)).save(buffer, kind)
    whole, file = buffer.getvalue(), tmp_path / "train" / "a" / "1"
    save(tmp_path / "train" / "a" / "0.png", noise(0))
    save(tmp_path / "test" / "a" / "0.png", noise(0))
    file.write_bytes(whole)
    expected = folder(tmp_path).train.images
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        read = read_or_refused(folder, tmp_path)
        if isinstance(read, str):
            assert read == f"{file}: not an image that can be decoded"
        else:
            assert length >= len(whole) - 24  # checksums and marks of the end
            assert torch.equal(read.train.images, expected)


def test_a_header_that_no_decoder_expects_is_named(root: Path) -> None:
    """Pillow raises a plain ValueError here."""
    data = (root / "train" / "ant" / "9.png").read_bytes()
    file = root / "train" / "ant" / "91.png"
    file.write_bytes(data[:11] + b"\x05" + data[12:])
    assert f"{file}: not an image that can be decoded" in refusal(folder, root)


def test_without_its_extra_it_gives_advice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"decoding images needs the `data` extra: pip install 'saltflat\[data\]'"):
        folder(root)


# --- Tiny ImageNet ---


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    for seed, (wnid, number) in enumerate([("n02", 0), ("n02", 1), ("n01", 0)]):
        save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", noise(seed))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t3\t3\n")
    for number in range(3):
        save(root / "val" / "images" / f"val_{number}.JPEG", noise(10 + number))
    save(root / "test" / "images" / "test_0.JPEG", noise(20))  # without labels: not read
    annotate(root, "val_1.JPEG\tn01\t0\t0\t3\t3\nval_0.JPEG\tn02\t0\t0\t3\t3\nval_2.JPEG\tn01\t1\t1\t2\t2\n")
    return root


def annotate(root: Path, text: str) -> None:
    (root / "val" / "val_annotations.txt").write_text(text)


def test_tiny_imagenet_has_its_test_labels_in_a_file(tiny: Path) -> None:
    splits = tiny_imagenet(tiny)
    for part, names in (
        (splits.train, ["train/n01/images/n01_0", "train/n02/images/n02_0", "train/n02/images/n02_1"]),
        (splits.test, ["val/images/val_1", "val/images/val_0", "val/images/val_2"]),
    ):
        assert torch.equal(part.images, as_tensor(*(np.asarray(pillow.open(tiny / f"{name}.JPEG")) for name in names)))
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 1, 1], [0, 1, 0])
    assert (splits.train.num_classes, splits.train.name) == (2, "tiny-imagenet-200 train")
    assert (splits.test.num_classes, splits.test.name) == (2, "tiny-imagenet-200 test")


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ("val_0.JPEG\tn02\nval_1.JPEG\tn03\n", "line 2: expected a file, a tab and a class, got 'val_1.JPEG\\tn03'"),
        ("val_0.JPEG n02\n", "line 1: expected a file, a tab and a class, got 'val_0.JPEG n02'"),
        ("val_0.JPEG\tn02\n\n", "line 2: expected a file, a tab and a class, got ''"),
        ("val_0.JPEG\tn02\nval_1.JPEG\tn01\n", "once, and no other; see val_2.JPEG"),
        ("val_0.JPEG\tn02\nval_1.JPEG\tn01\nval_2.JPEG\tn01\nval_3.JPEG\tn01\n", "once, and no other; see val_3.JPEG"),
        ("val_0.JPEG\tn02\nval_1.JPEG\tn01\nval_2.JPEG\tn01\nval_1.JPEG\tn02\n", "once, and no other; see val_1.JPEG"),
        ("", "once, and no other; see val_0.JPEG"),
    ],
)
def test_annotations_of_other_files_or_classes_are_refused(annotations: str, words: str, tiny: Path) -> None:
    annotate(tiny, annotations)
    message = refusal(tiny_imagenet, tiny)
    assert str(tiny / "val" / "val_annotations.txt") in message
    assert words in message


def test_tiny_imagenet_names_what_is_missing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: not found; expected the folder tiny-imagenet-200"):
        tiny_imagenet(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "train: expected a folder for each class in it, found none" in refusal(tiny_imagenet, tmp_path / "empty")
    (tiny / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe")
    assert "val_annotations.txt: cannot be read" in refusal(tiny_imagenet, tiny)
    (tiny / "val" / "val_annotations.txt").unlink()
    assert "val_annotations.txt: cannot be read" in refusal(tiny_imagenet, tiny)
    (tiny / "train" / "n01" / "images").rename(tiny / "train" / "n01" / "pictures")
    assert f"{tiny / 'train' / 'n01' / 'images'}: expected images in it, found none" in refusal(tiny_imagenet, tiny)
