"""Where the family meets odd models, half precision, ties, and batches of one."""

import copy
from functools import partial

import pytest
import torch
from commands import QUICK, run
from family import ATTACK, configured, sgd, taking
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat import AT, Global, Layerwise, Natural, double_perturbation_step, perturbed
from saltflat.averaging import ema, reestimate_statistics
from saltflat.data import Images
from saltflat.lab import adversaries, record, trainings
from saltflat.models import small_resnet
from saltflat.neighbours.accumulated import accumulated_step, cheaply_accumulated_step
from saltflat.neighbours.adaptive_random_wp import PREFIX, adaptive_random_wp
from saltflat.neighbours.amortised import amortised_step
from saltflat.neighbours.free import NAME, free_step
from saltflat.neighbours.kaggle import fast_awp, kaggle_awp, momentum
from saltflat.neighbours.random_wp import Gaussian, drawn, two_batch_step
from saltflat.neighbours.robust_wp import accumulated
from saltflat.neighbours.weighted import all_but_last
from saltflat.schedules import constant
from saltflat.step import in_mode
from saltflat.train import Epoch, Plan, _follow, extra_per_batch, fit


class Growing(nn.Module):
    """Keeps a mask as long as the longest batch so far, as caches of positions do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mask", torch.zeros(0))

    def forward(self, x):
        if len(self.mask) < len(x):
            self.mask = torch.ones(len(x))
        return self.linear(x) * self.mask[: len(x), None]


class Tied(nn.Module):
    """A head that is the embedding's matrix, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)))


@pytest.mark.parametrize("model", [Growing(), nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))])
def test_buffers_that_grow_or_come_late_are_no_obstacle(model):
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if not nn.parameter.is_lazy(p)], 0.1)
    for n in (3, 6):
        step = double_perturbation_step(
            model, x[:n], y[:n], objective=Natural(), attack=None, ball=None, optimizer=optimizer
        )
        assert step.dropped == 0


def test_what_the_optimiser_trains_besides_the_model_is_kept_from_bad_batches():
    model, scale = nn.Linear(3, 2), nn.Parameter(torch.ones(()))

    class Scaled(Natural):
        def outer(self, model, x, x_adv, y):
            return super().outer(model, x, x_adv, y) * scale / scale.detach() + 0 * scale / (1 - scale)

    optimizer = torch.optim.SGD([*model.parameters(), scale], 0.1)
    x, y = torch.rand(4, 3), torch.arange(4) % 2
    step = double_perturbation_step(model, x, y, objective=Scaled(), attack=None, ball=None, optimizer=optimizer)
    assert step.dropped == 1
    assert scale == 1


@pytest.mark.parametrize(
    "step",
    [
        double_perturbation_step,
        partial(double_perturbation_step, steps=3),
        partial(double_perturbation_step, share=0.5),
        partial(accumulated_step, micro_batches=2),
        partial(cheaply_accumulated_step, micro_batches=2),
        lambda *batch, **given: free_step(*batch, memory={}, replays=1, **given),
        amortised_step,
    ],
    ids=["one step", "three steps", "a share at w", "accumulated", "cheaply", "free", "amortised"],
)
def test_what_the_optimiser_trains_besides_the_model_has_the_gradient_of_the_descent_alone(step):
    """In a ball so small that w + v is w, it is that of plain training; and those that nobody trains do not add up."""

    class Scaled(AT):
        def outer(self, model, x, x_adv, y):
            return nn.functional.cross_entropy(model(x_adv) * scale, y)

    (x, y), model, scale = batch(), convolutional(batch_norm=False), nn.Parameter(torch.tensor(1.5))
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([*rest, scale], lr=0.0)
    step(model, x, y, objective=Scaled(), attack=ATTACK, ball=None, optimizer=optimizer)
    expected = [p.grad.clone() for p in (first, *rest, scale)]
    for _ in range(2):
        step(model, x, y, objective=Scaled(), attack=ATTACK, ball=Layerwise(1e-9), optimizer=optimizer)
        torch.testing.assert_close([p.grad for p in (first, *rest, scale)], expected, rtol=1e-5, atol=1e-9)
    assert scale.requires_grad


