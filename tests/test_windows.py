"""Only what a window reaches is computed again: against the whole network, wherever the window is, however often."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saltflat import L2, Linf, PerExample
from saltflat.evaluation import Square, find
from saltflat.lean import reach, windows
from saltflat.lean.layers import Untraceable
from saltflat.lean.network import lean
from saltflat.lean.windows import Windows
from saltflat.models import preact_resnet18, small_cnn, small_resnet, vgg19_bn, wide_resnet


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However little is gained."""
    monkeypatch.setattr(reach, "MOST", 1.0)
    monkeypatch.setattr(reach, "WORTH", 1.0)
    monkeypatch.setattr(reach, "OVERHEAD", 0.0)


def used(network, *shape):
    """In eval mode and fp64, with norms that change something."""
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval()


def pasted(x, new, top, left):
    """x with the windows in it, one by one."""
    y = x.clone()
    for n, (i, j) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
        y[n, :, i : i + new.shape[2], j : j + new.shape[3]] = new[n]
    return y


def drawn(x, height, width, k):
    """Windows of random numbers, and their first row and column: at first, corners of the image."""
    ends = x.shape[2] - height, x.shape[3] - width
    if k < 4:
        top, left = torch.full((len(x),), k // 2 * ends[0]), torch.full((len(x),), k % 2 * ends[1])
    else:
        top, left = (torch.randint(end + 1, (len(x),)) for end in ends)
    return torch.randn(len(x), x.shape[1], height, width, dtype=x.dtype), top, left


def follows(network, x, height, width, *, near=None, tolerance=1e-11, n=12):
    """Along a walk of which some rows accept each step, and rows leave: the network's own answers. Returns `Near`."""
    near = Windows(network).near(x, height, width) if near is None else near
    assert near is not None
    scale = network(x).abs().max().item()
    for k in range(n):
        new, top, left = drawn(x, height, width, k)
        y = pasted(x, new, top, left)
        z = near.ask(new, top * x.shape[3] + left)
        assert torch.allclose(z, network(y), rtol=0, atol=tolerance * scale)
        better = torch.rand(len(x)) < 0.5
        near.settle(better)
        x = torch.where(better[:, None, None, None], y, x)
        if k == n // 2:
            kept = torch.arange(len(x))[1:].flip(0)
            near.keep(kept)
            x = x[kept]
    return near


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(9, 12), st.integers(9, 12)),
)
def test_convolutions_of_every_kind(kernel, stride, padding, dilation, window, size):
    first = nn.Conv2d(2, 4, kernel, stride, padding, dilation=dilation)
    network = nn.Sequential(first, nn.Tanh(), nn.Conv2d(4, 4, 2, padding=1, groups=2), nn.Flatten()).double()
    follows(network, torch.rand(3, 2, *size, dtype=torch.float64), *window, n=6)


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 3), dilation=st.integers(1, 3),
    window=st.integers(1, 4), extent=st.integers(10, 15),
)  # fmt: skip
def test_what_a_window_reaches_is_what_changes(kernel, stride, padding, dilation, window, extent):
    """Along an axis; weights are ones, so that nothing cancels. Patches are as large as the largest, and no more."""
    before = reach.Reach(torch.arange(extent - window + 1), torch.arange(extent - window + 1) + window - 1, extent)
    ones = torch.ones(1, 1, kernel)
    changed = []
    for first in before.first.tolist():
        x = torch.zeros(1, 1, extent)
        x[..., first : first + window] = 1
        changed.append(F.conv1d(x, ones, None, stride, padding, dilation)[0, 0].nonzero()[:, 0])
    after = before.through(
        kernel, stride, padding, dilation, F.conv1d(x, ones, None, stride, padding, dilation).shape[2]
    )
    for first, last, places in zip(after.first.tolist(), after.last.tolist(), changed, strict=True):
        assert all(first <= place <= last for place in places.tolist())
        assert len(places) == 0 or (dilation > 1 or (places[0].item(), places[-1].item()) == (first, last))
    assert after.start.min() >= 0
    assert (after.start + after.size <= after.extent).all()


