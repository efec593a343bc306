"""Every neighbour against an oracle that was written from its formula alone, and the limits in which one is another."""

import copy
import math

import pytest
import torch
from family import ATTACK, bits, everything, sgd
from networks import batch, convolutional
from oracles import neighbours as oracles
from torch import nn

from saltflat import (
    AT,
    MART,
    PGD,
    TRADES,
    Box,
    Global,
    Layerwise,
    Linf,
    Natural,
    double_perturbation_step,
    gradient,
    perturbed,
)
from saltflat.inputs import zero
from saltflat.neighbours.adaptive_random_wp import (
    PREFIX,
    adaptive_random_wp,
    adaptively_drawn,
    by_coordinate,
    by_filter,
)
from saltflat.neighbours.free import NAME, free_step
from saltflat.neighbours.kaggle import along_momentum, fast_awp, kaggle_awp
from saltflat.neighbours.random_wp import Gaussian, drawn, increasing, random_wp, two_batch_step
from saltflat.neighbours.robust_wp import accumulated, below, robust_wp
from saltflat.neighbours.sharpness_aware import asam, sam
from saltflat.neighbours.weighted import all_but_last
from saltflat.objectives import ce
from saltflat.weights import default, trained

SHRINKS = {0.5: by_filter, 0.25: by_coordinate}


def close(found, expected, atol=1e-15):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].detach(), tensor.detach(), rtol=1e-12, atol=atol)


def identical(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(model, where=trained):
    return {name: p.detach().clone() for name, p in model.named_parameters() if where(name, p)}


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def normals(w, seed=3):
    """The draws that one generator gives, tensor by tensor."""
    draws = generator(seed)
    return {name: torch.randn(part.shape, dtype=part.dtype, generator=draws) for name, part in w.items()}


@pytest.fixture(params=["eval", "train"])
def setting(request):
    """A network in each mode, a batch, and the losses of its examples as a function of a dict of weights."""
    torch.manual_seed(0)
    model = convolutional().train(request.param == "train")
    x, y = batch()
    return model, x, y, oracles.cross_entropies(model, x, y)


# RobustWP


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.6, 1.0])
def test_robust_wp_is_the_oracle_s(setting, steps, quantile):
    """With c below all losses, between some of them, and above all; the perturbation is large, so that masks change."""
    model, x, y, losses = setting
    w = weights(model, default)
    at_w = losses(w).detach()
    c = {0.0: 0.0, 1.0: math.inf}.get(quantile, at_w.quantile(quantile).item())
    expected = oracles.robust_wp(losses, w, 0.3, c, steps)
    with robust_wp(model, lambda: ce(model(x), y), 0.3, c=c, steps=steps) as ascent:
        close(ascent.displacement, expected)
        torch.testing.assert_close(ascent.value, at_w.where(at_w < c, 0).mean(), rtol=1e-12, atol=0)
        assert ascent.skipped == (len(w) if c == 0 else 0)
    if c > 0:
        assert oracles.global_norm(expected) == pytest.approx(0.3 * oracles.global_norm(w), rel=1e-12)


def test_robust_wp_s_mask_is_looked_at_anew_in_every_step():
    """A c that some example passes on its way up, which a mask that is kept would go on with."""
    model = convolutional().eval()
    x, y = batch()
    losses, w = oracles.cross_entropies(model, x, y), weights(model, default)
    c = losses(w).max().item() + 1e-3
    first = oracles.robust_wp(losses, w, 0.3, c, 1)
    assert (losses(w) < c).all()
    assert not (losses(oracles.moved(w, first)) < c).all()
    with robust_wp(model, lambda: ce(model(x), y), 0.3, c=c, steps=3) as ascent:
        close(ascent.displacement, oracles.robust_wp(losses, w, 0.3, c, 3))


