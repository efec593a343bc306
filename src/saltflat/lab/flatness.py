"""The job behind `saltflat flatness`: measures of one network, each written down as soon as it is done.

flatness/NAME.part   measures that are done; what goes on after a kill
flatness/NAME.json   all of them, and the settings that they share, written last

Processes that torchrun started share out the work, and the first of them writes; any number of them goes on from what
any other number left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from saltflat import parallel
from saltflat.evaluation.suite import prepared
from saltflat.lab import once, record
from saltflat.lab.config import BadInput
from saltflat.lab.console import CONSOLE, progress, say
from saltflat.lab.measures import DEFINITIONS, INSIDE, LONGEST, MEASURES, Found, How, Shown, Spectrum
from saltflat.lab.precision import exact
from saltflat.lab.subjects import Subject, identity, place, up_to


@exact()
def flatness(of: Subject, names: Sequence[str], how: How) -> dict[str, Any]:
    """Measured and written down; what was asked before, of the same weights, is read, what was interrupted goes on."""
    check(names)
    x, y, _ = up_to(of, how.split, how.examples)
    x = prepared(x, of.model)
    shown = Shown(of.model, x, y.to(x.device), of.threat.pgd(how.steps), how, of.initial)
    asked = {
        **identity(of, shown.x, shown.y),
        "split": how.split,
        "n": len(y),
        "definitions": DEFINITIONS,
        "settings": {
            "attack": f"{of.threat.pgd_in_words(how.steps)}, starts per example",
            "batch_norm": "eval mode",
            "weights": of.weights,
            **{name: value for name, value in asdict(how).items() if name not in ("split", "examples", "steps")},
        },
    }
    path = place(of, "flatness", how.split, {**asked, "measures": list(names)})
    if there := parallel.first(lambda: _read_whole(path) if path.is_file() else None):
        return there
    with once.alone(path.with_suffix(".lock")):
        return _measured(of, shown, names, asked, path)


def _measured(of: Subject, shown: Shown, names: Sequence[str], asked: dict[str, Any], path: Path) -> dict[str, Any]:
    part = path.with_suffix(".part")
    done: dict[str, list[dict[str, Any]]] = parallel.first(lambda: _read(part, names) if part.is_file() else {})
    if done:
        say(f"goes on after {', '.join(done)}: {part}")
    with progress() as bar:
        task = bar.add_task("flatness", total=len(names), completed=len(done))
        for some in _turns([name for name in names if name not in done]):
            bar.update(task, description=f"{', '.join(some)} of {of.folder.absolute().name}")
            work = partial(_rows, shown)
            rows = list(map(work, some)) if some[0] in INSIDE else parallel.shared_out(some, work)
            done |= dict(zip(some, rows, strict=True))
            parallel.first(partial(record.write_json, part, {"done": done}))
            bar.advance(task, len(some))

    def written() -> dict[str, Any]:
        summary = {**asked, "measures": [row for name in names for row in done[name]]}
        record.write_json(path, summary)
        part.unlink(missing_ok=True)
        return summary

    return parallel.first(written)


def _turns(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """What is measured at once: one measure that is shared inside, or one of each process."""
    width = parallel.ranks()
    if width == 1:
        yield from ([name] for name in names)
        return
    apart = [name for name in names if name not in INSIDE]
    apart.sort(key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))  # nobody waits long
    yield from (apart[i : i + width] for i in range(0, len(apart), width))
    yield from ([name] for name in names if name in INSIDE)


def _rows(shown: Shown, name: str) -> list[dict[str, Any]]:
    began = time.perf_counter()
    found = MEASURES[name](shown)
    seconds = round(time.perf_counter() - began, 2)
    return [_row(each) | {"seconds": seconds} for each in found]


def check(names: Sequence[str]) -> None:
    """BadInput for a name that stands for nothing, or repeats."""
    if strange := [name for name in names if name not in MEASURES]:
        raise BadInput(f"measures: expected any of {', '.join(MEASURES)}, got {strange[0]!r}")
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise BadInput(f"measures: expected each once, got {repeated[0]!r} again")


def _read_whole(path: Path) -> dict[str, Any]:
    found = record.read_again(path)
    if not _are_rows(found.get("measures")):
        raise BadInput(f"flatness: {path} is no whole measurement; delete it to begin anew")
    return found


def _read(part: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The measures that are done, by name."""
    done = record.read_again(part).get("done")
    if not isinstance(done, dict) or not done.keys() <= set(names) or not all(map(_are_rows, done.values())):
        raise BadInput(f"flatness: {part} is no part of this measurement; delete it to begin anew")
    return done


def _are_rows(rows: Any) -> bool:
    names = {each.name for each in fields(Found)} | {"seconds"}
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() == names for row in rows)


def _row(found: Found) -> dict[str, Any]:
    """As JSON, which knows no NaN and no infinity: what is not finite is null, and the note says so."""
    starts = [value if math.isfinite(value) else None for value in found.starts]
    row = asdict(found) | {"starts": starts, "spectrum": _atoms(found.spectrum)}
    for name in ("value", "standard_error"):
        row[name] = row[name] if math.isfinite(row[name]) else None
    if row["value"] is None:
        row["note"] = f"{found.value:g}".replace("nan", "not a number") + (f"; {found.note}" if found.note else "")
    return row


def _atoms(spectrum: Spectrum | None) -> dict[str, list[list[float]]] | None:
    if spectrum is None or not all(map(math.isfinite, chain(*spectrum.nodes, *spectrum.weights))):
        return None
    return {"nodes": list(map(list, spectrum.nodes)), "weights": list(map(list, spectrum.weights))}


def show(of: Subject, summary: dict[str, Any]) -> None:
    """A table in the terminal, then what is to be said of single measures; the settings of each are on the page."""
    title = f"{of.folder}: {summary['checkpoint']} checkpoint, {summary['split']} split, n = {summary['n']}"
    table = Table("measure", "value", "standard error", "unit", title=title)
    for row in summary["measures"]:
        value, error = (("–" if row[name] is None else f"{row[name]:.4g}") for name in ("value", "standard_error"))
        table.add_row(row["name"], value, error, row["unit"])
    CONSOLE.print(table)
    for row in summary["measures"]:
        if row["starts"]:
            starts = ", ".join("–" if value is None else f"{value:.4g}" for value in row["starts"])
            say(f"{row['name']}, from each start: {starts}")
        if row["note"]:
            say(f"{row['name']}: {row['note']}")
