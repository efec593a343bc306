"""Label smoothing, mixup and CutMix: against loops, closed forms, and the batch that both adversaries see."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saltflat import AT, PGD, TRADES, Layerwise, Linf, double_perturbation_step
from saltflat.data import mix
from saltflat.data.mix import cutmix, mixup, smoothed, symmetric_beta
from saltflat.random import seeded

Mixing = Callable[[Tensor, Tensor, float, torch.Generator], tuple[Tensor, Tensor]]


def batch(
    n: int, *shape: int, classes: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] that reach both ends, and probabilities."""
    generator = seeded(seed)
    x = (torch.rand(n, *shape, generator=generator, dtype=torch.float64) * 1.5 - 0.25).clamp(0, 1)
    y = torch.rand(n, classes, generator=generator, dtype=torch.float64).add(1e-3)
    return x.to(dtype), (y / y.sum(1, keepdim=True)).to(dtype)


# --- smoothed ---


def test_smoothed_classes_have_their_closed_form() -> None:
    y = torch.tensor([2, 0])
    expected = torch.tensor([[0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3], [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    assert torch.allclose(smoothed(y, 3, 0.1), expected, rtol=1e-6, atol=0)
    assert torch.equal(smoothed(y, 3, 0.0), torch.eye(3)[y])
    assert torch.equal(smoothed(y, 4, 1.0), torch.full((2, 4), 0.25))
    assert smoothed(y[:0], 3, 0.1).shape == (0, 3)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 4),
    classes=st.integers(1, 6),
    first=st.floats(0, 1),
    second=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_smoothing_twice_keeps_the_product_of_what_each_keeps(
    n: int, classes: int, first: float, second: float, seed: int
) -> None:
    _, y = batch(n, 1, 1, 1, classes=classes, seed=seed)
    twice = smoothed(smoothed(y, classes, first), classes, second)
    assert torch.allclose(twice, smoothed(y, classes, 1 - (1 - first) * (1 - second)), rtol=0, atol=1e-15)
    assert torch.allclose(twice.sum(1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-14)
    assert twice.dtype == torch.float64
    assert (twice >= 0).all()


@pytest.mark.parametrize(
    ("y", "amount", "message"),
    [
        (torch.tensor([0]), -0.1, r"^amount: expected a number in \[0, 1\], got -0.1$"),
        (torch.tensor([0]), 1.5, "^amount: .* got 1.5$"),
        (torch.tensor([0]), math.nan, "^amount: .* got nan$"),
        (torch.rand(2, 4), 0.1, r"^y: expected \(N,\) int64 or \(N, 3\) probabilities, got .* of shape \(2, 4\)$"),
        (torch.tensor([0.0]), 0.1, r"^y: .* got torch.float32 of shape \(1,\)$"),
        (torch.tensor([[0, 0, 1]]), 0.1, r"^y: .* got torch.int64 of shape \(1, 3\)$"),
        (torch.tensor([0], dtype=torch.int32), 0.1, r"^y: .* got torch.int32 of shape \(1,\)$"),
    ],
)  # fmt: skip
def test_smoothed_refuses(y: Tensor, amount: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smoothed(y, 3, amount)


# --- Beta(alpha, alpha) ---


def betas(alpha: float, number: int, seed: int) -> Tensor:
    generator = seeded(seed)
    return torch.stack([symmetric_beta(alpha, generator) for _ in range(number)])


def central_moment(alpha: float, order: int) -> float:
    """E (lam - 1/2)^order of Beta(alpha, alpha), from the Gamma functions of its density."""
    if order % 2:
        return 0.0
    return math.prod((2 * i + 1) / (2 * alpha + 2 * i + 1) for i in range(order // 2)) / 2**order


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 2.5, 40.0])
def test_moments_of_beta_are_within_their_standard_errors(alpha: float) -> None:
    number = 300
    draws = torch.stack([betas(alpha, number, seed) for seed in range(20)]) - 0.5
    for order in (1, 2, 3, 4):
        exact = central_moment(alpha, order)
        error = ((central_moment(alpha, 2 * order) - exact**2) / number) ** 0.5
        z = (draws.pow(order).mean(1) - exact) / error
        assert abs(z.mean()) < 4.5 / 20**0.5, order
        assert 0.35 < z.square().mean().sqrt() < 2, order


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (0.5, lambda lam: 2 / math.pi * lam.sqrt().asin()),  # the arcsine law
        (1.0, lambda lam: lam),
        (2.0, lambda lam: 3 * lam**2 - 2 * lam**3),
    ],
)
def test_beta_has_its_distribution_function(alpha: float, cdf: Callable[[Tensor], Tensor]) -> None:
    found = cdf(betas(alpha, 4000, seed=1).sort().values)
    assert (found - (torch.arange(4000) + 0.5) / 4000).abs().max() < 2.2 / 4000**0.5  # Kolmogorov, 0.01 %


def test_beta_is_right_at_the_ends_of_alpha() -> None:
    for tiny in (1e-320, 1e-12):
        ends = betas(tiny, 400, seed=0)
        assert set(ends.tolist()) == {0.0, 1.0}
        assert abs(ends.mean() - 0.5) < 4.5 * 0.5 / 400**0.5
    for huge in (1e12, 1e300):
        assert (betas(huge, 50, seed=0) - 0.5).abs().max() < 5 * huge**-0.5


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("v", [0.0, 0.25, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("alpha", [1e-320, 0.5, 1e300])
def test_beta_is_a_number_whatever_is_drawn(u: float, v: float, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "_uniform", lambda number, generator: torch.tensor([u, v], dtype=torch.float64))
    assert 0 <= symmetric_beta(alpha, seeded(0)) <= 1


# --- mixtures ---


def mixed_by_hand(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lam = symmetric_beta(alpha, generator).item()
    partner = torch.randperm(len(x), generator=generator).tolist()
    pairs = list(enumerate(partner))
    return tuple(torch.stack([lam * t[n] + (1 - lam) * t[m] for n, m in pairs]) for t in (x, y))  # type: ignore[return-value]


def cut_by_hand(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Slices of a box that is cut off at the borders, as in the paper's pseudo-code."""
    height, width = x.shape[2:]
    lam0 = symmetric_beta(alpha, generator).item()
    u = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    partner = torch.randperm(len(x), generator=generator)

    def side(size: int, u: float) -> tuple[int, int]:
        extent = round(size * math.sqrt(1 - lam0))
        first = math.floor(size * u) - extent // 2
        return max(0, first), min(size, first + extent)

    top, bottom = side(height, u[0])
    left, right = side(width, u[1])
    out = x.clone()
    out[:, :, top:bottom, left:right] = x[partner][:, :, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return out, lam * y + (1 - lam) * y[partner]


@pytest.mark.parametrize(("ours", "by_hand"), [(mixup, mixed_by_hand), (cutmix, cut_by_hand)])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 7), (8, 8), (31, 2)])
def test_mixtures_equal_loops_with_the_same_draws(
    ours: Mixing, by_hand: Mixing, alpha: float, size: tuple[int, int]
) -> None:
    x, y = batch(6, 2, *size)
    for seed in range(12):
        first, second = seeded(seed), seeded(seed)
        (x_ours, y_ours), (x_hand, y_hand) = ours(x, y, alpha, first), by_hand(x, y, alpha, second)
        assert torch.allclose(x_ours, x_hand, rtol=0, atol=1e-15)
        assert torch.allclose(y_ours, y_hand, rtol=0, atol=1e-15)
        assert torch.equal(first.get_state(), second.get_state()), "another number of draws"


@settings(deadline=None, max_examples=80)
@given(
    mixing=st.sampled_from([mixup, cutmix]),
    n=st.integers(0, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    classes=st.integers(1, 4),
    alpha=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_mixtures_stay_images_and_probabilities_and_leave_their_input_alone(
    mixing: Mixing, n: int, shape: tuple[int, int, int], classes: int, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    x, y = batch(n, *shape, classes=classes, dtype=dtype, seed=seed % 100)
    kept_x, kept_y = x.clone(), y.clone()
    x_mixed, y_mixed = mixing(x, y, alpha, seeded(seed))
    assert (x_mixed.shape, x_mixed.dtype, y_mixed.shape, y_mixed.dtype) == (x.shape, dtype, y.shape, dtype)
    assert ((x_mixed >= 0) & (x_mixed <= 1)).all()
    assert ((y_mixed >= 0) & (y_mixed <= 1)).all()
    slack = 4 * torch.finfo(dtype).eps
    assert (y_mixed.double().sum(1) - 1).abs().le(slack).all()
    assert torch.equal(x, kept_x)
    assert torch.equal(y, kept_y)
    again = mixing(x, y, alpha, seeded(seed))
    assert torch.equal(again[0], x_mixed)
    assert torch.equal(again[1], y_mixed)


@pytest.mark.parametrize("mixing", [mixup, cutmix])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_labels_say_how_much_of_each_image_is_shown(mixing: Mixing, alpha: float) -> None:
    """Image n is a plane of brightness b_n: then the mean brightness of a mixture is the mean of b under its label."""
    y, brightness = torch.eye(4, dtype=torch.float64), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    x = brightness.view(4, 1, 1, 1).expand(4, 1, 7, 9)
    shares = set()
    for seed in range(30):
        x_mixed, y_mixed = mixing(x, y, alpha, seeded(seed))
        assert torch.allclose(x_mixed.mean((1, 2, 3)), y_mixed @ brightness, rtol=0, atol=1e-14)
        shares.add(round(y_mixed.amax(1).min().item(), 6))
    assert len(shares) > 10, "lam hardly moves"


@pytest.mark.parametrize("mixing", [mixup, cutmix])
def test_one_example_alone_and_equal_images_stay_to_the_bit(mixing: Mixing) -> None:
    alone_x, alone_y = batch(1, 3, 5, 4, dtype=torch.float32)
    equal_x, equal_y = alone_x.expand(6, 3, 5, 4), alone_y.expand(6, 3)
    for seed in range(10):
        for x, y in ((alone_x, alone_y), (equal_x, equal_y)):
            x_mixed, y_mixed = mixing(x, y, 1.0, seeded(seed))
            assert torch.equal(x_mixed, x)
            assert torch.equal(y_mixed, y)


def test_mixtures_of_black_and_white_never_leave_the_range_by_rounding() -> None:
    x = torch.tensor([0.0, 1.0]).repeat(50).view(100, 1, 1, 1)
    for seed in range(200):
        mixed, _ = mixup(x, torch.eye(2).repeat(50, 1), 0.5, seeded(seed))
        low, high = mixed.aminmax()
        assert 0 <= low <= high <= 1


def test_cutmix_of_one_pixel_swaps_it_or_leaves_it() -> None:
    x, y = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.eye(2)
    for seed in range(20):
        x_mixed, y_mixed = cutmix(x, y, 1.0, seeded(seed))
        assert torch.equal(x_mixed.flatten(), y_mixed[:, 1])
        assert set(x_mixed.flatten().tolist()) == {0.0, 1.0}


def test_cutmix_gives_one_box_to_the_whole_batch_and_reaches_all_places() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 5, 6) / 3
    reached = torch.zeros(5, 6, dtype=torch.bool)
    kept = torch.zeros(5, 6, dtype=torch.bool)
    for seed in range(200):
        out, _ = cutmix(x, torch.eye(4), 1.0, seeded(seed))
        foreign = (out != x).any(1)
        moved = foreign[foreign.any((1, 2))]
        if len(moved):
            assert (moved == moved[0]).all()
            rows, columns = moved[0].any(1), moved[0].any(0)
            assert torch.equal(moved[0], rows[:, None] & columns)
            assert all(int((side.int().diff() == 1).sum() + side[0]) == 1 for side in (rows, columns)), "not connected"
            reached |= moved[0]
            kept |= ~moved[0]
    assert reached.all()
    assert kept.all()


def test_generators_that_differ_give_other_mixtures_and_the_global_one_is_not_moved() -> None:
    x, y = batch(6, 1, 4, 4)
    before = torch.get_rng_state()
    assert not torch.equal(mixup(x, y, 1.0, seeded(0))[0], mixup(x, y, 1.0, seeded(1))[0])
    assert not torch.equal(cutmix(x, y, 1.0, seeded(0))[0], cutmix(x, y, 1.0, seeded(1))[0])
    assert torch.equal(torch.get_rng_state(), before)


class _NoReading(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading a number, or a result of unknown size."""

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "repeat_interleave")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.__name__ for name in self.READING), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixing", [mixup, cutmix])
def test_nothing_is_read_back_from_the_device(mixing: Mixing) -> None:
    x, y = batch(4, 1, 5, 5)
    with _NoReading():
        with pytest.raises(AssertionError):
            x.sum().item()
        mixing(x, y, 1.0, seeded(0))


@pytest.mark.parametrize("mixing", [mixup, cutmix])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.rand(2, 4, 4)}, r"^x: expected floating images \(N, C, H, W\), got .* of shape \(2, 4, 4\)$"),
        ({"x": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, "^x: .* got torch.uint8"),
        ({"y": torch.tensor([0, 1])}, r"^y: expected probabilities of shape \(2, classes\), got .* of shape \(2,\)$"),
        ({"y": torch.rand(3, 2)}, r"^y: .* of shape \(3, 2\)$"),
        ({"y": torch.eye(2).long()}, "^y: .* got torch.int64"),
        ({"alpha": 0.0}, "^alpha: expected a finite number > 0, got 0.0$"),
        ({"alpha": -1.0}, "^alpha: .* got -1.0$"),
        ({"alpha": math.inf}, "^alpha: .* got inf$"),
        ({"alpha": math.nan}, "^alpha: .* got nan$"),
    ],
)  # fmt: skip
def test_mixtures_refuse(mixing: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixing(**({"x": torch.rand(2, 1, 4, 4), "y": torch.eye(2), "alpha": 1.0, "generator": seeded(0)} | wrong))


# --- with both adversaries ---


@pytest.mark.parametrize("mixing", [mixup, cutmix])
@pytest.mark.parametrize("objective", [AT(), TRADES(6.0)])
def test_attack_ascent_and_descent_see_the_same_mixed_batch(mixing: Mixing, objective: Any) -> None:
    x, y = batch(6, 1, 4, 4, dtype=torch.float32)
    x, y = mixing(x, y, 1.0, seeded(3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = double_perturbation_step(
        model, x, y, objective=objective, attack=PGD(Linf(0.05), 0.02, 3), ball=Layerwise(0.01), optimizer=optimizer,
        generator=seeded(0),
    )  # fmt: skip
    assert all((inputs - x).abs().max() <= 0.05 + 1e-6 for inputs in seen)
    ascent, descent = [inputs for inputs in seen if not torch.equal(inputs, x)][-2:]
    assert torch.equal(ascent, step.x_adv)
    assert torch.equal(descent, step.x_adv)
    assert ((step.x_adv >= 0) & (step.x_adv <= 1)).all()
