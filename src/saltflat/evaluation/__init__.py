"""How right a network stays under attack."""

from saltflat.evaluation.accuracy import (
    Outcomes,
    answers,
    attacked,
    carlini_wagner,
    collect,
    cross_entropy,
    interval,
    outcomes,
    outcomes_by_batch,
)
from saltflat.evaluation.apgd import APGD, TargetedAPGD
from saltflat.evaluation.fab import TargetedFAB
from saltflat.evaluation.restarts import Restarted
from saltflat.evaluation.search import Attack, Found, Trial, find
from saltflat.evaluation.sparse_apgd import SparseAPGD, TargetedSparseAPGD
from saltflat.evaluation.spsa import SPSA
from saltflat.evaluation.square import Square

__all__ = [
    "APGD",
    "SPSA",
    "Attack",
    "Found",
    "Outcomes",
    "Restarted",
    "SparseAPGD",
    "Square",
    "TargetedAPGD",
    "TargetedFAB",
    "TargetedSparseAPGD",
    "Trial",
    "answers",
    "attacked",
    "carlini_wagner",
    "collect",
    "cross_entropy",
    "find",
    "interval",
    "outcomes",
    "outcomes_by_batch",
]
