"""Auto-PGD in L-inf and L2: against pyautoattack from the same start, and its checkpoints against scripted losses."""

import math
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from networks import batch, convolutional, equal_states, state
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saltflat import L1, L2, Linf, PerExample
from saltflat.evaluation import APGD, TargetedAPGD, find
from saltflat.evaluation.apgd import wrong_class
from saltflat.evaluation.ratios import dlr, targeted_dlr
from saltflat.objectives import ce, margin

NORMS = {Linf: "Linf", L2: "L2"}


def network(kind, classes=5):
    """Random, for 6 x 6 RGB images, in torch's default precision; no class is likelier than another on average."""
    layers = [nn.Flatten(), nn.Linear(108, 40), nn.Tanh(), nn.Linear(40, classes)]
    if kind == "conv":
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(72, classes)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[-1].bias -= model(torch.rand(1000, 3, 6, 6)).mean(0)
    return model


def labelled(model, n):
    """Images with the model's own answers as classes."""
    x = torch.rand(n, 3, 6, 6, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    """As torch's default, too, in which pyautoattack writes its losses down."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def both(model, ball, loss, x, y):
    """Logits (T + 1, N, C) of all points that ours and theirs look at from one start, and the classes in the loss."""
    theirs = pytest.importorskip("pyautoattack.autopgd_base")
    seen, start = [], x + ball.sample(x, surface=True)

    def recorded(x_adv):
        seen.append(model(x_adv))
        return seen[-1]

    if loss is targeted_dlr:
        attack = theirs.APGDAttack_targeted(recorded, norm=NORMS[type(ball)], eps=ball.radius)
        attack.y_target = model(x).sort(1)[1][:, -3]
        ours, labels = TargetedAPGD(ball, 2), (y, attack.y_target)
    else:
        attack = theirs.APGDAttack(recorded, norm=NORMS[type(ball)], eps=ball.radius, loss=loss.__name__)
        ours, labels = APGD(ball, loss), (y,)
    attack.init_hyperparam(x)
    attack.attack_single_run(x, y, x_init=start)
    trials = list(ours(model, x, y, start=start))[:101]  # in L2 there is a last look at what is stretched
    return torch.stack([trial.logits for trial in trials]), torch.stack(seen).detach(), labels


@pytest.mark.filterwarnings("ignore:.*zero gradient")
@pytest.mark.parametrize("loss", [ce, dlr, targeted_dlr])
@pytest.mark.parametrize(
    ("kind", "ball"), [("mlp", Linf(0.02)), ("mlp", L2(0.2)), ("conv", Linf(0.008)), ("conv", L2(0.06))]
)
def test_from_one_start_it_goes_where_pyautoattack_goes(kind, ball, loss, dtype):
    """Until a row is fooled: there dlr may become constant, and the direction of a gradient that is nought but rounding
    is nobody's. In fp32, rounding decides now and then whether a loss rose, and a step size is halved or not.
    """
    model = network(kind)
    x, y = labelled(model, 100)
    ours, theirs, labels = both(model, ball, loss, x, y)
    assert ours.shape == theirs.shape == (101, 100, 5)
    wrong = theirs.argmax(2) != y
    searched = wrong.cumsum(0) - wrong.long() == 0
    assert searched[-1].sum() > 20
    apart = torch.stack(
        [(loss(z, *labels) - loss(other, *labels)).abs() for z, other in zip(ours, theirs, strict=True)]
    )
    largest = torch.where(searched, apart, 0).amax(0)
    assert (largest < 1e-5).double().mean() >= (1.0 if dtype is torch.float64 or isinstance(ball, Linf) else 0.9)
    assert largest.max() < 1e-2


@pytest.mark.filterwarnings("ignore:.*zero gradient")
@pytest.mark.parametrize("loss", [ce, dlr, targeted_dlr])
@pytest.mark.parametrize(("kind", "ball"), [("mlp", Linf(0.03)), ("conv", L2(0.06))])
def test_verdicts_from_one_start_are_those_of_pyautoattack(kind, ball, loss, dtype):
    model = network(kind)
    x, y = labelled(model, 300)
    ours, theirs, _ = both(model, ball, loss, x, y)
    fooled = [(z.argmax(2) != y).any(0) for z in (ours, theirs)]
    assert 0.01 < fooled[1].double().mean() < 0.9
    assert (fooled[0] == fooled[1]).double().mean() >= 0.99


@pytest.mark.parametrize("loss", [ce, dlr, targeted_dlr])
@pytest.mark.parametrize(("kind", "ball"), [("mlp", Linf(0.02)), ("mlp", L2(0.2)), ("conv", Linf(0.008))])
@pytest.mark.filterwarnings("ignore:.*zero gradient")
def test_verdicts_from_starts_of_its_own_are_those_of_pyautoattack(kind, ball, loss):
    """Here rows leave as soon as they are fooled; APGD-T is ranks 1 to 4."""
    theirs = pytest.importorskip("pyautoattack.autopgd_base")
    model = network(kind)
    x, y = labelled(model, 300)
    attacks = [TargetedAPGD(ball, rank) for rank in range(1, 5)] if loss is targeted_dlr else [APGD(ball, loss)]
    ours = torch.zeros(300, dtype=torch.bool)
    for attack in attacks:
        ours |= find(attack, model, x, y, generator=PerExample(0, torch.arange(300))).fooled
    if loss is targeted_dlr:
        attack = theirs.APGDAttack_targeted(model, norm=NORMS[type(ball)], eps=ball.radius, n_target_classes=4)
    else:
        attack = theirs.APGDAttack(model, norm=NORMS[type(ball)], eps=ball.radius, loss=loss.__name__)
    with torch.no_grad():
        fooled = model(attack.perturb(x, y)).argmax(1) != y
    assert 0.05 < fooled.double().mean() < 0.95
    assert (ours == fooled).double().mean() >= 0.97


# Checkpoints: a loss that follows a script, on a line. Value and gradient of each look are laid down in advance.


def scripted(values, gradients):
    look = count()

    def loss(z, y):
        t = next(look)
        return values[t] + gradients[t] * (z[:, 0] - z[:, 0].detach())

    return loss


def walk(steps, values, gradients):
    """Where APGD goes on the line from 0 in [-1, 1]: x_0 ... x_steps."""
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    attack = APGD(Linf(1.0, None), scripted(values, gradients), steps)
    return [trial.x_adv.item() for trial in attack(lambda x: x, x, y, start=x)]


def returns(steps, values, best):
    """Checkpoints at which it went back to the look `best`, {k: eta after it}. All gradients are 0, but 1 there; so a
    step that begins at p, after one that began at q, is 0.25 (p - q), and 0.75 eta more if p is the best point.
    """
    x = walk(steps, values, [float(t == best) for t in range(steps + 1)])
    back, q = {}, x[best]
    for k in range(best + 1, steps):
        p = x[k]
        if x[k + 1] != pytest.approx(max(-1.0, min(p + 0.25 * (p - q), 1.0)), abs=1e-12):
            p = x[best]
            back[k] = (x[k + 1] - p - 0.25 * (p - q)) / 0.75
        q = p
    return back


def checkpoints(steps):
    """w_j = p_j steps with p_0 = 0, p_1 = 0.22 and p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06), in whole hundredths."""
    before, now, found = 0, 22, []
    while now <= 100:
        found.append(now * steps // 100)
        before, now = now, now + max(now - before - 3, 6)
    return found


def test_the_published_periods():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [100, 200, 1000])
def test_a_loss_that_never_rises_halves_the_step_size_at_every_checkpoint(steps):
    back = returns(steps, [-float(t) for t in range(steps + 1)], best=0)
    expected = [k for k in checkpoints(steps) if k < steps]
    assert list(back) == expected
    assert list(back.values()) == pytest.approx([2 * 0.5**j for j in range(1, len(expected) + 1)], abs=1e-9)


def test_few_steps_have_a_checkpoint_after_each():
    back = returns(9, [-float(t) for t in range(10)], best=0)
    assert list(back) == list(range(1, 9))
    assert list(back.values()) == pytest.approx([2 * 0.5**j for j in range(1, 9)])


def test_a_loss_that_always_rises_keeps_the_step_size():
    """With eta = 2 a step of either sign reaches the ball's end from anywhere; with half of it, it does not."""
    signs = [1.0 if t % 2 == 0 else -1.0 for t in range(101)]
    x = walk(100, [1.0 + t for t in range(101)], signs)
    expected = [0.0, 1.0]
    for k in range(1, 100):
        ahead = x[k] + 0.75 * (signs[k] - x[k]) + 0.25 * (x[k] - x[k - 1])
        expected.append(max(-1.0, min(ahead, 1.0)))
    assert x == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("rises", "halved"), [(12, True), (13, False)])
