"""ARWP against an oracle that was written from its formula alone, and what it remembers."""

import copy

import pytest
import torch
from against_oracles import close, generator, identical, normals, weights
from family import bits, sgd
from networks import batch, convolutional
from oracles import neighbours as oracles
from torch import nn

from saltflat import (
    Natural,
    double_perturbation_step,
    parallel,
)
from saltflat.neighbours.adaptive_random_wp import (
    PREFIX,
    adaptive_random_wp,
    adaptively_drawn,
    by_coordinate,
    by_filter,
)
from saltflat.neighbours.random_wp import Gaussian, random_wp
from saltflat.weights import trained

SHRINKS = {0.5: by_filter, 0.25: by_coordinate}


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


def test_arwp_remembers_what_its_block_adds_to_gradients_that_were_there():
    memories = []
    for before in (None, torch.full((2, 3), 7.0)):
        model, memory = nn.Linear(3, 2), {}
        nn.init.ones_(model.weight)
        model.weight.grad = before
        with adaptive_random_wp(model, 0.0, generator(), memory=memory):
            model(torch.ones(4, 3)).sum().backward()
        memories.append(memory["squared_gradients.weight"])
    torch.testing.assert_close(*memories)
    assert bool((memories[0] > 0).all())


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


def test_arwp_s_memory_knows_nothing_of_distributed_data_parallel(tmp_path):
    """Names are those of one process, so that any number of them goes on from it."""
    (x, y), memories = batch(), []
    with parallel.together(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1):
        for wrapped in (False, True):
            torch.manual_seed(0)
            model, memory = nn.Sequential(), {}
            model.module = convolutional(batch_norm=False)  # a name that stays
            called = parallel.Replicated(model).called if wrapped else model
            draws = generator()
            for _ in range(2):
                called.zero_grad()
                with adaptive_random_wp(called, 0.1, draws, memory=memory):
                    Natural().outer(called, x, x, y).backward()
            memories.append(memory)
        del called, model
    assert next(iter(memories[0])) == f"{PREFIX}module.0.weight"
    assert identical(*memories)
