import pytest
import torch
from networks import convolutional
from torch import nn

from saltflat import L2, Linf
from saltflat.evaluation import find
from saltflat.evaluation.spsa import SPSA
from saltflat.random import PerExample

BALLS = [Linf(0.05), L2(0.3), Linf(0.05, None), L2(0.3, None)]


def linear(a, bias=0.0):
    """Two classes; the margin of class 0 is <a, x> - bias."""

    def logits(x):
        z = x.flatten(1) @ a
        return torch.stack([torch.full_like(z, bias), z], 1)

    return logits


def rows(n, shape, low=0.0, high=1.0):
    x = low + (high - low) * torch.rand(n, *shape, dtype=torch.float64)
    return x, torch.zeros(n, dtype=torch.long), torch.randn(x[0].numel(), dtype=torch.float64)


def gain(ball, x, a):
    """By how much <a, x'> can exceed <a, x> in the ball; in L2, where the box does not matter."""
    x = x.flatten(1)
    if isinstance(ball, Linf):
        return ball.project(ball.radius * a.sign().expand_as(x), x) @ a
    return ball.radius * a.norm().expand(len(x))


@pytest.mark.parametrize(("ball", "part"), [(Linf(0.05), 0.95), (Linf(0.05, None), 0.95), (L2(0.3), 0.85)])
@pytest.mark.parametrize("shape", [(3, 6, 6), (12,)])
def test_it_comes_near_the_closed_form_on_linear_models(ball, part, shape):
    x, y, a = rows(10, shape, *((0.4, 0.6) if isinstance(ball, L2) else (0.0, 1.0)))
    found = find(SPSA(ball, 40), linear(a, 1000.0), x, y, generator=PerExample(0, torch.arange(10)))
    reached = (found.margin + 1000 - x.flatten(1) @ a) / gain(ball, x, a)
    assert not found.fooled.any()
    assert part < reached.min() <= reached.max() < 1 + 1e-9


def graded(ball, shape, n):
    """Examples which take 0 to 1.3 times what the ball can give to be fooled, and their model."""
    x, y, a = rows(n, shape, 0.4, 0.6)
    needed = gain(ball, x, a) * torch.linspace(0.0, 1.3, n, dtype=torch.float64)
    x = x - ((x.flatten(1) @ a + needed) / a.square().sum())[:, None].mul(a).view(x.shape)
    return x.clamp(0, 1), y, linear(a)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("shape", [(2, 4, 4), (12,)])