def test_three_quarters_of_the_steps_must_be_exceeded(rises, halved):
    """Of the 16 steps from 41 to 57, the last of which falls from a new best."""
    values = [1.0 + t for t in range(42)]
    values += [42.0 - 0.1 * t for t in range(1, 16 - rises)]
    values += [values[-1] + t for t in range(1, rises + 1)]
    values += [values[-1] - 1.0]
    values += [values[-1] + t for t in range(1, 44)]
    back = returns(100, values, best=56)
    assert list(back) == ([57] if halved else [])
    assert list(back.values()) == pytest.approx([1.0] * halved)


@pytest.mark.parametrize("best", [0, 22])
def test_without_a_new_best_it_is_halved_at_every_second_checkpoint(best):
    """From the best on, the loss falls at the first step of each period and rises at all others, but stays below; at
    the first checkpoint it may. (The first step is compared with a loss of 0, so it counts as one that rose.)
    """
    values = [100.0 + t for t in range(best + 1)]
    starts = [start for start in [0, *checkpoints(100)] if start >= best]
    for start, end in zip(starts, [*starts[1:], 100], strict=True):
        values += [90.0 - start / 10 + 0.01 * t for t in range(end - start)]
    back = returns(100, values, best)
    assert list(back) == [41, 70, 87, 99]
    assert list(back.values()) == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_rows_have_step_sizes_of_their_own():
    """One row's loss rises, the other's falls; each goes as it would alone."""
    values = torch.stack([1.0 + torch.arange(101.0).double(), -torch.arange(101.0).double()], 1)
    signs = torch.where(torch.arange(101) % 2 == 0, 1.0, -1.0).double()
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    attack = APGD(Linf(1.0, None), scripted(values, signs))
    together = torch.stack([trial.x_adv[:, 0] for trial in attack(lambda x: x, x, y, start=x)], 1)
    for row, own in zip(together, values.T, strict=True):
        assert row.tolist() == pytest.approx(walk(100, own.tolist(), signs.tolist()), abs=1e-12)
    assert not torch.equal(*together)


