"""The network that attacks climb on: its answers are the network's to rounding, and the network is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import equal_states, state
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from saltflat.lean.network import lean
from saltflat.models import small_resnet, wide_resnet

LOWER = [torch.bfloat16, torch.float16]


def used(network, *shape):
    """The network with statistics and weights of its norms that are those of none that is fresh, in eval mode."""
    for module in network.modules():
        for name in ("weight", "bias"):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and getattr(module, name) is not None:
                nn.init.normal_(getattr(module, name))
    with torch.no_grad():
        for _ in range(3):
            network.train()(3 * torch.randn(8, *shape, dtype=next(network.parameters()).dtype) + 1)
    return network.eval()


def answers(logits, x):
    """Logits, and the gradient of some function of them with respect to x."""
    leaf = x.clone().requires_grad_()
    z = logits(leaf)
    (gradient,) = torch.autograd.grad(
        (z * torch.arange(1, z.shape[1] + 1).view(1, -1, *[1] * (z.ndim - 2))).sum(), leaf
    )
    return z.detach(), gradient


def same(network, *shape, tolerance=1e-12):
    """Logits and gradients of `lean` are the network's."""
    x = torch.rand(5, *shape, dtype=next(network.parameters()).dtype)
    for expected, found in zip(answers(network, x), answers(lean(network), x), strict=True):
        assert found.dtype is expected.dtype
        assert torch.allclose(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def similar(network, *shape, dtype, tolerance):
    """So they are in lower precision, but for ReLUs that rounding switches on or off."""
    x = torch.rand(5, *shape)
    expected, found = answers(network, x), answers(lean(network, dtype), x)
    assert found[0].dtype is dtype
    assert found[1].dtype is torch.float32
    assert (found[0] - expected[0]).abs().max() < tolerance * expected[0].abs().max()
    assert F.cosine_similarity(found[1].flatten(1), expected[1].flatten(1)).median() > 1 - tolerance


def operations(logits, x):
    """Names of all that torch computes for logits(x)."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    with Names(), torch.no_grad():
        logits(x)
    return names


def without_bias(norm):
    norm.register_parameter("bias", None)
    return norm


def without_weight(norm):
    norm.register_parameter("weight", None)
    return norm


KINDS = [
    (nn.BatchNorm1d, nn.Linear(6, 4), (6,)),
    (nn.BatchNorm1d, nn.Conv1d(2, 4, 3), (2, 6)),
    (nn.BatchNorm2d, nn.Conv2d(2, 4, 3), (2, 6, 5)),
    (nn.BatchNorm3d, nn.Conv3d(2, 4, 3), (2, 4, 5, 6)),
    (nn.SyncBatchNorm, nn.Conv2d(2, 4, 3), (2, 6, 5)),
]


@pytest.mark.parametrize(("kind", "before", "shape"), KINDS)
@pytest.mark.parametrize(
    "norm",
    [
        lambda kind: kind(4),
        lambda kind: kind(4, affine=False),
        lambda kind: kind(4, eps=0.5),
        lambda kind: kind(4, momentum=None),
        lambda kind: without_bias(kind(4)),
        lambda kind: without_weight(kind(4)),
    ],
    ids=["plain", "not affine", "eps", "cumulative", "no bias", "no weight"],
)
def test_batch_norm_of_every_kind(kind, before, shape, norm):
    layer = copy.deepcopy(before)
    network = used(nn.Sequential(layer, norm(kind), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double(), *shape)
    same(network, *shape)
    x = torch.rand(2, *shape, dtype=torch.float64)
    assert any("batch_norm" in name for name in operations(network, x))
    assert not any("batch_norm" in name for name in operations(lean(network), x))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1), (1, 8, 8)),
        (lambda: wide_resnet(depth=10, widen_factor=1), (3, 16, 16)),
    ],
    ids=["small", "wide"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_whole_networks(network, shape, dtype, tolerance):
    model = used(network().to(dtype), *shape)
    same(model, *shape, tolerance=tolerance)
    assert not any("batch_norm" in name for name in operations(lean(model), torch.rand(2, *shape, dtype=dtype)))


class Twice(nn.Module):
    """One norm under two names, in two places each, and in a module of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.again, self.block = self.norm, nn.Sequential(nn.Tanh(), self.norm)
        self.blocks = nn.ModuleList([self.block, self.block])
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.again(self.norm(x).sin())
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_modules_that_stand_in_several_places():
    same(used(Twice().double(), 3, 4, 4), 3, 4, 4)


def test_a_norm_alone_and_a_network_of_one_layer():
    same(used(nn.BatchNorm1d(3).double(), 3), 3)
    same(nn.Linear(3, 2).double(), 3)


def test_a_network_without_parameters():
    x = torch.rand(2, 3)
    assert torch.equal(lean(nn.Flatten())(x), x)
    assert torch.equal(lean(nn.Flatten(), torch.bfloat16)(x), x)


# What may compute something else stays as it is


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """Its weights may not be rounded before their mean is taken."""

    def forward(self, x):
        assert self.weight.dtype in (torch.float32, torch.float64)
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.norm(), self.bias)


