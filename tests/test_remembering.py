"""What an attack in training climbs on is the model as it stands, and the model itself where there is no telling."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from networks import equal_states, state
from test_fused import answers, off, used
from torch import nn
from torch.nn.utils import parametrizations, prune

from saltflat import AT, PGD, TRADES, Linf
from saltflat.lean import leaner
from saltflat.lean.packed import supported
from saltflat.models import preact_resnet18, small_resnet

pytestmark = pytest.mark.skipif(not supported(torch.float32), reason="this machine has no oneDNN")


def test_weights_are_read_anew_and_have_no_gradient():
    network, x, remembering = used(small_resnet(10), 3, 16, 16), torch.rand(3, 3, 16, 16), leaner()
    for _ in range(3):
        assert off(remembering(network)(x), network(x)) < 1e-5
        answers(remembering(network), x)
        assert all(parameter.grad is None for parameter in network.parameters())
        with torch.no_grad():
            for tensor in (*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())):
                tensor.mul_(1.1)


def test_batches_and_images_of_other_sizes():
    network, remembering = used(small_resnet(10), 3, 16, 16), leaner()
    logits = remembering(network)
    for shape in ((4, 3, 16, 16), (1, 3, 16, 16), (7, 3, 16, 16), (2, 3, 24, 16)):
        x = torch.rand(shape)
        for found, wanted in zip(answers(logits, x), answers(network, x), strict=True):
            assert off(found, wanted) < 1e-4


def test_another_model_is_another_model():
    remembering, x = leaner(), torch.rand(2, 3, 16, 16)
    for seed in range(3):
        torch.manual_seed(seed)
        network = used(small_resnet(10), 3, 16, 16)
        assert off(remembering(network)(x), network(x)) < 1e-5


def test_the_model_is_left_as_it_was():
    network = used(small_resnet(10), 3, 16, 16)
    before, identities = state(network), [id(tensor) for tensor in (*network.parameters(), *network.buffers())]
    answers(leaner()(network), torch.rand(3, 3, 16, 16))
    answers(leaner(torch.bfloat16)(network), torch.rand(3, 3, 16, 16))
    assert equal_states(state(network), before)
    assert identities == [id(tensor) for tensor in (*network.parameters(), *network.buffers())]
    assert not any(module.training for module in network.modules())


class Decides(nn.Module):
    """Its forward looks at numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_the_model_itself_where_there_is_no_telling():
    hooked = nn.Sequential(nn.Conv2d(1, 2, 3))
    hooked.register_forward_hook(lambda module, given, found: 2 * found)
    for network in (Decides(), nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Conv2d(1, 2, 3)).double(), hooked):
        assert leaner()(network.eval()) is network
    training = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout())
    assert leaner()(training) is training


def test_a_trace_that_is_wrong_is_left():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Conv2d(1, 2, 3), 1.0

        def forward(self, x):
            return self.layer(x) * self.scale

    remembering, network, x = leaner(), Wrong().eval(), torch.rand(2, 1, 4, 4)
    logits = remembering(network)
    network.scale = 2.0
    assert torch.equal(logits(x), network(x))
    assert remembering(network) is network


def test_an_attack_on_it_is_the_attack_on_the_model():
    torch.manual_seed(3)
    network, x, y = used(small_resnet(10), 3, 16, 16), torch.rand(8, 3, 16, 16), torch.arange(8)
    attack = PGD(Linf(8 / 255), 2 / 255, 10)
    found = [
        attack(AT().inner(of, x, y), x, generator=torch.Generator().manual_seed(0))
        for of in (network, leaner()(network))
    ]
    differ = (found[0] - found[1]).abs() > 1e-6
    assert differ.float().mean() < 0.01  # where a gradient is next to 0, its sign may turn
    losses = [AT().inner(network, x, y)(x_adv) for x_adv in found]
    assert off(losses[1], losses[0]) < 1e-3


# Replaced, not changed


def replaced(network, name):
    """Something else in the place of a weight, a buffer, a module, or what a module does."""
    other = used(small(), 3, 8, 8)
    if name == "weight":
        network[0].weight = nn.Parameter(other[0].weight.detach())
    elif name == "assigned":
        network.load_state_dict(other.state_dict(), assign=True)
    elif name == "statistics":
        network[1].running_mean, network[1].running_var = other[1].running_mean, other[1].running_var
    elif name == "module":
        network[0] = other[0]
    elif name == "parametrised":
        parametrizations.weight_norm(network[0])
        with torch.no_grad():
            network[0].parametrizations.weight.original0.mul_(3)
    elif name == "pruned":
        prune.l1_unstructured(network[0], "weight", 0.5)
    elif name == "hook":
        network[0].register_forward_hook(lambda module, given, found: 2 * found)
    elif name == "types":
        network.bfloat16()


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


@pytest.mark.parametrize(
    "name", ["weight", "assigned", "statistics", "module", "parametrised", "pruned", "hook", "types"]
)
def test_whatever_takes_the_place_of_something_is_seen(name):
    network, x, remembering = used(small(), 3, 8, 8), torch.rand(4, 3, 8, 8), leaner()
    remembering(network)(x)
    assert remembering.why is None
    replaced(network, name)
    x = x.to(next(network.parameters()).dtype)
    assert off(remembering(network)(x).detach().float(), network(x).detach().float()) < 1e-5
    assert off(remembering(network)(x).detach().float(), network(x).detach().float()) < 1e-5  # after the trial as well