# Starts, targets, shapes, precision


@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.3), Linf(0.05, None), L2(0.3, None)])
def test_it_starts_on_the_surface_and_stays_in_ball_and_box(ball):
    model = network("mlp").double()
    x, y = labelled(model, 8)
    x = torch.where(torch.rand_like(x) < 0.1, x.round(), x)
    order = {Linf: math.inf, L2: 2}[type(ball)]
    trials = list(APGD(ball)(model, x, y, generator=PerExample(0, torch.arange(8))))
    assert torch.equal(trials[0].x_adv, x + ball.sample(x, PerExample(0, torch.arange(8)), surface=True))
    for trial in trials:
        sizes = (trial.x_adv - x).flatten(1).norm(p=order, dim=1)
        assert (sizes <= ball.radius * (1 + 1e-9)).all()
        assert ball.box is None or 0 <= trial.x_adv.min() <= trial.x_adv.max() <= 1
        assert torch.equal(trial.logits, model(trial.x_adv))
        assert trial.inside is None
    if ball.box is None:
        assert torch.allclose((trials[0].x_adv - x).flatten(1).norm(p=order, dim=1), torch.tensor(ball.radius).double())


@pytest.mark.parametrize("attack", [APGD(Linf(1e-6), steps=7), TargetedAPGD(L2(1e-6), 1, steps=7)])
def test_a_step_is_one_forward_and_one_gradient(attack):
    model = network("conv")
    x, y = labelled(model, 3)
    passes = []
    logits = lambda x: passes.append((x.requires_grad, len(x))) or model(x)
    find(attack, logits, x, y, exact=model)
    choice = last = [(False, 3)] * isinstance(attack, TargetedAPGD)  # of the class; in L2, what is stretched
    assert passes == choice + [(True, 3)] * 8 + last