def with_buckets(model):
    """Gradients as under DistributedDataParallel with views: each backward writes where the one before has written."""
    buckets = {p: torch.zeros_like(p) for p in model.parameters()}

    def into_the_bucket(p):
        p.grad = buckets[p].copy_(p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(into_the_bucket)
    return model


def test_robust_wp_adds_gradients_up_as_they_were_also_where_they_lie_in_a_bucket():
    model, (x, y) = with_buckets(convolutional(batch_norm=False)), batch()
    losses, w = oracles.cross_entropies(model, x, y), weights(model, default)
    with robust_wp(model, lambda: ce(model(x), y), 0.1, c=5.0, steps=4) as ascent:
        close(ascent.displacement, oracles.robust_wp(losses, w, 0.1, 5.0, 4))


def test_a_gradient_that_was_asked_for_stays_what_it_was_also_where_it_lies_in_a_bucket():
    model, (x, y) = with_buckets(convolutional(batch_norm=False)), batch()
    found = gradient(model, lambda: ce(model(x), y).mean())
    kept = {name: g.clone() for name, g in found.items()}
    gradient(model, lambda: ce(model(x), y).sum())
    assert identical(found, kept)


def test_the_loss_stationary_condition_counts_all_examples_and_an_equal_loss_is_masked():
    losses = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    value = below(lambda: losses, 4.0)()
    value.backward()
    assert value.item() == 0.75
    assert losses.grad.tolist() == [0.25, 0.25, 0, 0]
    taken = below(lambda a, *, b: a * b, 4.0)(losses.detach(), b=2.0)
    assert taken.item() == 0.5


@pytest.mark.parametrize("objective", [AT(), TRADES(6.0), MART(5.0)], ids=repr)
@pytest.mark.parametrize("inside", [False, True])
def test_robust_wp_with_an_infinite_c_one_step_and_awp_s_ball_is_awp_to_the_bit(objective, inside):
    ends = []
    for more in ({}, {"climb": accumulated, "climbed": below(objective.each, math.inf)}):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer, draws = sgd(model), generator()
        attack = PGD(Linf(8 / 255), 4 / 255, 2)
        for _ in range(3):
            step = double_perturbation_step(
                model, x, y, objective=objective, attack=attack, ball=Layerwise(0.01), optimizer=optimizer,
                generator=draws, step_inside=inside, **more,
            )  # fmt: skip
        ends.append((bits(everything(model, optimizer)), bits(grads(model)), step.perturbed_loss, step.x_adv))
    assert identical(ends[0][0], ends[1][0])
    assert identical(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])
    assert torch.equal(ends[0][3], ends[1][3])


def test_robust_wp_with_a_c_of_zero_is_adversarial_training_to_the_bit():
    ends = []
    for more in (
        {"ball": None},
        {
            "ball": Global(0.01, relative=True),
            "climb": accumulated,
            "climbed": below(AT().each, 0.0),
            "steps": 4,
        },
    ):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        for _ in range(3):
            step = double_perturbation_step(model, x, y, objective=AT(), attack=ATTACK, optimizer=optimizer, **more)
        ends.append((bits(everything(model, optimizer)), step))
    assert identical(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1].perturbed_loss, ends[1][1].perturbed_loss)
    assert ends[1][1].skipped == 3  # nobody moved


# RandomWP


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


# ARWP


@pytest.mark.parametrize("power", SHRINKS)
def test_arwp_is_the_oracle_s_for_any_memory(power):
    model = convolutional()
    w = weights(model)
    squares = {name: torch.rand_like(part) ** 8 * 100 for name, part in w.items()}
    memory = {PREFIX + name: part.clone() for name, part in squares.items()}
    expected = oracles.adaptive_random_wp(w, 0.1, normals(w), squares, 0.7, power)
    with adaptive_random_wp(model, 0.1, generator(), memory=memory, eta=0.7, shrink=SHRINKS[power]) as ascent:
        close(ascent.displacement, expected, atol=1e-14)
    assert identical(bits(weights(model)), bits(w))


@pytest.mark.parametrize("shrink", SHRINKS.values())
@pytest.mark.parametrize("kept", ["nothing", "zeros"])
def test_arwp_s_first_draw_is_random_wp_s_to_the_bit(shrink, kept):
    model = convolutional()
    memory = {} if kept == "nothing" else {PREFIX + name: torch.zeros_like(p) for name, p in weights(model).items()}
    with random_wp(model, 0.1, generator()):
        expected = bits(weights(model))
    with adaptive_random_wp(model, 0.1, generator(), memory=memory, eta=5.0, shrink=shrink):
        assert identical(bits(weights(model)), expected)


