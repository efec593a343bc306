"""The page's sentences, figures and tables for READMEs generated from records: Markdown, with SVG files beside it."""

import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path

from saltflat.lab.report.plates import curves_plate, landscape_plates
from saltflat.lab.report.runs import read_run
from saltflat.lab.report.statistics import Group, grouped
from saltflat.lab.report.tables import Table, accuracy_table, outcome_table, seeds_table
from saltflat.lab.report.words import headline


def summary(runs: Sequence[Path]) -> str:
    """What the runs show, in sentences, then figures (the files of `figures`), then every table of accuracies."""
    groups = _groups(runs)
    plates = [_shown(panels, caption, "") for panels, caption in _plates(groups)]
    tables = [as_markdown(make(groups)) for make in (accuracy_table, seeds_table, outcome_table)]
    return "\n\n".join([_sentences(groups), *plates, *tables])


def brief(runs: Sequence[Path], pictures: str) -> str:
    """The last figure, the sentences, and the table of means; `pictures` is the folder in which the figures lie."""
    groups = _groups(runs)
    plates = [_shown(panels, caption, f"{pictures}/") for panels, caption in _plates(groups)[-1:]]
    return "\n\n".join([*plates, _sentences(groups), as_markdown(accuracy_table(groups))])


def _shown(panels: Mapping[str, str], caption: str, pictures: str) -> str:
    return "\n".join([*(f"![{_words(svg)}]({pictures}{name}.svg)" for name, svg in panels.items()), "", caption])


def _words(svg: str) -> str:
    """What the figure says of itself to those who cannot see it."""
    found = re.search(r'aria-label="([^"]*)"', svg)
    return unescape(found[1]).translate({ord("["): "(", ord("]"): ")"}) if found else ""


def _sentences(groups: Sequence[Group]) -> str:
    return "\n".join(f"- {sentence.claim} {sentence.evidence}".rstrip() for sentence in headline(groups))


def figures(runs: Sequence[Path]) -> dict[str, str]:
    """The SVG text of every figure by its name, on a white ground so that it can be seen on any page."""
    return {name: _on_white(svg) for panels, _ in _plates(_groups(runs)) for name, svg in panels.items()}


def _on_white(svg: str) -> str:
    opened = svg.index(">", svg.index("<svg")) + 1
    return f'{svg[:opened]}<rect width="100%" height="100%" fill="#fff"/>{svg[opened:]}\n'


def _plates(groups: Sequence[Group]) -> list[tuple[dict[str, str], str]]:
    """Each plate as its panels by name, and its caption."""
    curves, landscapes = curves_plate(groups), landscape_plates(groups)
    plates = [("curves", curves)] if curves else []
    plates += [(f"landscape-{index}", plate) for index, plate in enumerate(landscapes)]
    return [({f"{name}-{i}": str(svg) for i, svg in enumerate(plate.panels)}, plate.caption) for name, plate in plates]


def _groups(runs: Sequence[Path]) -> list[Group]:
    return grouped([read_run(folder) for folder in runs])


def as_markdown(table: Table) -> str:
    """One Markdown table under its name, its caption below."""
    labels = [] if table.row_labels is None else [table.row_labels.text]
    units = [f"{column.text} ({column.unit})" if column.unit else column.text for column in table.columns]
    lines = [
        f"**{table.label}**",
        "",
        _row(["recipe", *labels, *units]),
        _row(["---"] * (1 + len(labels) + len(units))),
    ]
    for body in table.bodies:
        for row in body.rows:
            cells = [f"{cell.mean} {cell.spread}".strip() for cell in row.cells]
            lines.append(_row([body.name, *([row.label] if labels else []), *cells]))
    return "\n".join([*lines, "", table.caption])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