def test_a_rank_is_a_wrong_class_by_likelihood_whatever_the_answer_is():
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    y = torch.tensor([0, 1, 2])
    found = [wrong_class(lambda x: x, z, y, rank) for rank in (1, 2, 3)]
    assert [rank.tolist() for rank in found] == [[1, 3, 0], [2, 2, 1], [3, 0, 3]]
    assert wrong_class(lambda x: x, z, y, 4) is None


@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_class_of_that_rank_nothing_is_tried(classes):
    model = network("mlp", classes).double()
    x, y = labelled(model, 6)
    for rank in range(1, 5):
        trials = list(TargetedAPGD(Linf(0.01), rank, steps=4)(model, x, y))
        assert len(trials) == (5 if rank < classes else 0)
    found = find(TargetedAPGD(Linf(1.0), classes), model, x, y)
    assert not found.fooled.any()
    assert torch.equal(found.x_adv, x)
    assert (found.margin == -math.inf).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.4)])
def test_dlr_with_few_classes_goes_where_the_margin_goes(classes, ball):
    """With two classes dlr is the margin; with three it is divided by z_pi1 - z_pi3, and fools about as many. Towards a
    class it is z_t - z_y for both.
    """
    model = network("mlp", classes).double()
    x, y = labelled(model, 60)
    draws = lambda: PerExample(0, torch.arange(60))
    one, other = (find(APGD(ball, loss), model, x, y, generator=draws()) for loss in (dlr, margin))
    assert 5 < other.fooled.sum() < 60
    if classes == 2:
        assert torch.equal(one.fooled, other.fooled)
        assert torch.equal(one.x_adv, other.x_adv)
        towards = find(TargetedAPGD(ball, 1), model, x, y, generator=draws())
        assert torch.equal(towards.fooled, other.fooled)
    else:
        assert (one.fooled == other.fooled).double().mean() > 0.9


@pytest.mark.parametrize("ball", [Linf(0.3), L2(1.0)])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("inputs", "weights"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
    ],
)
def test_points_have_the_precision_of_x_whatever_the_logits_have(ball, targeted, inputs, weights):
    model = network("mlp").to(weights)
    x = torch.rand(20, 3, 6, 6).to(inputs)
    logits = lambda x: model(x if inputs is weights else x.to(weights))
    y = logits(x).argmax(1)
    attack = TargetedAPGD(ball, 1, steps=30) if targeted else APGD(ball, steps=30)

    def strict(x):
        assert x.dtype is inputs
        return logits(x)

    found = find(attack, strict, x, y)
    assert found.fooled.double().mean() > 0.5
    assert found.x_adv.dtype is inputs


