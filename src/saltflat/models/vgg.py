"""VGG-19 with BatchNorm: sixteen 3x3 convolutions in five groups, each group ended by max-pooling, then one matrix.

    x -> [relu(bn(conv(x))) x 2, 2, 4, 4, 4, each group halving the image] -> pooling to 1x1 -> linear

Sources: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015, arXiv
1409.1556), configuration E; BatchNorm (Ioffe, Szegedy, 2015, arXiv 1502.03167) between convolution and ReLU.

Deviation: the paper's two hidden layers of 4096 units are left out, as in the usual variant for 32 x 32 images, whose
512 features at 1 x 1 go straight to the classes. State-dict names are those of that variant: `features.N`, counted over
convolutions, BatchNorms, ReLUs and poolings alike, and `classifier`; its convolutions have biases, which BatchNorm
makes void.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from saltflat.models.normalise import input_layer

GROUPS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions


def vgg19_bn(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """VGG-19 with BatchNorm for small images; 20,040,522 parameters for ten classes.

    Takes (N, in_channels, H, W) in pixel units, H and W at least 1, and returns logits (N, num_classes). In train mode
    an image no larger than 16 x 16 ends at 1 x 1, where BatchNorm needs more than one of them. `mean` and `std`: see
    `Normalise`. Initial weights are torch's defaults, drawn from its global generator.

    >>> import torch
    >>> vgg19_bn(num_classes=100)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    features: list[nn.Module] = []
    before = in_channels
    for channels, convolutions in GROUPS:
        for _ in range(convolutions):
            features += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        # ceil_mode changes nothing at 32 x 32, and leaves something of an image that is 1 pixel wide
        features.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(
        OrderedDict(
            normalise=input_layer(mean, std),
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(before, num_classes),
        )
    )
