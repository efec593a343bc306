"""RandomWP and m-RWP against oracles that were written from their formulas alone."""

import copy
import math

import pytest
import torch
from against_oracles import close, generator, grads, identical, normals, weights
from family import bits, everything, sgd
from networks import batch, convolutional
from oracles import neighbours as oracles
from torch import nn

from saltflat import (
    AT,
    PGD,
    TRADES,
    Layerwise,
    Linf,
    double_perturbation_step,
    gradient,
)
from saltflat.inputs import uniform
from saltflat.neighbours.random_wp import Gaussian, drawn, increasing, random_wp, two_batch_step
from saltflat.objectives import ce
from saltflat.random import Rows
from saltflat.weights import default, trained


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.7])
def test_random_wp_is_the_oracle_s(sigma):
    model = nn.Sequential(convolutional(), nn.Linear(3, 2)).double()
    model.scale = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))  # no dimension at all
    w = weights(model)
    expected = oracles.random_wp(w, sigma, normals(w))
    with random_wp(model, sigma, generator()) as ascent:
        inside = weights(model)
        close(inside, oracles.moved(w, expected))
        close(ascent.displacement, expected, atol=1e-14)
        assert ascent.value is None
        assert ascent.skipped == (len(w) if sigma == 0 else sum(not part.any() for part in w.values()))
    assert identical(bits(weights(model)), bits(w))


def test_the_expected_square_of_a_filter_s_noise():
    """E ‖e_j‖^2 = sigma^2 n_j ‖w_j‖^2: twenty seeds, each within three of its own standard errors."""
    w = {"filters": torch.randn(4, 3, 2, 2, dtype=torch.float64), "bias": torch.randn(5, dtype=torch.float64)}
    w["filters"][1] *= 100  # sizes of their own
    norms = torch.tensor([*(oracles.norm(part) for part in w["filters"]), oracles.norm(w["bias"])], dtype=torch.float64)
    expected = 0.1**2 * torch.tensor([12.0] * 4 + [5.0], dtype=torch.float64) * norms**2
    for seed in range(20):
        draws, squares = generator(seed), []
        for _ in range(200):
            e = Gaussian(0.1).sample(w, draws)
            squares.append([*(oracles.norm(part) ** 2 for part in e["filters"]), oracles.norm(e["bias"]) ** 2])
        shares = torch.tensor(squares, dtype=torch.float64) / expected
        assert (shares.mean() - 1).abs() < 3 * shares.mean(1).std() / math.sqrt(len(shares))
        assert ((shares.mean(0) - 1).abs() < 4.5 * shares.std(0) / math.sqrt(len(shares))).all()


def test_on_a_quadratic_the_expected_rise_is_half_the_trace_of_each_filter_s_curvature():
    """E L(w + e) - L(w) = sigma^2 / 2 sum_j ‖w_j‖^2 tr H_jj."""
    model = nn.Linear(3, 4).double()
    root = torch.randn(16, 16, dtype=torch.float64)
    H, centre = root @ root.T, torch.randn(16, dtype=torch.float64)

    def loss():
        away = torch.cat([model.weight.flatten(), model.bias]) - centre
        return (away @ H @ away / 2).item()

    diagonal, at_w = H.diagonal(), loss()
    norms = [oracles.norm(row) for row in model.weight]
    expected = sum(norms[j] ** 2 * diagonal[3 * j : 3 * j + 3].sum().item() for j in range(4))
    expected = 0.2**2 / 2 * (expected + oracles.norm(model.bias) ** 2 * diagonal[12:].sum().item())
    for seed in range(20):
        draws, rises = generator(seed), []
        for _ in range(250):
            with random_wp(model, 0.2, draws):
                rises.append(loss() - at_w)
        found = torch.tensor(rises, dtype=torch.float64)
        assert abs(found.mean() - expected) < 3 * found.std() / math.sqrt(len(found))


def test_any_ball_can_be_drawn_from():
    model = convolutional()
    w = weights(model, default)
    with drawn(model, None, Layerwise(0.1), where=default, generator=generator()) as ascent:
        v = ascent.displacement
    close(v, Layerwise(0.1).sample(w, generator()), atol=1e-15)
    assert all(0 < v[name].norm() < 0.1 * part.norm() for name, part in w.items())


def test_sigma_grows_along_half_a_cosine():
    course = increasing(0.002, 4.0)
    assert course(0) == 0.002
    assert course(1) == pytest.approx(5 * 0.002, rel=1e-12)
    values = [course(t / 20) for t in range(21)]
    assert values == sorted(values)
    assert course(0.25) + course(0.75) == pytest.approx(course(0) + course(1), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [8, 7])
