"""What `perturbed` climbs to, and what it refuses."""

import weakref

import pytest
import torch
from networks import batch, convolutional, equal_states, state
from oracles.proxy_awp import at_loss, proxy_displacement, trades_loss
from torch import nn

from saltflat import AT, TRADES, Global, Layerwise, displaced, double_perturbation_step, gradient, perturbed


def closure(model, objective=None, seed=0):
    torch.manual_seed(seed)
    x, y = batch()
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    return x, x_adv, y, lambda: (objective or AT()).outer(model, x, x_adv, y)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("step_size", [None, 4e-3])
@pytest.mark.parametrize(
    ("objective", "loss"), [(AT(), at_loss), (TRADES(6.0), trades_loss(6.0))], ids=["AT", "TRADES"]
)
def test_displacement_agrees_with_the_proxy_model(mode, steps, step_size, objective, loss):
    model = convolutional().train(mode == "train")
    x, x_adv, y, outer = closure(model, objective)
    expected = proxy_displacement(model, loss, x, x_adv, y, gamma=5e-3, steps=steps, step_size=step_size)
    with perturbed(model, outer, Layerwise(5e-3), steps=steps, step_size=step_size) as ascent:
        assert ascent.displacement.keys() == expected.keys()
        for name, v in ascent.displacement.items():
            torch.testing.assert_close(v, expected[name], rtol=1e-10, atol=1e-14)


def test_one_step_is_the_paper_s_closed_form():
    model = convolutional()
    *_, outer = closure(model)
    g, w = gradient(model, outer), {name: p.detach().clone() for name, p in model.named_parameters()}
    with perturbed(model, outer, Layerwise(0.01)) as ascent:
        for name, v in ascent.displacement.items():
            torch.testing.assert_close(v, 0.01 * w[name].norm() * g[name] / g[name].norm(), rtol=1e-10, atol=1e-14)
        assert ascent.displacement.keys() == {name for name, p in model.named_parameters() if p.ndim > 1}


def micro_batches(model, x, y, size):
    pairs = zip(x.split(size), y.split(size), strict=True)
    return [lambda a=a, b=b: AT().outer(model, a, a, b) * len(a) / len(x) for a, b in pairs]


def test_a_loss_that_reaches_nothing_and_names_that_are_none_are_refused():
    model, other = convolutional().float(), convolutional().float()
    before, x = state(model), torch.rand(2, 3, 6, 6)
    for loss, more, words in (
        (lambda: other(x).sum(), {}, "loss: reaches none of the 3 weights"),
        ({}, {}, "loss: reaches none of the 3 weights"),
        ({"module.0.weight": model[0].weight}, {}, "loss: 'module.0.weight' is none of the 3 weights"),
        (lambda: model(x).sum(), {"start": {"1.weight": x}}, "start: '1.weight' is none of the 3 weights"),
        (lambda: model(x).sum(), {"steps": 0}, "steps: expected an integer >= 1, got 0"),
        (lambda: model(x).sum(), {"step_size": -1.0}, "step_size: expected a finite number >= 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=words), perturbed(model, loss, Layerwise(0.1), **more):
            pass
    assert equal_states(
        {n: t for n, t in state(model).items() if "weight" in n}, {n: t for n, t in before.items() if "weight" in n}
    )


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1)])
def test_tensors_of_another_shape_are_refused_and_not_broadcast(shape):
    model = nn.Linear(4, 3)
    v = {"weight": torch.ones(shape)}
    blocks = {
        "loss": lambda: perturbed(model, v, Layerwise(0.1)),
        "start": lambda: perturbed(model, lambda: model(torch.ones(1, 4)).sum(), Layerwise(0.1), start=v),
        "displacement": lambda: displaced(model, v),
    }
    before = state(model)
    for argument, block in blocks.items():
        with pytest.raises(ValueError, match=rf"^{argument}: expected \(3, 4\) for 'weight', got "), block():
            pass
    assert equal_states(state(model), before)


