"""Networks, as plain functions that return an `nn.Module`: pixels in [0, 1] in, logits out, normalisation inside.

Other people's checkpoints: `published.load`.
"""

from saltflat.models import published
from saltflat.models.normalise import Normalise
from saltflat.models.preact_resnet import preact_resnet18, small_resnet
from saltflat.models.published import named
from saltflat.models.small import mlp, small_cnn
from saltflat.models.vgg import vgg19_bn
from saltflat.models.wide_resnet import wide_resnet

__all__ = [
    "Normalise",
    "mlp",
    "named",
    "preact_resnet18",
    "published",
    "small_cnn",
    "small_resnet",
    "vgg19_bn",
    "wide_resnet",
]