@pytest.mark.parametrize("power", SHRINKS)
@pytest.mark.parametrize("inside", [False, True])
def test_arwp_s_steps_and_memory_follow_the_oracle(power, inside):
    """Five whole steps: draw, gradient at w + e, F <- beta F + g^2, SGD."""
    model, (x, y) = convolutional(batch_norm=False), batch()
    optimizer, memory, draws = torch.optim.SGD(model.parameters(), lr=0.1), {}, generator()
    w, loss = weights(model), oracles.mean_of(oracles.cross_entropies(model, x, y))
    F, theirs = {name: torch.zeros_like(part) for name, part in w.items()}, generator()
    for _ in range(5):
        double_perturbation_step(
            model, x, y, objective=Natural(), attack=None, ball=Gaussian(0.05), optimizer=optimizer, where=trained,
            step_inside=inside,
            climb=lambda *a, **k: adaptively_drawn(
                *a, **k, generator=draws, memory=memory, eta=3.0, beta=0.9, shrink=SHRINKS[power]
            ),
        )  # fmt: skip
        z = {name: torch.randn(part.shape, dtype=part.dtype, generator=theirs) for name, part in w.items()}
        e = oracles.adaptive_random_wp(w, 0.05, z, F, 3.0, power)
        g = oracles.gradient(loss, oracles.moved(w, e))
        F = oracles.fisher_update(F, g, 0.9)
        w = {name: part - 0.1 * g[name] for name, part in w.items()}
        close({name.removeprefix(PREFIX): squares for name, squares in memory.items()}, F)
        close(weights(model), w)


def test_arwp_forgets_a_block_that_fails_and_keeps_no_reference_to_gradients():
    model, x, memory = nn.Linear(3, 2), torch.rand(4, 3), {}
    with pytest.raises(ZeroDivisionError):
        with adaptive_random_wp(model, 0.1, generator(), memory=memory):
            model(x).sum().backward()
            raise ZeroDivisionError
    assert memory == {}
    with adaptive_random_wp(model, 0.1, generator(), memory=memory):
        model(x).sum().backward()
    kept = copy.deepcopy(memory)
    model.weight.grad.fill_(7.0)
    assert identical(memory, kept)


def test_arwp_s_memory_stays_finite_where_squares_overflow():
    """A finite gradient whose square is not would silence its filter for ever: beta times infinity is infinity."""
    model, memory = nn.Linear(3, 2), {}
    for size in (1.0, 1e30, 1.0):
        model.zero_grad()
        with adaptive_random_wp(model, 0.1, generator(), memory=memory):
            (size * model(torch.ones(1, 3))).sum().backward()
        assert all(squares.isfinite().all() for squares in memory.values())


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_arwp_remembers_the_gradient_of_the_loss_whatever_its_share_of_the_descent(share):
    model, (x, y) = convolutional(batch_norm=False), batch()
    w, memory = weights(model), {}
    loss = oracles.mean_of(oracles.cross_entropies(model, x, y))
    g = oracles.gradient(loss, oracles.moved(w, oracles.random_wp(w, 0.05, normals(w))))
    double_perturbation_step(
        model, x, y, objective=Natural(), attack=None, ball=Gaussian(0.05), optimizer=sgd(model), where=trained,
        share=share, climb=lambda *a, **k: adaptively_drawn(*a, **k, generator=generator(), memory=memory),
    )  # fmt: skip
    close({name.removeprefix(PREFIX): squares for name, squares in memory.items()}, {n: p**2 for n, p in g.items()})


# m-RWP


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


# WT-AWP


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wt_awp_s_gradient_is_the_oracle_s(setting, share):
    model, x, y, losses = setting
    w, truncated = weights(model), ["6.weight", *(name for name, p in model.named_parameters() if p.ndim < 2)]
    expected = oracles.weighted_awp(oracles.mean_of(losses), w, 0.1, share, truncated)
    double_perturbation_step(
        model, x, y, objective=AT(), attack=None, ball=Layerwise(0.1), optimizer=sgd(model), share=share,
        where=all_but_last(model),
    )  # fmt: skip
    close(grads(model), expected, atol=1e-14)


def test_wt_awp_with_a_share_of_one_and_every_layer_is_awp_to_the_bit():
    ends = []
    for more in ({}, {"share": 1.0, "where": default}):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        for _ in range(3):
            double_perturbation_step(
                model, x, y, objective=TRADES(), attack=PGD(Linf(0.1), 0.05, 2), ball=Layerwise(0.01),
                optimizer=optimizer, generator=generator(), **more,
            )  # fmt: skip
        ends.append(bits(everything(model, optimizer)))
    torch.manual_seed(0)  # and a loop for AWP alone
    model, (x, y) = convolutional().train(), batch()
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        model.eval()
        x_adv = PGD(Linf(0.1), 0.05, 2)(TRADES().inner(model, x, y), x, generator=generator())
        model.train()
        loss = lambda x_adv=x_adv: TRADES().outer(model, x, x_adv, y)
        with perturbed(model, loss, Layerwise(0.01)):
            loss().backward()
        optimizer.step()
    ends.append(bits(everything(model, optimizer)))
    assert identical(ends[0], ends[1])
    assert identical(ends[0], ends[2])


