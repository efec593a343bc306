"""A run folder: what it holds, and how it is read.

    config.yaml          what was asked for; a folder without it is no run
    environment.json     the machine and the versions
    evaluation.json      how every epoch was measured
    metrics.jsonl        one line per epoch
    outcomes/*.json      final evaluations
    examples/*.json      images that an attack fooled
    landscapes/*.json    weight loss landscapes, along lines and over planes
    flatness/*.json      measures of flatness

Everything but the config may be missing or damaged: that becomes a note, and nothing is guessed in its place.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, Strict, TypeAdapter

from saltflat.lab.config import BadInput, Train, as_text, read_yaml
from saltflat.lab.record import DECIDES, read_config, unsealed
from saltflat.lab.report.fooled import Examples, read_examples
from saltflat.lab.report.landscapes import Line, Plane, read_landscape
from saltflat.lab.report.rows import flattened

# What reading a file raises when its content isn't what was promised.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
Part = TypeVar("Part")


# JSON has no nan, so a writer may have put null in its place.
Number = Annotated[float, Strict(), BeforeValidator(lambda value: math.nan if value is None else value)]
Eigenvalue = Annotated[float, Strict(), Field(ge=-1e100, le=1e100)]  # finite, and so are differences and squares
Mass = Annotated[float, Strict(), Field(ge=0.0, allow_inf_nan=False)]
Rows = Annotated[dict[str, str], BeforeValidator(lambda tree: flattened(tree or {}))]


@dataclass(frozen=True)
class Measured:
    """One split at one epoch, at the weights w; accuracies are fractions, the loss is in nats."""

    n: int
    clean_accuracy: Number
    robust_accuracy: Number
    robust_loss: Number


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl; times in seconds, the properties in percent and percentage points."""

    number: Annotated[int, Field(alias="epoch")]
    train: Measured
    test: Measured
    seconds: Number = math.nan
    evaluation_seconds: Number = math.nan
    skipped: int | None = 0
    dropped: int | None = 0
    best: bool | None = False
    collapsed: bool | None = False

    @property
    def clean(self) -> float:
        """Clean accuracy on test."""
        return 100 * self.test.clean_accuracy

    @property
    def robust(self) -> float:
        """Robust accuracy on test."""
        return 100 * self.test.robust_accuracy

    @property
    def robust_train(self) -> float:
        """Robust accuracy on the training subset."""
        return 100 * self.train.robust_accuracy

    @property
    def gap(self) -> float:
        """Robust generalisation gap."""
        return 100 * (self.train.robust_accuracy - self.test.robust_accuracy)

    @property
    def loss_gap(self) -> float:
        """Robust loss on test minus that on the training subset, in nats."""
        return self.test.robust_loss - self.train.robust_loss


@dataclass(frozen=True)
class Attacked:
    """What one attack left of the accuracy; accuracy and interval are fractions."""

    name: str
    accuracy: Number
    description: str = ""
    interval: tuple[Number, Number] | None = None


@dataclass(frozen=True)
class Outcome:
    """A final evaluation: several attacks on one checkpoint."""

    checkpoint: str
    split: str
    n: int
    attacks: tuple[Attacked, ...]
    settings: Rows = field(default_factory=dict)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues as atoms, in nats / weight²: `nodes` of mass `weights`, a row of equally many for every run."""

    nodes: tuple[tuple[Eigenvalue, ...], ...]
    weights: tuple[tuple[Mass, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(run) for run in (*self.nodes, *self.weights)}
        if len(self.nodes) != len(self.weights) or len(lengths) != 1 or 0 in lengths:
            raise ValueError("nodes and weights do not fit")
        if not all(math.isclose(math.fsum(run), 1.0, rel_tol=1e-6) for run in self.weights):
            raise ValueError("the weights of every run sum to 1")


@dataclass(frozen=True)
class Measure:
    """One measure of flatness; the standard error is that of the measurement itself, from images and draws.

    `starts`: of a maximum, the rise that was found from each start of the search; how far they differ says how far it
    is to be trusted. `note`: why it was not, or only partly, measured. `spectrum`: what a density was made of.
    """

    name: str
    value: Number
    unit: str = ""
    settings: str = ""
    standard_error: Number = math.nan
    seconds: Number = math.nan
    starts: tuple[Number, ...] = ()
    note: str | None = None
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class Flatness:
    """Measures of flatness at one checkpoint."""

    checkpoint: str
    split: str
    n: int
    measures: tuple[Measure, ...]
    settings: Rows = field(default_factory=dict)


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
    examples: tuple[Examples, ...]
    lines: tuple[Line, ...]
    planes: tuple[Plane, ...]
    flatness: tuple[Flatness, ...]
    notes: tuple[str, ...]

    @property
    def last(self) -> Epoch | None:
        """The last epoch on record."""
        return self.epochs[-1] if self.epochs else None

    @property
    def best(self) -> Epoch | None:
        """Every epoch that beat those before it on validation was marked when written: the latest mark counts."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.best), None)

    @property
    def planned(self) -> int:
        """How many epochs were asked for, 0 if that is not on record."""
        found = re.fullmatch(r"[0-9]{1,9}", self.config.get("optimizer.epochs", ""))
        return int(found[0]) if found else 0

    @property
    def reached(self) -> int:
        """Number of the last epoch on record, 0 if there is none."""
        return self.last.number if self.last else 0


