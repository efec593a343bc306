"""How right a network stays under attack."""

from saltflat.evaluation.accuracy import (
    Outcomes,
    carlini_wagner,
    collect,
    cross_entropy,
    interval,
    outcomes,
    outcomes_by_batch,
)
from saltflat.evaluation.apgd import APGD, TargetedAPGD
from saltflat.evaluation.search import Attack, Found, Trial, find

__all__ = [
    "APGD",
    "Attack",
    "Found",
    "Outcomes",
    "TargetedAPGD",
    "Trial",
    "carlini_wagner",
    "collect",
    "cross_entropy",
    "find",
    "interval",
    "outcomes",
    "outcomes_by_batch",
]
