"""A report is a function of records: every number and every word on the page is computed from files that runs left.

Reading a run, grouping runs that differ only in seed, statistics over seeds, words for the statistics, and one offline
HTML file. A sentence says "consistently" only if every seed agrees in sign and there are three or more; with fewer it
says that this is an anecdote. What a run lacks is listed, never guessed. Spread is always the sample standard deviation
over seeds. Nothing here imports torch.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from saltflat.lab import figures

TEMPLATE = Path(__file__).with_name("report.html.j2")
MISSING = "–"
UNBROKEN = "\N{NO-BREAK SPACE}"  # keeps a number, its spread and its unit on one line
# Fields of a config that say where or how often a run was made and not by which method: they never split a group.
NOT_THE_METHOD = frozenset({"seed", "device", "threads", "workers"})

# What reading a file raises when its content isn't what was promised.
DAMAGE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
Part = TypeVar("Part")

DEFINITIONS = {
    "seeds": (
        "seeds",
        "Number of runs behind a mean, which differ only in their seed. Spread (±) is the sample standard deviation.",
    ),
    "checkpoint": (
        "best and last",
        "Best: the epoch with the highest robust accuracy on the validation split, which is held out of the training "
        "set, so that the test set chooses nothing. Last: the weights after the last epoch.",
    ),
    "clean": ("clean accuracy", "Percentage of unperturbed images that are classified correctly."),
    "robust": (
        "robust accuracy",
        "Percentage of images that are still classified correctly after the attack that the caption states.",
    ),
    "train": (
        "training subset",
        "A fixed part of the training images, without augmentation, attacked and measured exactly like the test "
        "images, at the unperturbed weights w in eval mode; never taken from the training log, measured at w + v.",
    ),
    "gap": (
        "robust generalisation gap",
        "Robust accuracy on the training subset minus robust accuracy on test, in percentage points.",
    ),
    "loss-gap": ("gap in loss", "Robust loss on test minus robust loss on the training subset, in nats."),
    "drop": (
        "drop",
        "Robust accuracy on test at the best epoch minus that after the last epoch, in percentage points: "
        "what robust overfitting costs.",
    ),
    "paired": (
        "paired difference",
        "The second group's value minus the first group's at the same seed; its mean and standard deviation are taken "
        "over the seeds that both groups have.",
    ),
    "interval": (
        "interval",
        "95 % interval of one run's accuracy, due to the finite number of images; "
        "shown where a single run stands behind a number.",
    ),
    "landscape": (
        "weight loss landscape",
        "g(α): robust loss at w + α d along a random direction d in weight space, normalised as the caption states. "
        "Centred: g(α) − g(0).",
    ),
    "seconds": (
        "seconds per epoch",
        "Wall-clock time. Training: the epoch itself. Evaluation: the measurements after it that this page shows.",
    ),
}


# --- Records -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One split at one epoch, at the weights w; accuracies are fractions, losses nats."""

    n: int
    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float
    robust_loss: float


@dataclass(frozen=True)
class Epoch:
    number: int
    train: Measured
    test: Measured
    seconds: float
    evaluation_seconds: float
    skipped: int
    best: bool

    @property
    def gap(self) -> float:
        """Robust generalisation gap, in percentage points."""
        return 100 * (self.train.robust_accuracy - self.test.robust_accuracy)

    @property
    def loss_gap(self) -> float:
        return self.test.robust_loss - self.train.robust_loss


@dataclass(frozen=True)
class Outcome:
    """One attack on one checkpoint; accuracy and interval are fractions."""

    checkpoint: str
    split: str
    n: int
    attack: str
    description: str
    accuracy: float
    interval: tuple[float, float] | None
    settings: str


