"""Wide residual networks: few layers, many channels. Depth 6n + 4: three stages of n blocks, 16k, 32k and 64k channels.

    block(x) = s + conv2(dropout(f(bn2(conv1(a))))),    a = f(bn1(x)),    s = x, or conv1x1(a) for new channels

f is ReLU, or SiLU, with which wide networks are more robust (Gowal et al., arXiv 2010.03593). Source: Zagoruyko,
Komodakis, "Wide Residual Networks" (BMVC 2016, arXiv 1605.07146). State-dict names are those that
TRADES, AWP and RobustBench checkpoints share: conv1, block1 ... block3 with `layer.N`, bn1, fc.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from saltflat.models.normalise import input_layer

Activation = Literal["relu", "silu"]
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class _Block(nn.Module):
    """Two 3x3 convolutions: (N, channels_in, H, W) -> (N, channels_out, ceil(H / stride), ceil(W / stride))."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, dropout: float, activation: Activation
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        changes = channels_in != channels_out
        self.convShortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(self.dropout(self.activation(self.bn2(self.conv1(activated)))))  # type: ignore[no-any-return]


def _stage(
    channels_in: int, channels_out: int, blocks: int, stride: int, dropout: float, activation: Activation
) -> nn.Sequential:
    """`blocks` blocks under the published name `layer`; the first one changes the shape."""
    first = _Block(channels_in, channels_out, stride, dropout, activation)
    rest = [_Block(channels_out, channels_out, 1, dropout, activation) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


def _initialise(network: nn.Sequential) -> None:
    """The paper's start: convolutions from N(0, 2 / (k * k * channels_out)), `fc` bias 0; BatchNorm is at 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def wide_resnet(
    depth: int = 34,
    widen_factor: int = 10,
    num_classes: int = 10,
    *,
    dropout: float = 0.0,
    in_channels: int = 3,
    activation: Activation = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """WRN-depth-widen_factor; WRN-34-10 has 46,160,474 parameters for ten classes.

    Takes (N, in_channels, H, W) in pixel units, H and W at least 1, and returns logits (N, num_classes). `dropout` is
    the probability of a zero between the two convolutions of a block, in train mode. `activation`: "relu", as
    published, or "silu". `mean` and `std`: see `Normalise`. Initial weights are drawn from torch's global generator.

    Raises ValueError unless depth is 6n + 4 with n of at least 1.

    >>> import torch
    >>> wide_resnet(depth=10, widen_factor=1)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    blocks, left_over = divmod(depth - 4, 6)
    if left_over != 0 or blocks < 1:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 34, ...), got {depth}")
    widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {' or '.join(ACTIVATIONS)}, got {activation!r}")
    network = nn.Sequential(
        OrderedDict(
            normalise=input_layer(mean, std),
            conv1=nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            block1=_stage(16, widths[0], blocks, 1, dropout, activation),
            block2=_stage(widths[0], widths[1], blocks, 2, dropout, activation),
            block3=_stage(widths[1], widths[2], blocks, 2, dropout, activation),
            bn1=nn.BatchNorm2d(widths[2]),
            relu=ACTIVATIONS[activation](),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(widths[2], num_classes),
        )
    )
    _initialise(network)
    return network
