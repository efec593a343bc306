"""Rotation of a batch, against a loop over pixels, against quarter turns, and against what no rotation can do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saltflat.data.augment import rotate, rotated
from saltflat.random import seeded


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def angles_drawn(number: int, degrees: float, generator: torch.Generator) -> list[float]:
    u = torch.rand(number, dtype=torch.float64, generator=generator)
    return ((2 * u - 1) * degrees).tolist()


def pixel_by_pixel(images: Tensor, angles: list[float]) -> Tensor:
    """In the plane, x to the right and y up from the centre: the pixel centre z of the result comes from z e^(-i t)."""
    number, channels, height, width = images.shape
    out = torch.zeros_like(images)
    for n in range(number):
        back = complex(math.cos(math.radians(angles[n])), -math.sin(math.radians(angles[n])))
        for i in range(height):
            for j in range(width):
                z = complex(j - (width - 1) / 2, (height - 1) / 2 - i) * back
                row, column = round((height - 1) / 2 - z.imag), round((width - 1) / 2 + z.real)
                if 0 <= row < height and 0 <= column < width:
                    for c in range(channels):
                        out[n, c, i, j] = images[n, c, row, column]
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (7, 5), (5, 8), (1, 6), (1, 1)])
@pytest.mark.parametrize("degrees", [1.0, 15.0, 180.0])
def test_rotate_equals_a_loop_over_pixels(height: int, width: int, degrees: float) -> None:
    images = random_images(12, 3, height, width)
    ours, theirs = seeded(3), seeded(3)
    out = rotate(images, degrees=degrees, generator=ours)
    assert out.dtype == torch.uint8
    assert torch.equal(out, pixel_by_pixel(images, angles_drawn(12, degrees, theirs)))
    assert torch.equal(ours.get_state(), theirs.get_state()), "another number of draws"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("turns", [-3, -2, -1, 0, 1, 2, 3, 4])
def test_quarter_turns_of_squares_are_exact_and_counter_clockwise(size: int, turns: int, dtype: torch.dtype) -> None:
    images = random_images(2, 2, size, size).to(dtype)
    out = rotated(images, torch.full((2,), 90.0 * turns))
    assert out.dtype == dtype
    assert torch.equal(out, torch.rot90(images, turns, (2, 3)))  # torch's first axis to its second: counter-clockwise


@pytest.mark.parametrize(("height", "width"), [(2, 5), (3, 5), (4, 6), (5, 4)])
def test_half_turns_are_exact_for_every_shape(height: int, width: int) -> None:
    images = random_images(3, 1, height, width)
    assert torch.equal(rotated(images, torch.tensor([180.0, -180.0, 540.0])), images.flip(2, 3))


def test_every_image_has_an_angle_of_its_own() -> None:
    images = random_images(1, 1, 6, 6).expand(4, 1, 6, 6)
    out = rotated(images, torch.tensor([0.0, 90.0, 180.0, 270.0]))
    assert torch.equal(out, torch.stack([torch.rot90(images[0], turns, (1, 2)) for turns in range(4)]))


def test_corners_that_come_from_outside_are_zero_and_the_centre_stays() -> None:
    out = rotated(torch.full((1, 1, 9, 9), 7, dtype=torch.uint8), torch.tensor([45.0]))[0, 0]
    assert out[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 0, 0, 0]
    assert out[4, 4] == 7
    assert out[:, 4].tolist() == [7] * 9, "on the axes, pixels come from inside"


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    degrees=st.floats(0, 180),
    seed=st.integers(0, 2**32),
    n=st.integers(0, 4),
)
def test_no_value_is_new_but_zero_and_the_way_back_is_the_mirrored_way(
    height: int, width: int, degrees: float, seed: int, n: int
) -> None:
    images = random_images(n, 2, height, width, seed=seed).clamp(min=1)
    out = rotate(images, degrees=degrees, generator=seeded(seed))
    assert out.shape == images.shape
    for before, after in zip(images, out, strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist()) | {0}
    angles = torch.tensor(angles_drawn(n, degrees, seeded(seed)), dtype=torch.float64)
    assert torch.equal(rotated(images.flip(3), -angles), rotated(images, angles).flip(3))


def test_no_degrees_are_the_identity_and_draw_nothing() -> None:
    images, generator = random_images(3, 1, 4, 4), seeded(0)
    before = generator.get_state()
    assert rotate(images, degrees=0, generator=generator) is images
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(rotated(images, torch.zeros(3)), images)


def test_angles_are_uniform_and_reach_both_ends() -> None:
    """Where the middle of a spot to the right of the centre went says by how much its image was turned."""
    number, degrees = 2000, 30.0
    spots = torch.zeros(number, 1, 65, 65)
    spots[:, :, 30:35, 54:59] = 1
    turned = rotate(spots, degrees=degrees, generator=seeded(1))[:, 0]
    place = torch.arange(65.0) - 32
    up, right = (-(turned.sum(2) * place).sum(1), (turned.sum(1) * place).sum(1))
    found = torch.atan2(up, right).rad2deg().sort().values
    uniform = torch.linspace(-degrees, degrees, number)
    assert (found - uniform).abs().max() < 1 + 2.2 * 2 * degrees / number**0.5  # a spot's grid, and Kolmogorov's 0.01 %


def test_rotation_reads_any_memory_layout_and_leaves_its_input_alone() -> None:
    images = random_images(6, 3, 8, 8)
    before = images.clone()
    expected = rotate(images, degrees=40, generator=seeded(0))
    assert torch.equal(rotate(images.to(memory_format=torch.channels_last), degrees=40, generator=seeded(0)), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("degrees", [-1, 180.5, math.nan, math.inf])
def test_rotate_refuses_degrees_that_are_no_half_turn(degrees: float) -> None:
    with pytest.raises(ValueError, match=r"^degrees: expected a number in \[0, 180\], got "):
        rotate(random_images(1, 1, 2, 2), degrees=degrees, generator=seeded(0))


def test_rotation_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(N, C, H, W\), got \(3, 4, 4\)"):
        rotate(random_images(3, 4, 4), degrees=1, generator=seeded(0))
    with pytest.raises(ValueError, match=r"must have shape \(N, C, H, W\), got \(3, 4, 4\)"):
        rotated(random_images(3, 4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^angles: expected shape \(3,\), got \(2,\)$"):
        rotated(random_images(3, 1, 4, 4), torch.zeros(2))
