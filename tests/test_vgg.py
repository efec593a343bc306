"""VGG-19 with BatchNorm: its names, its size, and its forward pass written out a second time."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saltflat.models import vgg19_bn

# Configuration E of the paper's table, for 3x3 convolutions; M halves the image.
TABLE = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]


def test_its_size_is_that_of_the_table():
    channels = [3, *(entry for entry in TABLE if entry != "M")]
    assert len(channels) == 17  # sixteen convolutions, and the matrix makes nineteen layers
    convolutions = sum(9 * a * b + b for a, b in pairwise(channels))
    expected = convolutions + 2 * sum(channels[1:]) + 512 * 10 + 10
    with torch.device("meta"):
        assert sum(p.numel() for p in vgg19_bn().parameters()) == expected == 20_040_522
        assert vgg19_bn(100).classifier.weight.shape == (100, 512)
        assert vgg19_bn(in_channels=1).features[0].weight.shape == (64, 1, 3, 3)


def test_its_names_count_every_layer_of_the_table():
    expected, layer = [], 0
    for entry in TABLE:
        if entry == "M":
            layer += 1
            continue
        expected += [f"features.{layer}.{name}" for name in ("weight", "bias")]
        statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        expected += [f"features.{layer + 1}.{name}" for name in statistics]
        layer += 3  # the convolution, its BatchNorm, a ReLU
    with torch.device("meta"):
        network = vgg19_bn()
    assert list(network.state_dict()) == [*expected, "classifier.weight", "classifier.bias"]
    assert layer == len(network.features) == 53


def written_out(state, x):
    """In eval mode, from the state dict alone."""
    layer = 0
    for entry in TABLE:
        if entry == "M":
            x = F.max_pool2d(x, 2)
            layer += 1
            continue
        x = F.conv2d(x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1)
        mean, variance, weight, bias = (
            state[f"features.{layer + 1}.{name}"].view(-1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = torch.clamp((x - mean) / torch.sqrt(variance + 1e-5) * weight + bias, min=0)
        layer += 3
    return x.mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.fixture(scope="module")
def network():
    """In float64, with statistics, scales and offsets that are not 0 and 1."""
    torch.manual_seed(0)
    made = vgg19_bn(7).double().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.2)  # so that images still matter after sixteen layers
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    return made


@pytest.mark.parametrize("size", [32, 64])
def test_forward_equals_the_formula(network, size):
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        found, expected = network(x), written_out(network.state_dict(), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("size", [1, 8, 33])
def test_any_size_of_image_will_do(network, size):
    with torch.no_grad():
        assert network(torch.rand(2, 3, size, size, dtype=torch.float64)).shape == (2, 7)


def test_every_parameter_takes_part_in_training():
    network = vgg19_bn(7)
    F.cross_entropy(network(torch.rand(3, 3, 32, 32)), torch.arange(3)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_image_alone_must_be_larger_than_16_pixels_to_train_on():
    vgg19_bn()(torch.rand(1, 3, 17, 17))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        vgg19_bn()(torch.rand(1, 3, 16, 16))


def test_normalisation_inside_is_normalisation_outside(network):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    inside = vgg19_bn(7, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)).double().eval()
    inside.load_state_dict(network.state_dict())
    outside = (x - x.new_tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / x.new_tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(inside(x), network(outside), rtol=1e-5, atol=1e-7)  # constants in float32
