"""Settings of groups side by side: first those in which they differ, then those that all share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from saltflat.lab.report.notation import MISSING, cut
from saltflat.lab.report.runs import Run
from saltflat.lab.report.statistics import Group, differing

LONGEST = 500  # signs of a field or its value


@dataclass(frozen=True)
class Settings:
    """Rows of text, one column per group."""

    heads: tuple[str, ...]
    different: tuple[tuple[str, tuple[str, ...]], ...]
    common: tuple[tuple[str, str], ...]


def configuration(groups: Sequence[Group]) -> Settings:
    """What was asked for."""
    return _settings(groups, lambda run: run.config)


def environments(groups: Sequence[Group]) -> Settings:
    """Machines and versions."""
    return _settings(groups, lambda run: run.environment)


def _settings(groups: Sequence[Group], rows_of: Callable[[Run], Mapping[str, str]]) -> Settings:
    merged = [_merged([rows_of(run) for run in group.runs]) for group in groups]
    different = differing(merged)
    return Settings(
        heads=tuple(group.name for group in groups),
        different=tuple(
            (cut(key, LONGEST), tuple(cut(table.get(key, MISSING), LONGEST) for table in merged))
            for key in different
            if key != "recipe"  # the heads say it
        ),
        common=tuple(
            (cut(key, LONGEST), cut(value, LONGEST)) for key, value in merged[0].items() if key not in different
        ),
    )


def _merged(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """One table for several: where they differ, all values, in order."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: " · ".join(dict.fromkeys(table.get(key, MISSING) for table in tables)) for key in keys}
