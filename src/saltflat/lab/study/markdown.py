"""The gap study's sentences, figures and table for READMEs generated from a record: Markdown, with SVG files beside it.

A record of a study holds its table.json; everything shown is a function of that.
"""

from dataclasses import replace
from pathlib import Path

from saltflat.lab.report.markdown import as_markdown, on_white, shown
from saltflat.lab.report.plates import Plate
from saltflat.lab.study.findings import Findings, findings
from saltflat.lab.study.plates import confounder_plate, forest_plate, scatter_plate
from saltflat.lab.study.table import Table, read_table
from saltflat.lab.study.tables import association_table
from saltflat.lab.study.words import headline, left_out

DRAWN = ("average case", "landscape area")  # measures whose scatters are shown


def summary(record: Path) -> str:
    """What the study found, in sentences, then figures (the files of `figures`), the table, and what was left out."""
    table, found = _read(record)
    plates = [shown(panels, plate.caption, "") for panels, plate in _plates(table, found)]
    notes = "\n".join(f"- {note.claim}: {note.evidence}" for note in left_out(table, found))
    return "\n\n".join([_sentences(found), *plates, as_markdown(association_table(found)), notes])


def brief(record: Path, pictures: str) -> str:
    """The sentences, and the figure of all measures, which lies in `pictures`."""
    table, found = _read(record)
    panels, plate = _plates(table, found)[0]
    return "\n\n".join([_sentences(found), shown(panels, plate.caption, f"{pictures}/")])


def figures(record: Path) -> dict[str, str]:
    """The SVG text of every figure by its name, on a white ground so that it can be seen on any page."""
    return {name: on_white(svg) for panels, _ in _plates(*_read(record)) for name, svg in panels.items()}


def _read(record: Path) -> tuple[Table, Findings]:
    table = read_table(record / "table.json")
    return table, findings(table)


def _sentences(found: Findings) -> str:
    return "\n".join(f"- {' '.join(filter(None, (one.claim, one.evidence)))}" for one in headline(found))


def _plates(table: Table, found: Findings) -> list[tuple[dict[str, str], Plate]]:
    """Every measure's tau; the confounder; and two measures against the gap, chosen before anything was measured."""
    plates = [("forest", forest_plate(found)), ("confounder", confounder_plate(table, found))]
    some = replace(found, measures=tuple(one for one in found.measures if one.measure.name in DRAWN))
    plates.append(("scatter", scatter_plate(table, some)))
    return [({f"{name}-{i}": str(svg) for i, svg in enumerate(plate.panels)}, plate) for name, plate in plates if plate]