def test_a_climb_whose_steps_reach_different_tensors_stays_in_the_global_ball():
    model, calls = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), []

    def loss():
        calls.append(1)
        return model[len(calls) % 2](torch.ones(1, 2)).square().sum()

    with perturbed(model, loss, Global(1.0), steps=2, step_size=1.0) as ascent:
        assert sum(v.norm() ** 2 for v in ascent.displacement.values()).sqrt() <= 1 + 1e-6


def test_skipped_counts_over_all_steps():
    model, calls = nn.Linear(3, 2), []

    def loss():
        calls.append(1)
        return model(torch.ones(1, 3)).sum() * (torch.nan if len(calls) == 2 else 1.0)

    with perturbed(model, loss, Layerwise(0.1), steps=3) as ascent:
        assert ascent.skipped.item() == 1


def test_micro_batches_climb_their_sum():
    model = convolutional(batch_norm=False)
    x, y = batch(12)
    whole = lambda: AT().outer(model, x, x, y)
    parts = micro_batches(model, x, y, 5)
    with perturbed(model, whole, Layerwise(0.01)) as one:
        v, value = one.displacement, one.value
    with perturbed(model, parts, Layerwise(0.01)) as other:
        for name in v:
            torch.testing.assert_close(other.displacement[name], v[name], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(other.value, value, rtol=1e-12, atol=0)


def test_accumulation_with_the_summed_ascent_equals_the_full_batch():
    x, y = batch(12)
    updated = []
    for split in (12, 4):
        torch.manual_seed(5)
        model = convolutional(batch_norm=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(5):
            parts = micro_batches(model, x, y, split)
            optimizer.zero_grad()
            with perturbed(model, parts, Layerwise(0.01)):
                for part in parts:
                    part().backward()
            optimizer.step()
        updated.append(state(model))
    for name, w in updated[0].items():
        torch.testing.assert_close(updated[1][name], w, rtol=1e-12, atol=1e-12)


def test_one_graph_is_alive_at_a_time():
    model = convolutional()
    alive = []

    def part():
        assert all(reference() is None for reference in alive)
        loss = model(torch.rand(2, 3, 6, 6, dtype=torch.float64)).sum()
        alive.append(weakref.ref(loss))
        return loss

    gradient(model, [part, part, part])
    assert len(alive) == 3


def test_a_gradient_at_hand_is_climbed_as_it_is():
    model = convolutional()
    *_, outer = closure(model)
    g = gradient(model, outer)
    with perturbed(model, outer, Layerwise(0.01)) as ascent:
        v = ascent.displacement
    with perturbed(model, g, Layerwise(0.01)) as ascent:
        assert all(torch.equal(ascent.displacement[name], v[name]) for name in v)
        assert ascent.value is None
    with pytest.raises(ValueError, match="a gradient at hand allows one step, got 2"):
        with perturbed(model, g, Layerwise(0.01), steps=2):
            pass


def test_start_goes_on_with_the_climb():
    model = convolutional()
    *_, outer = closure(model)
    with perturbed(model, outer, Layerwise(0.01), steps=4) as ascent:
        v = ascent.displacement
    with perturbed(model, outer, Layerwise(0.01), steps=2, step_size=0.01 / 4) as half:
        start = half.displacement
    with perturbed(model, outer, Layerwise(0.01), steps=2, step_size=0.01 / 4, start=start) as ascent:
        for name in v:
            torch.testing.assert_close(ascent.displacement[name], v[name], rtol=1e-9, atol=1e-13)


def test_selection_tied_frozen_and_unreached_tensors():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight  # tied
            self.frozen, self.unused = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

        def forward(self, ids):
            return self.head(self.frozen(self.embed(ids)))

    model = Odd()
    loss = lambda: model(torch.tensor([1, 2])).square().sum()
    with perturbed(model, loss, Layerwise(0.1)) as ascent:
        norms = {name: v.norm() / (model.embed.weight - v).norm() for name, v in ascent.displacement.items() if v.any()}
        assert list(norms) == ["embed.weight"]
        assert norms["embed.weight"].item() == pytest.approx(0.1, rel=1e-5)
    assert gradient(model, loss).keys() == {"embed.weight"}
    with perturbed(model, loss, Layerwise(0.1), where=lambda name, p: name == "frozen.weight" or p.ndim == 2) as ascent:
        assert not ascent.displacement["frozen.weight"].any()
    with pytest.raises(ValueError, match="where: chose none of the model's 5 parameters"):
        with perturbed(model, loss, Layerwise(0.1), where=lambda name, p: False):
            pass


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_a_tensor_without_a_usable_gradient_stays_and_is_counted(bad):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.rand(2, 3)
    poison = torch.ones(4)

    def loss():
        hidden = model[0](x)
        hidden.register_hook(lambda g: g * poison * bad)
        return model[1](hidden).square().sum()

    with perturbed(model, loss, Layerwise(0.1)) as ascent:
        assert not ascent.displacement["0.weight"].any()
        assert ascent.displacement["1.weight"].any()
        assert ascent.skipped.item() == 1
        assert all(p.isfinite().all() for p in model.parameters())


def test_works_under_no_grad_and_with_autocast():
    model = convolutional().float()
    x = torch.rand(4, 3, 6, 6)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return AT().outer(model, x, x, torch.arange(4) % 3)

    with torch.no_grad(), perturbed(model, loss, Layerwise(0.1)) as ascent:
        assert ascent.skipped.item() == 0
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("what", ["perturbed", "displaced", "step"])
def test_an_autocast_around_the_block_sees_the_perturbed_weights(what):
    """Autocast keeps copies of the weights in low precision: they must not outlive a change of the weights."""
    model = convolutional(batch_norm=False).float()
    x, y = torch.rand(8, 3, 6, 6), torch.arange(8) % 3
    loss = lambda: AT().outer(model, x, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        at_w = loss().item()
        if what == "perturbed":
            with perturbed(model, loss, Layerwise(0.5)):
                assert loss().item() > at_w + 0.01
        elif what == "displaced":
            with displaced(model, {"6.weight": -3 * model[6].weight.detach()}):
                assert abs(loss().item() - at_w) > 0.01
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            step = double_perturbation_step(
                model, x, y, objective=AT(), attack=None, ball=Layerwise(0.5), optimizer=optimizer
            )
            assert step.perturbed_loss > step.loss + 0.01
        assert loss().item() == at_w


def test_losses_that_are_no_closures_say_so():
    model = nn.Linear(2, 2)
    value = model(torch.rand(1, 2)).sum()
    for loss, words in (
        (value, "loss: expected a closure such as `lambda: ...`, or a sequence of them, got Tensor"),
        ([], "loss: expected a closure such as `lambda: ...`, or a sequence of them, got list"),
        (lambda: None, "return a tensor without dimensions, got NoneType"),
        (lambda: model(torch.rand(1, 2)), r"return a tensor without dimensions, got \(1, 2\)"),
    ):
        with pytest.raises(TypeError, match=words), perturbed(model, loss, Layerwise(0.1)):
            pass


def test_sparse_gradients_of_embeddings_are_climbed():
    model = nn.Embedding(5, 3, sparse=True)
    with perturbed(model, lambda: model(torch.tensor([1, 2])).square().sum(), Layerwise(0.1)) as ascent:
        v = ascent.displacement["weight"]
    assert v[1].any()
    assert not v[0].any()


def test_a_scaled_loss_gives_the_same_displacement():
    """What a GradScaler does to a loss does not matter to a direction."""
    model = convolutional()
    *_, outer = closure(model)
    with perturbed(model, outer, Layerwise(0.1)) as ascent:
        v = ascent.displacement
    with perturbed(model, lambda: outer() * 2.0**16, Layerwise(0.1)) as ascent:
        for name in v:
            torch.testing.assert_close(ascent.displacement[name], v[name], rtol=1e-12, atol=1e-15)