def test_a_hook_or_a_module_that_comes_where_another_was_is_seen():
    """Also where it comes to lie where that lay, and another hook is one of several."""
    network, x, remembering = used(small(), 3, 8, 8), torch.rand(4, 3, 8, 8), leaner()
    handle = None
    for times in (2, 5, 3):
        if handle is not None:
            handle.remove()
        handle = network[0].register_forward_hook(lambda module, given, found, times=times: times * found)
        assert off(remembering(network)(x), network(x)) < 1e-5
    network[0].register_forward_hook(lambda module, given, found: found + 1)
    assert off(remembering(network)(x), network(x)) < 1e-5
    for slope in (0.6, 0.3, 0.9, 0.1):
        del network[2]
        network.insert(2, nn.LeakyReLU(slope))
        network.eval()
        for _ in range(2):
            assert off(remembering(network)(x), network(x)) < 1e-5


def test_a_trace_is_made_once():
    network, x, remembering = used(small(), 3, 8, 8), torch.rand(4, 3, 8, 8), leaner()
    remembering(network)(x)
    known = remembering._known
    with torch.no_grad():
        network[0].weight.mul_(2)
    remembering(network)(x)
    assert remembering._known is known
    assert known.tried


# The trial


class Turned(nn.Module):
    """Something else than when it was traced."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Conv2d(1, 2, 3), 1.0

    def forward(self, x):
        return self.layer(x) * self.scale


def turned(remembering):
    """A model with a trace that is wrong, and what is climbed on."""
    network = Turned().eval()
    logits = remembering(network)
    network.scale = 3.0
    return network, logits


def test_a_batch_that_tells_nothing_does_not_pass_the_trial():
    x = torch.rand(2, 1, 4, 4)
    for first in (x[:0], torch.full_like(x, torch.nan)):
        remembering = leaner()
        network, logits = turned(remembering)
        logits(first)
        assert torch.equal(logits(x), network(x))
        assert remembering.why == "a trace that gives other answers"


def test_answers_of_zero_do_not_pass_the_trial():
    remembering, x = leaner(), torch.rand(2, 1, 4, 4)
    network, logits = turned(remembering)
    with torch.no_grad():
        network.layer.weight.zero_()
        network.layer.bias.zero_()
    assert torch.equal(logits(x), network(x))
    nn.init.normal_(network.layer.weight)
    assert torch.equal(remembering(network)(x), network(x))


def test_a_first_call_that_fails_is_the_models_to_explain():
    remembering = leaner()
    _, logits = turned(remembering)
    with pytest.raises(RuntimeError, match="channels"):
        logits(torch.rand(2, 7, 4, 4))


def test_two_models_in_turn_are_tried_each():
    remembering, x = leaner(), torch.rand(2, 1, 4, 4)
    first, climbed = turned(remembering)
    second = Turned().eval()
    remembering(second)(x)
    assert torch.equal(climbed(x), first(x))
    assert remembering.why is None  # of the second


def test_a_model_whose_answer_is_no_tensor_is_left_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.layer(x), x

    network, x = Two().eval(), torch.rand(2, 1, 4, 4)
    z, same = leaner()(network)(x)
    assert torch.equal(z, network.layer(x))
    assert same is x


@pytest.mark.parametrize("seed", range(3))
def test_rounding_passes_the_trial(seed):
    torch.manual_seed(seed)
    network, remembering = used(preact_resnet18(10), 3, 32, 32), leaner()
    remembering(network)(torch.rand(8, 3, 32, 32))
    assert remembering.why is None


@pytest.mark.parametrize("seed", [1, 4, 6])
def test_so_do_kinks_of_relus(seed):
    """Of 64 images, fresh weights put a few so near to a kink that rounding decides."""
    torch.manual_seed(seed)
    network, remembering = preact_resnet18(10).to(memory_format=torch.channels_last).eval(), leaner()
    remembering(network)(torch.rand(64, 3, 32, 32))
    assert remembering.why is None


# Around it


def test_autocast_around_it_changes_nothing():
    network, x = used(preact_resnet18(10), 3, 32, 32), torch.rand(4, 3, 32, 32)
    logits, leaf = leaner()(network), x.clone().requires_grad_()
    logits(x)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = logits(leaf)
        found.append((z, torch.autograd.grad(z.sum(), leaf)[0]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_unknown_precision_is_refused():
    for dtype in (torch.float16, torch.int8, torch.float64):
        with pytest.raises(ValueError, match=r"dtype: expected torch.bfloat16 or None, got torch\."):
            leaner(dtype)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))])
def test_copies_begin_without_memory(twin):
    network, x, remembering = used(small(), 3, 8, 8), torch.rand(4, 3, 8, 8), leaner(torch.bfloat16)
    remembering(network)(x)
    other = twin(remembering)
    assert other._known is None
    assert torch.equal(other(network)(x), remembering(network)(x))


def test_a_model_that_nobody_else_has_is_let_go():
    network, remembering = used(small(), 3, 8, 8), leaner()
    remembering(network)(torch.rand(2, 3, 8, 8))
    weight = weakref.ref(network[0].weight)
    del network
    gc.collect()
    assert weight() is None
    assert remembering.why is None


def test_empty_batches():
    network = used(preact_resnet18(10), 3, 32, 32)
    logits, x = leaner()(network), torch.rand(2, 3, 32, 32)
    logits(x)
    assert logits(x[:0]).shape == (0, 10)


def test_trades_asks_it_for_clean_logits_as_well():
    network, x, y = used(small(), 3, 8, 8), torch.rand(4, 3, 8, 8), torch.arange(4)
    noisy = torch.rand_like(x)
    found = TRADES(6.0).inner(leaner()(network), x, y)(noisy)
    assert off(found.detach(), TRADES(6.0).inner(network, x, y)(noisy).detach()) < 1e-4
