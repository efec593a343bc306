"""Sentences that follow from numbers: what groups of runs show at their last epoch, and how it was measured.

A sentence says "consistently" only if every seed agrees in sign and there are three or more; with fewer it says that
this is an anecdote.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from saltflat.lab.report.notation import UNBROKEN, counted, decimal
from saltflat.lab.report.runs import Epoch
from saltflat.lab.report.statistics import Group, Spread, at, last, measured, over_seeds, paired, runs_of


@dataclass(frozen=True)
class Quantity:
    """What a headline compares, with the words for less and more of it."""

    name: str
    unit: str
    of_epoch: Callable[[Epoch], float]
    below: str
    above: str


GAP = Quantity("robust generalisation gap", "points", lambda epoch: epoch.gap, "smaller", "larger")
ROBUST = Quantity("last-epoch test robust accuracy", "%", lambda epoch: epoch.robust, "lower", "higher")


@dataclass(frozen=True)
class Sentence:
    """A claim, and the numbers that it rests on."""

    claim: str
    evidence: str = ""


def headline(groups: Sequence[Group]) -> list[Sentence]:
    """What the numbers at the last epoch say: two groups are compared seed by seed, more or fewer are described. That
    these last epochs are not those that were asked for, or differ, is said before anything else.
    """
    return [*_stages(groups), *_findings(groups)]


def _stages(groups: Sequence[Group]) -> list[Sentence]:
    apart = len({group.last_epoch for group in measured(groups)}) > 1
    short = [group for group in measured(groups) if group.last_epoch < group.planned_epochs]
    if not apart and not short:
        return []
    ends = [
        f"{group.name} at epoch {group.last_epoch}{f' of {group.planned_epochs}' if group in short else ''}"
        for group in measured(groups)
    ]
    stage = "Training has not reached its end" if short else "Training ended at different epochs"
    caution = " Numbers of different epochs stand side by side below." if apart else ""
    return [Sentence(f"{stage}: {', '.join(ends)}.{caution}")]


def _findings(groups: Sequence[Group]) -> list[Sentence]:
    if len(groups) == 2 and len(measured(groups)) == 2:
        gap, robust = (_compared(quantity, *groups) for quantity in (GAP, ROBUST))
        behind = _composition(*groups)
        return [Sentence(gap.claim, f"{gap.evidence} {behind}".strip()), Sentence(robust.claim, robust.evidence)]
    return [_described(group) for group in measured(groups)] or [Sentence("No per-epoch measurements were found.")]


def _described(group: Group) -> Sentence:
    gap, robust = _at_last(group, GAP.of_epoch), _at_last(group, ROBUST.of_epoch)
    seeds = f"{counted(robust.n, 'seed')}{', an anecdote' if robust.n < 3 else ''}"
    return Sentence(
        f"After {counted(group.last_epoch, 'epoch')}, {group.name} has a {GAP.name} of {_with_unit(gap, GAP)} "
        f"and a test robust accuracy of {_with_unit(robust, ROBUST)} ({seeds})."
    )


@dataclass(frozen=True)
class Comparison:
    """Two groups in one quantity, seed by seed; `numbers` are their means over the seeds that both have."""

    quantity: Quantity
    first: str
    second: str
    numbers: str
    differences: Spread

    @property
    def below(self) -> int:
        """At how many seeds the second is less; fractions of images that cancel leave rounding errors behind."""
        return sum(value < -1e-9 for value in self.differences.by_seed.values())

    @property
    def above(self) -> int:
        """At how many seeds the second is more."""
        return sum(value > 1e-9 for value in self.differences.by_seed.values())

    @property
    def claim(self) -> str:
        """What may be said: as much as the seeds agree on."""
        n, one_way = self.differences.n, self.differences.n in (self.below, self.above)
        subject = f"The {self.quantity.name} of {self.second}"
        word = self.quantity.below if self.below else self.quantity.above
        if n == 0:
            return f"{subject} is {self.numbers} for {self.first}; the two share no seed, so nothing is compared."
        if n >= 3 and one_way:
            return f"{subject} is consistently {word} than that of {self.first}: {self.numbers}."
        anecdote = ", which is an anecdote" if n < 3 else ""
        if one_way or not self.below + self.above:
            relation = f"is {word} than" if one_way else "equals"
            seeds = {1: "the one common seed", 2: "both common seeds"}.get(n, f"all {n} common seeds")
            return f"{subject} {relation} that of {self.first} in {seeds}{anecdote}: {self.numbers}."
        names = f"{self.second} and {self.first}"
        if n < 3:
            return f"The two common seeds disagree on the {self.quantity.name} of {names}{anecdote}: {self.numbers}."
        return f"There is no consistent difference in {self.quantity.name} between {names}: {self.numbers}."

    @property
    def evidence(self) -> str:
        """The differences, how many seeds agree, and what chance alone would do."""
        n = self.differences.n
        if not n:
            return ""
        words = {self.quantity.below: self.below, self.quantity.above: self.above, "equal": n - self.below - self.above}
        agreement = ", ".join(f"{word} in {count} of {n}" for word, count in words.items() if count)
        chance = ""
        if n >= 3 and n in (self.below, self.above):
            odds = f"{100 * 2.0 ** (1 - n):.3g}{UNBROKEN}%"
            chance = f" With no real difference, {n} seeds would still agree in sign in {odds} of studies."
        return (
            f"{self.second} − {self.first}, paired over {counted(n, 'common seed')}: "
            f"{_signed(self.differences)} points; {agreement}.{chance}"
        )


def _compared(quantity: Quantity, first: Group, second: Group) -> Comparison:
    a, b = (_at_last(group, quantity.of_epoch) for group in (first, second))
    differences = paired(a, b)
    if differences.n:  # words and numbers speak of the same seeds; the table has all of them
        a, b = (Spread({seed: spread.by_seed[seed] for seed in differences.by_seed}) for spread in (a, b))
    numbers = f"{_with_unit(b, quantity)} against {_with_unit(a, quantity)}"
    return Comparison(quantity, first.name, second.name, numbers, differences)


def _composition(first: Group, second: Group) -> str:
    """A gap also closes when the training accuracy falls, so its change is split into its two halves."""
    quantities: tuple[Callable[[Epoch], float], ...] = (lambda epoch: epoch.robust_train, lambda epoch: epoch.robust)
    train, test = (paired(_at_last(first, quantity), _at_last(second, quantity)) for quantity in quantities)
    if not test.n:
        return ""
    return (
        f"Behind the difference stand {_signed(train)} points of robust accuracy on the training "
        f"subset and {_signed(test)} points on test."
    )


def _at_last(group: Group, quantity: Callable[[Epoch], float]) -> Spread:
    return over_seeds(group.finished, at(last, quantity))


def _with_unit(spread: Spread, quantity: Quantity) -> str:
    return _plus_minus(spread) + UNBROKEN + quantity.unit


def _signed(spread: Spread) -> str:
    text = _plus_minus(spread)
    return text if text.startswith("−") or spread.mean == 0 else f"+{text}"


def _plus_minus(spread: Spread) -> str:
    mean = decimal(spread.mean)
    return f"{mean}{UNBROKEN}±{UNBROKEN}{decimal(spread.deviation)}" if spread.n > 1 else mean


def measurement_caption(groups: Sequence[Group]) -> str:
    """How the per-epoch numbers were taken: attack, images, mode."""
    runs = runs_of(groups)
    attacks = distinct(run.evaluation.get("attack") for run in runs)
    train = distinct(str(epoch.train.n) for run in runs for epoch in run.epochs)
    test = distinct(str(epoch.test.n) for run in runs for epoch in run.epochs)
    mode = distinct(run.evaluation.get("mode") for run in runs)
    attack = f"Attack: {attacks}." if attacks else "The attack is not on record."
    images = f" n = {train} training and {test} test images." if train else ""
    weights = distinct(run.evaluation.get("weights") for run in runs)
    at = "w" if weights in ("", "w") else f"({weights})"
    how = f"{mode or 'eval'} mode, without augmentation"
    return f"{attack}{images} Measured at the unperturbed weights {at}, {how}."


def machine_caption(groups: Sequence[Group]) -> str:
    """Where the times were taken."""
    values = {
        fact: distinct(run.environment.get(fact) for run in runs_of(groups))
        for fact in ("device", "processor", "cores", "threads")
    }
    known = ", ".join(f"{fact} {text}" for fact, text in values.items() if text)
    return f"Measured on {known}." if known else "The machine is not on record."


def distinct(texts: Iterable[str | None]) -> str:
    """
    >>> distinct(["cpu", None, "cuda", "cpu"])
    'cpu or cuda'
    """
    return " or ".join(dict.fromkeys(text for text in texts if text))
