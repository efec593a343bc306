"""The page's sentences, figures and tables for READMEs generated from records: Markdown, with SVG files beside it."""

import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path

from saltflat.lab.report.flatness import flatness_table
from saltflat.lab.report.lines import line_plates
from saltflat.lab.report.planes import plane_plates
from saltflat.lab.report.plates import Plate, curves_plate
from saltflat.lab.report.runs import read_run
from saltflat.lab.report.spectra import spectrum_plates
from saltflat.lab.report.statistics import Group, grouped
from saltflat.lab.report.tables import Table, accuracy_table, outcome_table, seeds_table
from saltflat.lab.report.words import headline


def summary(runs: Sequence[Path]) -> str:
    """What the runs show, in sentences, then figures (the files of `figures`), then every table of accuracies."""
    groups = _groups(runs)
    plates = [shown(_panels(name, plate), plate.caption, "") for name, plate in _plates(groups)]
    tables = [accuracy_table(groups), seeds_table(groups), outcome_table(groups)]
    tables += [table for table in (flatness_table(groups),) if table.bodies]
    return "\n\n".join([_sentences(groups), *plates, *map(as_markdown, tables)])


def brief(runs: Sequence[Path], pictures: str) -> str:
    """The first two panels of one plate, the sentences, and the table of means; the figures lie in `pictures`.

    The plate is that of the last landscape along lines, or the learning curves if there is none.
    """
    groups = _groups(runs)
    plates = [named for named in _plates(groups) if not named[0].startswith(("plane", "spectrum"))][-1:]
    first = [shown(dict(list(_panels(*named).items())[:2]), named[1].caption, f"{pictures}/") for named in plates]
    return "\n\n".join([*first, _sentences(groups), as_markdown(accuracy_table(groups))])


def shown(panels: Mapping[str, str], caption: str, pictures: str) -> str:
    """The figures of `panels`, SVG text by name, whose files lie in `pictures`, and their caption."""
    return "\n".join([*(f"![{_words(svg)}]({pictures}{name}.svg)" for name, svg in panels.items()), "", caption])


def _words(svg: str) -> str:
    """What the figure says of itself to those who cannot see it."""
    found = re.search(r'aria-label="([^"]*)"', svg)
    return unescape(found[1]).translate({ord("["): "(", ord("]"): ")"}) if found else ""


def _sentences(groups: Sequence[Group]) -> str:
    return "\n".join(f"- {sentence.claim} {sentence.evidence}".rstrip() for sentence in headline(groups))


def figures(runs: Sequence[Path]) -> dict[str, str]:
    """The SVG text of every figure by its name, on a white ground so that it can be seen on any page."""
    panels = [_panels(*named) for named in _plates(_groups(runs))]
    return {name: on_white(svg) for plate in panels for name, svg in plate.items()}


def on_white(svg: str) -> str:
    """The figure on a white ground, so that it can be seen on any page."""
    opened = svg.index(">", svg.index("<svg")) + 1
    return f'{svg[:opened]}<rect width="100%" height="100%" fill="#fff"/>{svg[opened:]}\n'


def _plates(groups: Sequence[Group]) -> list[tuple[str, Plate]]:
    """Every plate by its name."""
    curves = curves_plate(groups)
    named = [("curves", curves)] if curves else []
    named += [(f"landscape-{index}", plate) for index, plate in enumerate(line_plates(groups))]
    named += [(f"plane-{index}", plane.plate) for index, plane in enumerate(plane_plates(groups))]
    return named + [(f"spectrum-{index}", plate) for index, plate in enumerate(spectrum_plates(groups))]


def _panels(name: str, plate: Plate) -> dict[str, str]:
    return {f"{name}-{index}": str(svg) for index, svg in enumerate(plate.panels)}


def _groups(runs: Sequence[Path]) -> list[Group]:
    return grouped([read_run(folder) for folder in runs])


def as_markdown(table: Table) -> str:
    """One Markdown table under its name, its caption below."""
    labels = [] if table.row_labels is None else [table.row_labels.text]
    units = [f"{column.text} ({column.unit})" if column.unit else column.text for column in table.columns]
    lines = [
        f"**{table.label}**",
        "",
        _row([table.corner, *labels, *units]),
        _row(["---"] * (1 + len(labels) + len(units))),
    ]
    for body in table.bodies:
        name = f"{body.name} ({body.detail})" if body.detail else body.name
        for row in body.rows:
            cells = [f"{cell.mean} {cell.spread}".strip() for cell in row.cells]
            lines.append(_row([name, *([row.label] if labels else []), *cells]))
    return "\n".join([*lines, "", table.caption])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
