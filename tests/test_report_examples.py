"""Adversarial examples on the page, and the pictures they are made into."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from run_folders import Parsed, examples_record, groups_in, page, synthetic_run, two_groups, write

from saltflat.lab.report import read_run
from saltflat.lab.report.examples import eight_bits, galleries, magnification
from saltflat.lab.report.png import png


@given(arrays(np.uint8, st.sampled_from([(1, 1), (3, 2), (2, 5, 3), (1, 1, 3)])))
def test_a_picture_is_read_back_as_it_was(pixels: np.ndarray) -> None:
    with Image.open(io.BytesIO(png(pixels))) as image:
        image.load()
        assert image.mode == ("L" if pixels.ndim == 2 else "RGB")
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 4), (0, 2), (2, 2, 3, 1)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected shape"):
        png(np.zeros(shape, np.uint8))


@given(st.floats(0, 1))
def test_a_difference_is_magnified_as_far_as_it_stays_visible(largest: float) -> None:
    factor = magnification(largest)
    assert 1 <= factor <= 1000
    assert f"{factor:e}"[0] in "125"
    assert factor == 1 or factor * largest <= 0.5 * (1 + 1e-6)
    assert factor == 1000 or factor * 2.5 * largest >= 0.5 * (1 - 1e-6)


def test_a_gallery_shows_the_images_their_difference_and_what_became_of_them(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    ((kept,),) = [read_run(folder).examples]
    (gallery,) = galleries(groups_in([folder]))
    assert gallery.name == "at, seed 0"
    assert [card.words for card in gallery.cards] == [
        "image 3: class 0, taken for 9 under pgd-20",
        "image 7: class 1, taken for 9 under pgd-20",
    ]
    assert [one.under for one in gallery.cards[0].pictures] == ["clean", "attacked", "difference × 10"]
    assert (
        "The first 2 of 2000 test images that an attack fooled; weights: last; threat: Linf, eps 8/255"
        in gallery.caption
    )
    first = kept.examples[0]
    assert first.clean.shape == (6, 5, 3)
    np.testing.assert_allclose(np.abs(first.attacked - first.clean).max(), 8 / 255, rtol=1e-6)
    assert eight_bits(first.clean).max() > 200


def test_channels_come_last_and_grey_images_stay_grey() -> None:
    red = np.zeros((2, 3, 3), np.float32)
    red[..., 0] = 1.0
    assert eight_bits(red)[0, 0].tolist() == [255, 0, 0]
    assert eight_bits(np.full((2, 3, 1), 0.5, np.float32)).tolist() == [[128] * 3] * 2


def test_each_group_shows_its_first_run_and_many_groups_show_fewer_images(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 21], [10, 11])
    folders += [synthetic_run(tmp_path / "mart", recipe="mart")]
    for folder in folders:
        record = examples_record()
        write(folder / "examples" / "last.json", record | {"examples": 5 * record["examples"]})
    assert [(one.name, len(one.cards)) for one in galleries(groups_in(folders[:4]))] == [
        ("at, seed 0", 8),
        ("at-awp, seed 0", 8),
    ]
    assert [len(one.cards) for one in galleries(groups_in(folders))] == [4, 4, 4]


def changed(**fields: Any) -> dict[str, Any]:
    return examples_record() | fields


def with_image(text: Any) -> dict[str, Any]:
    record = examples_record()
    record["examples"][1]["attacked"] = text
    return record


BAD = {
    "no examples": changed(examples=[]),
    "no list": changed(examples=3),
    "no shape": changed(shape=None),
    "another shape": changed(shape=[3, 6, 6]),
    "four channels": changed(shape=[4, 3, 5]),
    "an empty side": changed(shape=[3, 0, 5]),
    "a monstrous shape": changed(shape=[3, 10**9, 10**9]),
    "no text": with_image(None),
    "no base64": with_image("<img src=x>"),
    "too short": with_image("AAAA"),
    "not a number": with_image(examples_record(eps=float("nan"))["examples"][1]["attacked"]),
    "out of the box": with_image(base64.b64encode(np.full((3, 6, 5), 1.5, "<f4").tobytes()).decode()),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_record_becomes_a_note_and_the_rest_is_shown(tmp_path: Path, name: str) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "examples" / "last.json", BAD[name])
    run = read_run(folder)
    assert run.examples == ()
    assert "A damaged file was skipped: examples/last.json" in run.notes
    parsed = Parsed(page([folder]))
    assert "No adversarial example is on record" in parsed.text
    assert "img" not in parsed.tags


def test_a_run_that_was_never_attacked_misses_no_example(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    (folder / "examples" / "last.json").unlink()
    for path in (folder / "outcomes").iterdir():
        path.unlink()
    text = Parsed(page([folder])).text
    assert "No adversarial example is on record" not in text
    assert "No final evaluation" in text
