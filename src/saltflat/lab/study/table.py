"""The table of the study: one row per trained model, and what was fixed before anything was measured.

Fixed in advance: the sign that the association of every measure with the gap is expected to have, and the floor of
training accuracy below which a model is undertrained (and so flat without deserving it).

As JSON: names, text and numbers; null where a value is missing. A missing or non-finite number is nan in columns.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saltflat.lab.config import BadInput
from saltflat.lab.record import unsealed, write_json
from saltflat.lab.study.association import Array
from saltflat.lab.study.granulation import Value

Numbers = Mapping[str, float | None]
Part = Literal["targets", "controls", "measures", "errors", "again"]
GAP_LOSS, GAP_ACCURACY, NEGATIVE = TARGETS = ("gap_loss", "gap_accuracy", "test_robust_accuracy")
TRAIN_LOSS, TRAIN_ACCURACY, WEIGHT_NORM = CONTROLS = ("train_robust_loss", "train_robust_accuracy", "weight_norm")


@dataclass(frozen=True)
class Measure:
    """A measure of flatness. `sign`: +1 if more of it should go with a larger gap (sharpness), −1 if less (a width), 0
    for what is no flatness but has to be beaten by it (a norm): a control.
    """

    name: str
    unit: str
    settings: str
    sign: int

    def __post_init__(self) -> None:
        if self.sign not in (-1, 0, 1):
            raise ValueError(f"sign: expected +1, -1 or 0 for measure {self.name!r}, got {self.sign!r}")


@dataclass(frozen=True)
class Model:
    """One trained model. Checkpoints of one run share its `cluster`.

    `method`: what it was trained by, in a word. `axes`: hyper-parameters, "seed" among them where known. `targets`:
    gap_loss (nats, test − train robust loss), gap_accuracy (points, train − test robust accuracy),
    test_robust_accuracy (%). `controls`: train_robust_loss (nats), train_robust_accuracy (%), weight_norm. `measures`,
    their standard `errors`, and the same measured `again` with other draws, by the names of the table's measures.
    """

    name: str
    cluster: str
    method: str
    axes: Mapping[str, Value]
    targets: Numbers
    controls: Numbers
    measures: Numbers
    errors: Numbers = field(default_factory=dict)
    again: Numbers = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """`floor`: training robust accuracy, %, below which a model is undertrained. `settings`: how targets and controls
    were measured, in words."""

    title: str
    measures: tuple[Measure, ...]
    models: tuple[Model, ...]
    floor: float
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [measure.name for measure in self.measures]
        for what, names in (("measures", known), ("models", [model.name for model in self.models])):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{what}: expected names that are unique, got {twice!r} twice")
        allowed: dict[str, Sequence[str]] = {
            "targets": TARGETS,
            "controls": CONTROLS,
            "measures": known,
            "errors": known,
            "again": known,
        }
        for model in self.models:
            for part, expected in allowed.items():
                for name in getattr(model, part):
                    if name not in expected:
                        raise ValueError(f"{part}: expected one of {list(expected)}, got {name!r} of {model.name!r}")

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of their first models, which is the order of their colours."""
        return tuple(dict.fromkeys(model.method for model in self.models))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of all hyper-parameters, in the order of their first appearance."""
        return tuple(dict.fromkeys(name for model in self.models for name in model.axes))

    def undertrained(self, model: Model) -> bool:
        """Whether its training robust accuracy is below the floor; one that is not on record is not."""
        return number(model.controls.get(TRAIN_ACCURACY)) < self.floor


def number(value: float | None) -> float:
    """A value as a number, nan for one that is missing or infinite.

    >>> number(None), number(float("inf")), number(2)
    (nan, nan, 2.0)
    """
    return float(value) if value is not None and math.isfinite(value) else math.nan


def column(models: Sequence[Model], part: Part, name: str) -> Array:
    """One quantity of all models, (n,)."""
    return np.array([number(getattr(model, part).get(name)) for model in models], dtype=np.float64)


def as_record(table: Table) -> dict[str, Any]:
    """The table as plain JSON."""
    record = plain(asdict(table))
    assert isinstance(record, dict)
    return record


def plain(value: Any) -> Any:
    """Mappings, lists, text and numbers as JSON has them: no tuple, and null for what is not finite.

    >>> plain({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_record(record: Mapping[str, Any]) -> Table:
    """The table that `as_record` gave; ValueError, TypeError or KeyError if it is none."""
    fields = dict(record)
    measures: Iterable[Any] = fields.pop("measures")
    models: Iterable[Any] = fields.pop("models")
    return Table(
        measures=tuple(Measure(**measure) for measure in measures),
        models=tuple(Model(**model) for model in models),
        **fields,
    )


def write_table(table: Table, path: Path) -> None:
    """Whole or not at all."""
    write_json(path, as_record(table))


def read_table(path: Path) -> Table:
    """BadInput if the file is no whole table."""
    try:
        return from_record(unsealed(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"table: {str(path)!r} is no table of a study ({error})") from None