def test_buffers_that_lie_in_one_place_are_no_obstacle():
    model = nn.Linear(3, 2)
    model.register_buffer("same", torch.ones(1).expand(3))
    optimizer, (x, y) = sgd(model), (torch.rand(4, 3), torch.arange(4) % 2)
    for ball in (None, Layerwise(0.1)):
        step = double_perturbation_step(model, x, y, objective=AT(), attack=None, ball=ball, optimizer=optimizer)
        assert step.dropped == 0
    assert torch.equal(model.same, torch.ones(3))


class Merging(nn.Linear):
    """In eval mode its two matrices are one, as in adapters that are merged for inference."""

    def __init__(self):
        super().__init__(3, 2)
        self.low, self.merged = nn.Parameter(torch.zeros(2, 3)), False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + x @ self.low.T


@pytest.mark.parametrize("outside", [True, False])
def test_modules_that_do_more_than_set_a_flag_go_back_to_training(outside):
    model = nn.Sequential(Merging(), nn.Sequential(nn.Dropout(), Merging()))
    model[1][1].train(outside)
    with in_mode(model, "eval"):
        assert model[0].merged
        assert model[1][1].merged
    assert (model[0].training, model[0].merged) == (True, False)
    assert (model[1].training, model[1][0].training) == (True, True)
    assert (model[1][1].training, model[1][1].merged) == (outside, not outside)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
def test_a_head_that_is_tied_to_the_embedding_is_the_last_layer(wrap):
    model = wrap(Tied())
    where = all_but_last(model)
    assert [name for name, p in model.named_parameters() if where(name, p)] == [
        f"{'0.' if wrap is nn.Sequential else ''}hidden.weight"
    ]


def test_kaggle_s_sizes_are_refused_where_rounding_hides_them():
    model = nn.Linear(3, 2).bfloat16()
    x = torch.rand(4, 3).bfloat16()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"eps: moves no weight of torch.bfloat16 \('weight'\); .* got 0.0001"):
        kaggle_awp(model, lambda: model(x).sum())
    with pytest.raises(ValueError, match="eps: moves no weight"):
        fast_awp(model, optimizer)
    with kaggle_awp(model, lambda: model(x).square().sum(), eps=0.01) as ascent:
        assert (ascent.displacement["weight"] != 0).any()


def test_kaggle_awp_takes_several_steps():
    model, (x, y) = convolutional(), batch()
    loss = lambda: Natural().outer(model, x, x, y)
    found = []
    for steps in (1, 3):
        with kaggle_awp(model, loss, step_size=1e-3, eps=1e-2, steps=steps) as ascent:
            found.append(ascent.displacement)
    assert max((found[1][n].norm() / found[0][n].norm()).item() for n in found[0]) > 1.5


