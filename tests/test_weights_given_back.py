"""What `perturbed` and `displaced` give back: weights, gradients and buffers, to the bit, on every way out."""

import gc
from collections import Counter

import pytest
import torch
from launches import Launches
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat import AT, Filterwise, Global, Layerwise, displaced, gradient, perturbed
from saltflat.models import preact_resnet18
from saltflat.weights import _finally


def closure(model, objective=None, seed=0):
    torch.manual_seed(seed)
    x, y = batch()
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    return x, x_adv, y, lambda: (objective or AT()).outer(model, x, x_adv, y)


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


def test_a_buffer_that_the_forward_deletes_is_a_buffer_again():
    class Deleting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("first", torch.ones(2))
            self.register_buffer("second", None)

        def forward(self, x):
            del self.first, self.second
            return self.linear(x)

    model = Deleting()
    gradient(model, lambda: model(torch.rand(1, 2)).sum())
    assert torch.equal(model.state_dict()["first"], torch.ones(2))
    assert dict(model._buffers) == {"first": model.first, "second": None}
    assert "first" not in vars(model)


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

    with pytest.raises(KeyboardInterrupt), _finally(put_back):
        pass
    assert done == [0, 0, 1, 2]


def test_memory_one_copy_of_the_weights_in_the_block_two_if_the_step_is_inside():
    model = convolutional()
    *_, outer = closure(model)
    for inside, copies in ((False, 1), (True, 2)):
        found = None  # or it would keep the round before alive
        gc.collect()
        before = [
            o for o in gc.get_objects() if type(o) is torch.Tensor
        ]  # of other tests; held, so that ids stay theirs
        others = {id(o) for o in before}
        with perturbed(model, outer, Layerwise(0.1), step_inside=inside) as ascent:
            shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 2}
            parameters = {id(p) for p in model.parameters()}
            gc.collect()
            found = [
                o
                for o in gc.get_objects()
                if type(o) is torch.Tensor and tuple(o.shape) in shapes and id(o) not in parameters | others
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


def test_a_network_of_several_types_is_perturbed_and_comes_back_whole():
    """Types, layouts, a sparse gradient, a parameter without numbers: what torch does not take in one go."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(6, 4, sparse=True)
            self.convolution = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)
            self.wide, self.narrow = nn.Linear(6, 3).double(), nn.Linear(3, 2).bfloat16()
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, ids):
            self.calls += 1
            self.flags.logical_not_()
            rows = self.words(ids)
            maps = self.convolution(rows.view(-1, 1, 2, 2)).flatten(1)
            return self.narrow(self.wide(torch.cat([rows, maps], 1).double()).bfloat16()).float() + self.nothing.sum()

    torch.manual_seed(0)
    model, ids = Mixed(), torch.tensor([1, 2, 2])
    loss = lambda: model(ids).square().sum()
    loss().backward()
    before, grads = state(model), {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    for inside in (False, True):
        with perturbed(model, loss, Layerwise(0.1), steps=2, step_inside=inside) as ascent:
            found = ascent.displacement
            assert not torch.equal(model.words.weight, before["words.weight"])
            assert torch.equal(model.calls, before["calls"])
        assert equal_states(state(model), before)
        assert ascent.skipped == 2  # the one without numbers, in both steps
    for name, v in found.items():
        assert v.dtype == before[name].dtype
        assert v.numel() == 0 or 0.01 < v.double().norm() / before[name].double().norm() < 0.11, name
    for name, parameter in model.named_parameters():
        grad, content = grads[name]
        assert parameter.grad is grad
        assert torch.equal(grad.to_dense(), content.to_dense())


def test_weights_that_are_not_finite_come_back_as_they_were():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0, 0], model.weight[1, 1] = torch.inf, torch.nan
    bits = model.weight.detach().clone().view(torch.int32)
    with perturbed(model, lambda: model(torch.ones(1, 3)).sum(), Layerwise(0.1)):
        pass
    assert torch.equal(model.weight.detach().view(torch.int32), bits)


def test_a_weight_that_w_plus_v_is_too_large_for_comes_back_from_a_block_with_a_step_inside():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0, 0], model.weight[1, 0] = 3e38, -0.0
    before, g = model.weight.detach().clone(), {"weight": torch.randn(2, 3)}
    with perturbed(model, g, Layerwise(0.1), step_inside=True):
        assert model.weight.isinf().any()
    assert torch.equal(model.weight.detach().view(torch.int32), before.view(torch.int32))
    with perturbed(model, g, Layerwise(0.1), step_inside=True), torch.no_grad():
        model.weight[0, 1] = 7.0
        model.bias.sub_(1.0)
    assert torch.equal(model.weight[1], before[1])
    assert model.weight[0, 0] == before[0, 0]


def launches(model, inside):
    """Of a climb along a gradient at hand, and of giving w back."""
    g = {name: torch.empty_like(p) for name, p in model.named_parameters() if p.ndim > 1}
    with Launches() as found:
        with perturbed(model, g, Layerwise(5e-3), step_inside=inside):
            pass
    return found.counts


def test_perturbing_and_restoring_launch_few_operations_for_each_tensor():
    """Multiplications by a number of its own, which torch can't launch together, and nothing else."""
    with torch.device("meta"):
        small, large, network = (
            *(nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(depth)]) for depth in (2, 20)),
            preact_resnet18(10),
        )
    of_each = Counter({"_foreach_div_": 1, "_foreach_mul_": 2})
    for inside, more in ((False, Counter()), (True, Counter({"eq": 1, "masked_fill_": 1}))):
        difference = launches(large, inside)
        difference.subtract(launches(small, inside))
        assert +difference == Counter({name: 18 * times for name, times in (of_each + more).items()})
        # 21 tensors
        assert sum(launches(network, inside).values()) <= 21 * sum((of_each + more).values()) + 25