NETWORKS = {
    "cnn": (lambda: small_cnn(in_channels=3, width=4), (8, 8)),
    "preact": (lambda: small_resnet(in_channels=3, widths=(4, 6, 8), stem_stride=1), (16, 16)),
    "wide": (lambda: wide_resnet(10, 2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), (16, 20)),
    "deep": (lambda: preact_resnet18(), (32, 32)),
    "vgg": (lambda: vgg19_bn(), (32, 32)),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("leaned", [False, True], ids=["as it is", "lean"])
def test_whole_networks(kind, side, leaned):
    build, size = NETWORKS[kind]
    network, x = used(build()), torch.rand(3, 3, *size, dtype=torch.float64)
    near = lean(network).windows().near(x, side, side) if leaned else None
    follows(network, x, side, side, near=near, n=6)


def test_most_of_a_network_is_patches():
    """Of the convolutions of WRN-10-2 on 32 x 32 pixels, the last is whole."""
    plan = lean(wide_resnet(10, 2).eval()).windows().near(torch.rand(2, 3, 32, 32), 2, 2).plan
    assert sum(node.op == "call_module" and "conv" in str(node.target) for node in plan.patches) == 10
    assert max(region.height for region in plan.patches.values()) == 8


class Of(nn.Module):
    """Two convolutions and a linear layer, and what is made of them."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.down, self.norm, self.linear = nn.Conv2d(4, 4, 1, stride=2), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.register_buffer("scale", torch.rand(1, 4, 1, 1))
        self.register_buffer("map", torch.rand(1, 4, 12, 12))
        self.of = [forward]

    def forward(self, x):
        return self.of[0](self, x)

    def head(self, x):
        return self.linear(x.mean((2, 3)))


def residual(m, x):
    x = m.first(x)
    out = F.relu(m.second(x))
    out += x
    return m.head(F.relu(out))


def downwards(m, x):
    x = m.relu(m.first(x))
    return m.head(m.down(x) + F.max_pool2d(x, 2) + m.second(x)[:, :, ::2, ::2])


def sized(m, x):
    x = m.dropout(m.first(x)).relu()
    return m.linear(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)) * x.shape[2]


FORWARDS = {
    "a sum in place": residual,
    "in place": lambda m, x: m.head(m.second(F.relu_(m.relu(m.first(x))).relu_())),
    "other sizes": downwards,
    "shapes": sized,
    "numbers for channels": lambda m, x: m.head(torch.tanh((m.first(x) - m.scale) / 2 * m.scale + 1)),
    "a number from the left": lambda m, x: m.head(m.second(1 - torch.relu(0.5 * m.first(x)))),
    "a map by name": lambda m, x: m.head(m.second(torch.add(m.first(x), other=m.map))),
    "a map": lambda m, x: m.head(m.second(F.relu(m.first(x) + m.map))),
    "the same layer twice": lambda m, x: m.head(m.second(m.second(m.first(x)))),
    "a sum with itself": lambda m, x: m.head(m.second(torch.add(y := m.first(x), y))),
    "a weighted sum": lambda m, x: m.head(torch.add(y := m.first(x), m.second(y), alpha=0.3)),
    "a product of maps": lambda m, x: m.head((y := m.first(x)) * m.second(y)),
    "parts": lambda m, x: m.head(m.second(torch.cat(m.first(x).chunk(2, 1)[::-1], 1))),
    "softmax": lambda m, x: m.head(m.second(m.first(x).softmax(1))),
    "a shift": lambda m, x: m.head(m.second(m.first(x).roll(1, 2))),
    "a transposition": lambda m, x: m.head(m.second(m.first(x).transpose(2, 3))),
    "settings by name": lambda m, x: m.head(F.leaky_relu(input=m.first(input=x), negative_slope=0.3)),
    "weights read": lambda m, x: m.head(F.conv2d(m.first(x), m.second.weight, padding=1)),
    "the image again": lambda m, x: m.head(m.second(m.first(x))) + x.mean((1, 2, 3))[:, None],
    "nothing of the image": lambda m, x: m.head(m.second(m.map)).expand(x.size(0), 3) + m.head(m.first(x)),
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_whatever_a_network_does(kind):
    network = used(Of(FORWARDS[kind]))
    follows(network, torch.rand(3, 2, 12, 12, dtype=torch.float64), 2, 2)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_paddings_that_are_no_zeros(mode):
    first = nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode)
    follows(
        nn.Sequential(first, nn.Conv2d(4, 4, 3, padding="same"), nn.Flatten()).double(),
        torch.rand(3, 2, 9, 9).double(),
        2,
        2,
    )


def test_layers_with_hooks_are_asked_for_the_whole():
    network = used(Of(FORWARDS["settings by name"]))
    seen = []
    network.first.register_forward_hook(lambda module, args, z: seen.append(z.shape) or z.flip(2))
    follows(network, torch.rand(3, 2, 12, 12, dtype=torch.float64), 2, 2)
    assert {shape[2:] for shape in seen} == {(12, 12)}


class Optional(Of):
    """With arguments that nobody gives."""

    def forward(self, x, mask=None, *, scale=1.0, **more):
        x = self.norm(self.first(x)) if mask is None else self.second(self.norm(self.first(x) * mask))
        return self.head(self.second(x) * scale)


def test_arguments_that_nobody_gives():
    network, x = used(Optional(None)), torch.rand(3, 2, 12, 12, dtype=torch.float64)
    follows(network, x, 2, 2)
    follows(network, x, 2, 2, near=lean(network).windows().near(x, 2, 2))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.head(m.first(x)) + torch.randn(3),
        lambda m, x: m.head(m.first(x) + torch.randn_like(x[:, :1])),
        lambda m, x: (m.head(m.first(x)), x),
    ],
    ids=["numbers", "a map of numbers", "two answers"],
)
def test_a_trace_that_answers_otherwise_is_not_believed(forward):
    network, x = used(Of(forward)), torch.rand(3, 2, 12, 12, dtype=torch.float64)
    assert Windows(network).near(x, 2, 2) is None


class Caching(Of):
    """Computes something in its first forward, and remembers its features."""

    cache = None

    def forward(self, x):
        y = self.features = self.first(x)
        if self.cache is None:
            self.cache = torch.linspace(0, 1, 4).view(1, 4, 1, 1).to(y)
        return self.head(self.second(y * self.cache))


def test_what_a_forward_remembers_is_not_of_a_trace():
    network, x = used(Caching(None)), torch.rand(3, 2, 12, 12, dtype=torch.float64)
    Windows(network)
    assert "cache" not in vars(network)
    follows(network, x, 2, 2)
    assert isinstance(lean(network)(x), torch.Tensor)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(F.conv2d(x, self.w, padding=1).relu().mean((2, 3)), self.v)


class Unseeing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.z = nn.Conv2d(2, 3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x):
        self.layer(x)
        return self.z.expand(x.size(0), 3)


@pytest.mark.parametrize("build", [Functional, Unseeing])
def test_networks_without_anything_to_gain(build):
    network, x = build().double(), torch.rand(3, 2, 12, 12, dtype=torch.float64)
    near = Windows(network).near(x, 2, 2)
    assert near is None or torch.equal(near.ask(x[:, :, :2, :2], torch.zeros(3, dtype=torch.long)), network(x))


@pytest.mark.parametrize(("kind", "name"), [("second", "forward"), ("second", "_conv_forward"), ("dropout", "forward")])
def test_layers_of_which_a_part_was_replaced(kind, name):
    network = used(Of(lambda m, x: m.head(m.dropout(m.second(m.first(x))))))
    layer = getattr(network, kind)
    setattr(layer, name, lambda x, *weights: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), network.second.weight))
    follows(network, torch.rand(3, 2, 12, 12, dtype=torch.float64), 2, 2)


def test_under_inference_mode_the_whole_is_asked():
    network, x = used(Of(FORWARDS["settings by name"])), torch.rand(3, 2, 12, 12, dtype=torch.float64)
    with torch.inference_mode():
        assert Windows(network).near(x, 2, 2) is None


VIEWS = {
    "flat maps": lambda m, x: m.second(m.first(x)).view(x.size(0), -1),
    "a flat image": lambda m, x: m.head(m.second(m.first(x))) + x.view(x.size(0), -1).mean(1, keepdim=True),
    "flat pools": lambda m, x: F.max_pool2d(torch.relu(m.first(x)), 2).view(-1, 144),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_of_maps_that_lie_row_by_row(kind):
    follows(used(Of(VIEWS[kind])), torch.rand(3, 2, 12, 12, dtype=torch.float64), 2, 2)


def test_features_that_a_hook_leaves_behind_are_none_of_a_trace():
    network, found = used(Of(lambda m, x: m.head(m.dropout(m.first(x))) + m.found[0].mean((1, 2))[:, :3])), []
    network.found = found
    network.dropout.register_forward_hook(lambda module, args, z: found.insert(0, z.detach()))
    x = torch.rand(3, 2, 12, 12, dtype=torch.float64)
    network(x)
    assert Windows(network).near(x, 2, 2) is None


def adding_up(m, x):
    total = torch.zeros(1, 3, dtype=torch.float64)
    total += m.head(m.first(x))
    return total


def test_constants_that_are_written_over():
    assert Windows(used(Of(adding_up))).near(torch.rand(1, 2, 12, 12, dtype=torch.float64), 2, 2) is None


def written_over(m, x):
    y = m.first(x)
    z = m.second(y)
    return m.head(F.relu_(y) + z)


@pytest.mark.parametrize(
    "forward",
    [written_over, lambda m, x: m.head(m.first(x.sub_(0.5))), lambda m, x: m.head(m.second(m.first(x).mul_(2).exp_()))],
    ids=["a map", "the image", "a map by what is not known"],
)
def test_what_others_read_may_not_be_written_over(forward):
    network, x = used(Of(forward)), torch.rand(3, 2, 12, 12, dtype=torch.float64)
    assert Windows(network).near(x, 2, 2) is None


def hooked():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten())
    network.register_forward_hook(lambda module, args, z: 2 * z)
    return network


@pytest.mark.parametrize("build", [lambda: Of(lambda m, x: m.first(x) if x.sum() > 0 else x), hooked])
def test_a_network_that_cannot_be_read(build):
    network = build().eval()
    with pytest.raises(Untraceable):
        Windows(network)
    assert lean(network).windows() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    network = used(wide_resnet(10, 2)).float()
    logits, x = lean(network, dtype), torch.rand(4, 3, 32, 32)
    near = logits.windows().near(x, 2, 2)
    scale = network(x).abs().max()
    for k in range(6):
        new, top, left = drawn(x, 2, 2, k)
        z = near.ask(new, top * 32 + left)
        assert z.dtype is dtype
        assert (z.float() - logits(pasted(x, new, top, left)).float()).abs().max() < 0.02 * scale
        near.settle(torch.ones(4, dtype=torch.bool))
        x = pasted(x, new, top, left)


def test_it_is_not_done_where_little_is_gained(monkeypatch):
    x = torch.rand(20, 3, 32, 32)
    network = lean(small_resnet(in_channels=3).eval()).windows()
    assert network.near(x, 2, 2) is not None
    monkeypatch.undo()
    assert network.near(x, 2, 2) is None
    wide = lean(wide_resnet(10, 2).eval()).windows()
    assert wide.near(x, 2, 2) is not None
    assert wide.near(x[:2], 2, 2) is None
    assert wide.near(x, 24, 24) is None
    monkeypatch.setattr(reach, "BYTES", 10**7)
    assert wide.near(x, 2, 2) is None


def forbidden(*args):
    raise AssertionError


def test_square_finds_the_same_with_and_without(monkeypatch):
    network, x = used(small_resnet(in_channels=3, widths=(4, 8, 8))), torch.rand(12, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        network.linear.bias -= network(x).mean(0)
    y = network(x).argmax(1)
    asked = []
    ask = windows.Near.ask
    monkeypatch.setattr(
        windows.Near, "ask", lambda near, new, corner: asked.append(new.shape) or ask(near, new, corner)
    )
    draws = lambda: PerExample(0, torch.arange(12))
    logits = lean(network)
    found = [find(Square(Linf(0.05), 60), f, x, y, exact=network, generator=draws()) for f in (logits, logits.network)]
    assert 0 < found[0].fooled.sum() < 12
    assert len(asked) > 40
    assert torch.equal(found[0].fooled, found[1].fooled)
    assert torch.equal(found[0].iteration, found[1].iteration)
    assert torch.allclose(found[0].x_adv, found[1].x_adv)
    assert torch.allclose(found[0].margin, found[1].margin)


def test_square_asks_the_whole_where_two_windows_change(monkeypatch):
    monkeypatch.setattr(windows.Near, "ask", forbidden)
    network, x = used(small_resnet(in_channels=3, widths=(4, 8, 8))), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    find(Square(L2(0.1), 20), lean(network), x, network(x).argmax(1), exact=network)


def test_weights_are_left_alone():
    network = used(small_resnet(in_channels=3, widths=(4, 8, 8)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    kept = x.clone()
    near = Windows(network).near(x, 2, 2)
    z = near.ask(torch.rand(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 5, 20]))
    assert not z.requires_grad
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