class Squared(nn.Module):
    def forward(self, w):
        return w.square() + 1


def parametrised(module, name):
    parametrize.register_parametrization(module, name, Squared())
    return module


def hooked(norm, kind):
    if kind == "before":
        norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif kind == "after":
        norm.register_forward_hook(lambda module, args, output: output * 2)
    else:
        norm.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 2,))
    return norm


ODD = {
    "norm subclass": lambda: (nn.Conv2d(2, 4, 3), Doubled(4)),
    "norm parametrised": lambda: (nn.Conv2d(2, 4, 3), parametrised(nn.BatchNorm2d(4), "weight")),
    "norm with a hook before": lambda: (nn.Conv2d(2, 4, 3), hooked(nn.BatchNorm2d(4), "before")),
    "norm with a hook after": lambda: (nn.Conv2d(2, 4, 3), hooked(nn.BatchNorm2d(4), "after")),
    "norm with a hook backward": lambda: (nn.Conv2d(2, 4, 3), hooked(nn.BatchNorm2d(4), "backward")),
    "conv subclass": lambda: (Standardised(2, 4, 3), nn.BatchNorm2d(4)),
    "conv parametrised": lambda: (parametrised(nn.Conv2d(2, 4, 3), "weight"), nn.BatchNorm2d(4)),
    "weight norm": lambda: (parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4)),
    "spectral norm": lambda: (parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4)),
    "instance norm": lambda: (nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "group norm": lambda: (nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)),
}


@pytest.mark.parametrize("odd", ODD)
def test_modules_that_may_compute_something_else(odd):
    network = nn.Sequential(*ODD[odd](), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    same(used(copy.deepcopy(network).double(), 2, 6, 5), 2, 6, 5)
    similar(used(network, 2, 6, 5), 2, 6, 5, dtype=torch.bfloat16, tolerance=0.05)


def test_without_running_statistics_a_norm_goes_on_looking_at_the_batch():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()).double()
    same(network.eval(), 2, 6, 5)
    x = torch.rand(4, 2, 6, 5, dtype=torch.float64)
    assert not torch.allclose(lean(network)(x)[:1], lean(network)(x[:1]))


class Uncopyable(nn.Module):
    """Keeps a tensor that was computed, which cannot be copied, or refuses by itself."""

    def __init__(self, refuses):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.scale = refuses or self.layer.weight.norm()

    def __deepcopy__(self, memo):
        if isinstance(self.scale, type):
            raise self.scale
        copy.deepcopy(self.scale)

    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize("refuses", [None, TypeError, RuntimeError])
def test_a_network_that_cannot_be_copied(refuses):
    network = used(Uncopyable(refuses).double(), 3)
    before = state(network)
    same(network, 3, tolerance=0)
    assert equal_states(state(network), before)
    x = torch.rand(2, 3)
    network = network.float()
    low = lean(network, torch.bfloat16)(x)
    assert torch.allclose(low.float(), network(x), atol=0.05 * network(x).abs().max().item())


