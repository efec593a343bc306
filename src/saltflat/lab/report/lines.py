"""Plates of weight loss landscapes along lines: what was measured in different ways is never averaged nor overlaid."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.captions import ends, footnotes, gaps_in_words, settings_in_words
from saltflat.lab.report.curves import (
    ACCURACY,
    CENTRED,
    CLEAN,
    OBJECTIVE,
    RAW,
    Array,
    GroupLandscape,
    Ordinate,
    mean_and_deviation,
)
from saltflat.lab.report.drawing import shortened
from saltflat.lab.report.figures import landscape
from saltflat.lab.report.landscapes import Gap, Line
from saltflat.lab.report.notation import counted, decimal
from saltflat.lab.report.plates import Plate
from saltflat.lab.report.probes import along_direction
from saltflat.lab.report.statistics import Group

Answers = Mapping[Group, Mapping[int, Line]]
QUANTITIES: tuple[tuple[Ordinate, Callable[[Line], Array]], ...] = (
    (CENTRED, lambda line: line.robust_loss),
    (RAW, lambda line: line.robust_loss),
    (ACCURACY, lambda line: 100 * line.robust_accuracy),
    (CLEAN, lambda line: line.clean_loss),
    (OBJECTIVE, lambda line: line.objective),
)


def line_plates(groups: Sequence[Group]) -> list[Plate]:
    """One plate per question, with one panel per quantity on record.

    Of two answers of a run to one question the one with more directions counts: it holds the other's.
    """
    asked: dict[tuple[object, ...], dict[Group, dict[int, Line]]] = {}
    for group in groups:
        for run in group.finished:
            for line in run.lines:
                answers = asked.setdefault(_question(line), {}).setdefault(group, {})
                known = answers.get(run.seed)
                if known is None or len(line.robust_loss) > len(known.robust_loss):
                    answers[run.seed] = line
    return [_plate(answers, f"landscape-{index}") for index, answers in enumerate(asked.values())]


def _question(line: Line) -> tuple[object, ...]:
    return line.checkpoint, line.split, line.n, tuple(line.alphas), tuple(sorted(line.settings.items()))


def _plate(answers: Answers, identity: str) -> Plate:
    lines = [line for by_seed in answers.values() for line in by_seed.values()]
    grid = f"{len(lines[0].alphas)} points at α {ends(lines[0].alphas)}"
    panels, probes = [], []
    for ordinate, quantity in QUANTITIES:
        if any(np.isfinite(quantity(line)).any() for line in lines):
            drawn = [_of_group(group, by_seed, quantity) for group, by_seed in answers.items()]
            name = ordinate.title.lower().replace(" ", "-")
            figure = landscape(
                drawn,
                ordinate,
                footnotes=footnotes(lines[0], grid),
                identity=f"{identity}-{name}",
                description=_description(drawn, ordinate, lines[0]),
            )
            panels.append(Markup(figure.svg))
            probes.append(along_direction(drawn, ordinate, figure.frame))
    return Plate(tuple(panels), _caption(answers, lines[0]), _title(lines[0]), tuple(probes))


def _title(line: Line) -> str:
    return f"Weights: {line.checkpoint}, direction: {shortened(line.settings.get('direction', 'not on record'), 80)}"


def _of_group(group: Group, by_seed: Mapping[int, Line], quantity: Callable[[Line], Array]) -> GroupLandscape:
    lines = list(by_seed.values())
    return GroupLandscape(group.name, lines[0].alphas, tuple(map(quantity, lines)), group.series)


def _description(drawn: Sequence[GroupLandscape], ordinate: Ordinate, line: Line) -> str:
    def words(group: GroupLandscape) -> str:
        mean, _ = mean_and_deviation(group.curves(ordinate))
        values = " and ".join(
            f"{decimal(float(mean[end]))}{ordinate.unit} at α = {group.alphas[end]:g}" for end in (0, -1)
        )
        return f"{group.name}, {group.origin(ordinate)}, {'rises by' if ordinate.centred else 'has'} {values}"

    where = f"along directions in weight space ({line.settings.get('direction', 'of a kind not on record')})"
    return f"{ordinate.title}: {ordinate.words}, {where}: {'; '.join(map(words, drawn))}."


def _caption(answers: Answers, line: Line) -> str:
    def count(group: Group) -> str:
        sizes = sorted({len(one.robust_loss) for one in answers[group].values()})
        directions = f"{' or '.join(map(str, sizes))} direction{'' if sizes == [1] else 's'}"
        return f"{group.name}: {counted(len(answers[group]), 'seed')} × {directions}"

    sentences = (
        f"Robust loss g(α) at w + α d on n = {line.n} {line.split} images, {len(line.alphas)} values of α from "
        f"{decimal(float(line.alphas[0]))} to {decimal(float(line.alphas[-1]))}; robust accuracy and clean loss, where "
        "shown, are those at the same weights.",
        "Line: mean over directions and seeds; band: one sample standard deviation over all curves "
        f"({'; '.join(map(count, answers))}). g(0): mean over seeds.",
        gaps_in_words(_gaps(answers)),
        f"{settings_in_words(line.settings)}.",
    )
    return " ".join(sentence for sentence in sentences if sentence)


def _gaps(answers: Answers) -> list[tuple[str, Gap]]:
    """The gaps on record, and those losses that are missing without a word."""
    found = []
    for group, by_seed in answers.items():
        for seed, line in by_seed.items():
            name = f"{group.name}, seed {seed}"
            said = {gap.alpha for gap in line.gaps}
            missing = line.alphas[np.isnan(line.robust_loss).any(axis=0)]
            found += [(name, gap) for gap in line.gaps]
            found += [(name, Gap(alpha, np.nan, "not on record")) for alpha in missing if alpha not in said]
    return found
