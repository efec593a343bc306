"""rho as a function of the weights, against its closed form on a linear model, and against the evaluation."""

import math

import pytest
import torch
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat import L2, MART, PGD, TRADES, Linf, displaced, gradient
from saltflat.data import Images, to_float
from saltflat.evaluation import outcomes
from saltflat.inputs import zero
from saltflat.landscape import afresh, along, continued, frozen, random_direction, total
from saltflat.lean import leaner
from saltflat.objectives import ce, kl
from saltflat.random import PerExample

ALPHAS = [-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 3.0]
EPS = 0.1
ATTACKS = {"Linf": PGD(Linf(EPS, box=None), EPS / 4, 8, zero), "L2": PGD(L2(EPS, box=None), EPS / 4, 8, zero)}
DUAL = {"Linf": 1, "L2": 2}


class Logistic(nn.Module):
    """Two classes with logits (0, <w, x>)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 12, dtype=torch.float64))

    def forward(self, x):
        z = x.flatten(1) @ self.weight[0]
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.fixture
def linear():
    return Logistic(), torch.rand(40, 12, dtype=torch.float64), torch.arange(40) % 2


def closed_form(w, x, y, norm):
    """mean softplus(-(s <w, x> - eps ‖w‖_q)), q dual to the attack's norm."""
    s = 2 * y - 1
    return nn.functional.softplus(-(s * (x @ w) - EPS * w.norm(DUAL[norm]))).mean()


@pytest.mark.parametrize("norm", ATTACKS)
@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_landscape_of_a_linear_model_is_its_closed_form(linear, norm, batch_size):
    model, x, y = linear
    losses, d = afresh(model, x, y, ATTACKS[norm], batch_size=batch_size), random_direction(model, 0)
    w = model.weight.detach()[0].clone()
    for alpha, found in along(model, d, ALPHAS, lambda: total(losses)):
        assert found == pytest.approx(closed_form(w + alpha * d["weight"][0], x, y, norm).item(), abs=1e-6)


@pytest.mark.parametrize("norm", ATTACKS)
def test_frozen_examples_agree_at_w_and_underestimate_elsewhere(linear, norm):
    model, x, y = linear
    losses, kept = (make(model, x, y, ATTACKS[norm]) for make in (afresh, frozen))
    assert total(kept) == pytest.approx(total(losses), abs=1e-12)
    d = random_direction(model, 0)
    rises = dict(along(model, d, ALPHAS, lambda: total(losses) - total(kept)))
    assert all(rise > -1e-9 for rise in rises.values())
    assert rises[3.0] > 0.01


def test_continued_ascent_reaches_the_maximum_step_by_step(linear):
    model, x, y = linear
    losses = continued(model, x, y, ATTACKS["Linf"], batch_size=16)
    values = [total(losses) for _ in range(6)]
    assert values[:4] == sorted(values[:4])
    assert values[0] < values[-1] == pytest.approx(total(afresh(model, x, y, ATTACKS["Linf"])), abs=1e-12)
    quick = continued(model, x, y, ATTACKS["Linf"], batch_size=16, steps=4)
    assert total(quick) == pytest.approx(values[-1], abs=1e-12)


