"""The page's sentences and tables as Markdown, for READMEs that are generated from records."""

from collections.abc import Sequence
from pathlib import Path

from saltflat.lab.report.runs import read_run
from saltflat.lab.report.statistics import grouped
from saltflat.lab.report.tables import Table, accuracy_table, outcome_table, seeds_table
from saltflat.lab.report.words import headline


def summary(runs: Sequence[Path]) -> str:
    """What the runs show, in sentences, then every table of accuracies; ends with a newline."""
    groups = grouped([read_run(folder) for folder in runs])
    sentences = [f"- {sentence.claim} {sentence.evidence}".rstrip() for sentence in headline(groups)]
    tables = [as_markdown(make(groups)) for make in (accuracy_table, seeds_table, outcome_table)]
    return "\n\n".join(["\n".join(sentences), *tables]) + "\n"


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