def test_m_rwp_s_gradient_is_the_oracle_s(share, n):
    """The first half at w, the second at w + e; of an odd batch, the one in the middle is in the first."""
    model, (x, y) = convolutional().eval(), batch(n)
    w = weights(model)
    first, second = (oracles.mean_of(oracles.cross_entropies(model, x[r], y[r])) for r in (slice(4), slice(4, None)))
    e = oracles.random_wp(w, 0.05, normals(w))
    expected = oracles.mixed_random_wp(second, first, w, share, e)
    step = two_batch_step(
        model, x, y, objective=AT(), attack=None, ball=Gaussian(0.05), optimizer=torch.optim.SGD(model.parameters()),
        share=share, generator=generator(),
    )  # fmt: skip
    close(grads(model), expected)
    close(weights(model), {name: part - 1e-3 * expected[name] for name, part in w.items()})
    torch.testing.assert_close(step.loss, first(w), rtol=1e-12, atol=0)
    if share > 0:
        torch.testing.assert_close(step.perturbed_loss, second(oracles.moved(w, e)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", [AT(), TRADES(6.0)], ids=repr)
def test_m_rwp_with_a_share_of_zero_is_plain_training_on_the_first_half_to_the_bit(objective):
    torch.manual_seed(0)
    ours, (x, y) = convolutional().train(), batch(10)
    other = copy.deepcopy(ours)
    optimizers = sgd(ours), sgd(other)
    attack = PGD(Linf(8 / 255), 4 / 255, 2)
    for seed in range(3):
        step = two_batch_step(
            ours, x, y, objective=objective, attack=attack, ball=Gaussian(0.05), optimizer=optimizers[0], share=0.0,
            generator=generator(seed),
        )  # fmt: skip
        double_perturbation_step(
            other, x[:5], y[:5], objective=objective, attack=lambda f, x, start, generator, a=step.x_adv[:5]: a,
            ball=None, optimizer=optimizers[1],
        )  # fmt: skip
    assert identical(bits(everything(ours, optimizers[0])), bits(everything(other, optimizers[1])))


@pytest.mark.parametrize("ball", [None, Gaussian(0.0)])
def test_m_rwp_without_noise_is_plain_training_on_both_halves(ball):
    model, (x, y) = convolutional().eval(), batch()
    expected = gradient(model, lambda: ce(model(x), y).mean(), where=trained)
    two_batch_step(model, x, y, objective=AT(), attack=None, ball=ball, optimizer=sgd(model), generator=generator())
    close(grads(model), expected)


def test_m_rwp_s_buffers_see_the_first_half_at_w_alone():
    model, (x, y) = convolutional().train(), batch()
    other = copy.deepcopy(model)
    other(x[:4])
    two_batch_step(
        model, x, y, objective=AT(), attack=None, ball=Gaussian(0.5), optimizer=sgd(model), generator=generator()
    )
    assert identical(dict(model.named_buffers()), dict(other.named_buffers()))


def test_what_draws_for_rows_draws_the_weights_of_all_of_them():
    model, whole, part = convolutional(), generator(), generator()
    with drawn(model, None, Gaussian(0.1), generator=whole) as ascent:
        expected = ascent.displacement
    with drawn(model, None, Gaussian(0.1), generator=Rows(Rows(part, slice(4, 8), 8), slice(0, 2), 4)) as ascent:
        assert identical(bits(ascent.displacement), bits(expected))
    assert torch.equal(whole.get_state(), part.get_state())


@pytest.mark.parametrize("ball", [None, Gaussian(0.05)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_m_rwp_draws_alike_on_ranks_whatever_their_rows(share, ball):
    """Starts of the rows that each has, and weights; afterwards all generators stand at the same place."""
    states, starts = [], []
    for rows in (slice(0, 1), slice(1, 3), slice(0, 3)):
        model, (x, y), draws = convolutional(batch_norm=False), batch(3), generator()
        step = two_batch_step(
            model, x[rows], y[rows], objective=AT(), attack=PGD(Linf(0.1), 0.05, 1, start=uniform), ball=ball,
            optimizer=sgd(model), share=share, generator=Rows(draws, rows, 3),
        )  # fmt: skip
        starts.append(step.x_adv - x[rows][: len(step.x_adv)])
        states.append(draws.get_state())
    assert all(torch.equal(states[0], other) for other in states)
    assert starts[0].any()
    if share > 0:
        assert [len(start) for start in starts] == [1, 2, 3]


def test_m_rwp_takes_two_backwards_for_a_rank_s_only_row_of_more():
    """Which is both halves, since others have two; a batch of one is plain training for all."""
    model, (x, y) = convolutional().eval(), batch(1)
    w, loss = weights(model), oracles.mean_of(oracles.cross_entropies(model, x, y))
    e = oracles.random_wp(w, 0.05, normals(w))
    for total, expected in (
        (3, oracles.mixed_random_wp(loss, loss, w, 0.3, e)),
        (1, oracles.gradient(loss, w)),
    ):
        other = copy.deepcopy(model)
        two_batch_step(
            other, x, y, objective=AT(), attack=None, ball=Gaussian(0.05), optimizer=sgd(other), share=0.3,
            generator=Rows(generator(), slice(0, 1), total),
        )  # fmt: skip
        close(grads(other), expected)
