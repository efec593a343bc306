import gc
import weakref

import pytest
import torch
from networks import batch, convolutional, equal_states, state
from oracles.proxy_awp import at_loss, proxy_displacement, trades_loss
from torch import nn

from saltflat import AT, TRADES, Filterwise, Global, Layerwise, displaced, double_perturbation_step, gradient, perturbed
from saltflat.weights import _surely


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


@pytest.mark.parametrize("ball", [Layerwise(0.3), Filterwise(0.3), Global(2.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step_inside", [False, True])
def test_a_thousand_cycles_leave_every_bit(ball, dtype, step_inside):
    """With the closure raising in every third, the block in every fifth; the weights lie channels-last."""
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model = model.to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
    x = torch.rand(5, 2, 2, 2, dtype=dtype)

    def bits():
        return {name: tensor.clone().reshape(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}

    before = bits()

    def loss(fail):
        value = model(x).float().square().mean()
        if fail:
            raise KeyboardInterrupt
        return value

    for cycle in range(1000):
        try:
            with perturbed(model, lambda fail=cycle % 3 == 0: loss(fail), ball, step_inside=step_inside):
                if cycle % 5 == 0:
                    raise RuntimeError("in the block")
        except (KeyboardInterrupt, RuntimeError):
            pass
    assert equal_states(bits(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_w_comes_back_when_a_later_climb_step_raises():
    model = convolutional()
    before, calls = state(model), []
    *_, outer = closure(model)

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return outer()

    with pytest.raises(KeyboardInterrupt), perturbed(model, loss, Layerwise(0.1), steps=3):
        pass
    assert equal_states(state(model), before)


@pytest.mark.parametrize("gradients", ["none", "accumulated"])
def test_grad_and_buffers_stay_as_they_were(gradients):
    model = convolutional().train()
    *_, outer = closure(model)
    if gradients == "accumulated":
        outer().backward()
    before, grads = state(model), {name: p.grad for name, p in model.named_parameters()}
    contents = {name: None if g is None else g.clone() for name, g in grads.items()}
    with perturbed(model, outer, Layerwise(0.1), steps=2):
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name])
    gradient(model, outer)
    assert equal_states(state(model), before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert parameter.grad is None or torch.equal(parameter.grad, contents[name])


def test_running_statistics_come_from_the_outer_forward_alone():
    model = convolutional().train()
    _, x_adv, _, outer = closure(model)
    with perturbed(model, outer, Layerwise(0.1)) as ascent:
        v = ascent.displacement
        outer()
    found = state(model)
    other = convolutional().train()
    other.load_state_dict(state(model))
    other[1].reset_running_stats()
    with displaced(other, v):
        other(x_adv)
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, found[name])


def test_buffers_of_any_module_come_back_even_if_replaced():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2, 2))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls = self.calls + 1  # another tensor, not the same one changed
            return x @ self.weight

    model = nn.Sequential(Counter(), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    before, calls = state(model), model[0].calls
    with perturbed(model, lambda: model(torch.rand(3, 2)).sum(), Layerwise(0.1)):
        pass
    assert equal_states(state(model), before)
    assert model[0].calls is calls


def test_step_after_the_block_is_at_w_and_inside_at_w_plus_v():
    for inside in (False, True):
        model = convolutional()
        *_, outer = closure(model)
        w = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
        with perturbed(model, outer, Layerwise(0.1), step_inside=inside) as ascent:
            v = ascent.displacement
            outer().backward()
            if inside:
                optimizer.step()
        if not inside:
            optimizer.step()
        for name, p in model.named_parameters():
            decayed = w[name] + (v[name] if inside and name in v else 0)
            torch.testing.assert_close(p.detach(), w[name] - 0.1 * (p.grad + 0.3 * decayed), rtol=1e-12, atol=1e-14)


def test_step_inside_without_a_step_gives_w_back_to_the_bit():
    model = convolutional().float()
    before = state(model)
    for _ in range(100):
        with perturbed(model, lambda: model(torch.rand(2, 3, 6, 6)).square().sum(), Layerwise(0.3), step_inside=True):
            pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_weight_changed_in_the_block_is_an_error_and_w_is_back():
    model = convolutional()
    *_, outer = closure(model)
    before, optimizer = state(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"changed inside `perturbed`.*step_inside=True"):
        with perturbed(model, outer, Layerwise(0.1)):
            outer().backward()
            optimizer.step()
    assert all(
        torch.equal(dict(model.named_parameters())[name], before[name]) for name in ("0.weight", "3.weight", "6.weight")
    )


def micro_batches(model, x, y, size):
    pairs = zip(x.split(size), y.split(size), strict=True)
    return [lambda a=a, b=b: AT().outer(model, a, a, b) * len(a) / len(x) for a, b in pairs]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])
def test_no_optimiser_steps_inside_unnoticed(make, kind):
    model = convolutional().float()
    before, optimizer = state(model), make(model.parameters(), lr=0.1, **kind)
    x = torch.rand(2, 3, 6, 6)
    with pytest.raises(RuntimeError, match=r"was changed inside `perturbed`"):
        with perturbed(model, lambda: model(x).square().sum(), Layerwise(0.1)):
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    optimizer.step()  # the hook is gone
    other = nn.Linear(2, 2)
    with perturbed(model, lambda: model(x).square().sum(), Layerwise(0.1)):
        other(torch.rand(1, 2)).sum().backward()
        make(other.parameters(), lr=0.1, **kind).step()  # other models may step


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


def test_a_grad_whose_storage_the_backward_reuses_keeps_its_content():
    """As a bucket of DistributedDataParallel would: the old `.grad` is written to while it is set aside."""
    model = nn.Linear(3, 2)
    model(torch.rand(4, 3)).sum().backward()
    grad, content = model.weight.grad, model.weight.grad.clone()

    def loss():
        grad.zero_()
        return model(torch.rand(4, 3)).square().sum()

    gradient(model, loss)
    assert model.weight.grad is grad
    assert torch.equal(grad, content)


def test_a_buffer_that_the_first_forward_makes_is_gone_again():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("cache", None)

        def forward(self, x):
            self.cache = x.detach() if self.cache is None else self.cache
            return self.linear(x)

    model = Lazy()
    gradient(model, lambda: model(torch.rand(1, 2)).sum())
    assert model.cache is None


def test_what_is_being_put_back_is_put_back_despite_an_interrupt():
    done, calls = [], []

    def put_back():
        calls.append(1)
        for part in range(3):
            if len(calls) == 1 and part == 1:
                raise KeyboardInterrupt
            done.append(part)

    with pytest.raises(KeyboardInterrupt):
        _surely(put_back)
    assert done == [0, 0, 1, 2]


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


def test_memory_one_copy_of_the_weights_in_the_block_two_if_the_step_is_inside():
    model = convolutional()
    *_, outer = closure(model)
    for inside, copies in ((False, 1), (True, 2)):
        found = None  # or it would keep the round before alive
        with perturbed(model, outer, Layerwise(0.1), step_inside=inside) as ascent:
            shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 2}
            parameters = {id(p) for p in model.parameters()}
            gc.collect()
            found = [
                o
                for o in gc.get_objects()
                if type(o) is torch.Tensor and tuple(o.shape) in shapes and not o.is_sparse and id(o) not in parameters
            ]
            assert len(found) == copies * 2  # two convolutions
            assert ascent.skipped is not None


def test_displacement_is_valid_inside_only():
    model = convolutional()
    *_, outer = closure(model)
    with perturbed(model, outer, Layerwise(0.1)) as ascent:
        pass
    with pytest.raises(RuntimeError, match="inside the `with` block only"):
        _ = ascent.displacement


def test_storage_is_never_swapped():
    model = convolutional()
    *_, outer = closure(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    for inside in (False, True):
        with perturbed(model, outer, Layerwise(0.1), step_inside=inside):
            assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_displaced_holds_exactly_w_plus_v_and_refuses_strange_names():
    model = convolutional()
    before = state(model)
    v = {"0.weight": torch.randn_like(model[0].weight), "6.bias": torch.randn_like(model[6].bias)}
    with pytest.raises(ZeroDivisionError), displaced(model, v):
        assert torch.equal(model[0].weight, before["0.weight"] + v["0.weight"])
        assert torch.equal(model[6].bias, before["6.bias"] + v["6.bias"])
        raise ZeroDivisionError
    assert equal_states(state(model), before)
    with pytest.raises(KeyError), displaced(model, {"nothing": torch.zeros(1)}):
        pass


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
