"""Pages about what a training is made of: every field of its config, and the recipes, which are configs with a name.

Types and bounds are read from the dataclasses, the meaning of a field, with its unit, from the text below it.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import griffe
from pydantic.fields import FieldInfo

from docs.api import prose, text
from docs.command_line import cell
from saltflat.lab import config
from saltflat.lab.config import MOST, Train, shown
from saltflat.lab.recipes import DATA, RECIPES, described

OPENING = """# Settings of a training

What `config.yaml` of a run holds, and what `saltflat train RECIPE --section.field VALUE` overrides: names are written
with hyphens there (`--data.validation-examples`), and a switch that is on is taken back by `no-` before its name
(`--data.no-stored`). Numbers may be fractions, such as 8/255; what is counted may not exceed a thousand million. The
defaults are those of a config that says nothing; those of a recipe are what the recipe says ([recipes](recipes.md)).
A config is checked whole before any work, fields that do not go together included: a refusal is one line that names
the field, the value and what is allowed."""

NAMES = """# Recipes

Each is a config with a name, for `saltflat train RECIPE`; every [setting](settings.md) can be overridden. Those of
the bundled digits run in seconds or minutes on a CPU, those of CIFAR and SVHN want a GPU; which of these were run to
the end stands under [limits](../../README.md#limits). Recipes named `...-official` reproduce what the official scripts
do besides: [differences](../differences.md). What the weight adversaries are: [the family](../family.md).

eps and step are in pixel units, images in [0, 1]; K1 counts steps of the attack, warm-up the epochs before AWP begins.
gamma is in the unit of its method ([settings](settings.md#awp))."""


def fields_page(root: griffe.Module) -> str:
    """Every section of a config, with a table of its fields."""
    sections = [field for field in dataclasses.fields(Train) if dataclasses.is_dataclass(_kind(Train, field.name))]
    pieces = [OPENING, "## Of the run", table(Train, "", root)]
    for section in sections:
        pieces += [f"## {section.name}", table(_kind(Train, section.name), f"{section.name}.", root)]
    return "\n\n".join(pieces) + "\n"


def table(section: type[Any], prefix: str, root: griffe.Module) -> str:
    """Name, default, what is allowed, and meaning."""
    rows = ["| field | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(section):
        kind = _kind(section, field.name)
        if dataclasses.is_dataclass(kind) or field.name == "recipe":
            continue
        meaning = text(root["lab.config"][section.__name__][field.name])
        cells = f"`{prefix}{field.name}`", _default(field), allowed(kind), meaning.replace("\n", " ")
        rows.append("| " + " | ".join(cell(words) for words in cells) + " |")
    return "\n".join(rows)


def allowed(kind: Any) -> str:
    """What a field may hold, in words.

    >>> allowed(config.Count), allowed(config.Share), allowed(bool), allowed(Path | None)
    ('a whole number >= 1', 'a number >= 0 and <= 1', '`true` or `false`', 'a path, or none')
    """
    if get_origin(kind) is Annotated:
        base, *marks = get_args(kind)
        bounds = [bound for mark in marks if isinstance(mark, FieldInfo) for bound in mark.metadata]
        return allowed(base) + _within(bounds)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return ", or ".join(allowed(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of: {allowed(get_args(kind)[0])}"
    plain = {bool: "`true` or `false`", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return plain.get(kind, "none")


def _within(bounds: list[Any]) -> str:
    found = {sign: getattr(bound, name) for bound in bounds for name, sign in SIGNS.items() if hasattr(bound, name)}
    limits = [f"{sign} {limit}" for sign, limit in found.items() if limit != MOST]
    return f" {' and '.join(limits)}" if limits else ""


SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _kind(section: type[Any], name: str) -> Any:
    return get_type_hints(section, vars(config), include_extras=True)[name]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is None or value == ():
        return ""
    written = str(value).lower() if isinstance(value, bool) else shown(value) if isinstance(value, float) else value
    return f"`{written}`"


def recipes_page() -> str:
    """A table of recipes for each data set."""
    pieces = [NAMES]
    for data, called in DATA.items():
        own = {name: of for name, of in RECIPES.items() if of.data.name == data}
        pieces += [f"## {called[0].upper()}{called[1:]}", "\n".join(_recipes(own))]
    return "\n\n".join(pieces) + "\n"


def _network(of: Train) -> str:
    size = f"-{of.model.depth}-{of.model.widen_factor}" if of.model.name == "wide-resnet" else ""
    return of.model.name + size


COLUMNS: dict[str, Callable[[Train], object]] = {
    "what it is": lambda of: prose(described(of)),
    "network": _network,
    "beta": lambda of: "" if of.objective.name in ("at", "natural") else f"{of.objective.beta:g}",
    "eps": lambda of: shown(of.attack.eps),
    "step": lambda of: shown(of.attack.step_size),
    "K1": lambda of: "" if of.attack.replays else of.attack.steps,
    "warm-up": lambda of: of.awp.warmup or "",
    "batch": lambda of: of.optimizer.batch_size,
    "learning rate": lambda of: f"{of.optimizer.learning_rate:g}, {of.optimizer.schedule}",
}


def _recipes(own: dict[str, Train]) -> Iterator[str]:
    yield f"| recipe | {' | '.join(COLUMNS)} |"
    yield "| --- |" + " --- |" * len(COLUMNS)
    for name, of in own.items():
        yield f"| `{name}` | " + " | ".join(cell(str(made(of))) for made in COLUMNS.values()) + " |"
