"""What chance alone would do, with whole runs as the units: checkpoints of one run are not independent.

    interval      draw as many runs as there are, with replacement, each with all its models, and take the association
                  of what was drawn; the 2.5 % and 97.5 % quantiles over draws (percentile cluster bootstrap)
    p             exchange whole runs of equal size in one column, P times; two-sided, (1 + #{|tau*| ≥ |tau|}) / (1 + P)
    detectable    tau that n independent models without ties show at 80 % power, 5 % two-sided: 2.80 standard deviations
                  of tau under independence, √(2 (2n + 5) / (9 n (n − 1)))

Sources: Davison and Hinkley, Bootstrap Methods and their Application, section 3.8; Kendall, Rank Correlation Methods,
chapter 5.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saltflat.lab.study.association import RESIDUE, Array

LEVEL = 0.95
POWER = 1.959964 + 0.841621  # normal quantiles of a two-sided 5 % level and of 80 % power


def cluster_counts(clusters: Sequence[str], resamples: int, generator: np.random.Generator) -> Array:
    """How often each resample holds each model, (R, n): models of one cluster are drawn together."""
    names, index = np.unique(np.array(clusters, dtype=object), return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    return np.asarray(generator.multinomial(len(names), shares, size=resamples)[:, index], dtype=np.float64)


def interval(values: Array) -> tuple[float, float]:
    """The percentile interval over resamples (R,); those without a value are left out, (nan, nan) if most are."""
    finite = values[np.isfinite(values)]
    if 2 * len(finite) < len(values) or not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def arrangements(clusters: Sequence[str]) -> float:
    """How many ways there are to exchange whole clusters of equal size.

    >>> arrangements(["a", "a", "b", "b", "c"]), arrangements(["a", "b", "c"])
    (2.0, 6.0)
    """
    sizes = Counter(Counter(clusters).values())
    logarithm = sum(math.lgamma(count + 1) for count in sizes.values())
    return float(round(math.exp(logarithm))) if logarithm < 30 else math.inf


def permutations(clusters: Sequence[str], number: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """Orders of the models, (P, n), in which whole clusters of equal size have changed places."""
    members: dict[str, list[int]] = {}
    for place, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(place)
    sizes: dict[int, list[list[int]]] = {}
    for own in members.values():
        sizes.setdefault(len(own), []).append(own)
    orders = np.tile(np.arange(len(clusters)), (number, 1))
    for equal in sizes.values():
        blocks = np.array(equal)  # (clusters of this size, size)
        for order in orders:
            order[blocks] = blocks[generator.permutation(len(blocks))]
    return orders


def p_value(observed: float, drawn: Array) -> float:
    """Two-sided, over permutations (P,); nan where there is nothing to compare."""
    if not math.isfinite(observed):
        return math.nan
    return float((1 + (np.abs(drawn) >= abs(observed) - RESIDUE).sum()) / (1 + len(drawn)))


def detectable(n: int) -> float:
    """The tau that n independent models detect in 80 % of studies.

    >>> round(detectable(40), 2), round(detectable(10), 2), detectable(1)
    (0.31, 0.7, inf)
    """
    return POWER * math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1))) if n > 1 else math.inf