@pytest.mark.parametrize("norm", ATTACKS)
def test_the_gradient_is_danskin_s(linear, norm):
    model, x, y = linear
    w = model.weight.detach()[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(closed_form(w, x, y, norm), w)
    found = gradient(model, afresh(model, x, y, ATTACKS[norm], batch_size=16))["weight"][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_rho_at_w_is_the_evaluation_s_loss():
    model = convolutional()
    images = Images(torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8), torch.arange(20) % 3, 3, "noise")
    attack = PGD(Linf(0.1), 0.05, 3)
    x = to_float(images.images, torch.float64)
    losses = afresh(model, x, images.labels, attack, batch_size=6, seed=4)
    evaluated = outcomes(model, images, attack, batch_size=6, seed=4)
    assert total(losses) == pytest.approx(evaluated.mean_loss, rel=1e-12)


def test_asked_twice_it_gives_equal_bits_and_leaves_everything():
    model, (x, y) = convolutional(), batch()
    model.train()
    before = state(model)
    losses = afresh(model, x, y, PGD(Linf(0.1), 0.05, 3), batch_size=3, seed=1)
    assert total(losses) == total(losses)
    assert equal_states(state(model), before)
    assert all(module.training for module in model.modules())
    assert total(losses) != total(afresh(model, x, y, PGD(Linf(0.1), 0.05, 3), batch_size=3, seed=2))


def test_starts_belong_to_examples():
    model, (x, y) = convolutional(), batch()
    attack = PGD(Linf(0.1), 0.05, 1)
    rows = torch.tensor([5, 2])
    some = total(afresh(model, x[rows], y[rows], attack, seed=3, ids=rows))
    one_by_one = afresh(model, x, y, attack, seed=3, batch_size=1)
    assert some == pytest.approx(sum(one_by_one[row]().item() * len(x) / 2 for row in rows.tolist()), rel=1e-12)


def test_an_objective_s_own_pair_is_maximised_and_returned():
    model, (x, y) = convolutional(), batch()
    objective, attack = TRADES(3.0), PGD(Linf(0.1), 0.05, 3)
    (loss,) = frozen(model, x, y, attack, objective=objective)
    model.eval()
    x_adv = attack(objective.inner(model, x, y), x, generator=PerExample(0, torch.arange(len(x))))
    expected = ce(model(x), y).mean() + 3.0 * kl(model(x), model(x_adv)).mean()
    assert loss().item() == pytest.approx(expected.item(), rel=1e-12)
    assert total(afresh(model, x, y, attack, objective=MART(2.0))) != pytest.approx(expected.item())


def test_the_attack_climbs_on_what_it_is_given_and_the_loss_is_the_model_s():
    model, (x, y) = convolutional(), batch()
    attack, standing = PGD(Linf(0.05), 0.02, 3, zero), lambda network: lambda x: 0 * x.flatten(1)[:, :3]
    clean = total(afresh(model, x, y, None))
    for closures in (afresh, continued, frozen):
        assert total(closures(model, x, y, attack, attack_on=standing)) == clean
        assert total(closures(model, x, y, attack)) > clean


def test_on_a_lean_copy_rho_is_the_same_but_for_rounding_wherever_the_weights_are():
    (x, y), model = batch(), convolutional().float()
    x, attack, attack_on = x.float(), PGD(Linf(0.05), 0.02, 3), leaner()
    lean, plain = afresh(model, x, y, attack, attack_on=attack_on), afresh(model, x, y, attack)
    for seed in range(3):
        with displaced(model, random_direction(model, seed)):
            assert total(lean) == pytest.approx(total(plain), rel=1e-4)
    assert attack_on.why is None


def test_in_train_mode_batchnorm_sees_the_batch():
    model, (x, y) = convolutional().eval(), batch()
    in_train, in_eval = (total(afresh(model, x, y, None, mode=mode)) for mode in ("train", "eval"))
    assert in_train == pytest.approx(ce(model.train()(x), y).mean().item(), rel=1e-9)
    assert in_train != pytest.approx(in_eval, rel=1e-3)


def test_without_an_attack_it_is_the_clean_loss_and_far_out_it_may_not_be_finite():
    model, (x, y) = convolutional().eval(), batch()
    losses = afresh(model, x, y, None, batch_size=5)
    assert total(losses) == pytest.approx(ce(model(x), y).mean().item(), rel=1e-12)
    with displaced(model, {"6.weight": torch.full((3, 20), 1e308, dtype=torch.float64)}):
        assert not math.isfinite(total(losses))


@pytest.mark.parametrize(("given", "named"), [({"batch_size": 0}, "batch_size"), ({}, "y")])
def test_what_cannot_be_is_refused_in_one_line(given, named):
    model, (x, y) = convolutional(), batch()
    with pytest.raises(ValueError, match=named):
        afresh(model, x, y if given else y[:-1], None, **given)
