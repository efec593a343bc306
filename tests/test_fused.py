"""What attacks in training climb on: the answers and input gradients of the network, in fewer operations."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from saltflat import AT, PGD, Layerwise, Linf, double_perturbation_step
from saltflat.lean import leaner
from saltflat.lean.convolution import Fixed
from saltflat.lean.fused import Fused
from saltflat.lean.layers import Layers
from saltflat.lean.packed import supported
from saltflat.models import preact_resnet18, small_resnet, vgg19_bn, wide_resnet

pytestmark = pytest.mark.skipif(not supported(torch.float32), reason="this machine has no oneDNN")


def used(network, *shape):
    """With statistics and weights of its norms that are those of none that is fresh, in eval mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias):
                nn.init.normal_(tensor, 0.5)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.rand(8, *shape))
    return network.eval()


def answers(logits, x):
    """Logits, and the gradient of some function of them."""
    leaf = x.clone().requires_grad_()
    z = logits(leaf)
    (gradient,) = torch.autograd.grad((z.float() * torch.arange(1.0, 1 + z[0].numel()).view(z[0].shape)).sum(), leaf)
    return z.detach(), gradient


def off(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def same(network, x, tolerance=3e-6):
    """As near to the network in fp64 as rounding in fp32 allows, without falling back on the network."""
    logits = Fused(Layers(network), None)
    exact = answers(lambda leaf: copy.deepcopy(network).double()(leaf.double()), x)
    for found, wanted in zip(answers(logits, x), exact, strict=True):
        assert off(found, wanted) < tolerance


def operations(logits, x):
    """Names of all that torch computes for the logits and their gradient."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    logits(x)  # a first time, which tries things
    with Names():
        answers(logits, x)
    return names


WHOLE = {
    "preact": lambda: preact_resnet18(10, mean=(0.5,), std=(0.25,)),
    "small": lambda: small_resnet(10),
    "wide": lambda: wide_resnet(10, 2, 10),
    "silu": lambda: wide_resnet(10, 1, 10, activation="silu"),
    "vgg": lambda: vgg19_bn(10),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks(name):
    torch.manual_seed(0)
    same(used(WHOLE[name](), 3, 32, 32), torch.rand(5, 3, 32, 32), tolerance=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": 1},
        {"padding": 2},
        {"padding": 5},
        {"padding": 1, "stride": 2},
        {"padding": (0, 2), "stride": (2, 1)},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (2, 5), "padding": (1, 2)},
    ],
    ids=str,
)
def test_convolutions_of_every_kind(settings, bias):
    torch.manual_seed(1)
    module = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "bias": bias} | settings)
    for network in (
        nn.Sequential(module),
        nn.Sequential(module, nn.ReLU()),
        nn.Sequential(module, nn.BatchNorm2d(6)),
        nn.Sequential(nn.Conv2d(4, 4, 1), module, nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1)),
    ):
        same(used(network, 4, 9, 8), torch.rand(5, 4, 9, 8))


class Joined(nn.Module):
    """A convolution with a norm, joined with a branch of it in some way."""

    def __init__(self, join):
        super().__init__()
        self.first, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other, self.join = nn.Conv2d(8, 8, 1), join

    def forward(self, x):
        x = self.first(x)
        return self.join(self, x, self.norm(self.conv(x)))


JOINS = {
    "x + y": lambda of, x, y: F.relu(x + y),
    "y + x": lambda of, x, y: torch.relu(y + x),
    "torch.add": lambda of, x, y: torch.add(x, y),
    "method": lambda of, x, y: y.add(x).relu(),
    "in place of y": lambda of, x, y: y.add_(x).relu_(),
    "in place of x": lambda of, x, y: (2 * x).add_(y) + x,
    "iadd of x": lambda of, x, y: operator.iadd(2 * x, y) * x,
    "twice the norm": lambda of, x, y: y + y,
    "two uses of the norm": lambda of, x, y: F.relu(y) + y,
    "two uses of the sum": lambda of, x, y: (lambda z: F.relu(z) * z)(x + y),
    "scaled": lambda of, x, y: torch.add(x, y, alpha=2),
    "a number": lambda of, x, y: F.relu(y + 1),
    "a number that the trace computes": lambda of, x, y: F.relu(y + x.shape[0]),
    "a branch with a convolution": lambda of, x, y: F.relu(y + of.other(x)),
    "a convolution that comes later": lambda of, x, y: F.relu(of.other(F.relu(y)) + of.other(x)),
    "a broadcast branch": lambda of, x, y: F.relu(y + x.mean((2, 3), keepdim=True)),
    "a broadcast branch of one channel": lambda of, x, y: F.relu(x[:, :1] + y),
    "leaky": lambda of, x, y: F.leaky_relu(x + y),
}


@pytest.mark.parametrize("join", JOINS)
def test_sums_of_every_kind(join):
    torch.manual_seed(2)
    same(used(Joined(JOINS[join]), 3, 6, 6), torch.rand(4, 3, 6, 6))


def test_a_norm_and_what_follows_are_done_within_the_convolution():
    network = used(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 2, 6, 6)
    names = operations(leaner()(network), torch.rand(3, 2, 6, 6))
    assert not {"native_batch_norm", "addcmul", "relu", "clamp_min", "clamp_min_"} & set(names)
    assert names.count("_convolution_pointwise") == 2  # the input gradient is one as well


AFTER_A_RELU = {
    "a convolution": lambda a, of: of["conv"](a),
    "two": lambda a, of: of["conv"](a) + of["other"](a),
    "with groups": lambda a, of: of["grouped"](a),
    "one of two with groups": lambda a, of: of["conv"](a) + of["grouped"](a),
    "with a stride": lambda a, of: of["strided"](a),
    "one that has a ReLU": lambda a, of: of["other"](F.relu(of["conv"](a))),
    "as a branch, too": lambda a, of: of["conv"](a) + a,
    "a sum": lambda a, of: of["conv"](a) + a.sum((1, 2, 3), keepdim=True),
    "nothing": lambda a, of: a,
}


@pytest.mark.parametrize("after", AFTER_A_RELU)
@pytest.mark.parametrize("before", ["norm", "convolution", "convolution and norm"])
def test_what_looks_at_a_relu(before, after):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1))
            self.norm = nn.BatchNorm2d(6)
            self.of = nn.ModuleDict(
                {
                    "conv": nn.Conv2d(6, 6, 3, padding=1),
                    "other": nn.Conv2d(6, 6, 1),
                    "grouped": nn.Conv2d(6, 6, 3, padding=1, groups=3),
                    "strided": nn.Conv2d(6, 6, 3, padding=1, stride=2),
                }
            )

        def forward(self, x):
            u = self.first[1](x.repeat(1, 2, 1, 1)) if before == "norm" else self.first(x)
            return AFTER_A_RELU[after](F.relu(u if before == "convolution" else self.norm(u)), self.of)

    torch.manual_seed(3)
    same(used(Network(), 3, 6, 6), torch.rand(4, 3, 6, 6))


def test_gradients_go_past_a_relu_in_place_and_past_its_norm_for_nothing():
    network = used(
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 3)), 2, 6, 6
    )
    names = operations(leaner()(network), torch.rand(3, 2, 6, 6))
    assert names.count("mul") == 2  # of the function that is asked for its gradient, there and back
    assert names.count("threshold_backward") == 2


def test_a_preact_network_has_as_many_convolutions_as_before_and_no_norm():
    network, x = used(small_resnet(10), 3, 32, 32), torch.rand(2, 3, 32, 32)
    count = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    names = operations(leaner()(network), x)
    assert names.count("_convolution_pointwise") + names.count("convolution_backward") == 2 * count
    assert not any("batch_norm" in name for name in names)


@pytest.mark.skipif(not supported(torch.bfloat16), reason="this machine has no bf16 convolutions")
@pytest.mark.parametrize("name", ["preact", "wide"])
def test_lower_precision(name):
    torch.manual_seed(4)
    network, x = used(WHOLE[name](), 3, 32, 32), torch.rand(5, 3, 32, 32)
    expected, found = answers(network, x), answers(leaner(torch.bfloat16)(network), x)
    assert found[0].dtype is torch.bfloat16
    assert found[1].dtype is torch.float32
    assert off(found[0].float(), expected[0]) < 0.05
    assert F.cosine_similarity(found[1].flatten(1), expected[1].flatten(1)).min() > 0.9


def test_the_gradient_of_the_branch():
    torch.manual_seed(5)
    module = nn.Conv2d(3, 4, 3, padding=1)
    x, r = torch.rand(2, 3, 5, 5, requires_grad=True), torch.rand(2, 4, 5, 5, requires_grad=True)
    fixed = Fixed(module, None, relu=True, dtype=torch.float32)
    g = torch.randn(2, 4, 5, 5)
    found = torch.autograd.grad(fixed(x, r - 0.5), (x, r), g)
    expected = torch.autograd.grad(F.relu(module(x) + r - 0.5), (x, r), g)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class Counted(TorchDispatchMode):
    """Forwards, input gradients and weight gradients of convolutions, whoever computes them."""

    def __init__(self):
        super().__init__()
        self.fixed, self.plain = 0, [0, 0, 0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_convolution_pointwise":
            self.fixed += 1
        elif name == "convolution_backward":
            self.plain[1] += args[-1][0]
            self.plain[2] += args[-1][1]
        elif name == "convolution":
            self.plain[0] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("ball", [None, Layerwise(0.01)])
def test_a_step_has_as_many_forwards_as_on_the_model_itself_counted_at_the_convolutions(ball):
    """On the lean network most input gradients come by an operation like a forward; with a stride, by the usual one."""
    network, x, y = used(small_resnet(10), 3, 16, 16).train(), torch.rand(4, 3, 16, 16), torch.arange(4)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    strided = sum(module.stride != (1, 1) and module.kernel_size != (1, 1) for module in convolutions)
    steps, attack_on, total = 5, leaner(), len(convolutions)
    attack = PGD(Linf(8 / 255), 2 / 255, steps)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def step():
        double_perturbation_step(
            network, x, y, objective=AT(), attack=attack, ball=ball, optimizer=optimizer, attack_on=attack_on
        )

    step()  # the first tries the lean network
    with Counted() as seen:
        step()
    outer = 1 if ball is None else 2
    first = 1  # whose input needs no gradient in the outer passes
    assert seen.fixed == steps * (2 * total - strided)
    assert seen.plain == [outer * total, steps * strided + outer * (total - first), outer * total]
