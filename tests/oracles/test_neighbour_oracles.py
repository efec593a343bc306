"""The neighbours' oracles against cases worked by hand and closed forms."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles.losses import cross_entropy
from oracles.neighbours import (
    Loss,
    Weights,
    adaptive_random_wp,
    alp,
    amortised_awp,
    asam,
    awp,
    cross_entropies,
    fisher_update,
    free_at,
    global_norm,
    gradient,
    kaggle_awp,
    mean_of,
    mixed_random_wp,
    momentum_awp,
    moved,
    random_wp,
    robust_wp,
    sam,
    weighted_awp,
)
from oracles.proxy_awp import at_loss, proxy_displacement


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def linear(slope: Weights) -> Loss:
    """⟨slope, w⟩: its gradient is `slope` everywhere."""
    return lambda w: torch.stack([(slope[name] * part).sum() for name, part in w.items()]).sum()


def half_square(w: Weights) -> Tensor:
    """½‖w‖²: its gradient is w."""
    return 0.5 * torch.stack([(part**2).sum() for part in w.values()]).sum()


def scaled(weights: Weights, factor: float) -> Weights:
    return {name: factor * part for name, part in weights.items()}


def network() -> nn.Sequential:
    """Linear, BatchNorm, tanh, Linear: 3 features, 2 classes, float64, train mode, weights from fixed seeds."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return model


def weights_of(model: nn.Module, kept: Callable[[Tensor], bool] = lambda part: True) -> Weights:
    return {name: part.detach().clone() for name, part in model.named_parameters() if kept(part)}


W = {"a": random(2, 3, seed=1), "b": random(4, seed=2)}
SLOPE = {"a": random(2, 3, seed=3), "b": 10 * random(4, seed=4)}
X, Y = random(5, 3, seed=10), torch.tensor([0, 1, 1, 0, 1])


# The model as a function of a dict


def test_the_function_of_the_weights_is_the_model_with_these_weights() -> None:
    model = network()
    losses = cross_entropies(model, X, Y)
    w = weights_of(model)
    v = {"0.weight": random(4, 3, seed=20)}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("0.weight").add_(v["0.weight"])
    logits = twin(X).detach()
    expected = [cross_entropy(logits[i], Y[i]) for i in range(5)]
    close(losses(moved(w, v)), tensor(*expected))
    close(losses(moved({"0.weight": w["0.weight"]}, v)), tensor(*expected))


