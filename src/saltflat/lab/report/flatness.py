"""The table of flatness: a row per measure and way of measuring it, a column per group."""

from collections.abc import Mapping, Sequence

from saltflat.lab.report.captions import settings_in_words
from saltflat.lab.report.drawing import shortened
from saltflat.lab.report.notation import MISSING, UNBROKEN, counted, decimal, places_for
from saltflat.lab.report.questions import Answers, Question, answers
from saltflat.lab.report.runs import Measure
from saltflat.lab.report.statistics import Group, differing, finite
from saltflat.lab.report.tables import Body, Cell, Column, Row, Table


def flatness_table(groups: Sequence[Group]) -> Table:
    """Every measure of flatness, over the finished runs of every group."""
    found = answers(groups)
    shown = [group for group in groups if any(group in by_group for by_group in found.values())]
    settings = [dict(asked.settings) for asked in found]
    apart = differing(settings)
    common = {key: value for key, value in (settings[0] if settings else {}).items() if key not in apart}

    def body(asked: Question, by_group: Answers) -> Body:
        own = [f"{key}: {value}" for key, value in asked.settings if key in apart]
        detail = "; ".join(text for text in (asked.unit, asked.words, *own) if text)
        cells = [_cell(by_group.get(group, {}), len(group.finished)) for group in shown]
        row = Row(asked.checkpoint, (Cell(f"{asked.n} {asked.split}"), *cells))
        return Body(asked.name, None, (row,), detail)

    return Table(
        label="Measures of flatness",
        caption=_caption(found, common),
        columns=(
            Column("images", "", "images"),
            *(
                Column(shortened(group.name, 40), counted(len(group.finished), "seed"), series=group.series)
                for group in shown
            ),
        ),
        bodies=tuple(body(asked, by_group) for asked, by_group in found.items()),
        row_labels=Column("weights", "", "checkpoint"),
        corner="measure",
    )


def _caption(found: Mapping[Question, Answers], common: Mapping[str, str]) -> str:
    remarks = dict.fromkeys(
        f"{asked.name} ({one.note})"
        for asked, by_group in found.items()
        for by_seed in by_group.values()
        for one in by_seed.values()
        if one.note
    )
    sentences = (
        "Mean ± sample standard deviation over seeds; where one run stands alone, the standard error (s.e.) of its "
        "measurement in brackets.",
        f"Not or only partly measured: {'; '.join(remarks)}." if remarks else "",
        f"Settings: {settings_in_words(common, always=())}." if common else "",
    )
    return " ".join(sentence for sentence in sentences if sentence)


def _cell(by_seed: Mapping[int, Measure], seeds: int) -> Cell:
    spread = finite({seed: one.value for seed, one in by_seed.items()})
    if not spread.n:
        return Cell(MISSING, detail="; ".join(f"seed {seed}: {one.note}" for seed, one in by_seed.items() if one.note))
    places = places_for(spread.mean)
    detail = ", ".join(_in_words(seed, one, places) for seed, one in by_seed.items())
    fewer = f"({spread.n} of {seeds} seeds)" if spread.n < seeds else ""
    if spread.n > 1:
        beside = f"± {decimal(spread.deviation, places)}"
    else:
        error = decimal(next(by_seed[seed].standard_error for seed in spread.by_seed), places)
        beside = "" if error == MISSING else f"[s.e.{UNBROKEN}{error}]"
    return Cell(decimal(spread.mean, places), f"{beside} {fewer}".strip(), detail)


def _in_words(seed: int, one: Measure, places: int) -> str:
    error, seconds = decimal(one.standard_error, places), decimal(one.seconds, 1)
    beside = ", ".join(text for text in (f"s.e. {error}", f"{seconds} s") if MISSING not in text)
    found = ", ".join(decimal(value, places) for value in one.starts)
    facts = "; ".join(text for text in (beside, f"from each start: {found}" if found else "") if text)
    return f"seed {seed}: {decimal(one.value, places)}" + (f" ({facts})" if facts else "")
