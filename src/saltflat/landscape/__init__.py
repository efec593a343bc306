"""How flat the loss is around the weights."""

from saltflat.landscape.directions import adversarial_direction, random_direction
from saltflat.landscape.estimate import Estimate
from saltflat.landscape.robust import afresh, continued, frozen, total
from saltflat.landscape.slices import along, over

__all__ = [
    "Estimate",
    "adversarial_direction",
    "afresh",
    "along",
    "continued",
    "frozen",
    "over",
    "random_direction",
    "total",
]
