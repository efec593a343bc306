"""Folders of parquet files in hub layout; every one was made here."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image as pillow
import pyarrow
import pytest
import torch
from PIL import ExifTags
from torch import Tensor

from saltflat.data import (
    parquet,
)

# --- parquet ---


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


def test_parquet_stands_images_upright_as_the_hub_does(tmp_path: Path) -> None:
    image, exif, buffer = colour(1, height=4, width=5)[0], pillow.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6  # the first row is the right side, the first column the top
    pillow.fromarray(image).save(buffer, "PNG", exif=exif)
    upright = np.rot90(image, -1).copy()
    splits = parquet(pair(tmp_path, [buffer.getvalue(), encoded(upright)], [buffer.getvalue()]))
    assert torch.equal(splits.train.images, as_tensor(np.stack([upright, upright])))
    assert torch.equal(splits.test.images, as_tensor(upright[None]))


def test_parquet_reads_transparent_palettes_without_a_warning(tmp_path: Path) -> None:
    image, buffer = pillow.new("P", (4, 5), 1), io.BytesIO()
    image.putpalette([0, 0, 0, 255, 0, 51])
    image.save(buffer, "PNG", transparency=bytes([255, 7]))
    splits = parquet(pair(tmp_path, [buffer.getvalue()], [buffer.getvalue()]))
    assert torch.equal(splits.train.images[0, :, 0, 0], torch.tensor([255, 0, 51], dtype=torch.uint8))


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
    with pytest.raises(ValueError, match=r"huge: expected classes below 100000, got 1000000000000$"):
        parquet(pair(tmp_path / "huge", rows, rows, [0, 1, 10**12]))
    with pytest.raises(ValueError, match=r"train-0\.parquet: expected classes below 100000, got 9223372036854775808$"):
        parquet(pair(tmp_path / "unsigned", rows, rows, pyarrow.array([0, 1, 2**63], pyarrow.uint64())))


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
    with pytest.raises(
        ValueError, match=r"test-0\.parquet: expected a column img or image, found \['id', 'picture', 'label'\]"
    ):
        parquet(tmp_path)
    write_parquet(tmp_path / "data" / "test-0.parquet", [GOOD_ROW], [0], names=("img", "class"))
    with pytest.raises(ValueError, match=r"expected a column label or fine_label, found \['id', 'img', 'class'\]"):
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
    with pytest.raises(ValueError, match=r"(parquet|images) needs the `data` extra: pip install 'saltflat\[data\]'"):
        parquet(source)
