"""Plates of the study's page: its figures, each with a caption and a description for those who cannot see it."""

import math

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.notation import UNBROKEN
from saltflat.lab.report.plates import Plate
from saltflat.lab.study.figures import Points, forest, scatter
from saltflat.lab.study.findings import Finding, Findings
from saltflat.lab.study.table import GAP_LOSS, TARGETS, TRAIN_LOSS, Part, Table, column
from saltflat.lab.study.words import TARGET_WORDS, estimate


def forest_plate(found: Findings) -> Plate:
    """All taus on one scale."""
    words = "; ".join(
        f"{one.measure.name}: {', '.join(_with(one, target) for target in TARGETS)}" for one in found.measures
    )
    drawn = forest(
        found.measures,
        found.controls,
        note=f"n = {found.models} models from {found.runs} runs · intervals of 95 % over {found.resamples} bootstrap "
        f"resamples of runs · {len(found.undertrained)} undertrained left out",
        identity="forest",
        description=f"Kendall's tau-b of every measure. {words}.",
    )
    return Plate(
        (Markup(drawn),),
        "A row per measure; filled: τ-b, hollow: the partial τ given training robust loss, with 95 % intervals. The "
        "expected sign, which was fixed in advance, stands below each name. Below the line: the controls, as if they "
        "were measures.",
    )


def _with(finding: Finding, target: str) -> str:
    return f"{estimate(finding.with_target(target).tau)} with the {TARGET_WORDS[target]}".replace(UNBROKEN, " ")


def scatter_plate(table: Table, found: Findings) -> Plate | None:
    """Every measure against the gap in loss."""
    panels = [
        _scatter(table, "measures", one.measure.name, one, _quantity(one), one.measure.settings, f"scatter-{place}")
        for place, one in enumerate(found.measures)
    ]
    if not any(panels):
        return None
    return Plate(
        tuple(Markup(panel) for panel in panels if panel),
        "A mark per model, in the colour and shape of its method; hollow: undertrained, and not counted in n and τ. "
        "Vertical: gap in robust loss, test − training, nats. Horizontal bars: standard errors of the measure, where "
        "it has them.",
    )


def confounder_plate(table: Table, found: Findings) -> Plate | None:
    """Training robust loss against the gap: what any measure has to add to."""
    title, quantity = "The confounder: how far a model is trained", "training robust loss, nats"
    settings = " · ".join(f"{key}: {value}" for key, value in table.settings.items())
    panel = _scatter(
        table, "controls", TRAIN_LOSS, found.controls[0], quantity, settings, "scatter-training-loss", title
    )
    if not panel:
        return None
    return Plate(
        (Markup(panel),),
        "Training robust loss against the gap in robust loss, test − training. As the gap holds the training loss "
        "with a minus sign, a part of this association is built in.",
    )


def _quantity(finding: Finding) -> str:
    measure = finding.measure
    return f"{measure.name}, {measure.unit}" if measure.unit else measure.name


def _scatter(
    table: Table,
    part: Part,
    name: str,
    finding: Finding,
    quantity: str,
    settings: str,
    identity: str,
    title: str = "",
) -> str:
    """The panel, or nothing where no model has both values."""
    x, y = column(table.models, part, name), column(table.models, "targets", GAP_LOSS)
    there = np.isfinite(x) & np.isfinite(y)
    if not there.any():
        return ""
    places = {method: place for place, method in enumerate(table.methods)}
    errors = column(table.models, "errors", name) if part == "measures" else np.full(len(x), math.nan)
    association = finding.with_target(GAP_LOSS)
    tau = f"τ = {estimate(association.tau)}".replace(UNBROKEN, " ")
    points = Points(
        x=x[there],
        y=y[there],
        errors=errors[there],
        series=np.array([places[model.method] for model in table.models])[there],
        hollow=np.array([table.undertrained(model) for model in table.models])[there],
    )
    return scatter(
        points,
        table.methods,
        title=title or name,
        notes=(f"gap in robust loss, nats · n = {finding.models} · {tau}", settings),
        quantity=quantity,
        identity=identity,
        description=f"{quantity} against the gap in robust loss of {finding.models} models: {tau}.",
    )
