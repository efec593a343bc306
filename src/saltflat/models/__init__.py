"""Networks, as plain functions that return an `nn.Module`: pixels in [0, 1] in, logits out, normalisation inside."""

from saltflat.models.normalise import Normalise
from saltflat.models.preact_resnet import preact_resnet18, small_resnet
from saltflat.models.small import mlp, small_cnn
from saltflat.models.wide_resnet import wide_resnet

__all__ = ["Normalise", "mlp", "preact_resnet18", "small_cnn", "small_resnet", "wide_resnet"]