def test_momentum_is_looked_for_in_the_group_of_each_weight():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "momentum": 0.9}, {"params": [model.bias], "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1)
    assert momentum(model, optimizer)["weight"].abs().sum() == 0
    with pytest.raises(ValueError, match="optimizer: expected one with momentum"):
        momentum(model, optimizer, where=lambda name, p: True)


def test_one_bad_gradient_does_not_take_robust_wp_s_sum_away():
    model, calls = nn.Linear(3, 2), []
    x = torch.rand(4, 3)

    def loss():
        calls.append(None)
        return model(x).square().sum() * (torch.nan if len(calls) == 2 else 1.0)

    with accumulated(model, loss, Global(0.1, relative=True), steps=3) as ascent:
        assert float(ascent.displacement["weight"].norm() / model.weight.detach().norm()) > 0.08


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arwp_s_memory_does_not_underflow_in_half_precision(dtype):
    model, memory = nn.Linear(3, 2).to(dtype), {}
    with adaptive_random_wp(model, 0.01, torch.Generator().manual_seed(0), memory=memory):
        model.weight.grad = torch.full_like(model.weight, 2e-5)
        model.bias.grad = torch.full_like(model.bias, 300.0)
    assert memory[f"{PREFIX}weight"].dtype == torch.float32
    assert (memory[f"{PREFIX}weight"] > 0).all()
    assert memory[f"{PREFIX}bias"].isfinite().all()
    assert memory[f"{PREFIX}bias"].max() > 8e4


def test_arwp_learns_nothing_from_a_batch_that_is_dropped():
    model = convolutional()
    for inside in (False, True):
        memory = {}
        take = taking("arwp", model, sgd(model), memory, step_inside=inside)
        x, y = batch()
        take(x, y)
        before = {name: squares.clone() for name, squares in memory.items()}
        model[3].weight.register_hook(lambda g: g * torch.nan)
        assert take(x, y).dropped == 1
        assert equal_states(memory, before)
        model = convolutional()


def test_a_memory_of_another_model_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    memory = {f"{PREFIX}module.0.weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"memory: expected squared gradients of such as '0\.weight', got"):
        with adaptive_random_wp(model, 0.01, torch.Generator(), memory=memory):
            pass


def test_a_dropped_replay_leaves_the_displacement_where_it_was():
    model, (x, y), memory = convolutional(), batch(), {}
    step = partial(free_step, objective=AT(), attack=ATTACK, ball=None, optimizer=sgd(model), memory=memory, replays=2)
    step(model, x, y)
    before = memory[NAME].clone()
    model[3].bias.register_hook(lambda g: g * torch.nan)
    assert step(model, x, y).dropped == 1
    assert torch.equal(memory[NAME], before)
    with pytest.raises(ValueError, match="attack: expected PGD"):
        free_step(model, x, y, objective=AT(), attack=None, ball=None, optimizer=sgd(model), memory={})


@pytest.mark.parametrize("how", ["no ball", "one example"])
def test_m_rwp_without_a_second_batch_is_plain_training(how):
    x, y = batch(5)
    x, y = (x, y) if how == "no ball" else (x[:1], y[:1])
    models = [convolutional().train(), convolutional().train()]
    models[1].load_state_dict(models[0].state_dict())
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    two_batch_step(
        models[0], x, y, objective=AT(), attack=None, ball=None if how == "no ball" else Gaussian(0.1),
        optimizer=sgd(models[0]), generator=generator,
    )  # fmt: skip
    double_perturbation_step(models[1], x, y, objective=AT(), attack=None, ball=None, optimizer=sgd(models[1]))
    assert equal_states(state(models[0]), state(models[1]))
    assert torch.equal(generator.get_state(), before)


def test_a_climb_has_its_own_choice_of_weights_unless_the_step_is_told():
    model, (x, y) = convolutional(), batch()
    seen = {}

    def loss(model, x, x_adv, y):
        seen.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return AT().outer(model, x, x_adv, y)

    class Seeing(AT):
        def outer(self, *batch):
            return loss(*batch)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    double_perturbation_step(
        model, x, y, objective=Seeing(), attack=None, ball=Gaussian(0.1), climb=partial(drawn, generator=generator),
        optimizer=sgd(model),
    )  # fmt: skip
    assert all(not torch.equal(seen[name], before[name]) for name in before if before[name].norm() > 0)


def test_the_loss_at_w_is_told_where_the_descent_asked_for_it():
    model, (x, y) = convolutional(), batch()
    at_w = AT().outer(model, x, x, y).item()
    generator = torch.Generator().manual_seed(0)
    step = double_perturbation_step(
        model, x, y, objective=AT(), attack=None, ball=Gaussian(0.3), climb=partial(drawn, generator=generator),
        share=0.5, optimizer=sgd(model),
    )  # fmt: skip
    assert step.loss.item() == pytest.approx(at_w, rel=1e-12)
    assert step.perturbed_loss.item() != pytest.approx(at_w, rel=1e-3)


def test_a_step_of_another_norm_has_its_own_size():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="step_size: expected None beside a step of its own size"):
        with perturbed(model, lambda: model.weight.sum(), Global(0.1), step=Layerwise(0.1), step_size=0.1):
            pass


def test_statistics_are_of_some_batches_and_come_back_if_one_fails():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    model(torch.rand(4, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        reestimate_statistics(model, [])
    with pytest.raises(RuntimeError):
        reestimate_statistics(model, [torch.rand(4, 2), torch.rand(4, 3)])
    assert equal_states(model.state_dict(), before)


def small_plan(**changes):
    return Plan(
        epochs=2, batch_size=8, learning_rate=constant(0.05), objective=lambda t: Natural(), attack=lambda t: None,
        ball=lambda t: None, measure=ATTACK, **changes,
    )  # fmt: skip


def few(n, shape=(1, 8, 8), classes=10):
    return Images(torch.randint(0, 256, (n, *shape), dtype=torch.uint8), torch.arange(n) % classes, classes, f"{n} few")


@pytest.mark.parametrize(
    ("extra", "share", "words"),
    [
        (few(9), 0.0, "extra: expected none with a share of 0.0"),
        (None, 0.5, "extra: expected some with a share of 0.5"),
        (few(9), 0.1, "extra_share: expected one of 8 examples or more, got 0.1"),
        (few(9, (1, 9, 9)), 0.5, r"extra: expected images and classes as 17 few has them, \(1, 8, 8, 10\), got"),
        (few(9, (3, 8, 8)), 0.5, "extra: expected images and classes"),
        (few(9, classes=11), 0.5, "extra: expected images and classes"),
    ],
)
def test_extra_examples_that_do_not_fit_are_refused_before_the_first_step(extra, share, words):
    model = small_resnet(in_channels=1, widths=(4, 4, 4), stem_stride=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        next(fit(model, few(17), {}, small_plan(extra_share=share), sgd(model), extra=extra))
    assert equal_states(model.state_dict(), before)


def test_every_batch_is_full_with_extra_examples_also_the_last():
    seen = []

    def step(model, x, y, **given):
        seen.append(len(x))
        return double_perturbation_step(model, x, y, **given)

    model = small_resnet(in_channels=1, widths=(4, 4, 4), stem_stride=1)
    events = fit(model, few(17), {}, small_plan(extra_share=0.3, step=step, swa_from=0.0), sgd(model), extra=few(5))
    assert sum(isinstance(event, Epoch) for event in events) == 2
    assert seen == [8] * 6
    assert [extra_per_batch(share, 100) for share in (0.29, 0.57, 0.7)] == [29, 57, 70]


def test_m_rwp_sees_extra_examples_in_both_halves():
    halves = []

    def step(model, x, y, **given):
        halves.append((y[:4].tolist(), y[4:].tolist()))
        return double_perturbation_step(model, x, y, **given)

    own, extra = few(32), few(32)
    extra = Images(extra.images, torch.full((32,), 9), 10, "nines")
    own = Images(own.images, own.labels.clamp(max=8), 10, "no nines")
    model = small_resnet(in_channels=1, widths=(4, 4, 4), stem_stride=1)
    list(fit(model, own, {}, small_plan(extra_share=0.5, step=step), sgd(model), extra=extra))
    assert any(9 in first for first, _ in halves)
    assert any(9 in second for _, second in halves)
    assert any(label < 9 for _, second in halves for label in second)


def test_a_collapse_ends_training_with_the_weights_before_it_if_asked_to(tmp_path, monkeypatch, capsys):
    """With a threshold that every second epoch falls below."""
    monkeypatch.setattr("saltflat.train.COLLAPSE", -2.0)
    out = tmp_path / "run"
    run("train", "fast-at", *QUICK, "--attack.stop-on-collapse", "--out", out)
    said = capsys.readouterr().out
    assert "epoch 1: robust accuracy on training images fell by more than 20 points; training ends" in said
    assert record.read_metrics(out) == []
    monkeypatch.setattr("saltflat.train.COLLAPSE", 0.2)
    run("train", "--resume", out)
    assert [line["epoch"] for line in record.read_metrics(out)] == [1, 2]
    assert trainings.FELL not in capsys.readouterr().out


def test_free_training_climbs_as_many_steps_as_it_is_told():
    model, (x, y) = convolutional(), batch()
    gradients = []
    model[0].weight.register_hook(gradients.append)
    config = configured("free-at-awp", steps=3)
    step = adversaries.step(config, {})
    step(
        model, x, y, objective=AT(), attack=ATTACK, ball=adversaries.ball(config)(0.5), optimizer=sgd(model),
        generator=torch.Generator(),
    )  # fmt: skip
    assert len(gradients) == 4 * (3 + 1)


def test_an_average_of_weights_takes_frozen_integers_along_as_torch_does():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.table = nn.Parameter(torch.arange(4), requires_grad=False)

    model = Counted()
    ours, torchs = ema(model, 0.9), ema(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model.linear.weight.add_(1.0)
            model.table.add_(10)
        _follow(ours, model, 0.9)
        torchs.update_parameters(model)
    assert equal_states(state(ours), state(torchs))
