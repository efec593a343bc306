"""How flat the loss is around the weights."""

from saltflat.landscape.directions import random_direction
from saltflat.landscape.slices import along

__all__ = ["along", "random_direction"]