@dataclass(frozen=True, eq=False)
class Landscape:
    checkpoint: str
    split: str
    n: int
    alphas: figures.Array  # (A,)
    robust_loss: figures.Array  # (D, A), one row per direction
    settings: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Run:
    """What one run folder holds; `notes` says what it lacks."""

    folder: Path
    label: str
    seed: int
    config: Mapping[str, str]
    environment: Mapping[str, str]
    evaluation: Mapping[str, str]
    epochs: tuple[Epoch, ...]
    outcomes: tuple[Outcome, ...]
    landscapes: tuple[Landscape, ...]
    notes: tuple[str, ...]

    @property
    def last(self) -> Epoch | None:
        return self.epochs[-1] if self.epochs else None

    @property
    def best(self) -> Epoch | None:
        """Every epoch that beat those before it on validation was marked when written: the latest mark counts."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.best), None)


def read_run(folder: Path) -> Run:
    """The run in `folder`; ValueError, in one line, if it is none. Any other missing or broken part becomes a note."""
    folder = Path(folder)
    config = _read_config(folder)
    notes: list[str] = []
    return Run(
        folder=folder,
        label=config["recipe"],
        seed=config["seed"],
        config=flattened(config),
        environment=flattened(
            _read_mapping(folder / "environment.json", notes, "the machine and versions are unknown")
        ),
        evaluation=flattened(
            _read_mapping(folder / "evaluation.json", notes, "the attack at each epoch is not stated")
        ),
        epochs=_read_epochs(folder / "metrics.jsonl", notes),
        outcomes=tuple(_read_parts(folder / "outcomes", _outcomes, notes, "No final evaluation")),
        landscapes=tuple(_read_parts(folder / "landscapes", _landscapes, notes, "No weight loss landscape")),
        notes=tuple(notes),
    )


def flattened(tree: Mapping[str, Any]) -> dict[str, str]:
    """
    >>> flattened({"attack": {"steps": 10, "ball": {"radius": 0.03}}, "augment": True, "wandb": None})
    {'attack.steps': '10', 'attack.ball.radius': '0.03', 'augment': 'yes', 'wandb': 'none'}
    """
    rows: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows |= {f"{key}.{inner}": text for inner, text in flattened(value).items()}
        else:
            rows[str(key)] = _plain(value)
    return rows


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None or value == {} else str(value)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        json.dumps(config, default=str)  # a YAML file may contain itself
    except (*DAMAGE, yaml.YAMLError) as error:
        raise ValueError(f"{folder}: no run, config.yaml cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: no run, config.yaml must hold named fields")
    for name, kind in (("recipe", str), ("seed", int)):
        if type(config.get(name)) is not kind:
            raise ValueError(f"{folder}: no run, config.yaml: {name} must be {kind.__name__}, got {config.get(name)!r}")
    return config


def _read_mapping(path: Path, notes: list[str], consequence: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"No {path.name}: {consequence}")
    except DAMAGE:
        notes.append(f"Unreadable {path.name}: {consequence}")
    else:
        if isinstance(content, dict):
            return content
        notes.append(f"No named fields in {path.name}: {consequence}")
    return {}


def _read_epochs(path: Path, notes: list[str]) -> tuple[Epoch, ...]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        notes.append("No metrics.jsonl: no per-epoch measurements")
        return ()
    epochs: dict[int, Epoch] = {}
    for number, line in enumerate(lines, 1):
        try:
            epoch = _epoch(json.loads(line))
        except DAMAGE:
            damage = "The last line of metrics.jsonl is cut"
            if number < len(lines):
                damage = f"Line {number} of metrics.jsonl is damaged"
            notes.append(f"{damage} and was skipped")
            continue
        if epoch.number in epochs:
            notes.append(f"Epoch {epoch.number} stands twice in metrics.jsonl: the later line counts")
        epochs[epoch.number] = epoch
    if not epochs:
        notes.append("No epoch in metrics.jsonl: no per-epoch measurements")
    return tuple(epochs[number] for number in sorted(epochs))


def _epoch(record: dict[str, Any]) -> Epoch:
    return Epoch(
        number=int(record["epoch"]),
        train=_measured(record["train"]),
        test=_measured(record["test"]),
        seconds=_number(record.get("seconds")),
        evaluation_seconds=_number(record.get("evaluation_seconds")),
        skipped=int(record.get("skipped") or 0),
        best=record.get("best") is True,
    )


def _measured(record: dict[str, Any]) -> Measured:
    names = ("clean_accuracy", "clean_loss", "robust_accuracy", "robust_loss")
    return Measured(int(record["n"]), *(_number(record[name]) for name in names))


def _number(value: object) -> float:
    """JSON has no nan, so a writer may have put null in its place."""
    if value is None:
        return math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"not a number: {value!r}")


def _read_parts(
    folder: Path, parse: Callable[[dict[str, Any]], Iterable[Part]], notes: list[str], if_none: str
) -> list[Part]:
    parts: list[Part] = []
    paths = sorted(folder.glob("*.json"))
    for path in paths:
        try:
            parts += parse(json.loads(path.read_bytes()))
        except DAMAGE:
            notes.append(f"A damaged file was skipped: {folder.name}/{path.name}")
    if not paths:
        notes.append(if_none)
    return parts


def _outcomes(record: dict[str, Any]) -> list[Outcome]:
    settings = "; ".join(f"{key}: {value}" for key, value in flattened(record.get("settings") or {}).items())
    return [
        Outcome(
            checkpoint=str(record["checkpoint"]),
            split=str(record["split"]),
            n=int(record["n"]),
            attack=str(attack["name"]),
            description=str(attack.get("description") or attack["name"]),
            accuracy=_number(attack["accuracy"]),
            interval=(_number(attack["interval"][0]), _number(attack["interval"][1]))
            if attack.get("interval")
            else None,
            settings=settings,
        )
        for attack in record["attacks"]
    ]


def _landscapes(record: dict[str, Any]) -> list[Landscape]:
    alphas = np.array([_number(alpha) for alpha in record["alphas"]])
    losses = np.array([[_number(loss) for loss in curve["robust_loss"]] for curve in record["curves"]])
    if losses.ndim != 2 or losses.shape[1] != len(alphas) or len(alphas) < 2 or not np.isfinite(alphas).all():
        raise ValueError("curves and alphas do not fit")
    order = np.argsort(alphas)
    figures.centre(alphas, losses)  # refuses a landscape without alpha = 0
    return [
        Landscape(
            checkpoint=str(record["checkpoint"]),
            split=str(record["split"]),
            n=int(record["n"]),
            alphas=alphas[order],
            robust_loss=losses[:, order],
            settings=flattened(record.get("settings") or {}),
        )
    ]


# --- Groups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in seed, in the order of their seeds."""

    name: str
    runs: tuple[Run, ...]
    series: int = 0

    @property
    def last_epoch(self) -> int:
        return max((run.last.number for run in self.runs if run.last), default=0)

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that came as far as the group's longest: numbers from different epochs are never averaged."""
        return tuple(run for run in self.runs if (run.last.number if run.last else 0) == self.last_epoch)


