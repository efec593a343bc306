"""Images, splits, crop-and-flip, the bundled digits."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saltflat.data import (
    Images,
    crop_flip,
    digits,
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
