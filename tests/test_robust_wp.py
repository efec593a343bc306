"""RobustWP against an oracle that was written from its formula alone, and the limits in which it is AWP or AT."""

import math

import pytest
import torch
from against_oracles import close, generator, grads, identical, weights
from family import ATTACK, bits, everything, sgd
from networks import batch, convolutional
from oracles import neighbours as oracles

from saltflat import (
    AT,
    MART,
    PGD,
    TRADES,
    Global,
    Layerwise,
    Linf,
    double_perturbation_step,
    gradient,
)
from saltflat.neighbours.robust_wp import accumulated, below, robust_wp
from saltflat.objectives import ce
from saltflat.weights import default


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
