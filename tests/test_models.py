"""The networks: one contract for all, published names and sizes, and forward passes written out a second time."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltflat.models import Normalise, mlp, preact_resnet18, small_cnn, small_resnet, wide_resnet

CLASSES = 7
Build = Callable[..., nn.Module]  # (channels, size, **options) -> network

NETWORKS: dict[str, Build] = {
    "preact_resnet18": lambda channels, size, **options: preact_resnet18(CLASSES, in_channels=channels, **options),
    "small_resnet": lambda channels, size, **options: small_resnet(CLASSES, in_channels=channels, **options),
    "small_resnet, deeper": lambda channels, size, **options: small_resnet(
        CLASSES, widths=(8, 8, 16), blocks=2, stem_stride=1, in_channels=channels, **options
    ),
    "wide_resnet": lambda channels, size, **options: wide_resnet(10, 2, CLASSES, in_channels=channels, **options),
    "wide_resnet, narrow": lambda channels, size, **options: wide_resnet(
        16, 1, CLASSES, in_channels=channels, **options
    ),
    "small_cnn": lambda channels, size, **options: small_cnn(CLASSES, in_channels=channels, **options),
    "mlp": lambda channels, size, **options: mlp(CLASSES, in_features=channels * size * size, **options),
}


def seeded(build: Build, channels: int, size: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return build(channels, size, **options)


def pixels(number: int, channels: int, size: int) -> Tensor:
    return torch.rand(number, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 13), (3, 32), (3, 64)])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_network_keeps_the_contract(build: Build, channels: int, size: int) -> None:
    network, x = seeded(build, channels, size), pixels(3, channels, size)

    logits = network(x)  # train mode: every parameter takes part
    assert logits.shape == (3, CLASSES)
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name

    twin = seeded(build, channels, size)
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, network.get_parameter(name)), f"{name} is not set by torch.manual_seed"

    network.eval()
    with torch.no_grad():
        whole = network(x)
        alone = torch.cat([network(row[None]) for row in x])
        assert torch.equal(copy.deepcopy(network)(x), whole)
        torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
        precise = network.double()(x.double())
        assert precise.dtype == torch.float64
        torch.testing.assert_close(precise.float(), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
def test_normalisation_inside_is_normalisation_outside_with_the_same_state_dict(build: Build) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    x = pixels(2, 3, 8)
    outside = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    plain, normalising = seeded(build, 3, 8).eval(), seeded(build, 3, 8, mean=mean, std=std).eval()
    assert torch.equal(normalising(x), plain(outside))
    assert list(normalising.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(normalising.state_dict())


# --- published names and sizes ---


def shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes without the memory
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def batch_norm(prefix: str) -> list[str]:
    return [f"{prefix}.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def test_preact_resnet18_has_the_names_and_the_size_of_the_awp_code() -> None:
    expected = ["conv1.weight"]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            expected += [*batch_norm(f"{at}.bn1"), f"{at}.conv1.weight", *batch_norm(f"{at}.bn2"), f"{at}.conv2.weight"]
            expected += [f"{at}.shortcut.0.weight"] if stage > 1 and block == 0 else []
    expected += [*batch_norm("bn"), "linear.weight", "linear.bias"]
    assert list(shapes(preact_resnet18)) == expected

    with torch.device("meta"):
        parameters = list(preact_resnet18().parameters())
    assert len(parameters) == 56
    assert sum(p.numel() for p in parameters) == 11_172_170
    matrices = [p.numel() for p in parameters if p.ndim > 1]
    assert (len(matrices), sum(matrices)) == (21, 11_164_352)
    assert shapes(lambda: preact_resnet18(100))["linear.weight"] == (100, 512)


def test_wide_resnet_has_the_names_and_the_size_of_published_checkpoints() -> None:
    expected = ["conv1.weight"]
    for stage in (1, 2, 3):
        for block in range(5):
            at = f"block{stage}.layer.{block}"
            expected += [*batch_norm(f"{at}.bn1"), f"{at}.conv1.weight", *batch_norm(f"{at}.bn2"), f"{at}.conv2.weight"]
            expected += [f"{at}.convShortcut.weight"] if block == 0 else []
    expected += [*batch_norm("bn1"), "fc.weight", "fc.bias"]
    found = shapes(wide_resnet)
    assert list(found) == expected
    assert len(found) == 191

    with torch.device("meta"):
        assert sum(p.numel() for p in wide_resnet().parameters()) == 46_160_474
        assert sum(p.numel() for p in wide_resnet(28, 10).parameters()) == 36_479_194


def test_small_networks_have_the_documented_sizes() -> None:
    assert sum(p.numel() for p in small_resnet().parameters()) == 173_986
    assert sum(p.numel() for p in small_cnn().parameters()) == 97_802
    assert {name.split(".")[0] for name in shapes(small_resnet)} == {
        "conv1",
        "layer1",
        "layer2",
        "layer3",
        "bn",
        "linear",
    }
    assert list(shapes(lambda: mlp(hidden=()))) == ["linear.weight", "linear.bias"]


def test_small_networks_have_no_batch_statistics() -> None:
    for network in (small_cnn(), mlp()):
        assert list(network.buffers()) == []


# --- forward passes, from the state dict alone ---


def activation(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        state[f"{prefix}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return torch.clamp((x - mean) / torch.sqrt(variance + 1e-5) * weight + bias, min=0)


def written_out(state: dict[str, Tensor], x: Tensor, stages: list[list[str]], strides: list[int], stem: int) -> Tensor:
    """A pre-activation network in eval mode; the names of its blocks come stage by stage."""
    x = F.conv2d(x, state["conv1.weight"], stride=stem, padding=1)
    for blocks, stage_stride in zip(stages, strides, strict=True):
        for number, at in enumerate(blocks):
            stride = stage_stride if number == 0 else 1
            activated = activation(state, f"{at}.bn1", x)
            projection = state.get(f"{at}.shortcut.0.weight", state.get(f"{at}.convShortcut.weight"))
            shortcut = x if projection is None else F.conv2d(activated, projection, stride=stride)
            inner = F.conv2d(activated, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            x = shortcut + F.conv2d(activation(state, f"{at}.bn2", inner), state[f"{at}.conv2.weight"], padding=1)
    last, head = ("bn", "linear") if "bn.weight" in state else ("bn1", "fc")
    features = activation(state, last, x).sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
    return features @ state[f"{head}.weight"].T + state[f"{head}.bias"]


@pytest.mark.parametrize(
    ("build", "stages", "strides", "stem"),
    [
        (preact_resnet18, [[f"layer{s}.{b}" for b in range(2)] for s in (1, 2, 3, 4)], [1, 2, 2, 2], 1),
        (lambda: small_resnet(blocks=2), [[f"layer{s}.{b}" for b in range(2)] for s in (1, 2, 3)], [1, 2, 2], 2),
        (lambda: wide_resnet(16, 2), [[f"block{s}.layer.{b}" for b in range(2)] for s in (1, 2, 3)], [1, 2, 2], 1),
        (lambda: wide_resnet(16, 1), [[f"block{s}.layer.{b}" for b in range(2)] for s in (1, 2, 3)], [1, 2, 2], 1),
    ],
    ids=["preact_resnet18", "small_resnet", "wide_resnet", "wide_resnet with an identity in stage 1"],
)
def test_forward_equals_the_formula(
    build: Callable[[], nn.Module], stages: list[list[str]], strides: list[int], stem: int
) -> None:
    torch.manual_seed(0)
    network, x = build().double(), pixels(2, 3, 16).double()
    for module in network.modules():  # statistics, scales and offsets that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        expected = written_out(network.state_dict(), x, stages, strides, stem)
        torch.testing.assert_close(network.eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_wide_resnet_starts_as_published() -> None:
    torch.manual_seed(0)
    network = wide_resnet(10, 4)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0]
            expected = (2 / (kernel * kernel * module.out_channels)) ** 0.5
            # a standard deviation from n values is off by about 1 / sqrt(2n); five times that
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / (2 * module.weight.numel()) ** 0.5), (
                name
            )
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Linear):
            assert not module.bias.any(), name


def test_wide_resnet_drops_out_between_the_convolutions_in_train_mode_only() -> None:
    torch.manual_seed(0)
    network, x = wide_resnet(10, 1, dropout=0.5), pixels(4, 3, 8)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


# --- what is refused ---


@pytest.mark.parametrize("depth", [4, 0, 18, 35])
def test_wide_resnet_refuses_a_depth_that_is_not_6n_plus_4(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 4 .*, got {depth}"):
        wide_resnet(depth, 1)


def test_small_resnet_refuses_other_numbers_of_stages_and_blocks() -> None:
    with pytest.raises(ValueError, match=r"widths needs three values, one per stage: got \(8, 8\)"):
        small_resnet(widths=(8, 8))
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        small_resnet(blocks=0)


def test_normalise_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="equally many values, at least one: got 1 and 2"):
        Normalise((0.5,), (1.0, 1.0))
    with pytest.raises(ValueError, match="equally many values, at least one: got 0 and 0"):
        Normalise((), ())
    with pytest.raises(ValueError, match="std must be positive"):
        Normalise((0.5,), (0.0,))
    with pytest.raises(ValueError, match="give both or neither"):
        small_cnn(mean=(0.5,))
    with pytest.raises(ValueError, match="3 values, the input has 1 channels"):
        Normalise((0.5,) * 3, (0.5,) * 3)(torch.rand(2, 1, 4, 4))


def test_one_mean_serves_all_channels_and_follows_the_dtype() -> None:
    x = pixels(2, 3, 4).double()
    layer = Normalise((0.5,), (0.25,)).double()
    assert torch.equal(layer(x), (x - 0.5) / 0.25)