def read_run(folder: Path) -> Run:
    """The run in `folder`; BadInput if it is none. Any other missing or broken part becomes a note."""
    folder = Path(folder)
    config = _read_config(folder)
    notes: list[str] = []
    landscapes = _read_parts(folder / "landscapes", read_landscape, notes, "No weight loss landscape")
    return Run(
        folder=folder,
        label=config["recipe"],
        seed=config["seed"],
        config=flattened(_completed(read_yaml(as_text(Train()), "config"), config)),
        environment=_read_rows(folder / "environment.json", notes, "the machine and versions are unknown"),
        evaluation=_read_rows(folder / "evaluation.json", notes, "the attack at each epoch is not stated"),
        epochs=_read_epochs(folder / "metrics.jsonl", notes),
        outcomes=_read_parts(
            folder / "outcomes", TypeAdapter(Outcome).validate_json, notes, "No final evaluation: run saltflat evaluate"
        ),
        examples=_read_parts(folder / "examples", read_examples, notes, ""),
        lines=tuple(part for part in landscapes if isinstance(part, Line)),
        planes=tuple(part for part in landscapes if isinstance(part, Plane)),
        flatness=_read_parts(folder / "flatness", TypeAdapter(Flatness).validate_json, notes, ""),
        notes=tuple(notes),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = read_yaml(text, "config.yaml")
    except DAMAGE as error:
        raise BadInput(f"{folder}: no run, config.yaml cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{folder}: no run, config.yaml must hold named fields")
    for name, kind in (("recipe", str), ("seed", int)):
        if type(config.get(name)) is not kind:
            raise BadInput(f"{folder}: no run, config.yaml: {name} must be {kind.__name__}, got {config.get(name)!r}")
    if text.startswith(DECIDES):
        read_config(folder)  # which refuses one that was changed
    return config


def _completed(usual: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A config with today's default for every field that its version did not have.

    >>> _completed({"awp": {"gamma": 0.0, "every": 1}}, {"awp": {"gamma": 0.01}})
    {'awp': {'gamma': 0.01, 'every': 1}}
    """
    found = usual | own
    for name, section in usual.items():
        if isinstance(section, dict) and isinstance(own.get(name), dict):
            found[name] = section | own[name]
    return found


def _read_rows(path: Path, notes: list[str], consequence: str) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return flattened(unsealed(content))
        problem = "No named fields in"
    except FileNotFoundError:
        problem = "No"
    except DAMAGE:
        problem = "Unreadable"
    notes.append(f"{problem} {path.name}: {consequence}")
    return {}


def _read_epochs(path: Path, notes: list[str]) -> tuple[Epoch, ...]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        notes.append("No metrics.jsonl: no per-epoch measurements")
        return ()
    epochs: dict[int, Epoch] = {}
    read = TypeAdapter(Epoch).validate_json
    for number, line in enumerate(lines, 1):
        try:
            epoch = read(_whole(line))
        except DAMAGE:
            last = number == len(lines)
            damage = "The last line of metrics.jsonl is cut" if last else f"Line {number} of metrics.jsonl is damaged"
            notes.append(f"{damage} and was skipped")
            continue
        if epoch.number in epochs:
            notes.append(f"Epoch {epoch.number} stands twice in metrics.jsonl: the later line counts")
        epochs[epoch.number] = epoch
    if not epochs:
        notes.append("No epoch in metrics.jsonl: no per-epoch measurements")
    return tuple(epochs[number] for number in sorted(epochs))


def _read_parts(folder: Path, read: Callable[[bytes], Part], notes: list[str], if_none: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    paths = sorted(folder.glob("*.json"))
    for path in paths:
        try:
            content = _whole(path.read_bytes())
            if _is_of_other_weights(folder.parent / "checkpoints", json.loads(content)):
                notes.append(f"Left out, since its checkpoint holds other weights now: {folder.name}/{path.name}")
            else:
                parts.append(read(content))
        except DAMAGE:
            notes.append(f"A damaged file was skipped: {folder.name}/{path.name}")
    if not paths and if_none:
        notes.append(if_none)
    return tuple(parts)


def _is_of_other_weights(checkpoints: Path, record: dict[str, Any]) -> bool:
    """Whether what a finding was measured on has been overwritten since, as by a training that went on."""
    file, known = checkpoints / f"{record.get('checkpoint')}.safetensors", record.get("sha256")
    return isinstance(known, str) and file.is_file() and _digest(file, file.stat().st_mtime_ns) != known


@lru_cache(maxsize=1024)
def _digest(file: Path, changed: int) -> str:
    """As `lab.checkpoints.digest`, once for each time that the file was changed at."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _whole(content: bytes) -> bytes:
    """The same JSON; ValueError if it is not what was written."""
    unsealed(json.loads(content))
    return content