@pytest.mark.parametrize("climb", [perturbed, accumulated, drawn])
def test_a_share_of_zero_is_plain_training_to_the_bit(climb):
    ends = []
    for more in ({"ball": None}, {"ball": Layerwise(0.3), "climb": climb, "share": 0.0, "where": default}):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        for _ in range(3):
            step = double_perturbation_step(model, x, y, objective=AT(), attack=ATTACK, optimizer=optimizer, **more)
        ends.append((bits(everything(model, optimizer)), step.loss))
    assert identical(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_last_layer_is_the_last_one_with_weights():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.linear = nn.Parameter(torch.ones(1, 2, 2)), nn.Linear(2, 2)

    def chosen(model):
        where = all_but_last(model)
        return [name for name, p in model.named_parameters() if where(name, p)]

    assert chosen(convolutional()) == ["0.weight", "3.weight"]
    assert chosen(nn.Sequential(nn.Linear(2, 2), Layer())) == ["0.weight"]  # attention is part of its layer
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))) == ["0.weight"]
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2, 2))) == ["0.weight"]
    with pytest.raises(ValueError, match="model: expected at least two layers with weights, got 1"):
        all_but_last(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_the_last_layer_stays_the_same_inside_a_wrapper():
    """DistributedDataParallel, or a normalisation, around a network that owns a tensor itself, as transformers do."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.first, self.last = nn.Parameter(torch.ones(1, 1, 2)), nn.Linear(2, 2), nn.Linear(2, 2)

    for model, last in ((convolutional(), "6.weight"), (Tokens(), "last.weight")):
        for depth in range(3):
            where, prefix = all_but_last(model), "0." * depth
            left = [name for name, p in model.named_parameters() if p.ndim > 1 and not where(name, p)]
            assert left == [prefix + last]
            model = nn.Sequential(model)


# SAM, ASAM


@pytest.mark.parametrize("where", [trained, default])
def test_sam_is_the_oracle_s(setting, where):
    model, x, y, losses = setting
    w = weights(model, where)
    v, g = oracles.sam(oracles.mean_of(losses), w, 0.5)
    model.zero_grad()
    with sam(model, lambda: ce(model(x), y).mean(), 0.5, where=where) as ascent:
        found = ascent.displacement
        ce(model(x), y).mean().backward()
    close(found, v, atol=1e-14)
    close({name: grad for name, grad in grads(model).items() if name in w}, g, atol=1e-14)


@pytest.mark.parametrize("offset", [0.0, 0.01, 1.0])
def test_asam_is_the_oracle_s(setting, offset):
    model, x, y, losses = setting
    with torch.no_grad():
        model[0].weight[0] = 0.0
    w = weights(model)
    v, g = oracles.asam(oracles.mean_of(losses), w, 0.5, offset)
    with asam(model, lambda: ce(model(x), y).mean(), 0.5, offset=offset) as ascent:
        found = ascent.displacement
        ce(model(x), y).mean().backward()
    close(found, v, atol=1e-14)
    close(grads(model), g, atol=1e-13)  # the zeroed filter's BatchNorm multiplies rounding
    assert found["0.weight"][0].any() == (offset > 0)


def test_asam_with_a_huge_offset_is_sam_with_a_radius_as_much_larger():
    model, (x, y) = convolutional().eval(), batch()
    loss = lambda: ce(model(x), y).mean()
    with sam(model, loss, 0.5) as ascent:
        v = ascent.displacement
    with asam(model, loss, 0.5e-9, offset=1e9) as ascent:
        for name, found in ascent.displacement.items():
            torch.testing.assert_close(found, v[name], rtol=1e-6, atol=1e-9)


# Kaggle


@pytest.mark.parametrize(("step_size", "eps"), [(1.0, 1e-4), (1e-3, 1e-3), (1e-3, 1.0)])
def test_kaggle_awp_is_the_oracle_s(setting, step_size, eps):
    """In the third setting, the box binds nowhere near everywhere."""
    model, x, y, losses = setting
    with torch.no_grad():
        model[3].weight[0] = 0.0
    w = weights(model, default)
    expected = oracles.kaggle_awp(oracles.mean_of(losses), w, step_size, eps)
    loss = lambda: ce(model(x), y).mean()
    for given in (loss, gradient(model, loss)):
        with kaggle_awp(model, given, step_size=step_size, eps=eps) as ascent:
            inside = weights(model, default)
            close(ascent.displacement, expected)
        close(inside, oracles.moved(w, expected))
    assert not expected["3.weight"][0].any()


def test_with_the_published_sizes_nearly_all_numbers_lie_on_the_box():
    model, (x, y) = convolutional().train(), batch()
    w = weights(model, default)
    with kaggle_awp(model, lambda: ce(model(x), y).mean()) as ascent:
        v = ascent.displacement
    on = torch.cat([((v[name].abs() / (1e-4 * part.abs()) - 1).abs() < 1e-8).flatten() for name, part in w.items()])
    assert on.double().mean() > 0.98
    assert sum(0 < v[name].norm() <= 1e-4 * part.norm() * (1 + 1e-9) for name, part in w.items()) == len(w)


MOMENTUM = {
    "Adam": (lambda p: torch.optim.Adam(p, lr=1e-2), "exp_avg"),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2), "exp_avg"),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=1e-2), "exp_avg"),
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
}


@pytest.mark.parametrize(("make", "key"), MOMENTUM.values(), ids=MOMENTUM)
@pytest.mark.parametrize("eps", [1e-3, 0.05])
def test_fast_awp_is_the_clamped_layer_step_along_the_optimiser_s_average(make, key, eps):
    model, (x, y) = convolutional().train(), batch()
    optimizer, names = make(model.parameters()), {id(p): name for name, p in model.named_parameters()}
    with fast_awp(model, optimizer, step_size=0.02, eps=eps) as ascent:  # nothing has been averaged yet
        assert all(not v.any() for v in ascent.displacement.values())
        assert ascent.skipped == 3
        ce(model(x), y).mean().backward()
    optimizer.step()
    for _ in range(2):
        w = weights(model, default)
        averages = {names[id(p)]: state[key].clone() for p, state in optimizer.state.items()}
        expected = oracles.momentum_awp({name: averages[name] for name in w}, w, 0.02)
        expected = {n: v.minimum(eps * w[n].abs()).maximum(-eps * w[n].abs()) for n, v in expected.items()}
        optimizer.zero_grad()
        with fast_awp(model, optimizer, step_size=0.02, eps=eps) as ascent:
            close(ascent.displacement, expected)
            assert ascent.value is None
            ce(model(x), y).mean().backward()
        assert identical(bits(weights(model, default)), bits(w))
        assert identical({names[id(p)]: state[key] for p, state in optimizer.state.items()}, averages)
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
    ids=["SGD", "RMSprop", "Adagrad"],
)
def test_an_optimiser_that_keeps_no_average_is_refused_once_it_has_stepped(make):
    """Else v would be 0 for ever, and nobody would know."""
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    optimizer = make(model.parameters())
    with pytest.raises(ValueError, match="optimizer: expected one with momentum"):
        for _ in range(2):
            with fast_awp(model, optimizer):
                model(x).sum().backward()
            optimizer.step()


# Free adversarial training


def free_losses(model, y):
    def loss(w, x):
        return oracles.mean_of(oracles.cross_entropies(model, x, y))(w)

    return loss


@pytest.mark.parametrize("step_size", [0.1, 0.03])
@pytest.mark.parametrize("replays", [1, 4])
def test_free_at_is_the_oracle_s_over_batches_of_other_sizes(step_size, replays):
    """The last batch is smaller; the one after it takes up the other rows' displacements where they were left."""
    model = convolutional(batch_norm=False)
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.1), {}
    attack = PGD(Linf(step_size), step_size, 9)
    w, delta = weights(model), torch.zeros(8, 3, 6, 6, dtype=torch.float64)
    for n in (8, 8, 5, 8):
        x, y = batch(n)
        step = free_step(
            model, x, y, objective=AT(), attack=attack, ball=None, optimizer=optimizer, memory=memory, replays=replays
        )
        w, d = oracles.free_at(free_losses(model, y), w, x, delta[:n], eps=step_size, lr=0.1, replays=replays)
        delta = torch.cat([d, delta[n:]])
        close(weights(model), w)
        torch.testing.assert_close(memory[NAME], delta, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(step.x_adv, x + d, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [AT(), TRADES(6.0)], ids=repr)
def test_free_at_with_awp_is_a_naive_loop(objective):
    """Smaller steps than the ball's radius, BatchNorm in train mode, momentum and weight decay."""
    model = convolutional().train()
    other = copy.deepcopy(model)
    d = 0.1 * torch.rand(6, 3, 6, 6, dtype=torch.float64) - 0.05  # at 0, TRADES' divergence has no gradient
    optimizers, memory = (sgd(model), sgd(other)), {NAME: d}
    for _ in range(2):
        x, y = batch(6)
        step = free_step(
            model, x, y, objective=objective, attack=PGD(Linf(0.1), 0.04, 1), ball=Layerwise(0.05), replays=3,
            optimizer=optimizers[0], memory=memory,
        )  # fmt: skip
        d = (x + d.clamp(-0.1, 0.1)).clamp(0, 1) - x
        for _ in range(3):
            x_adv, w = (x + d).detach(), weights(other, default)
            buffers = {name: b.clone() for name, b in other.named_buffers()}
            g = torch.autograd.grad(objective.outer(other, x, x_adv, y), [other.get_parameter(n) for n in w])
            with torch.no_grad():
                for name, b in other.named_buffers():
                    b.copy_(buffers[name])
                for name, part in zip(w, g, strict=True):
                    other.get_parameter(name).add_(0.05 * w[name].norm() * part / part.norm())
            x_adv.requires_grad_()
            other.zero_grad()
            value = objective.outer(other, x, x_adv, y)
            value.backward()
            with torch.no_grad():
                for name, part in w.items():
                    other.get_parameter(name).copy_(part)
            optimizers[1].step()
            d = (x + (x_adv.detach() - x + 0.04 * x_adv.grad.sign()).clamp(-0.1, 0.1)).clamp(0, 1) - x
        close(everything(model, optimizers[0]), everything(other, optimizers[1]), atol=1e-13)
        torch.testing.assert_close(memory[NAME], d, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(step.perturbed_loss, value.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("ball", "passes"), [(None, 4), (Layerwise(0.05), 8)])
def test_one_backward_gives_the_gradients_for_weights_and_inputs(ball, passes):
    model, (x, y) = convolutional().train(), batch()
    counts = {"forwards": 0, "backwards": 0, "weights": 0}

    def count(what):
        counts[what] += 1

    model[3].register_forward_hook(lambda *_: count("forwards"))
    model[3].register_full_backward_hook(lambda *_: count("backwards"))
    model[3].weight.register_hook(lambda g: count("weights"))
    free_step(model, x, y, objective=AT(), attack=ATTACK, ball=ball, optimizer=sgd(model), memory={}, replays=4)
    assert set(counts.values()) == {passes}


def test_free_at_s_memory_grows_with_the_batch_and_begins_anew_with_another_shape():
    model, memory = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).double(), {}
    attack = PGD(Linf(0.1), 0.1, 1, start=zero)
    for n in (3, 6):
        x, y = batch(n)
        if n == 3:
            model(x)
        free_step(model, x, y, objective=AT(), attack=attack, ball=None, optimizer=sgd(model), memory=memory, replays=1)
        assert memory[NAME].shape == x.shape
        assert memory[NAME].abs().amax() <= 0.1 + 1e-12
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x, y = torch.rand(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    free_step(other, x, y, objective=AT(), attack=attack, ball=None, optimizer=sgd(other), memory=memory, replays=1)
    assert memory[NAME].shape == x.shape


# Arguments that mean nothing


def test_what_a_climb_does_not_have_is_refused_in_one_line():
    model, x, y = nn.Linear(3, 2), torch.rand(4, 3), torch.arange(4) % 2
    loss, each = (lambda: ce(model(x), y).mean()), (lambda: ce(model(x), y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start, before = {"weight": torch.ones(2, 3)}, bits(weights(model))
    frozen = nn.Linear(3, 2).requires_grad_(False)
    nothing, never = nn.Linear(3, 2), (lambda name, p: False)
    one = {"objective": AT(), "attack": None, "optimizer": optimizer}
    for make, words in (
        (lambda: robust_wp(model, each, c=math.nan), "c: expected a number, got nan"),
        (lambda: robust_wp(model, each, -1.0), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: robust_wp(model, each, steps=0), "steps: expected an integer >= 1, got 0"),
        (lambda: robust_wp(model, loss), r"losses: expected one per example, \(N,\), got shape \(\)"),
        (lambda: robust_wp(model, lambda: model(x)), r"losses: expected one per example, \(N,\), got shape \(4, 2\)"),
        (lambda: robust_wp(model, each, where=never), "where: chose none of the model's 2 parameters"),
        (lambda: robust_wp(model, lambda: ce(nothing(x), y)), "loss: reaches none of the 1 weights"),
        (lambda: accumulated(model, loss, Global(0.1), step_size=0.1), "step_size: gradients are added as they are"),
        (lambda: accumulated(model, loss, Global(0.1), start=start), "start: the sum of gradients begins at 0"),
        (lambda: random_wp(model, -0.1, None), "radius: expected a finite number >= 0, got -0.1"),
        (lambda: random_wp(model, math.nan, None), "radius: expected a finite number >= 0, got nan"),
        (lambda: random_wp(model, 0.1, None, where=never), "where: chose none"),
        (lambda: random_wp(frozen, 0.1, None), "where: chose none of the model's 2 parameters"),
        (lambda: drawn(model, None, Gaussian(0.1), steps=2), "steps: a draw has none, expected 1, got 2"),
        (lambda: drawn(model, None, Gaussian(0.1), step_size=0.1), "step_size: a draw has none, expected None"),
        (
            lambda: drawn(model, None, Gaussian(0.1), start=start),
            r"start: a draw begins at w \(no alternations\), expected none",
        ),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, eta=-1.0), "eta: expected a .*number >= 0, got -1.0"),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, eta=math.nan), "eta: expected a .*number >= 0"),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, beta=1.1), r"beta: expected a number in \[0, 1\]"),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, where=never), "where: chose none"),
        (lambda: sam(model, loss, -1.0), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: sam(frozen, loss), "where: chose none of the model's 2 parameters"),
        (lambda: sam(model, lambda: nothing(x).sum()), "loss: reaches none of the 2 weights"),
        (lambda: asam(model, loss, offset=-1.0), "offset: expected a finite number >= 0, got -1.0"),
        (lambda: kaggle_awp(model, loss, eps=-1.0), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: kaggle_awp(model, {}), "loss: reaches none of the 1 weights"),
        (lambda: fast_awp(model, optimizer, where=never), "where: chose none"),
        (lambda: fast_awp(frozen, optimizer), "where: chose none"),
    ):
        with pytest.raises(ValueError, match=words) as caught, make():
            pass
        assert "\n" not in str(caught.value)
    for call, words in (
        (lambda: two_batch_step(model, x, y, ball=None, share=1.5, **one), r"share: expected a number in \[0, 1\]"),
        (lambda: double_perturbation_step(model, x, y, ball=None, share=-0.1, **one), r"share: expected a number in"),
        (
            lambda: double_perturbation_step(model, x, y, ball=Layerwise(0.1), share=0.5, step_inside=True, **one),
            "share: expected 1 with step_inside",
        ),
        (
            lambda: free_step(model, x, y, ball=None, memory={}, replays=0, **one | {"attack": ATTACK}),
            "replays: expected an integer >= 1, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert identical(bits(weights(model)), before)


def test_one_step_along_the_momentum_before_the_first_step_of_the_optimiser_as_after_it():
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="steps"),
            along_momentum(model, None, Box(0.1), optimizer=optimizer, steps=2),
        ):
            pass
        model(x).sum().backward()
        optimizer.step()


def test_free_at_refuses_a_loss_that_never_looks_at_the_attack():
    model, (x, y) = convolutional(), batch()
    with pytest.raises(ValueError, match=r"^(objective|loss|attack): "):
        free_step(
            model, x, y, objective=Natural(), attack=ATTACK, ball=None, optimizer=sgd(model), memory={}, replays=1
        )


@pytest.mark.parametrize("how", ["two batches", "no adversary"])
def test_a_model_without_anything_to_train_is_refused_in_one_line(how):
    model, (x, y) = convolutional().requires_grad_(False), batch()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    call = two_batch_step if how == "two batches" else double_perturbation_step
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(model, x, y, objective=AT(), attack=None, ball=None, optimizer=optimizer)
    assert "\n" not in str(caught.value)