@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.4)])
def test_a_gradient_that_is_no_number_leaves_its_row_where_it_is(ball):
    model = network("mlp").double()
    x, y = labelled(model, 4)
    poisoned = lambda z, y: ce(z, y) * torch.tensor([1.0, math.nan, 1.0, 1.0]).double()
    trials = list(APGD(ball, poisoned, 30)(model, x, y, start=x))
    for trial in trials:
        assert torch.equal(trial.x_adv[1], x[1])
    alone = list(APGD(ball, ce, 30)(model, x[2:], y[2:], start=x[2:]))
    assert torch.allclose(trials[-1].x_adv[2:], alone[-1].x_adv, atol=1e-12)


@pytest.mark.parametrize("attack", [APGD(Linf(0.05)), APGD(L2(0.4), dlr), TargetedAPGD(L2(0.4), 1)])
def test_a_larger_scale_of_the_gradient_changes_nothing(attack):
    """Steps are normalised, so a power of two before dlr and the margin is lost without a trace; also 2^-100."""
    model = network("mlp").double()
    x, y = labelled(model, 10)
    attack = type(attack)(**vars(attack) | {"loss": margin}) if isinstance(attack, APGD) else attack
    scales = (1.0, 2.0**60, 2.0**-100)
    runs = [list(attack(lambda x, c=c: model(x) * c, x, y, start=x)) for c in scales]
    for run in runs[1 if isinstance(attack, APGD) else 3 :]:
        assert all(torch.equal(trial.x_adv, other.x_adv) for trial, other in zip(run, runs[0], strict=True))


# What an attack leaves alone


@pytest.mark.parametrize(
    "attack", [APGD(Linf(0.05), steps=5), APGD(L2(0.4), dlr, 5), TargetedAPGD(Linf(0.05), 1, steps=5)]
)
def test_weights_and_inputs_are_left_alone(attack):
    model, (x, y) = convolutional().eval(), batch()
    before, kept, start = state(model), x.clone(), (x + 0.01).clamp(0, 1)
    began = start.clone()
    for trial in attack(model, x, y, start=start):
        assert not trial.x_adv.requires_grad
        assert not trial.logits.requires_grad
    assert equal_states(state(model), before)
    assert torch.equal(x, kept)
    assert torch.equal(start, began)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("attack", [APGD(Linf(0.05), steps=3), TargetedAPGD(L2(0.4), 1, steps=3)])
def test_no_gradient_of_weights_is_computed(attack):
    """It costs as many operations with weights that ask for gradients as with weights that do not."""
    x, y = batch()
    w = torch.randn(4, 3, 3, 3, dtype=x.dtype), torch.randn(3, 64, dtype=x.dtype)
    logits = lambda x: F.linear(F.conv2d(x, w[0]).tanh().flatten(1), w[1])

    def operations():
        with FlopCounterMode(display=False) as counter:
            list(attack(logits, x, y, start=x))
        return counter.get_total_flops()

    without = operations()
    for tensor in w:
        tensor.requires_grad_()
    assert operations() == without > 0
    assert all(tensor.grad is None for tensor in w)


def test_it_works_under_no_grad():
    model = network("mlp").double()
    x, y = labelled(model, 4)
    with torch.no_grad():
        first, *_, last = APGD(Linf(0.05), steps=5)(model, x, y, start=x)
    assert (last.x_adv != first.x_adv).any()


@pytest.mark.parametrize("attack", [APGD, lambda ball: TargetedAPGD(ball, 1)])
def test_the_l1_ball_is_refused(attack):
    with pytest.raises(ValueError, match=r"^ball: .*SparseAPGD"):
        attack(L1(12.0))


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (lambda: APGD(Linf(0.1), steps=-1), "steps"),
        (lambda: TargetedAPGD(Linf(0.1), 1, steps=-1), "steps"),
        (lambda: TargetedAPGD(Linf(0.1), 0), "rank"),
    ],
)
def test_wrong_settings_are_named(attack, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        attack()


def test_no_steps_leave_the_start():
    model = network("mlp").double()
    x, y = labelled(model, 3)
    (trial,) = APGD(Linf(0.1), steps=0)(model, x, y, start=x)
    assert torch.equal(trial.x_adv, x)
