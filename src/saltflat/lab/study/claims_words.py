"""Sentences that follow from the numbers of the study of the paper's claims.

A comparison says that AWP lowers a quantity only if Student's 95 % interval of the paired difference lies below 0, and
that it raises it only if it lies above; else they are not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saltflat.lab.report.notation import counted
from saltflat.lab.report.statistics import Spread
from saltflat.lab.report.words import Sentence
from saltflat.lab.study.claims_results import Group, Pair, Quantity, clean, drop, gap, pairs, robust
from saltflat.lab.study.claims_tables import signed

FEW = 3  # fewer seeds are an anecdote


@dataclass(frozen=True)
class Claim:
    """A quantity that AWP is said to change."""

    name: str
    quantity: Quantity


# What is claimed to fall or to rise, and clean accuracy, which is what AWP may cost.
CLAIMS = (
    Claim("Robust generalisation gap at the last epoch", gap),
    Claim("Drop of robust test accuracy from the best epoch to the last", drop),
    Claim("Robust test accuracy at the last epoch", robust("last")),
    Claim("Robust test accuracy at the best epoch", robust("best")),
    Claim("Clean test accuracy at the last epoch", clean("last")),
)


def headline(groups: Sequence[Group]) -> list[Sentence]:
    """What plain training does, and what AWP changes."""
    some = with_awp(groups)
    return [*_baseline(groups), *(_claimed(claim, some) for claim in CLAIMS if some)] or [
        Sentence("No comparison with and without AWP has been made yet.")
    ]


def with_awp(groups: Sequence[Group]) -> list[Pair]:
    """The pairs in which AWP is all that is added."""
    return [pair for pair in pairs(groups) if pair.adds_awp]


def _baseline(groups: Sequence[Group]) -> list[Sentence]:
    plain = next((group for group in groups if group.arm == "at"), None)
    if plain is None or not plain.spread(gap).n or plain.runs[0].config["awp"]["gamma"] > 0:
        return []
    fallen, opened = plain.spread(drop), plain.spread(gap)
    return [
        Sentence(
            f"Plain AT loses {_mean(fallen)} points of robust test accuracy from its best epoch to the last, and ends "
            f"with a robust generalisation gap of {_mean(opened)} points ({_seeds(opened.n)})."
        )
    ]


def _claimed(claim: Claim, some: Sequence[Pair]) -> Sentence:
    differences = {pair.arm.arm: pair.difference(claim.quantity) for pair in some}
    measured = {name: of for name, of in differences.items() if of.n}
    lower, higher = ([name for name, of in measured.items() if side(of) == sign] for sign in (-1, 1))
    rest, none = len(measured) - len(lower) - len(higher), len(differences) - len(measured)
    found = [f"AWP {verb} it in {len(some)}" for verb, some in (("lowers", lower), ("raises", higher)) if some]
    found += [f"the difference is not told from chance in {rest}"] if rest else []
    found += [f"{none} could not be made"] if none else []
    words = f"{claim.name}: of {counted(len(differences), 'comparison')}, {', '.join(found)}."
    if not measured:
        return Sentence(words)
    return Sentence(
        words,
        "Differences in points: " + "; ".join(f"{name} {interval(of)}" for name, of in measured.items()) + ".",
    )


def side(of: Spread) -> int:
    """−1 where the interval of the mean lies below 0, 1 where above, 0 where it holds 0 or there are too few seeds."""
    low, high = of.interval
    return 0 if of.n < FEW else int(low > 0) - int(high < 0)


def interval(of: Spread, places: int = 1) -> str:
    """The mean and its interval, in words of a line.

    >>> interval(Spread({0: 1.0, 1: 2.0, 2: 3.0}))
    '+2.0 [−0.5, +4.5]'
    """
    if of.n < 2:
        return f"{signed(of.mean, places)} (one seed)"
    low, high = of.interval
    return f"{signed(of.mean, places)} [{signed(low, places)}, {signed(high, places)}]"


def _mean(of: Spread) -> str:
    return f"{of.mean:.1f} ± {of.deviation:.1f}".replace("-", "−") if of.n > 1 else f"{of.mean:.1f}".replace("-", "−")


def _seeds(n: int) -> str:
    return f"{counted(n, 'seed')}{', an anecdote' if n < FEW else ''}"
