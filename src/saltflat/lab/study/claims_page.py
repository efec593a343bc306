"""The page of the study of the paper's claims: one offline HTML file, a function of the results of its runs.

It holds no script and no address outside itself; names out of results are escaped. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saltflat.lab.record import replacing
from saltflat.lab.report.drawing import VARIABLES
from saltflat.lab.report.notation import counted
from saltflat.lab.report.page import templates
from saltflat.lab.report.rows import flattened
from saltflat.lab.report.statistics import differing
from saltflat.lab.study.claims_plates import plates, threats
from saltflat.lab.study.claims_results import Group
from saltflat.lab.study.claims_tables import by_question, columns, differences_table, reached_table
from saltflat.lab.study.claims_words import headline

TEMPLATE = Path(__file__).with_name("claims.html.j2")


def write(groups: Sequence[Group], title: str, out: Path) -> Path:
    """Write claims.html into a folder, whole or not at all; returns its path."""
    path = out / "claims.html"
    with replacing(path) as temporary:
        temporary.write_bytes(render(groups, title).encode("utf-8", "replace"))
    return path


def render(groups: Sequence[Group], title: str) -> str:
    """The page as text: equal results give an equal page."""
    runs = [run for group in groups for run in group.runs]
    return (
        templates(TEMPLATE.parent)
        .get_template(TEMPLATE.name)
        .render(  # the style is the report's
            title=title,
            extent=f"{counted(len(groups), 'arm')}, {counted(len(runs), 'run')}",
            headline=headline(groups),
            plates=plates(groups),
            questions=[
                (question, reached_table(arms), differences_table(some) if some else None)
                for question, arms, some in by_question(groups)
            ],
            settings=settings(groups),
            missing=missing(groups),
            variables=VARIABLES,
        )
    )


def missing(groups: Sequence[Group]) -> list[str]:
    """Runs without numbers, seeds that others have, and numbers that are not finite."""
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({run.seed for run in runs})
    absent = [
        f"{group.arm}, seed {seed}: not trained"
        for group in groups
        for seed in seeds
        if seed not in {run.seed for run in group.runs}
    ]
    holes = [
        f"{run.arm}, seed {run.seed}: no {column.text}"
        for run in runs
        for column, quantity, _ in columns(run)
        if not run.note and quantity(run) is None
    ]
    return [f"{run.arm}, seed {run.seed}: {run.note}" for run in runs if run.note] + absent + holes


def settings(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """What all runs have in common, and how they were measured."""
    runs = [run for group in groups for run in group.runs]
    rows = [flattened(dict(run.config)) for run in runs]
    apart = differing(rows)
    common = [(key, value) for key, value in rows[0].items() if key not in apart] if rows else []
    how = [("measured", words)] if (words := threats(groups)) else []
    versions = sorted({f"torch {run.environment.get('torch')}, {run.environment.get('processor')}" for run in runs})
    return [*how, ("machines", "; ".join(versions)), *common]
