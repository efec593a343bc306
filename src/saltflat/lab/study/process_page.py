"""The page of one run over its epochs: one offline HTML file, with the record and its epochs as CSV beside it.

Every number and every word is a function of the record. The page holds no script and no address outside itself; names
out of the record are escaped. Nothing here imports torch.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from saltflat.lab.record import replacing
from saltflat.lab.report.captions import ends, settings_in_words
from saltflat.lab.report.drawing import TINY, VARIABLES, WIDTH, wrapped
from saltflat.lab.report.notation import MISSING, counted, decimal, places_for
from saltflat.lab.report.page import templates
from saltflat.lab.report.plates import Plate
from saltflat.lab.report.tables import Body, Cell, Column, Row, Table
from saltflat.lab.report.words import Sentence
from saltflat.lab.study.process_figures import (
    ACCURACY,
    DARK_RAMP,
    LOSS,
    RAMP,
    Quantity,
    centred,
    flatness_and_gap,
    landscape_curves,
    over_epochs,
    variables,
)
from saltflat.lab.study.process_record import AREA, AVERAGE, NORM, Measured, Moment, Process, read
from saltflat.lab.study.process_words import headline, notes

TEMPLATE = Path(__file__).with_name("process.html.j2")
SHOWN = (AREA, AVERAGE, NORM)
UNKNOWN = "not on record"


def write(report: Mapping[str, Any], folder: Path) -> list[Sentence]:
    """Write process.json, process.csv and process.html, each whole or not at all; returns what is said first."""
    process = read(report)
    texts = {
        "process.json": json.dumps(report, indent=1) + "\n",
        "process.csv": as_csv(process),
        "process.html": render(process),
    }
    for name, text in texts.items():
        with replacing(Path(folder) / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))  # a name read from JSON may hold half a pair
    return headline(process)


def render(process: Process) -> str:
    """The page as text: an equal record gives an equal page."""
    return (
        templates(TEMPLATE.parent)
        .get_template(TEMPLATE.name)
        .render(  # the style is the report's
            title=f"{process.run} over its epochs",
            extent=f"one run, {process.recipe}, seed {process.seed}, {counted(len(process.moments), 'measured epoch')}",
            headline=headline(process),
            followed=followed_plate(process),
            landscape=landscape_plate(process),
            table=epochs_table(process),
            settings=settings(process),
            notes=notes(process),
            variables=VARIABLES | {ink: name for name, ink in variables(RAMP).items()},
            dark=variables(DARK_RAMP),
        )
    )


def followed_plate(process: Process) -> Plate | None:
    """Robust accuracy and loss over all epochs."""
    if not len(process.trajectory.epochs):
        return None
    n_train, n_test = process.trajectory.n
    of = process.evaluation
    facts = [
        f"n = {n_train} training and {n_test} test images",
        f"BatchNorm: {of.get('mode', UNKNOWN)} mode",
        "no augmentation",
        of.get("attack", f"attack {UNKNOWN}"),
    ]
    panels = tuple(
        Markup(
            over_epochs(
                process,
                quantity,
                footnotes=facts,
                identity=quantity.title.lower().replace(" ", "-"),
                description=_followed_in_words(process, quantity),
            )
        )
        for quantity in (ACCURACY, LOSS)
    )
    return Plate(
        panels,
        "As written down after every epoch of training. Solid: test; dashed: training images; the shaded area between "
        "them is the robust generalisation gap. Vertical lines: drops of the learning rate, with the new rate. Dots: "
        "epochs whose weights were kept, and measured again for what stands below. Best: chosen on validation.",
    )


def _followed_in_words(process: Process, quantity: Quantity) -> str:
    train, test = quantity.of(process.trajectory)
    epochs = process.trajectory.epochs
    drops = f"; the learning rate drops after epochs {', '.join(map(str, process.drops))}" if process.drops else ""
    return f"{quantity.title} over {len(epochs)} epochs: " + (
        f"at epoch {epochs[0]:.0f}, {decimal(train[0], quantity.places)} {quantity.unit} on training and "
        f"{decimal(test[0], quantity.places)} on test images; at epoch {epochs[-1]:.0f}, "
        f"{decimal(train[-1], quantity.places)} and {decimal(test[-1], quantity.places)}{drops}."
    )


def landscape_plate(process: Process) -> Plate:
    """The curves of all measured epochs, and flatness and gap over them."""
    of = process.settings
    alphas, directions = process.alphas, max(len(moment.curves) for moment in process.moments)
    attack, _, images = of.get("gap", "").rpartition("; ")
    along = [
        f"{len(alphas)} points at α {ends(alphas)}",
        counted(directions, "direction"),
        f"n = {of.get('landscape.n', UNKNOWN)} {of.get('landscape.split', '')} images",
        f"BatchNorm: {of.get('landscape.batch_norm', UNKNOWN)}",
        f"direction: {of.get('landscape.direction', UNKNOWN)}, {of.get('landscape.normalisation', UNKNOWN)}",
        of.get("landscape.attack", f"attack {UNKNOWN}"),
    ]
    beside = [
        f"flatness: n = {of.get('flatness.n', UNKNOWN)} {of.get('flatness.split', '')} images",
        f"BatchNorm: {of.get('flatness.batch_norm', UNKNOWN)}",
        of.get("flatness.attack", f"attack {UNKNOWN}"),
        f"area: {_how(process, AREA)}",
        f"average: {_how(process, AVERAGE)}",
        f"gap: {images or UNKNOWN}",
        attack,
    ]
    curves = landscape_curves(
        process,
        footnotes=along,
        height=_height_above(along),
        identity="landscape",
        description=_curves_in_words(process),
    )
    strips = flatness_and_gap(
        process,
        footnotes=beside,
        height=_height_above(beside),
        identity="flatness-and-gap",
        description=_strips_in_words(process),
    )
    words = {key.removeprefix("landscape."): value for key, value in of.items() if key.startswith("landscape.")}
    return Plate(
        (Markup(curves), Markup(strips)),
        f"Left: robust loss g(α) at w + α d less g(0), mean over {counted(directions, 'direction')}, the same seeds at "
        "every epoch; from blue, the first epoch, to the last; bands at the first and the last: one sample standard "
        "deviation over directions. Right: landscape area, average-case flatness and the gap in robust loss at the "
        "same epochs, with one standard error over draws where there is one; × marks what is not finite; dashed: drops "
        f"of the learning rate. Landscape: {settings_in_words(words)}.",
    )


def _height_above(footnotes: Sequence[str]) -> float:
    """So that panels with few and with many lines of small print are equally high."""
    return 480.0 - 14 * len(wrapped(footnotes, WIDTH - 8, TINY))


def _how(process: Process, name: str) -> str:
    return next((one.settings for one in _all(process, name) if one.settings), UNKNOWN)


def _unit(process: Process, name: str) -> str:
    return next((one.unit for one in _all(process, name) if one.unit), "")


def _all(process: Process, name: str) -> list[Measured]:
    return [moment.measured(name) for moment in process.moments]


def _curves_in_words(process: Process) -> str:
    def rise(moment: Moment) -> str:
        mean, _ = centred(moment, process.alphas)
        left, right = (decimal(float(mean[end])) for end in (0, -1))
        return f"epoch {moment.epoch}: {left} and {right}"

    alphas = process.alphas
    return (
        f"Rise of the robust loss in nats at α = {alphas[0]:g} and α = {alphas[-1]:g}, mean over directions: "
        f"{'; '.join(map(rise, process.moments))}."
    )


def _strips_in_words(process: Process) -> str:
    words = (
        f"epoch {moment.epoch}: {decimal(moment.measured(AREA).value)}, {decimal(moment.measured(AVERAGE).value)}, "
        f"{decimal(moment.gap_loss)}"
        for moment in process.moments
    )
    return f"Landscape area, average case and gap in robust loss in nats: {'; '.join(words)}."


def epochs_table(process: Process) -> Table:
    """Every measured epoch."""
    heads = {
        AREA: Column("area", f"{_unit(process, AREA)} ± s.e.".strip(), "area"),
        AVERAGE: Column("average", f"{_unit(process, AVERAGE)} ± s.e.".strip(), "average-case"),
        NORM: Column("norm", "of w"),
    }
    return Table(
        label="Every measured epoch",
        caption=f"Gap: {process.settings.get('gap', UNKNOWN)}, at w, in eval mode, without augmentation. Area: "
        f"{_how(process, AREA)}. Average case: {_how(process, AVERAGE)}. Weight norm: {_how(process, NORM)}. The "
        "learning rate is that of an epoch's last step, so that of the last epoch before a drop may be the rate after "
        "it.",
        columns=(
            Column("rate", "last step"),
            Column("robust", "training, %", "robust"),
            Column("robust", "test, %", "robust"),
            Column("gap", "points", "gap-accuracy"),
            Column("loss", "training, nats", "robust"),
            Column("loss", "test, nats", "robust"),
            Column("gap", "nats", "gap-loss"),
            *heads.values(),
        ),
        bodies=tuple(Body(str(moment.epoch), None, (_row(moment),)) for moment in process.moments),
        row_labels=Column("role"),
        corner="epoch",
    )


def _row(moment: Moment) -> Row:
    rate = f"{moment.learning_rate:.4g}" if math.isfinite(moment.learning_rate) else MISSING
    numbers = (
        (moment.train.accuracy, 1),
        (moment.test.accuracy, 1),
        (moment.gap_accuracy, 1),
        (moment.train.loss, 3),
        (moment.test.loss, 3),
        (moment.gap_loss, 3),
    )
    return Row(
        moment.role or MISSING,
        (
            Cell(rate),
            *(Cell(decimal(value, places)) for value, places in numbers),
            *(_cell(moment.measured(name)) for name in SHOWN),
        ),
    )


def _cell(one: Measured) -> Cell:
    places = places_for(one.value) if math.isfinite(one.value) else 0
    error = one.standard_error
    spread = f"± {decimal(error, places)}" if error > 0 and math.isfinite(one.value) else ""  # 0 of what has no draws
    return Cell(decimal(one.value, places), spread, one.note)


def settings(process: Process) -> list[tuple[str, str]]:
    """All that the numbers rest on."""
    rows = [
        ("recipe", process.recipe),
        ("seed", str(process.seed)),
        ("epochs", str(process.planned)),
        ("drops of the learning rate after epochs", ", ".join(map(str, process.drops)) or "none"),
    ]
    rows += [(f"training.{key}", value) for key, value in process.evaluation.items()]
    rows += list(process.settings.items())
    return rows + [(name, _how(process, name)) for name in SHOWN]


def as_csv(process: Process) -> str:
    """A row per measured epoch, at full precision; what is not finite is empty."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    measures = [head for name in SHOWN for head in (name, f"{name} (standard error)")]
    lines.writerow(
        [
            "epoch",
            "role",
            "learning_rate",
            "train_robust_accuracy",
            "test_robust_accuracy",
            "gap_accuracy",
            "train_robust_loss",
            "test_robust_loss",
            "gap_loss",
            *measures,
        ]
    )
    for moment in process.moments:
        found = [moment.measured(name) for name in SHOWN]
        values: Sequence[float] = [
            moment.learning_rate,
            moment.train.accuracy / 100,
            moment.test.accuracy / 100,
            moment.gap_accuracy / 100,
            moment.train.loss,
            moment.test.loss,
            moment.gap_loss,
            *(value for one in found for value in (one.value, one.standard_error)),
        ]
        written = [repr(float(value)) if np.isfinite(value) else "" for value in values]
        lines.writerow([moment.epoch, moment.role, *written])
    return text.getvalue()
