"""Two networks without BatchNorm that train in seconds on a CPU: nothing about them depends on the other examples.

Convolutions with stride 2 in place of pooling: Springenberg et al., "Striving for Simplicity" (2014, arXiv 1412.6806).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from saltflat.models.normalise import input_layer


def small_cnn(
    num_classes: int = 10,
    *,
    in_channels: int = 1,
    width: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Three 3x3 convolutions (`width`, 2 `width`, 4 `width` channels; strides 1, 2, 2), pooling to 2x2, a linear layer.

    Takes (N, in_channels, H, W) in pixel units, H and W at least 1, and returns logits (N, num_classes); 97,802
    parameters by default. `mean` and `std`: see `Normalise`. Initial weights are torch's defaults, drawn from its
    global generator.

    >>> import torch
    >>> small_cnn()(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    return nn.Sequential(
        OrderedDict(
            normalise=input_layer(mean, std),
            conv1=nn.Conv2d(in_channels, width, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            relu3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(2),  # 1x1 would forget where a stroke is, and 8x8 digits need that
            flatten=nn.Flatten(),
            linear=nn.Linear(4 * width * 2 * 2, num_classes),
        )
    )


def mlp(
    num_classes: int = 10,
    *,
    in_features: int = 64,
    hidden: Sequence[int] = (256, 256),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Linear layers with ReLU between them; `hidden` holds their widths, and may be empty for a linear classifier.

    Takes (N, ...) with `in_features` values per example, flattens it, and returns logits (N, num_classes). `mean` and
    `std`, per channel (dimension 1) of what comes in: see `Normalise`. Initial weights are torch's defaults, drawn from
    its global generator.

    >>> import torch
    >>> mlp(in_features=64)(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    layers: list[tuple[str, nn.Module]] = [("normalise", input_layer(mean, std)), ("flatten", nn.Flatten())]
    for number, (before, after) in enumerate(pairwise([in_features, *hidden]), start=1):
        layers += [(f"linear{number}", nn.Linear(before, after)), (f"relu{number}", nn.ReLU())]
    layers.append(("linear", nn.Linear([in_features, *hidden][-1], num_classes)))
    return nn.Sequential(OrderedDict(layers))