def test_outcomes_are_those_of_each_example_alone(ball, shape):
    x, y, model = graded(ball, shape, 64)
    attack = SPSA(ball, 10, 33)
    together = find(attack, model, x, y, generator=PerExample(3, torch.arange(64)))
    assert 8 < together.fooled.sum() < 60  # some are fooled, and leave the search at different times
    assert len(together.iteration.unique()) > 3
    for size in (1, 3):
        for ids in torch.arange(64).split(size):
            apart = find(attack, model, x[ids], y[ids], generator=PerExample(3, ids))
            assert torch.equal(apart.fooled, together.fooled[ids])
            assert torch.equal(apart.iteration, together.iteration[ids])
            assert torch.allclose(apart.x_adv, together.x_adv[ids], atol=1e-7)
            assert torch.allclose(apart.margin, together.margin[ids], atol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_order_does_not_matter_to_the_bit(ball):
    x, y, model = graded(ball, (2, 4, 4), 16)
    x, y = x[8:], y[8:]
    order, ids = torch.randperm(8), torch.arange(8)
    one = find(SPSA(ball, 10, 32), model, x, y, generator=PerExample(0, ids))
    other = find(SPSA(ball, 10, 32), model, x[order], y, generator=PerExample(0, ids[order]))
    assert torch.equal(one.fooled[order], other.fooled)
    assert torch.equal(one.x_adv[order], other.x_adv)


def test_chunks_change_rounding_only():
    x, y, a = rows(3, (2, 4, 4))
    run = lambda chunk: [
        trial.x_adv
        for trial in SPSA(Linf(0.05), 3, 40, chunk=chunk)(linear(a), x, y, generator=PerExample(0, torch.arange(3)))
    ]
    whole = run(10_000)
    assert len(whole) == 4
    for chunk in (1, 50):
        assert all(torch.allclose(*pair, atol=1e-9) for pair in zip(run(chunk), whole, strict=True))


@pytest.mark.parametrize(("chunk", "largest"), [(1, 6), (64, 60), (10_000, 120)])
def test_a_forward_has_at_most_chunk_inputs_and_a_step_two_a_sample(chunk, largest):
    x, y, a = rows(3, (5,))
    sizes = []
    model = linear(a)
    search = SPSA(Linf(0.05), 1, 20, chunk=chunk)(lambda x: sizes.append(len(x)) or model(x), x, y)
    assert len(list(search)) == 2
    assert sizes[0] == sizes[-1] == 3
    assert max(sizes[1:-1]) == largest
    assert sum(sizes) == 3 * (2 * 20 + 1) + 3


def test_the_estimate_is_the_gradient_of_a_linear_function_on_average():
    """E[<a, v> v] = a, with the variance ‖a‖^2 - a_i^2 for each direction: the first Adam step shows its sign."""
    x, y, a = rows(1, (40,))
    a = a.sign() * 0.5 + a
    search = SPSA(Linf(1.0, None), 1, 2000, learning_rate=1e-3)(linear(a), x, y)
    first, second = (trial.x_adv for trial in search)
    assert torch.allclose((second - first)[0], 1e-3 * a.sign(), atol=1e-7)


@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.3)])
@pytest.mark.parametrize("shape", [(3, 5, 5), (12,), (1,)])
def test_trials_lie_in_the_ball_and_the_box(ball, shape):
    x, y, a = rows(4, shape)
    for trial in SPSA(ball, 10, 8)(linear(a), x, y):
        v = (trial.x_adv - x).flatten(1)
        assert trial.x_adv.shape == x.shape
        assert (v.abs().amax(1) if isinstance(ball, Linf) else v.norm(dim=1)).max() <= ball.radius * (1 + 1e-9)
        assert torch.allclose(trial.x_adv, trial.x_adv.clamp(0, 1), atol=1e-12)


def test_a_network_that_hides_its_gradient_is_fooled_all_the_same():
    x, y, a = rows(10, (12,), 0.4, 0.6)
    x = x - ((x @ a + 0.5 * gain(Linf(0.05), x, a)) / a.square().sum())[:, None] * a

    def rounded(x):
        return (linear(a)(x) * 1e6).round() / 1e6  # its gradient is 0 everywhere

    found = find(SPSA(Linf(0.05, None), 20, 64), rounded, x, y)
    assert found.fooled.all()


def test_inputs_are_left_alone_and_no_gradient_is_asked_for():
    model = convolutional().eval()
    x, y = torch.rand(4, 3, 6, 6, dtype=torch.float64), torch.arange(4) % 3
    before = x.clone()
    modes = []
    find(SPSA(Linf(0.05), 3, 8), lambda x: modes.append(torch.is_grad_enabled()) or model(x), x, y, exact=model)
    assert torch.equal(x, before)
    assert modes
    assert not any(modes)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_single_precision_and_a_network():
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 20), nn.ReLU(), nn.Linear(20, 4))
    x = torch.rand(30, 3, 3, 3)
    y = model(x).argmax(1)
    found = find(SPSA(Linf(0.3), 30, 32), model, x, y)
    assert 0.3 < found.fooled.double().mean() < 1
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.fooled)


@pytest.mark.parametrize(
    "settings",
    [{"steps": -1}, {"samples": 0}, {"chunk": 0}, {"delta": 0.0}, {"learning_rate": float("inf")}],
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SPSA(Linf(0.1), **settings)
