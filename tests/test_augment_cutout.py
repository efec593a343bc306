"""Cutout: one square, black, anywhere, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saltflat.data import cutout
from saltflat.random import seeded


@given(
    number=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9), side=st.integers(0, 12),
    seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_what_is_black_is_a_square_around_a_pixel_of_the_image_and_the_rest_is_as_it_was(
    number, height, width, side, seed
):
    images = 1 + torch.rand(number, 3, height, width)
    found = cutout(images, side=side, generator=seeded(seed))
    black = (found == 0).all(1)
    assert torch.equal(found, torch.where(black[:, None], 0.0, images))
    centres = seeded(seed)
    rows, columns = (torch.randint(0, size, (number, 1), generator=centres) for size in (height, width))
    for n in range(number):
        expected = torch.zeros(height, width, dtype=torch.bool)
        for i in range(rows[n, 0] - side // 2, rows[n, 0] - side // 2 + side):
            for j in range(columns[n, 0] - side // 2, columns[n, 0] - side // 2 + side):
                if 0 <= i < height and 0 <= j < width:
                    expected[i, j] = True
        assert torch.equal(black[n], expected)


def test_the_dtype_stays_and_nothing_is_written_into_what_was_given():
    images = torch.full((2, 1, 6, 6), 9, dtype=torch.uint8)
    found = cutout(images, side=3, generator=seeded(0))
    assert found.dtype == torch.uint8
    assert (images == 9).all()


def test_without_a_side_nothing_is_drawn():
    generator = seeded(0)
    images = torch.ones(2, 1, 4, 4)
    assert cutout(images, side=0, generator=generator) is images
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=seeded(0)))


def test_images_of_another_rank_and_negative_sides_are_refused():
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, H, W\), got \(2, 3\)"):
        cutout(torch.ones(2, 3), side=1, generator=seeded(0))
    with pytest.raises(ValueError, match="side must be at least 0, got -1"):
        cutout(torch.ones(2, 1, 3, 3), side=-1, generator=seeded(0))