def test_a_models_weights_gradients_and_buffers_stay_as_they_are() -> None:
    model = network().train()
    state = copy.deepcopy(model.state_dict())
    w, losses = weights_of(model), cross_entropies(model, X, Y)
    before = copy.deepcopy(w)
    awp(mean_of(losses), w, 0.1, 2)
    robust_wp(losses, w, 0.1, 0.7, 3)
    weighted_awp(mean_of(losses), w, 0.1, 0.5, ["3.bias"])
    sam(mean_of(losses), w, 0.1)
    asam(mean_of(losses), w, 0.1, 0.01)
    kaggle_awp(mean_of(losses), w, 0.1, 0.01)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(w, before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tensor_that_the_loss_does_not_look_at_has_gradient_zero() -> None:
    g = gradient(lambda w: (w["a"] ** 2).sum(), W)
    close(g, {"a": 2 * W["a"], "b": 0 * W["b"]})


# awp


def test_awp_on_a_linear_loss_goes_gamma_times_the_norm_along_each_slope_however_many_the_steps() -> None:
    expected = {name: 0.1 * W[name].norm() * SLOPE[name] / SLOPE[name].norm() for name in W}
    for steps in (1, 4):
        close(awp(linear(SLOPE), W, 0.1, steps), expected)
    close(awp(linear(SLOPE), W, 0.1, 3, step_size=5.0), expected)


def test_awp_of_two_steps_by_hand_turns_with_the_gradient_and_is_projected() -> None:
    """Slope (1, 0) at w = (0, 2) and (0, ½) at (1, 2); ‖w‖ = 2, so steps of ½ are one long, as is γ = ½."""

    def loss(w: Weights) -> Tensor:
        a, b = w["a"]
        return a - a**2 / 2 + a**2 * (b - 2) / 2

    w = {"a": tensor(0.0, 2.0)}
    close(awp(loss, w, 0.5, 1), {"a": tensor(1.0, 0.0)})
    close(awp(loss, w, 0.5, 2, step_size=0.5), {"a": tensor(math.sqrt(0.5), math.sqrt(0.5))})
    close(awp(loss, w, 1.0, 2), {"a": tensor(1.0, 1.0)})


def test_awp_leaves_a_tensor_without_slope_or_without_length() -> None:
    w = {"flat": tensor(1.0, 2.0), "zero": tensor(0.0, 0.0), "b": tensor(3.0, 4.0)}
    v = awp(linear({"flat": tensor(0.0, 0.0), "zero": tensor(1.0, 0.0), "b": tensor(0.0, 2.0)}), w, 0.1, 2)
    close(v, {"flat": tensor(0.0, 0.0), "zero": tensor(0.0, 0.0), "b": tensor(0.0, 0.5)})


@pytest.mark.parametrize("steps", [1, 3])
def test_awp_agrees_with_the_oracle_that_copies_models(steps: int) -> None:
    model = network()
    w = weights_of(model, lambda part: part.ndim > 1)
    v = awp(mean_of(cross_entropies(model, X, Y)), w, 0.3, steps, step_size=0.2)
    close(v, proxy_displacement(model, at_loss, X, X, Y, gamma=0.3, steps=steps, step_size=0.2))


# robust_wp


def test_robust_wp_of_one_unmasked_step_on_one_tensor_is_awp() -> None:
    model = network()
    w, losses = weights_of(model, lambda part: part.shape == (4, 3)), cross_entropies(model, X, Y)
    close(robust_wp(losses, w, 0.2, math.inf, 1), awp(mean_of(losses), w, 0.2, 1))


def test_robust_wp_normalises_over_all_tensors_together() -> None:
    """Slopes (3, 0) and (4,) have the norm 5, the weights (1, 2) and (2,) the norm 3."""
    losses = lambda w: torch.stack([3 * w["a"][0] + 4 * w["b"][0]])
    v = robust_wp(losses, {"a": tensor(1.0, 2.0), "b": tensor(2.0)}, 0.5, math.inf, 4)
    close(v, {"a": tensor(0.9, 0.0), "b": tensor(1.2)})


def test_robust_wp_lies_on_the_sphere() -> None:
    model = network()
    w = weights_of(model)
    v = robust_wp(cross_entropies(model, X, Y), w, 0.2, 0.8, 5)
    assert global_norm(v) == pytest.approx(0.2 * global_norm(w), rel=1e-12)


def masked_by_turns(w: Weights) -> Tensor:
    """At w = (3, 4): 0, 0.6, 0.6; at v = (1, 0): 1, 0, 0.6. Slopes (1, 0), (−0.6, 1), (0, 1)."""
    a, b = w["a"][0] - 3, w["a"][1] - 4
    return torch.stack([a, 0.6 - 0.6 * a + b, 0.6 + b])


def test_robust_wp_masks_anew_at_every_step_and_adds_gradients_as_they_are() -> None:
    """γ‖w‖ = 1 and c = 0.5: the first example moves w, which masks it and unmasks the second."""
    w = {"a": tensor(3.0, 4.0)}
    close(robust_wp(masked_by_turns, w, 0.2, 0.5, 1), {"a": tensor(1.0, 0.0)})
    total = tensor(1.0 - 0.6, 1.0)
    close(robust_wp(masked_by_turns, w, 0.2, 0.5, 2), {"a": total / total.norm()})


def test_robust_wp_divides_by_the_whole_batch() -> None:
    """One example of three in the first step, two in the second (c = 0.7): each adds a third of its slope, not a half.

    Losses 0, 0.8, 0.8 at w, and 1, 0, 0 at v = (1, 0): D = ⅓·(1, 0), then D = ⅓·(1, 0) + ⅓·(−0.8, 1) + ⅓·(−0.8, 3).
    """

    def losses(w: Weights) -> Tensor:
        a, b = w["a"][0] - 3, w["a"][1] - 4
        return torch.stack([a, 0.8 - 0.8 * a + b, 0.8 - 0.8 * a + 3 * b])

    total = tensor(1.0 - 1.6, 4.0)
    close(robust_wp(losses, {"a": tensor(3.0, 4.0)}, 0.2, 0.7, 2), {"a": total / total.norm()})


def test_robust_wp_with_all_masked_is_zero_at_first_and_stays_put_later() -> None:
    w = {"a": tensor(3.0, 4.0)}
    zero = robust_wp(masked_by_turns, w, 0.2, 0.0, 3)  # the first loss equals c: masked
    close(zero, {"a": tensor(0.0, 0.0)})
    rising = lambda w: torch.stack([w["a"][0] - 3])
    close(robust_wp(rising, w, 0.2, 0.5, 5), {"a": tensor(1.0, 0.0)})


# random_wp and adaptive_random_wp


def test_random_noise_has_the_length_of_its_filter() -> None:
    w = {
        "conv": tensor([[[3.0, 4.0]]], [[[0.0, 2.0]]]),
        "linear": tensor([1.0, 2.0, 2.0], [0.0, 0.0, 0.0]),
        "bias": tensor(6.0, 8.0),
        "scale": torch.tensor(-3.0, dtype=torch.float64),
    }
    ones = {name: torch.ones_like(part) for name, part in w.items()}
    noise = random_wp(w, 0.1, ones)
    close(
        noise,
        {
            "conv": tensor([[[0.5, 0.5]]], [[[0.2, 0.2]]]),
            "linear": tensor([0.3, 0.3, 0.3], [0.0, 0.0, 0.0]),
            "bias": tensor(1.0, 1.0),
            "scale": torch.tensor(0.3, dtype=torch.float64),
        },
    )
    normals = {name: random(*part.shape, seed=7) for name, part in w.items()}
    close(random_wp(w, 0.1, normals), {name: noise[name] * normals[name] for name in w})


def mean_and_error(draws: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(draws.mean()), float(draws.std() / math.sqrt(len(draws)))


def test_random_noise_has_the_expected_squared_length() -> None:
    """E‖ε_j‖² = σ²·n_j·‖w_j‖²: three coordinates in each row of `a`, four in the one filter of `b`."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[float]] = []
    for _ in range(4000):
        normals = {k: torch.randn(part.shape, dtype=torch.float64, generator=generator) for k, part in W.items()}
        noise = random_wp(W, 0.3, normals)
        rows.append([float((part**2).sum()) for part in (noise["a"][0], noise["a"][1], noise["b"])])
    exact = [0.09 * part.numel() * float((part**2).sum()) for part in (W["a"][0], W["a"][1], W["b"])]
    for draws, expected in zip(torch.tensor(rows, dtype=torch.float64).T, exact, strict=True):
        mean, error = mean_and_error(draws)
        assert error < 0.02 * expected
        assert abs(mean - expected) < 3 * error


def test_random_noise_raises_a_quadratic_loss_by_its_trace() -> None:
    """E[L(w + ε)] − L(w) = ½σ² Σ_j ‖w_j‖²·tr H_jj and E[∇L(w + ε)] = ∇L(w), for L = ½wᵀHw + bᵀw, H dense."""
    root = random(10, 10, seed=5)
    hessian, b = root @ root.T, random(10, seed=6)

    def loss(w: Weights) -> Tensor:
        flat = torch.cat([w["a"].flatten(), w["b"]])
        return 0.5 * flat @ hessian @ flat + b @ flat

    generator = torch.Generator().manual_seed(1)
    rises, slopes = [], []
    for _ in range(4000):
        normals = {k: torch.randn(part.shape, dtype=torch.float64, generator=generator) for k, part in W.items()}
        at = moved(W, random_wp(W, 0.5, normals))
        rises.append(float(loss(at) - loss(W)))
        slopes.append(gradient(loss, at)["b"])
    diagonal = hessian.diagonal()
    blocks = [(W["a"][0], diagonal[:3]), (W["a"][1], diagonal[3:6]), (W["b"], diagonal[6:])]
    expected = sum(0.5 * 0.25 * float((part**2).sum() * trace.sum()) for part, trace in blocks)
    mean, error = mean_and_error(torch.tensor(rises, dtype=torch.float64))
    assert error < 0.05 * expected
    assert abs(mean - expected) < 3 * error
    at_w = gradient(loss, W)["b"]
    for k in range(4):
        mean, error = mean_and_error(torch.stack(slopes)[:, k])
        assert abs(mean - float(at_w[k])) < 3 * error


def test_adaptive_noise_by_hand_in_both_readings() -> None:
    """η = 1, ‖w_0‖ = 5, ‖w_1‖ = 2, F = (3, 5) sums to 8 in the first row: √9 = 3, as against 4^¼ = √2 and 6^¼."""
    w = {"a": tensor([3.0, 4.0], [2.0, 0.0]), "b": tensor(0.0, 1.0)}
    F = {"a": tensor([3.0, 5.0], [0.0, 0.0]), "b": tensor(15.0, 3.0)}
    ones = {name: torch.ones_like(part) for name, part in w.items()}
    code = adaptive_random_wp(w, 0.3, ones, F, 1.0, 1 / 2)
    close(code, {"a": tensor([0.5, 0.5], [0.6, 0.6]), "b": tensor(0.3 / 4, 0.3 / 2)})
    paper = adaptive_random_wp(w, 0.3, ones, F, 1.0, 1 / 4)
    close(paper, {"a": tensor([1.5 / math.sqrt(2), 1.5 / 6**0.25], [0.6, 0.6]), "b": tensor(0.15, 0.3 / math.sqrt(2))})


@pytest.mark.parametrize("power", [1 / 2, 1 / 4])
def test_adaptive_noise_without_history_or_without_eta_is_random_noise(power: float) -> None:
    normals = {name: random(*part.shape, seed=8) for name, part in W.items()}
    expected = random_wp(W, 0.2, normals)
    close(adaptive_random_wp(W, 0.2, normals, scaled(W, 0), 0.1, power), expected)
    close(adaptive_random_wp(W, 0.2, normals, {name: part**2 for name, part in W.items()}, 0.0, power), expected)


def test_adaptive_noise_knows_two_powers() -> None:
    with pytest.raises(ValueError, match=r"power: expected 1/2 \(code\) or 1/4 \(paper\), got 1"):
        adaptive_random_wp(W, 0.2, W, W, 0.1, 1)


def test_the_average_of_squares_forgets_without_a_factor_one_minus_beta() -> None:
    F = {"a": tensor(0.0, 0.0)}
    for _ in range(3):
        F = fisher_update(F, {"a": tensor(1.0, -2.0)}, 0.5)
    close(F, {"a": tensor(1.75, 7.0)})


# Mixed and weighted gradients


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_gradient_of_a_quadratic_and_a_line(share: float) -> None:
    noise = {name: random(*part.shape, seed=9) for name, part in W.items()}
    g = mixed_random_wp(half_square, linear(SLOPE), W, share, noise)
    close(g, {name: share * (W[name] + noise[name]) + (1 - share) * SLOPE[name] for name in W})


def test_weighted_gradient_of_a_quadratic_grows_only_where_weights_are_perturbed() -> None:
    """∇½‖w‖² = w and v = γw: share·γ more on the perturbed tensor, none on the one that is cut off."""
    close(weighted_awp(half_square, W, 0.2, 0.7, ["b"]), {"a": 1.14 * W["a"], "b": W["b"]})
    close(weighted_awp(half_square, W, 0.2, 0.7, []), scaled(W, 1.14))
    close(weighted_awp(half_square, W, 0.2, 0.7, W), W)


def test_weighted_gradient_reaches_the_truncated_tensor_through_the_others() -> None:
    """L = ½a²b at a = 2, b = 3: a moves to 2.2 with γ = 0.1, and ∂L/∂b = ½a² is the mean of 2 and 2.42."""
    loss = lambda w: (0.5 * w["a"] ** 2 * w["b"]).sum()
    g = weighted_awp(loss, {"a": tensor(2.0), "b": tensor(3.0)}, 0.1, 0.5, {"b"})
    close(g, {"a": tensor(0.5 * (6.0 + 6.6)), "b": tensor(0.5 * (2.0 + 2.42))})


def test_weighted_gradient_at_its_ends_is_the_clean_and_the_perturbed_one() -> None:
    model = network()
    w, loss = weights_of(model), mean_of(cross_entropies(model, X, Y))
    close(weighted_awp(loss, w, 0.2, 0.0, []), gradient(loss, w))
    close(weighted_awp(loss, w, 0.2, 1.0, []), gradient(loss, moved(w, awp(loss, w, 0.2, 1))))


# sam and asam


def test_sam_on_a_quadratic_goes_outwards_and_its_gradient_is_where_it_arrives() -> None:
    v, g = sam(half_square, W, 0.5)
    close(v, scaled(W, 0.5 / global_norm(W)))
    close(g, moved(W, v))


def test_sam_has_one_norm_for_all_tensors() -> None:
    v, g = sam(linear({"a": tensor(3.0), "b": tensor(0.0, -4.0)}), {"a": tensor(7.0), "b": tensor(0.0, 1.0)}, 0.1)
    close(v, {"a": tensor(0.06), "b": tensor(0.0, -0.08)})
    close(g, {"a": tensor(3.0), "b": tensor(0.0, -4.0)})


def test_asam_by_hand() -> None:
    """T = (4, 1) and (3,), g = (½, 2) and (⅓·√8,): Tg = (2, 2, √8) has the norm 4."""
    w = {"a": tensor(-3.0, 0.0), "b": tensor(2.0)}
    slope = {"a": tensor(0.5, 2.0), "b": tensor(math.sqrt(8) / 3)}
    v, g = asam(linear(slope), w, 0.2, 1.0)
    close(v, {"a": tensor(0.05 * 8.0, 0.05 * 2.0), "b": tensor(0.05 * 3 * math.sqrt(8))})
    close(g, slope)


def test_asam_treats_plain_tensors_as_sam_does() -> None:
    """T = (4, 1) and 1, g = (½, 2) and (1,): Tg = (2, 2, 1) has the norm 3."""
    w = {"weight": tensor(-3.0, 0.0), "bias": tensor(2.0)}
    v, _ = asam(linear({"weight": tensor(0.5, 2.0), "bias": tensor(1.0)}), w, 0.3, 1.0, ["bias"])
    close(v, {"weight": tensor(0.8, 0.2), "bias": tensor(0.1)})
    close(asam(half_square, W, 0.3, 1.0, W), sam(half_square, W, 0.3))


def test_asam_is_the_best_displacement_of_its_ellipsoid() -> None:
    v, _ = asam(linear(SLOPE), W, 0.2, 0.1)
    scale = {name: part.abs() + 0.1 for name, part in W.items()}
    gain = float(sum((SLOPE[name] * v[name]).sum() for name in W))
    assert global_norm({name: v[name] / scale[name] for name in W}) == pytest.approx(0.2, rel=1e-12)
    for seed in range(50):
        other = {name: v[name] / scale[name] + 0.05 * random(*part.shape, seed=seed) for name, part in W.items()}
        other = scaled(other, 0.2 / global_norm(other))
        assert float(sum((SLOPE[name] * scale[name] * other[name]).sum() for name in W)) < gain


def test_asam_without_offset_follows_a_rescaling_of_the_weights_and_sam_does_not() -> None:
    loss = lambda w: (w["a"] ** 4).sum() + (w["b"] ** 2).sum()
    factors = {name: random(*part.shape, seed=12).exp() for name, part in W.items()}
    rescaled = {name: W[name] * factors[name] for name in W}
    rescaled_loss = lambda w: loss({name: part / factors[name] for name, part in w.items()})
    v, _ = asam(loss, W, 0.1, 0.0)
    u, _ = asam(rescaled_loss, rescaled, 0.1, 0.0)
    close(u, {name: v[name] * factors[name] for name in W})
    p, _ = sam(loss, W, 0.1)
    q, _ = sam(rescaled_loss, rescaled, 0.1)
    assert not torch.allclose(q["a"], p["a"] * factors["a"], rtol=1e-3)


@pytest.mark.parametrize("ascent", [lambda loss, w: sam(loss, w, 0.1), lambda loss, w: asam(loss, w, 0.1, 0.01)])
def test_without_slope_nothing_moves(ascent: Callable[[Loss, Weights], tuple[Weights, Weights]]) -> None:
    zero = scaled(W, 0)
    for part in ascent(linear(zero), W):
        close(part, zero)


# kaggle_awp and momentum_awp


def test_kaggle_awp_by_hand_is_cut_weight_by_weight() -> None:
    """‖w‖ = 5, g/‖g‖ = (0.6, −0.8, 0): a step of 0.1 is (0.3, −0.4, 0); ε = 0.09 allows (0.27, 0.36, 0)."""
    w, slope = {"a": tensor(-3.0, 4.0, 0.0)}, {"a": tensor(6.0, -8.0, 0.0)}
    close(kaggle_awp(linear(slope), w, 0.1, 0.09), {"a": tensor(0.27, -0.36, 0.0)})
    close(kaggle_awp(linear(slope), w, 0.1, 0.1), {"a": tensor(0.3, -0.4, 0.0)})
    close(kaggle_awp(linear(slope), w, 0.01, 0.1), {"a": tensor(0.03, -0.04, 0.0)})


def test_kaggle_awp_without_a_limit_that_binds_is_awp_but_for_weights_that_are_zero() -> None:
    close(kaggle_awp(linear(SLOPE), W, 0.01, 1e3), awp(linear(SLOPE), W, 0.01, 1))
    w = {"a": tensor(0.0, 2.0), "b": tensor(0.0, 0.0)}
    v = kaggle_awp(linear({"a": tensor(1.0, 1.0), "b": tensor(1.0, 1.0)}), w, 0.1, 1e3)
    close(v, {"a": tensor(0.0, 0.1 * math.sqrt(2)), "b": tensor(0.0, 0.0)})


def test_momentum_awp_along_the_gradient_is_awp_and_knows_no_length_of_the_direction() -> None:
    model = network()
    w, loss = weights_of(model), mean_of(cross_entropies(model, X, Y))
    expected = awp(loss, w, 0.2, 1)
    for length in (1.0, 1e-3):
        close(momentum_awp(scaled(gradient(loss, w), length), w, 0.2), expected)
    close(momentum_awp({"a": SLOPE["a"], "b": 0 * W["b"]}, W, 0.2)["b"], 0 * W["b"])


# free_at


def product(w: Weights, x: Tensor) -> Tensor:
    """Σ_i ⟨w, x_i⟩: the gradient is Σ_i x_i by w and w by each x_i."""
    return (x * w["a"]).sum()


def test_free_training_replays_by_hand_with_both_gradients_at_the_old_weights() -> None:
    """w = (0.02, −1), lr = 0.1, ε = 0.1; x = (0.5, 0.98) and (0.3, 0.02).

    First: g_w = (0.8, 1), g_x = sign (+, −), so w = (−0.06, −1.1) and δ = (0.1, −0.1), (0.1, −0.02), boxed.
    Second: g_w = (1.0, 0.88), signs (−, −): w = (−0.16, −1.188), δ = (0, −0.1), (0, −0.02).
    """
    w, x = {"a": tensor(0.02, -1.0)}, tensor([0.5, 0.98], [0.3, 0.02])
    start = torch.zeros_like(x)
    once, delta = free_at(product, w, x, start, eps=0.1, lr=0.1, replays=1)
    close(once, {"a": tensor(-0.06, -1.1)})
    close(delta, tensor([0.1, -0.1], [0.1, -0.02]))
    twice, delta = free_at(product, w, x, start, eps=0.1, lr=0.1, replays=2)
    close(twice, {"a": tensor(-0.16, -1.188)})
    close(delta, tensor([0.0, -0.1], [0.0, -0.02]))
    close(w, {"a": tensor(0.02, -1.0)})
    close(start, torch.zeros_like(x))


def test_free_training_goes_on_from_the_last_delta() -> None:
    w, x = {"a": random(3, seed=13)}, torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(14))
    loss = lambda w, x: ((x @ w["a"]) ** 2).sum()
    begun, delta = free_at(loss, w, x, torch.zeros_like(x), eps=0.05, lr=0.02, replays=2)
    resumed = free_at(loss, begun, x, delta, eps=0.05, lr=0.02, replays=3)
    whole = free_at(loss, w, x, torch.zeros_like(x), eps=0.05, lr=0.02, replays=5)
    close(resumed[0], whole[0])
    close(resumed[1], whole[1])


def test_free_training_brings_a_delta_of_another_batch_into_the_ball_and_the_box() -> None:
    x = tensor([0.95, 0.5])
    w, _ = free_at(product, {"a": tensor(0.0, 0.0)}, x, tensor([0.1, -7.0]), eps=0.1, lr=1.0, replays=1)
    close(w, {"a": tensor(-1.0, -0.4)})


# amortised_awp


def test_amortised_awp_by_hand_climbs_where_the_last_step_starts() -> None:
    """w = (3, −4), γ = 0.1, ε = 0.2, α = 0.15; x = (0.5, 0.9) and (0.4, 0.1). The gradient by w is Σ_i x'_i.

    From δ = 0 the first step gives (0.65, 0.75), (0.55, 0), boxed; the second is cut at ε: (0.7, 0.7), (0.6, 0).
    So h = (0.9, 1) for one step, and (1.2, 0.75) for two.
    """
    w, x = {"a": tensor(3.0, -4.0)}, tensor([0.5, 0.9], [0.4, 0.1])
    settings = {"eps": 0.2, "step_size": 0.15, "gamma": 0.1}
    x_adv, v = amortised_awp(product, w, x, torch.zeros_like(x), steps=1, **settings)
    close(x_adv, tensor([0.65, 0.75], [0.55, 0.0]))
    close(v, {"a": 0.5 * tensor(0.9, 1.0) / math.hypot(0.9, 1.0)})
    x_adv, v = amortised_awp(product, w, x, torch.zeros_like(x), steps=2, **settings)
    close(x_adv, tensor([0.7, 0.7], [0.6, 0.0]))
    close(v, {"a": 0.5 * tensor(1.2, 0.75) / math.hypot(1.2, 0.75)})


# alp


def test_logit_pairing_by_hand() -> None:
    """z = (ln 3, 0), z' = (0, ln 3), y = 0: CE = ln 4/3 and ln 4, each class (ln 3)² apart."""
    z, attacked = tensor([math.log(3), 0.0]), tensor([0.0, math.log(3)])
    value = alp(z, attacked, torch.tensor([0]), 0.5)
    close(value, tensor(0.5 * (math.log(4 / 3) + math.log(4)) + 0.5 * math.log(3) ** 2))


def test_logit_pairing_is_half_of_both_cross_entropies_and_beta_times_the_mean_square() -> None:
    z, attacked, y = random(4, 3, seed=15), random(4, 3, seed=16), torch.tensor([2, 0, 1, 1])
    for beta in (0.0, 0.7):
        expected = [
            0.5 * (cross_entropy(z[i], y[i]) + cross_entropy(attacked[i], y[i]))
            + beta * math.fsum((z[i] - attacked[i]).square().tolist()) / 3
            for i in range(4)
        ]
        close(alp(z, attacked, y, beta), tensor(*expected))


def test_logit_pairing_pulls_both_sides() -> None:
    """The pairing term's gradient is 2β(z − z')/K by z and its negative by z'."""
    z, attacked, y = random(4, 3, seed=15), random(4, 3, seed=16), torch.tensor([2, 0, 1, 1])
    leaves = [z.requires_grad_(True), attacked.requires_grad_(True)]
    with_pairing = torch.autograd.grad(alp(z, attacked, y, 0.7).sum(), leaves)
    without = torch.autograd.grad(alp(z, attacked, y, 0.0).sum(), leaves)
    pull = 2 * 0.7 * (z - attacked).detach() / 3
    close(with_pairing[0] - without[0], pull)
    close(with_pairing[1] - without[1], -pull)
