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

__all__ = ["Outcomes", "carlini_wagner", "collect", "cross_entropy", "interval", "outcomes", "outcomes_by_batch"]
