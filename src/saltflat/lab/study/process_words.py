"""What one run shows in words, whichever way it falls: does the landscape sharpen as the robust gap opens?

The gap opens or closes where that in accuracy changes by more than twice its sampling error, and that in loss the same
way. A measure of flatness rises or falls where it changes by more than twice its standard error, or at all where it has
none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saltflat.lab.report.notation import UNBROKEN, decimal, places_for
from saltflat.lab.report.words import Sentence
from saltflat.lab.study.association import Array, tau_b
from saltflat.lab.study.process_record import AREA, AVERAGE, FLATNESS, Moment, Process, Side

LEAST = 3  # epochs, below which an order says nothing
TOGETHER = 0.5  # tau from which the words say so: of four pairs three are ordered alike
VERBS = {1: "sharpens", -1: "flattens", 0: "is the same within twice the error"}
JOINT = " and "
BY = {AREA: "by its area", AVERAGE: "by the average case"}


@dataclass(frozen=True)
class Change:
    """A quantity at two epochs, and the error of their difference; nan where one is not known."""

    before: float
    after: float
    error: float = math.nan

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def sign(self) -> int:
        """0 within twice the error."""
        margin = 2 * self.error if math.isfinite(self.error) else 0.0
        return int(np.sign(self.difference)) if abs(self.difference) > margin else 0


def headline(process: Process) -> list[Sentence]:
    """The answer, the gap, flatness, both over all measured epochs, and the best epoch against the last."""
    if len(process.moments) < 2:
        return [Sentence("Nothing can be compared: only one epoch was measured.")]
    start, last = process.start, process.last
    if start is last:
        start = process.moments[0]
    answer = Sentence(fate(opening(start, last), _signs(start, last)), _from_where(process, start))
    return [answer, _gap(start, last), _flatness(process, start, last), _together(process), _best_and_last(process)]


def opening(start: Moment, last: Moment) -> str:
    """What the gap does, as the beginning of a sentence on the landscape."""
    accuracy, loss = _gap_in_accuracy(start, last), Change(start.gap_loss, last.gap_loss)
    if not (math.isfinite(accuracy.difference) and math.isfinite(loss.difference)):
        return "The robust gap is not known at both epochs;"
    if accuracy.difference * loss.difference < 0:
        return "The robust gap moves one way in loss and the other way in accuracy;"
    if accuracy.sign == 0:
        verb = "grows" if loss.difference > 0 else "shrinks" if loss.difference < 0 else "changes"
        return f"The robust gap {verb} by less than twice its sampling error;"
    return f"As the robust gap {'opens' if accuracy.sign > 0 else 'closes'},"


def fate(gap: str, signs: Mapping[str, int]) -> str:
    """The answer in one sentence: what the gap does, and the landscape by the measures that are known.

    >>> fate("As the robust gap opens,", {AREA: 1, AVERAGE: 1})
    'As the robust gap opens, the landscape sharpens by its area and by the average case.'
    >>> fate("As the robust gap opens,", {AREA: 1, AVERAGE: -1})
    'As the robust gap opens, the landscape sharpens by its area and flattens by the average case.'
    """
    if not signs:
        return f"{gap} nothing can be said of the landscape: no measure of it is finite at both epochs."
    by_sign: dict[int, list[str]] = {}
    for name, sign in signs.items():
        by_sign.setdefault(sign, []).append(BY[name])
    return (
        f"{gap} the landscape {' and '.join(f'{VERBS[sign]} {JOINT.join(names)}' for sign, names in by_sign.items())}."
    )


def _signs(start: Moment, last: Moment) -> dict[str, int]:
    changes = {name: _in_measure(name, start, last) for name in FLATNESS}
    return {name: change.sign for name, change in changes.items() if math.isfinite(change.difference)}


def _from_where(process: Process, start: Moment) -> str:
    last, first_drop = process.last, process.drops[0] if process.drops else 0
    rates = [process.rate(first_drop - 1), process.rate(first_drop + 1)]  # that on record is of an epoch's last step
    rate = f" ({' → '.join(f'{each:g}' for each in rates)})" if all(map(math.isfinite, rates)) else ""
    if start.epoch == first_drop:
        where = f"From epoch {start.epoch}, the last before the first drop of the learning rate{rate},"
    elif 0 < start.epoch < first_drop:
        where = (
            f"From epoch {start.epoch}, the last that was measured before the first drop of the learning rate after "
            f"epoch {first_drop}{rate},"
        )
    else:
        why = "before its first drop nothing was measured" if process.drops else "the learning rate does not drop"
        where = (
            f"From epoch {start.epoch}, the first that was measured (training robust accuracy "
            f"{_percent(start.train.accuracy)}; {why}),"
        )
    stopped = f", where the run of {process.planned} stopped" if last.epoch < process.planned else ""
    undertrained = "" if 0 < start.epoch <= first_drop else " What has not learned is flat and has no gap."
    return f"{where} to epoch {last.epoch}, the last{stopped}.{undertrained} One run, one seed: an anecdote."


def _gap(start: Moment, last: Moment) -> Sentence:
    loss, accuracy = Change(start.gap_loss, last.gap_loss), _gap_in_accuracy(start, last)
    return Sentence(
        f"The gap in robust loss {_goes(loss, 3)} nats, and that in robust accuracy {_goes(accuracy, 1)} points.",
        f"Changes: {_signed(loss, 3)} nats, {_signed(accuracy, 1)} points (± one sampling error, as if both epochs had "
        f"been shown other images). Behind them: robust loss {_to(start.train.loss, last.train.loss, 3)} on training "
        f"and {_to(start.test.loss, last.test.loss, 3)} on test images, robust accuracy "
        f"{_to(start.train.accuracy, last.train.accuracy, 1)} and {_to(start.test.accuracy, last.test.accuracy, 1)}"
        f"{UNBROKEN}%.",
    )


def _flatness(process: Process, start: Moment, last: Moment) -> Sentence:
    changes = {name: _in_measure(name, start, last) for name in FLATNESS}
    known = {name: change for name, change in changes.items() if math.isfinite(change.difference)}
    claims = "; ".join(_claim(name, start, last) for name in FLATNESS)
    if not known:
        return Sentence(f"{_capital(claims)}.")
    listed = "; ".join(f"{name} {_signed(change, _places(change))}" for name, change in known.items())
    directions, draws = (process.settings.get(f"flatness.{key}", "so many") for key in ("directions", "draws"))
    bare = [name for name, change in known.items() if math.isnan(change.error)]
    errors = (
        f"± one standard error, over {directions} directions for the area and {draws} draws a batch for the average "
        "case; that of a change is computed as if the two epochs had draws of their own, though they share them."
        + (f" Of the {' and the '.join(bare)} no error is known." if bare else "")
    )
    return Sentence(f"{_capital(claims)}.", f"{_capital(listed)}: {errors}")


def _claim(name: str, start: Moment, last: Moment) -> str:
    change = _in_measure(name, start, last)
    if not math.isfinite(change.difference):
        return f"the {name} is not finite at both epochs"
    verb = {1: "rises", -1: "falls", 0: "changes by less than twice its error,"}[change.sign]
    before, after = (_with_error(moment, name, _places(change)) for moment in (start, last))
    return f"the {name} {verb} from {before} to {after} {last.measured(name).unit}".rstrip()


def _together(process: Process) -> Sentence:
    moments = [moment for moment in process.moments if math.isfinite(moment.gap_loss)]
    gaps = np.array([moment.gap_loss for moment in moments])
    parts: dict[str, list[str]] = {}
    for name in FLATNESS:
        values = np.array([moment.measured(name).value for moment in moments])
        tau, n = _tau(values, gaps)
        fewer = f", {n} epochs" if n < len(process.moments) else ""
        parts.setdefault(_relation(tau), []).append(f"the {name} (τ{UNBROKEN}={UNBROKEN}{decimal(tau)}{fewer})")
    said = ", ".join(f"{relation} {' and '.join(names)}" for relation, names in parts.items())
    epoch, _ = _tau(np.array([float(moment.epoch) for moment in moments]), gaps)
    return Sentence(
        f"Over the {len(process.moments)} measured epochs, the gap in robust loss {said}.",
        "Kendall's τ-b: 1 if every two epochs are ordered alike. The epochs of one run are not independent, as each "
        "goes on from the one before: no interval is given, and whatever grows with training has a τ. The number of "
        f"the epoch alone has τ{UNBROKEN}={UNBROKEN}{decimal(epoch)} with the gap.",
    )


def _tau(x: Array, y: Array) -> tuple[float, int]:
    """tau-b where both are finite, and of how many; nan of fewer than three."""
    there = np.isfinite(x) & np.isfinite(y)
    n = int(there.sum())
    return (tau_b(x[there], y[there]), n) if n >= LEAST else (math.nan, n)


def _relation(tau: float) -> str:
    """
    >>> _relation(0.8), _relation(-0.8), _relation(0.1)
    ('rises together with', 'moves against', 'hardly goes with')
    """
    if math.isnan(tau):
        return "cannot be compared with"
    if abs(tau) < TOGETHER:
        return "hardly goes with"
    return "rises together with" if tau > 0 else "moves against"


def _best_and_last(process: Process) -> Sentence:
    best, last = process.best, process.last
    if best is None:
        return Sentence("The best epoch is not on record: none was chosen on validation, or it was not kept.")
    if best is last:
        return Sentence(f"The last epoch, {last.epoch}, is also the best on validation.")
    accuracy = Change(best.test.accuracy, last.test.accuracy, _sampling_error([best.test, last.test]))
    gap = Change(best.gap_loss, last.gap_loss)
    changes = {name: _in_measure(name, best, last) for name in FLATNESS}
    flat = "; ".join(
        f"{name} {_signed(change, _places(change))} {last.measured(name).unit}".rstrip()
        for name, change in changes.items()
        if math.isfinite(change.difference)
    )
    return Sentence(
        f"From the best epoch ({best.epoch}, chosen on validation) to the last ({last.epoch}), robust accuracy on test "
        f"{_goes(accuracy, 1)}{UNBROKEN}%, and the gap in robust loss {_goes(gap, 3)} nats.",
        f"Changes: test robust accuracy {_signed(accuracy, 1)} points"
        f"{', less than twice its sampling error' if not accuracy.sign else ''}; "
        f"gap in loss {_signed(gap, 3)} nats{f'; {flat}' if flat else ''}.",
    )


def notes(process: Process) -> list[Sentence]:
    """What is missing, and where."""
    found = []
    for name in FLATNESS:
        missing = {
            moment.epoch: moment.measured(name) for moment in process.moments if math.isnan(moment.measured(name).value)
        }
        if missing:
            why = "; ".join(dict.fromkeys(one.note for one in missing.values() if one.note)) or "not on record"
            found.append(Sentence(f"No finite {name} at {_epochs(list(missing))}", why))
    broken = [moment.epoch for moment in process.moments if np.isnan(moment.curves).any() or not len(moment.curves)]
    if broken:
        found.append(
            Sentence(f"Robust losses along a direction that are not finite, at {_epochs(broken)}", "the curve breaks")
        )
    gaps = [moment.epoch for moment in process.moments if math.isnan(moment.gap_loss)]
    if gaps:
        found.append(Sentence(f"No finite gap in loss at {_epochs(gaps)}", "a robust loss is not finite"))
    if process.last.epoch < process.planned:
        found.append(
            Sentence(f"The run has {process.last.epoch} of {process.planned} epochs", "it can be gone on with")
        )
    return found


def _epochs(numbers: Sequence[int]) -> str:
    """
    >>> _epochs([3]), _epochs([3, 5, 8])
    ('epoch 3', 'epochs 3, 5 and 8')
    """
    texts = list(map(str, numbers))
    return f"epoch {texts[0]}" if len(texts) == 1 else f"epochs {', '.join(texts[:-1])} and {texts[-1]}"


def _in_measure(name: str, start: Moment, last: Moment) -> Change:
    one, other = start.measured(name), last.measured(name)
    return Change(one.value, other.value, math.hypot(one.standard_error, other.standard_error))


def _gap_in_accuracy(start: Moment, last: Moment) -> Change:
    sides = [start.train, start.test, last.train, last.test]
    return Change(start.gap_accuracy, last.gap_accuracy, _sampling_error(sides))


def _sampling_error(sides: Sequence[Side]) -> float:
    """Of a sum or difference of accuracies in percent: √Σ p (1 − p) / n."""
    return math.sqrt(sum(side.accuracy * max(0.0, 100 - side.accuracy) / side.n for side in sides))


def _goes(change: Change, places: int) -> str:
    """
    >>> _goes(Change(0.1, 0.5), 2), _goes(Change(0.5, 0.1), 2), _goes(Change(0.5, 0.5), 2)
    ('grows from 0.10 to 0.50', 'falls from 0.50 to 0.10', 'stays at 0.50')
    """
    if not math.isfinite(change.difference):
        return f"is {_to(change.before, change.after, places)}"
    if decimal(change.before, places) == decimal(change.after, places):
        return f"stays at {decimal(change.after, places)}"
    verb = "grows" if change.difference > 0 else "falls"
    return f"{verb} from {decimal(change.before, places)} to {decimal(change.after, places)}"


def _to(before: float, after: float, places: int) -> str:
    return f"{decimal(before, places)} → {decimal(after, places)}"


def _signed(change: Change, places: int) -> str:
    """
    >>> _signed(Change(0.5, 0.1, 0.1), 2).replace(UNBROKEN, " "), _signed(Change(0.0, 1.0), 1)
    ('−0.40 ± 0.10', '+1.0')
    """
    error = f"{UNBROKEN}±{UNBROKEN}{decimal(change.error, places)}" if math.isfinite(change.error) else ""
    return f"{'+' if change.difference > 0 else ''}{decimal(change.difference, places)}{error}"


def _with_error(moment: Moment, name: str, places: int) -> str:
    one = moment.measured(name)
    error = f"{UNBROKEN}±{UNBROKEN}{decimal(one.standard_error, places)}" if math.isfinite(one.standard_error) else ""
    return f"{decimal(one.value, places)}{error}"


def _places(change: Change) -> int:
    return places_for(max(abs(change.before), abs(change.after)))


def _percent(value: float) -> str:
    return f"{decimal(value, 1)}{UNBROKEN}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