class Reads(nn.Module):
    """What a norm is besides a function: its numbers are read, and it is called by keyword."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.norm(input=self.convolution(x))
        return y * self.norm.num_features + self.norm.bias.sum() + self.norm.running_var.sum()


def test_whoever_reads_a_norm_finds_its_numbers():
    same(used(Reads().double(), 2, 5, 5), 2, 5, 5)


def test_a_norm_whose_forward_was_replaced_stays():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    network[1].forward = lambda x: 2 * x
    same(used(network.double(), 2, 6, 5), 2, 6, 5)


@pytest.mark.parametrize("dtype", [None, *LOWER])
def test_a_view_of_maps_that_must_lie_row_by_row(dtype):
    class Views(nn.Sequential):
        def forward(self, x):
            return self[1](F.max_pool2d(self[0](x), 2).view(-1, 4 * 3 * 3))

    network, x = Views(nn.Conv2d(2, 4, 3, padding=1), nn.Linear(36, 3)), torch.rand(5, 2, 6, 6)
    logits = lean(network, dtype)
    for _ in range(2):
        assert torch.allclose(logits(x).float(), network(x), atol=0.05 if dtype else 1e-5)


def test_what_fails_for_another_reason_fails():
    with pytest.raises(RuntimeError, match="shapes"):
        lean(nn.Linear(3, 2))(torch.rand(2, 4))


# The network itself


def mixed():
    """Training in parts, trained in parts, laid out in parts."""
    network = used(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)), 2, 6, 6)
    network.append(nn.Flatten()).append(nn.Linear(16, 3))
    network[1].train()
    network[3].train()
    network[0].weight.requires_grad_(False)
    network[2].to(memory_format=torch.channels_last)
    return network


@pytest.mark.parametrize("dtype", [None, *LOWER])
def test_the_network_is_left_as_it_was(dtype):
    network = mixed()
    tensors = [*network.parameters(), *network.buffers()]
    as_it_was = lambda: [
        (t.data_ptr(), t.stride(), t.dtype, t.requires_grad, t._version, t.grad is None) for t in tensors
    ]
    before, bits, modes = as_it_was(), state(network), [module.training for module in network.modules()]
    kinds = [type(module) for module in network.modules()]
    logits = lean(network, dtype)
    x = torch.rand(4, 2, 6, 6, requires_grad=True)
    logits(x).float().square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert as_it_was() == before
    assert [id(t) for t in tensors] == [id(t) for t in [*network.parameters(), *network.buffers()]]
    assert equal_states(state(network), bits)
    assert [module.training for module in network.modules()] == modes
    assert [type(module) for module in network.modules()] == kinds


@pytest.mark.parametrize("dtype", [None, *LOWER])
def test_its_copy_is_in_eval_mode_and_asks_for_no_gradient_of_weights(dtype):
    network = mixed()
    logits, x = lean(network, dtype), torch.rand(4, 2, 6, 6)
    first = logits(x)
    assert not first.requires_grad
    assert torch.equal(logits(x), first)  # no drop-out
    expected = network.eval()(x)
    assert torch.allclose(first.float(), expected, atol=(0.05 if dtype else 1e-5) * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_later_changes_of_weights_are_not_seen(dtype):
    network = mixed().eval()
    logits, x = lean(network, dtype), torch.rand(4, 2, 6, 6)
    before = logits(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert torch.equal(logits(x), before)


# Lower precision


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1), (1, 8, 8)),
        (lambda: wide_resnet(depth=10, widen_factor=1), (3, 16, 16)),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)), (2, 6)),
        (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(96, 3)), (2, 4, 5, 6)),
    ],
    ids=["small", "wide", "1d", "3d"],
)
def test_logits_and_gradients_in_lower_precision(network, shape, dtype):
    model = used(network(), *shape)
    similar(model, *shape, dtype=dtype, tolerance={torch.bfloat16: 0.05, torch.float16: 0.01}[dtype])


@pytest.mark.parametrize("dtype", LOWER)
def test_weights_are_rounded_once(dtype):
    """A forward under autocast converts the weights of all layers, this one's inputs only."""
    network = used(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(48, 3)), 2, 6, 5)
    x = torch.rand(2, 2, 6, 5)

    def converted(logits):
        seen = []

        class Conversions(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten._to_copy.default:
                    seen.append(tuple(args[0].shape))
                return function(*args, **kwargs or {})

        with Conversions(), torch.no_grad():
            logits(x)
        return seen

    with torch.autocast("cpu", dtype):
        plain = converted(network)
    assert tuple(network[0].weight.shape) in plain
    assert not {tuple(network[0].weight.shape), tuple(network[3].weight.shape)} & set(converted(lean(network, dtype)))


def test_autocast_ends_with_the_forward():
    logits = lean(nn.Linear(3, 2), torch.bfloat16)
    assert logits(torch.rand(1, 3)).dtype is torch.bfloat16
    assert nn.Linear(3, 2)(torch.rand(1, 3)).dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_convolutions_lie_channels_last():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    assert lean(network).network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[0].weight.is_contiguous()
