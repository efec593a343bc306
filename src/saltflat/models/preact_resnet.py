"""Pre-activation residual networks: BatchNorm and ReLU come before each convolution, so that nothing cuts off the sum.

    block(x) = s + conv2(relu(bn2(conv1(a)))),    a = relu(bn1(x)),    s = x, or conv1x1(a) where the shape changes

Source: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks" (ECCV 2016, arXiv 1603.05027).
`preact_resnet18` is the network of the AWP paper's CIFAR and SVHN experiments, with its state-dict names (conv1, layer1
... layer4, bn, linear), and, unlike the official code, for every input size.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from saltflat.models.normalise import input_layer


class _Block(nn.Module):
    """Two 3x3 convolutions: (N, channels_in, H, W) -> (N, channels_out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out, 1)
        same_shape = stride == 1 and channels_in == channels_out
        # A Sequential gives the published name "shortcut.0"; an empty one has no name in the state dict.
        projection = [] if same_shape else [nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)]
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if len(self.shortcut) else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))  # type: ignore[no-any-return]


def _conv3x3(channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks, of which the first changes the shape."""
    first = _Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *[_Block(channels_out, channels_out, 1) for _ in range(blocks - 1)])


def _network(
    num_classes: int,
    widths: Sequence[int],
    blocks: int,
    stem_stride: int,
    in_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Sequential:
    """Stem, one stage per width (from the second on it halves the image), then BatchNorm, pooling, a linear layer."""
    inputs = [widths[0], *widths[:-1]]
    strides = [1] + [2] * (len(widths) - 1)
    layers: list[tuple[str, nn.Module]] = [
        ("normalise", input_layer(mean, std)),
        ("conv1", _conv3x3(in_channels, widths[0], stem_stride)),
    ]
    for number, (before, width, stride) in enumerate(zip(inputs, widths, strides, strict=True), start=1):
        layers.append((f"layer{number}", _stage(before, width, blocks, stride)))
    layers += [
        ("bn", nn.BatchNorm2d(widths[-1])),
        ("relu", nn.ReLU()),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(widths[-1], num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def preact_resnet18(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """PreAct ResNet-18: four stages of two blocks, 64 to 512 channels; 11,172,170 parameters for ten classes.

    Takes (N, in_channels, H, W) in pixel units, H and W at least 1, and returns logits (N, num_classes). `mean` and
    `std`: see `Normalise`. Initial weights are torch's defaults, drawn from its global generator.

    >>> import torch
    >>> preact_resnet18(num_classes=100)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    return _network(num_classes, (64, 128, 256, 512), 2, 1, in_channels, mean, std)


def small_resnet(
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (24, 48, 96),
    blocks: int = 1,
    stem_stride: int = 2,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A pre-activation ResNet for two CPU cores: three stages (strides 1, 2, 2) of `blocks` blocks.

    Takes (N, in_channels, H, W) in pixel units and returns logits (N, num_classes); 173,986 parameters by default. A
    `stem_stride` of 2 halves the image at once, which makes the whole network about four times cheaper. `mean` and
    `std`: see `Normalise`. Initial weights are torch's defaults, drawn from its global generator.

    Raises ValueError unless there are three widths and at least one block.

    >>> import torch
    >>> small_resnet()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if len(widths) != 3:
        raise ValueError(f"widths needs three values, one per stage: got {tuple(widths)}")
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    return _network(num_classes, widths, blocks, stem_stride, in_channels, mean, std)
