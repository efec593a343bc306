"""The sentences, figures and tables of the study of the paper's claims for pages generated from a record: Markdown,
with SVG files beside it.

A record of the study holds the results of its runs, `results/*.json`; everything shown is a function of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from saltflat.lab.report.markdown import as_markdown, on_white, shown
from saltflat.lab.report.plates import Plate
from saltflat.lab.study.arms import PRESETS
from saltflat.lab.study.claims_page import missing
from saltflat.lab.study.claims_plates import MANY, plates, threats
from saltflat.lab.study.claims_results import Group, grouped, read_results
from saltflat.lab.study.claims_tables import NARROW, by_question, differences_table, reached_table
from saltflat.lab.study.claims_words import headline
from saltflat.lab.study.table import plain

ORDER = list(dict.fromkeys(arm.name for preset in PRESETS.values() for arm in preset.arms))


def summary(record: Path, pictures: str = "", level: str = "###") -> str:
    """What was found, in sentences, then figures (the files of `figures`, in `pictures`), then the tables of every
    question, and what has no numbers.
    """
    groups = groups_of(record)
    parts = [sentences(groups)]
    for name, heading, plate in plates(groups):
        parts += [f"{level} {heading}", shown(_panels(name, plate), plate.caption, pictures)]
    for question, arms, some in by_question(groups):
        parts += [f"{level} {question}", as_markdown(reached_table(arms))]
        parts += [as_markdown(differences_table(some))] if some else []
    notes = [f"- {words}" for words in missing(groups)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def brief(record: Path, pictures: str) -> str:
    """The figure of the claim, which lies in `pictures`, what is to be seen in it, and the methods' table, narrower."""
    groups = groups_of(record)
    first = [shown(_panels(name, plate), plate.caption, pictures) for name, _, plate in plates(groups)[:1]]
    _, arms, _ = by_question(groups)[0]
    claims = "\n".join(f"- {words}" for words in (*(one.claim for one in headline(groups)), so_far(groups)) if words)
    return "\n\n".join([*first, claims, as_markdown(reached_table(arms, NARROW))])


def figures(record: Path) -> dict[str, str]:
    """The SVG text of every figure by its name, on a white ground so that it can be seen on any page."""
    made = [_panels(name, plate) for name, _, plate in plates(groups_of(record))]
    return {name: on_white(svg) for panels in made for name, svg in panels.items()}


def groups_of(record: Path) -> list[Group]:
    return grouped(read_results(record / "results"), ORDER)


def sentences(groups: Sequence[Group]) -> str:
    lines = [f"- {one.claim} {one.evidence}".rstrip() for one in headline(groups)]
    return "\n".join([*lines, *(f"- {words}" for words in (so_far(groups), threats(groups), MANY) if words)])


def so_far(groups: Sequence[Group]) -> str:
    """What is not there yet, of the preset whose plan was followed."""
    runs = [run for group in groups for run in group.runs]
    for preset in PRESETS.values():
        if runs and plain(asdict(preset.plan)) == runs[0].plan:
            absent = [arm.name for arm in preset.arms if arm.name not in {group.arm for group in groups}]
            done = len(preset.arms) - len(absent)
            return f"{done} of {len(preset.arms)} arms so far; not trained yet: {', '.join(absent)}." if absent else ""
    return ""


def _panels(name: str, plate: Plate) -> dict[str, str]:
    return {f"{name}-{i}": str(svg) for i, svg in enumerate(plate.panels)}