def method(run: Run) -> dict[str, str]:
    """The fields of a config that make two runs two methods."""
    return {key: value for key, value in run.config.items() if key.rpartition(".")[2] not in NOT_THE_METHOD}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs; of two runs with equal method and seed the first counts."""
    members: dict[tuple[str, frozenset[tuple[str, str]]], dict[int, Run]] = {}
    for run in runs:
        members.setdefault((run.label, frozenset(method(run).items())), {}).setdefault(run.seed, run)
    groups = [tuple(by_seed[seed] for seed in sorted(by_seed)) for by_seed in members.values()]
    return [Group(_group_name(own, groups), own, series) for series, own in enumerate(groups)]


def _group_name(own: Sequence[Run], groups: Sequence[Sequence[Run]]) -> str:
    """The recipe's name, and where several groups share it, the fields in which they differ."""
    namesakes = [method(runs[0]) for runs in groups if runs[0].label == own[0].label]
    if len(namesakes) == 1:
        return own[0].label
    mine = method(own[0])
    fields = differing(namesakes)
    shown = ", ".join(f"{key} {mine.get(key, MISSING)}" for key in fields[:3])
    return f"{own[0].label} ({shown}{', …' if len(fields) > 3 else ''})"


def differing(tables: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose values are not the same in all tables, in the order of first appearance."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({table.get(key) for table in tables}) > 1]


# --- Statistics over seeds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Values by seed, with their mean and sample standard deviation; nan where there is none."""

    by_seed: Mapping[int, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else math.nan

    @property
    def deviation(self) -> float:
        return float(np.std(list(self.by_seed.values()), ddof=1)) if self.n > 1 else math.nan


def over_seeds(runs: Sequence[Run], quantity: Callable[[Run], float | None]) -> Spread:
    """A quantity of every run that has it."""
    values = {run.seed: quantity(run) for run in runs}
    return Spread({seed: value for seed, value in values.items() if value is not None and math.isfinite(value)})


def paired(first: Spread, second: Spread) -> Spread:
    """second − first at the seeds that both have."""
    return Spread({s: second.by_seed[s] - first.by_seed[s] for s in first.by_seed if s in second.by_seed})


def at(pick: Callable[[Run], Epoch | None], quantity: Callable[[Epoch], float]) -> Callable[[Run], float | None]:
    """A quantity of an epoch as a quantity of a run."""

    def of_run(run: Run) -> float | None:
        epoch = pick(run)
        return None if epoch is None else quantity(epoch)

    return of_run


def last(run: Run) -> Epoch | None:
    return run.last


def best(run: Run) -> Epoch | None:
    return run.best


def robust_on_test(epoch: Epoch) -> float:
    return 100 * epoch.test.robust_accuracy


def robust_on_train(epoch: Epoch) -> float:
    return 100 * epoch.train.robust_accuracy


def clean_on_test(epoch: Epoch) -> float:
    return 100 * epoch.test.clean_accuracy


def drop(run: Run) -> float | None:
    """Percentage points of robust test accuracy lost between the best epoch and the last."""
    return robust_on_test(run.best) - robust_on_test(run.last) if run.best and run.last else None


# --- Words ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """What a headline compares, with the words for less and more of it."""

    name: str
    unit: str
    of_epoch: Callable[[Epoch], float]
    below: str
    above: str


GAP = Quantity("robust generalisation gap", "points", lambda epoch: epoch.gap, "smaller", "larger")
ROBUST = Quantity("last-epoch test robust accuracy", "%", robust_on_test, "lower", "higher")


@dataclass(frozen=True)
class Sentence:
    claim: str
    evidence: str = ""


def headline(groups: Sequence[Group]) -> list[Sentence]:
    """What the numbers at the last epoch say, in words that follow from them: two groups are compared seed by seed."""
    measured = [group for group in groups if group.last_epoch]
    if len(groups) == 2 and len(measured) == 2:
        gap, robust = (_compared(quantity, *groups) for quantity in (GAP, ROBUST))
        return [replace(gap, evidence=f"{gap.evidence} {_composition(*groups)}".strip()), robust]
    return [_described(group) for group in measured] or [Sentence("No per-epoch measurements were found.")]


def _described(group: Group) -> Sentence:
    gap, robust = (over_seeds(group.finished, at(last, quantity.of_epoch)) for quantity in (GAP, ROBUST))
    seeds = f"{robust.n} seeds" if robust.n >= 3 else f"{_count(robust.n, 'seed')}, an anecdote"
    return Sentence(
        f"After {_count(group.last_epoch, 'epoch')}, {group.name} has a {GAP.name} of {_with_unit(gap, GAP)} "
        f"and a test robust accuracy of {_with_unit(robust, ROBUST)} ({seeds})."
    )


def _compared(quantity: Quantity, first: Group, second: Group) -> Sentence:
    a, b = (over_seeds(group.finished, at(last, quantity.of_epoch)) for group in (first, second))
    differences = paired(a, b)
    if differences.n:  # words and numbers speak of the same seeds; the table has all of them
        a, b = (Spread({seed: spread.by_seed[seed] for seed in differences.by_seed}) for spread in (a, b))
    numbers = f"{_with_unit(b, quantity)} against {_with_unit(a, quantity)}"
    claim = _claim(quantity, first.name, second.name, numbers, _signs(differences))
    return Sentence(claim, _evidence(quantity, first, second, differences))


def _claim(quantity: Quantity, first: str, second: str, numbers: str, signs: tuple[int, int, int]) -> str:
    below, equal, above = signs
    n = sum(signs)
    subject = f"the {quantity.name} of {second}"
    word = quantity.below if below else quantity.above
    agreed = n in (below, above)
    if n == 0:
        return f"{_upper(subject)} is {numbers} for {first}; the two share no seed, so nothing is compared."
    if n >= 3 and agreed:
        return f"{_upper(subject)} is consistently {word} than that of {first}: {numbers}."
    if equal == n:
        return f"{_upper(subject)} equals that of {first} in {_every_seed(n)}{_anecdote(n)}: {numbers}."
    if n >= 3:
        return f"There is no consistent difference in {quantity.name} between {second} and {first}: {numbers}."
    if agreed:
        return f"{_upper(subject)} is {word} than that of {first} in {_every_seed(n)}{_anecdote(n)}: {numbers}."
    return f"The two common seeds disagree on the {quantity.name} of {second} and {first}{_anecdote(n)}: {numbers}."


def _evidence(quantity: Quantity, first: Group, second: Group, differences: Spread) -> str:
    if not differences.n:
        return ""
    below, equal, above = _signs(differences)
    counts = ((below, quantity.below), (above, quantity.above), (equal, "equal"))
    agreement = ", ".join(f"{word} in {count} of {differences.n}" for count, word in counts if count)
    chance = ""
    if differences.n >= 3 and differences.n in (below, above):
        odds = _percent(2.0 ** (1 - differences.n))
        chance = f" With no real difference, {differences.n} seeds would still agree in sign in {odds} of studies."
    return (
        f"{second.name} − {first.name}, paired over {_count(differences.n, 'common seed')}: "
        f"{_signed(differences)} points; {agreement}.{chance}"
    )


def _composition(first: Group, second: Group) -> str:
    """A gap also closes when the training accuracy falls, so its change is split into its two halves."""
    train, test = (
        paired(*(over_seeds(group.finished, at(last, quantity)) for group in (first, second)))
        for quantity in (robust_on_train, robust_on_test)
    )
    if not test.n:
        return ""
    return (
        f"Behind the difference stand {_signed(train)} points of robust accuracy on the training subset and "
        f"{_signed(test)} points on test."
    )


def _signs(differences: Spread) -> tuple[int, int, int]:
    """How many seeds are below, at and above zero; fractions of images that cancel leave rounding errors behind."""
    values = differences.by_seed.values()
    below, above = (sum(sign * value > 1e-9 for value in values) for sign in (-1, 1))
    return below, differences.n - below - above, above


def _anecdote(n: int) -> str:
    return ", which is an anecdote" if n < 3 else ""


def _every_seed(n: int) -> str:
    return {1: "the one common seed", 2: "both common seeds"}.get(n, f"all {n} common seeds")


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}{UNBROKEN}%"


def decimal(value: float, places: int = 2) -> str:
    """
    >>> decimal(-1.5), decimal(-0.001), decimal(float("nan"))
    ('−1.50', '0.00', '–')
    """
    if not math.isfinite(value):
        return MISSING
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")


def _with_unit(spread: Spread, quantity: Quantity) -> str:
    return _plus_minus(decimal(spread.mean), spread) + UNBROKEN + quantity.unit


def _signed(spread: Spread) -> str:
    mean = decimal(spread.mean)
    return _plus_minus(mean if mean.startswith("−") or spread.mean == 0 else f"+{mean}", spread)


def _plus_minus(mean: str, spread: Spread) -> str:
    return f"{mean}{UNBROKEN}±{UNBROKEN}{decimal(spread.deviation)}" if spread.n > 1 else mean


# --- Tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    mean: str
    spread: str = ""
    detail: str = ""  # on hover: the value of each seed


@dataclass(frozen=True)
class Column:
    text: str
    unit: str = ""
    term: str = ""  # key in DEFINITIONS
    title: str = ""


@dataclass(frozen=True)
class Row:
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Body:
    """The rows of one group."""

    name: str
    series: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    label: str
    caption: str
    columns: tuple[Column, ...]
    bodies: tuple[Body, ...]
    row_labels: Column | None = None


def cell(spread: Spread, places: int = 2) -> Cell:
    if not spread.n:
        return Cell(MISSING)
    detail = ", ".join(f"seed {seed}: {decimal(value, places)}" for seed, value in spread.by_seed.items())
    spreads = spread.n > 1 and (places > 0 or spread.deviation > 0)  # epochs are counts: 30 ± 0 says no more than 30
    deviation = f"± {decimal(spread.deviation, places)}" if spreads else ""
    return Cell(decimal(spread.mean, places), deviation, detail)


MEASURES: tuple[tuple[Column, Callable[[Epoch], float], int], ...] = (
    (Column("epoch"), lambda epoch: float(epoch.number), 0),
    (Column("clean", "test, %", "clean"), clean_on_test, 2),
    (Column("robust", "test, %", "robust"), robust_on_test, 2),
    (Column("robust", "training subset, %", "train"), robust_on_train, 2),
    (Column("gap", "points", "gap"), GAP.of_epoch, 2),
    (Column("gap in loss", "nats", "loss-gap"), lambda epoch: epoch.loss_gap, 3),
)
DROP = Column("drop", "best to last, points", "drop")
CHECKPOINTS: tuple[tuple[str, Callable[[Run], Epoch | None]], ...] = (("best", best), ("last", last))


def accuracy_table(groups: Sequence[Group]) -> Table:
    """Best and last checkpoint of every group, over its finished runs."""

    def row(runs: Sequence[Run], name: str, pick: Callable[[Run], Epoch | None]) -> Row:
        spreads = [(over_seeds(runs, at(pick, quantity)), places) for _, quantity, places in MEASURES]
        dropped = cell(over_seeds(runs, drop)) if name == "last" else Cell("")
        return Row(name, (Cell(str(spreads[2][0].n)), *(cell(*spread) for spread in spreads), dropped))

    return Table(
        label="Accuracies at the best and the last epoch",
        caption=f"Mean ± sample standard deviation over seeds. {measurement_caption(groups)}",
        columns=(Column("n", "seeds", "seeds"), *(column for column, _, _ in MEASURES), DROP),
        bodies=tuple(
            Body(group.name, group.series, tuple(row(group.finished, *checkpoint) for checkpoint in CHECKPOINTS))
            for group in groups
            if group.last_epoch
        ),
        row_labels=Column("weights", "", "checkpoint"),
    )


def seeds_table(groups: Sequence[Group]) -> Table:
    """The last epoch of every run by itself, so that nothing hides behind a mean."""

    def row(run: Run) -> Row:
        best_robust = at(best, robust_on_test)(run)
        values = [Cell(decimal(quantity(run.last), places)) for _, quantity, places in MEASURES if run.last]
        ends = [MISSING if value is None else decimal(value) for value in (best_robust, drop(run))]
        return Row(str(run.seed), (*values, *map(Cell, ends)))

    return Table(
        label="The last epoch of every run",
        caption="The last epoch that each run recorded, unfinished runs included.",
        columns=(*(column for column, _, _ in MEASURES), Column("robust at best", "test, %", "checkpoint"), DROP),
        bodies=tuple(
            Body(group.name, group.series, tuple(row(run) for run in group.runs if run.epochs))
            for group in groups
            if group.last_epoch
        ),
        row_labels=Column("seed"),
    )


def _place(outcome: Outcome) -> tuple[str, str, int]:
    """Outcomes are averaged only over the same checkpoint, split and number of images."""
    return outcome.checkpoint, outcome.split, outcome.n


def outcome_table(groups: Sequence[Group]) -> Table | None:
    """Final evaluations: one row per group and checkpoint, one column per attack and its exact description."""
    found = [outcome for group in groups for run in group.finished for outcome in run.outcomes]
    attacks = list(dict.fromkeys((outcome.attack, outcome.description) for outcome in found))
    if not attacks:
        return None

    def value(runs: Sequence[Run], place: tuple[str, str, int], attack: tuple[str, str]) -> Cell:
        matching = {
            run.seed: outcome
            for run in runs
            for outcome in run.outcomes
            if _place(outcome) == place and (outcome.attack, outcome.description) == attack
        }
        shown = cell(Spread({s: 100 * o.accuracy for s, o in matching.items() if math.isfinite(o.accuracy)}))
        intervals = [outcome.interval for outcome in matching.values()]
        if len(intervals) == 1 and intervals[0]:
            return Cell(shown.mean, "[" + ", ".join(decimal(100 * end) for end in intervals[0]) + "]", shown.detail)
        return shown

    def rows(runs: Sequence[Run]) -> tuple[Row, ...]:
        counts: dict[tuple[str, str, int], set[int]] = {}
        for run in runs:
            for outcome in run.outcomes:
                counts.setdefault(_place(outcome), set()).add(run.seed)
        return tuple(
            Row(
                label=place[0],
                cells=(
                    Cell(str(len(seeds))),
                    Cell(f"{place[2]} {place[1]}"),
                    *(value(runs, place, a) for a in attacks),
                ),
            )
            for place, seeds in counts.items()
        )

    settings = list(dict.fromkeys(outcome.settings for outcome in found if outcome.settings))
    bodies = tuple(Body(group.name, group.series, rows(group.finished)) for group in groups)
    return Table(
        label="Final evaluation",
        caption="Accuracy in percent, mean ± sample standard deviation over seeds; where one run stands alone, "
        "its 95 % interval in brackets. " + " ".join(f"Settings: {text}." for text in settings),
        columns=(
            Column("n", "seeds", "seeds"),
            Column("images"),
            *(Column(name, "%", "clean" if name == "clean" else "robust", text) for name, text in attacks),
        ),
        bodies=tuple(body for body in bodies if body.rows),
        row_labels=Column("weights", "", "checkpoint"),
    )


def cost_table(groups: Sequence[Group]) -> Table:
    """Seconds per epoch of every run, totals of finished runs."""

    def mean_of(quantity: Callable[[Epoch], float]) -> Callable[[Run], float | None]:
        return lambda run: float(np.mean([quantity(epoch) for epoch in run.epochs])) if run.epochs else None

    def total(run: Run) -> float | None:
        return sum(epoch.seconds + epoch.evaluation_seconds for epoch in run.epochs) / 60 if run.epochs else None

    def row(group: Group, reference: float) -> Row:
        training = over_seeds(group.finished, mean_of(lambda epoch: epoch.seconds))
        evaluation = over_seeds(group.finished, mean_of(lambda epoch: epoch.evaluation_seconds))
        relative = training.mean / reference if reference > 0 else math.nan
        times = Cell(decimal(relative) + ("×" if math.isfinite(relative) else ""))
        counts = (Cell(str(training.n)), Cell(str(group.last_epoch)))
        return Row("", (*counts, cell(training), times, cell(evaluation), cell(over_seeds(group.finished, total))))

    measured = [group for group in groups if group.last_epoch]
    reference = over_seeds(measured[0].finished, mean_of(lambda epoch: epoch.seconds)).mean if measured else math.nan
    return Table(
        label="Cost",
        caption=f"Mean ± sample standard deviation over seeds. {machine_caption(groups)}",
        columns=(
            Column("n", "seeds", "seeds"),
            Column("epochs"),
            Column("training", "s per epoch", "seconds"),
            Column("relative", f"to {figures.shortened(measured[0].name, 24)}" if measured else ""),
            Column("evaluation", "s per epoch", "seconds"),
            Column("total", "min per run"),
        ),
        bodies=tuple(Body(group.name, group.series, (row(group, reference),)) for group in measured),
    )


@dataclass(frozen=True)
class Settings:
    """Rows of text, one column per group (or per set of runs)."""

    heads: tuple[str, ...]
    different: tuple[tuple[str, tuple[str, ...]], ...]
    common: tuple[tuple[str, str], ...]


def configuration(groups: Sequence[Group]) -> Settings:
    """Config rows: those in which groups differ, then those that all share."""
    settings = _settings([(group.name, [run.config for run in group.runs]) for group in groups])
    return replace(
        settings, different=tuple(row for row in settings.different if row[0] != "recipe")
    )  # the heads say it


def environments(groups: Sequence[Group]) -> Settings:
    return _settings([(group.name, [run.environment for run in group.runs]) for group in groups])


def _settings(columns: Sequence[tuple[str, Sequence[Mapping[str, str]]]]) -> Settings:
    merged = [_merged(tables) for _, tables in columns]
    different = differing(merged)
    keys = dict.fromkeys(key for table in merged for key in table)
    return Settings(
        heads=tuple(name for name, _ in columns),
        different=tuple((key, tuple(table.get(key, MISSING) for table in merged)) for key in different),
        common=tuple((key, merged[0][key]) for key in keys if key not in different),
    )


def _merged(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """One table for several: where they differ, all values, in order."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: " · ".join(dict.fromkeys(table.get(key, MISSING) for table in tables)) for key in keys}


# --- Captions and notes --------------------------------------------------------------------------------------------


def measurement_caption(groups: Sequence[Group]) -> str:
    """How the per-epoch numbers were taken: attack, images, mode."""
    runs = [run for group in groups for run in group.runs]
    attacks = _distinct(run.evaluation.get("attack") for run in runs)
    train = _distinct(str(epoch.train.n) for run in runs for epoch in run.epochs)
    test = _distinct(str(epoch.test.n) for run in runs for epoch in run.epochs)
    mode = _distinct(run.evaluation.get("mode") for run in runs)
    attack = f"Attack: {attacks}." if attacks else "The attack is not on record."
    images = f" n = {train} training and {test} test images." if train else ""
    return f"{attack}{images} Measured at the unperturbed weights w, {mode or 'eval'} mode, without augmentation."


def machine_caption(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    facts = (("device", "device"), ("processor", "processor"), ("cores", "cores"), ("threads", "threads"))
    known = [f"{name} {text}" for key, name in facts if (text := _distinct(run.environment.get(key) for run in runs))]
    return f"Measured on {', '.join(known)}." if known else "The machine is not on record."


def _distinct(texts: Iterable[str | None]) -> str:
    return " or ".join(dict.fromkeys(text for text in texts if text))


@dataclass(frozen=True)
class Note:
    text: str
    where: str


def notes(groups: Sequence[Group], given: int) -> list[Note]:
    """What is missing, damaged or not comparable, each thing once with the runs that it concerns."""
    runs = [(group, run) for group in groups for run in group.runs]
    concerned: dict[str, list[str]] = {}
    for group, run in runs:
        for text in (*run.notes, *_remarks(group, run)):
            concerned.setdefault(text, []).append(f"{group.name}, seed {run.seed}")
    everywhere = "every run" if len(runs) > 1 else "this run"
    listed = [
        Note(text, everywhere if len(set(names)) == len(runs) else "; ".join(dict.fromkeys(names)))
        for text, names in concerned.items()
    ]
    return listed + [Note(text, "the comparison") for text in _comparability(groups, given)]


def _remarks(group: Group, run: Run) -> list[str]:
    planned = [value for key, value in run.config.items() if key.rpartition(".")[2] == "epochs"]
    reached = run.last.number if run.last else 0
    skipped = sum(epoch.skipped for epoch in run.epochs)
    remarks = []
    if run.epochs and run not in group.finished:
        remarks.append(
            f"Stopped after epoch {reached} of {group.last_epoch}: drawn as thin lines and left out of all means"
        )
    elif run.epochs and len(planned) == 1 and planned[0].isdigit() and reached < int(planned[0]):
        remarks.append(f"Stopped after epoch {reached} of {planned[0]}")
    if run.epochs and not run.best:
        remarks.append("No epoch was chosen on a validation split: there is no best")
    if not all(math.isfinite(loss) for e in run.epochs for loss in (e.train.robust_loss, e.test.robust_loss)):
        remarks.append("A robust loss is not finite")
    if skipped:
        remarks.append(
            f"{_count(skipped, 'weight tensor')} had no usable ascent gradient and stayed unperturbed for a step"
        )
    if run.environment.get("git.dirty") == "yes":
        remarks.append("The working tree had uncommitted changes")
    return remarks


def _comparability(groups: Sequence[Group], given: int) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    measured = [group for group in groups if group.last_epoch]
    remarks = []
    if given > len(runs):
        remarks.append(
            f"{_count(given - len(runs), 'run')} of equal configuration and seed left out: the first given counts"
        )
    if len({group.last_epoch for group in measured}) > 1:
        ends = ", ".join(f"{group.name} at epoch {group.last_epoch}" for group in measured)
        remarks.append(f"The groups end at different epochs: {ends}")
    for key, what in (("attack", "measured with different attacks"), ("mode", "measured in different modes")):
        if len({run.evaluation[key] for run in runs if key in run.evaluation}) > 1:
            remarks.append(f"The epochs were {what}")
    for key, what in (
        ("git.commit", "different commits"),
        ("torch", "different versions of torch"),
        ("processor", "different processors"),
        ("device", "different devices"),
        ("threads", "different numbers of threads"),
    ):
        if len({run.environment[key] for run in runs if key in run.environment}) > 1:
            remarks.append(f"The runs come from {what}")
    return remarks


# --- Figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plate:
    """Figures side by side under one caption."""

    panels: tuple[Markup, ...]
    caption: str
    title: str = ""


def curves_plate(groups: Sequence[Group]) -> Plate | None:
    drawn = [_group_curves(group) for group in groups if group.last_epoch]
    if not drawn:
        return None
    limits = figures.shared_limits(drawn)
    panels = (
        figures.learning_curves(curves, limits=limits, identity=f"curves-{index}", description=_curve_words(curves))
        for index, curves in enumerate(drawn)
    )
    return Plate(
        tuple(map(Markup, panels)),
        "Accuracy against epoch; thick: mean over seeds, thin: each seed. Solid: robust accuracy on test. Dashed: "
        "robust accuracy on the training subset. The shaded area between them is the robust generalisation gap. "
        "Dotted: clean accuracy on test. A dot marks the best epoch of a seed, chosen on validation. All panels have "
        "the same axes. " + measurement_caption(groups),
    )


def _group_curves(group: Group) -> figures.GroupCurves:
    def curves(run: Run) -> figures.SeedCurves:
        return figures.SeedCurves(
            epochs=np.array([float(epoch.number) for epoch in run.epochs]),
            train_robust=np.array([robust_on_train(epoch) for epoch in run.epochs]),
            test_robust=np.array([robust_on_test(epoch) for epoch in run.epochs]),
            test_clean=np.array([clean_on_test(epoch) for epoch in run.epochs]),
            best_epoch=run.best.number if run.best else None,
            averaged=run in group.finished,
        )

    runs = [run for run in group.runs if run.epochs]
    attack = _distinct(run.evaluation.get("attack", "").partition(",")[0] for run in runs)
    end = runs[-1].epochs[-1]
    facts = (
        "accuracy in %",
        attack,
        _count(len(group.finished), "seed"),
        f"n = {end.train.n} train, {end.test.n} test",
    )
    note = " · ".join(fact for fact in facts if fact)
    return figures.GroupCurves(group.name, note, tuple(map(curves, runs)), group.series)


def _curve_words(group: figures.GroupCurves) -> str:
    epochs, (train, test, clean) = figures.mean_curves(group.seeds)
    if not len(epochs):
        return f"Learning curves of {group.name}: the runs have no epoch in common."
    return (
        f"Learning curves of {group.name}, mean over seeds: at epoch {epochs[-1]:.0f}, robust accuracy is "
        f"{train[-1]:.1f} % on the training subset and {test[-1]:.1f} % on test; "
        f"clean accuracy on test is {clean[-1]:.1f} %."
    )


def landscape_plates(groups: Sequence[Group]) -> tuple[list[Plate], list[Note]]:
    """One plate per checkpoint and split. A landscape on other alphas than the first cannot be averaged with it."""
    plates, left_out = [], []
    found = [(group, run, part) for group in groups for run in group.finished for part in run.landscapes]
    for index, place in enumerate(dict.fromkeys((part.checkpoint, part.split) for _, _, part in found)):
        here = [item for item in found if (item[2].checkpoint, item[2].split) == place]
        alphas = here[0][2].alphas
        fits = [part.alphas.shape == alphas.shape and np.allclose(part.alphas, alphas) for _, _, part in here]
        fitting = [item for item, fit in zip(here, fits, strict=True) if fit]
        left_out += [
            Note("A landscape has other alphas than the first and was left out", f"{group.name}, seed {run.seed}")
            for (group, run, _), fit in zip(here, fits, strict=True)
            if not fit
        ]
        plates.append(_landscape_plate(groups, fitting, f"landscape-{index}"))
    return plates, left_out


def _landscape_plate(groups: Sequence[Group], parts: Sequence[tuple[Group, Run, Landscape]], identity: str) -> Plate:
    drawn = []
    for group in groups:
        by_seed: dict[int, list[figures.Array]] = {}
        for owner, run, part in parts:
            if owner is group:
                by_seed.setdefault(run.seed, []).append(part.robust_loss)
        if by_seed:
            losses = tuple(np.concatenate(curves) for curves in by_seed.values())
            drawn.append(figures.GroupLandscape(group.name, parts[0][2].alphas, losses, group.series))
    note = f"n = {_distinct(str(part.n) for _, _, part in parts)} {parts[0][2].split} images"
    words = f"Robust loss along random directions in weight space: {'; '.join(map(_landscape_words, drawn))}."
    panels = (
        figures.landscape(
            drawn,
            centred=centred,
            note=note,
            identity=f"{identity}-{name}",
            description=f"{_upper(name)} curves. {words}",
        )
        for name, centred in (("centred", True), ("raw", False))
    )
    caption = _landscape_caption(drawn, [part for _, _, part in parts])
    return Plate(tuple(map(Markup, panels)), caption, f"Weights: {parts[0][2].checkpoint}")


def _landscape_words(group: figures.GroupLandscape) -> str:
    mean, _ = figures.mean_and_deviation(np.concatenate([x - figures.centre(group.alphas, x) for x in group.losses]))
    ends = [f"{decimal(float(mean[end]))} at α = {group.alphas[end]:g}" for end in (0, -1)]
    return f"{group.name}, {figures.origin(group)}, rises by {' and '.join(ends)}"


def _landscape_caption(drawn: Sequence[figures.GroupLandscape], parts: Sequence[Landscape]) -> str:
    def count(group: figures.GroupLandscape) -> str:
        directions = sorted({len(losses) for losses in group.losses})
        each = " or ".join(map(str, directions))
        return f"{group.name}: {_count(len(group.losses), 'seed')} × {each} direction{'' if directions == [1] else 's'}"

    alphas, first = parts[0].alphas, parts[0]
    names = {"direction": "direction", "attack": "attack", "batch_norm": "BatchNorm"}
    keys = dict.fromkeys([*names, *(key for part in parts for key in part.settings)])
    values = {key: _distinct(part.settings.get(key) for part in parts) or "not on record" for key in keys}
    settings = [f"{names.get(key, key)}: {value}" for key, value in values.items()]
    sizes = _distinct(str(part.n) for part in parts)
    return (
        f"Robust loss g(α) at w + α d on n = {sizes} {first.split} images, {len(alphas)} values of α from "
        f"{decimal(float(alphas[0]))} to {decimal(float(alphas[-1]))}. Line: mean over directions and seeds; band: one "
        f"sample standard deviation over all curves ({'; '.join(map(count, drawn))}). "
        f"g(0): mean over seeds. {_upper('; '.join(settings))}."
    )


# --- The page ------------------------------------------------------------------------------------------------------


def write_report(runs: Sequence[Path], path: Path, *, title: str | None = None) -> None:
    """Write one HTML file about these run folders, whole or not at all; a folder given twice counts once."""
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in runs))
    if not folders:
        raise ValueError("a report needs at least one run")
    _write_whole(Path(path), render([read_run(folder) for folder in folders], title=title))


def render(runs: Sequence[Run], *, title: str | None = None) -> str:
    """The page as text: equal records give an equal page."""
    groups = grouped(runs)
    plates, left_out = landscape_plates(groups)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title or default_title(groups),
        extent=f"{_count(len(groups), 'recipe')}, {_count(sum(len(group.runs) for group in groups), 'run')}",
        folders=[run.folder.name for group in groups for run in group.runs],
        headline=headline(groups),
        tables=[table for table in (accuracy_table(groups), outcome_table(groups)) if table and table.bodies],
        seeds=seeds_table(groups),
        curves=curves_plate(groups),
        landscapes=plates,
        cost=cost_table(groups),
        configuration=configuration(groups),
        environments=environments(groups),
        notes=notes(groups, len(runs)) + left_out,
        definitions=DEFINITIONS,
        light=dict(zip(figures.VARIABLES.values(), figures.VARIABLES, strict=True)),
    )


def default_title(groups: Sequence[Group]) -> str:
    names = [group.name for group in groups]
    return f"{names[1]} against {names[0]}" if len(names) == 2 else ", ".join(names)


def _write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a name read from JSON may hold half a surrogate pair
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
