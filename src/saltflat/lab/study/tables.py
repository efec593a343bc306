"""Tables of the study's page, and the CSV file of its models."""

import csv
import io
import math

from saltflat.lab.report.notation import MISSING, decimal
from saltflat.lab.report.tables import Body, Cell, Column, Row
from saltflat.lab.report.tables import Table as Numbers
from saltflat.lab.study.findings import Association, Estimate, Finding, Findings
from saltflat.lab.study.granulation import Value
from saltflat.lab.study.table import (
    CONTROLS,
    GAP_ACCURACY,
    GAP_LOSS,
    NEGATIVE,
    TARGETS,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
    WEIGHT_NORM,
    Model,
    Part,
    Table,
    number,
)
from saltflat.lab.study.words import TARGET_WORDS, VERDICT_WORDS, bracketed, p_words

HEADS = {
    GAP_LOSS: Column("gap in loss", "nats", "gap-loss"),
    GAP_ACCURACY: Column("gap in accuracy", "points", "gap-accuracy"),
    NEGATIVE: Column("robust", "test, %", "robust"),
    TRAIN_LOSS: Column("robust loss", "training, nats"),
    TRAIN_ACCURACY: Column("robust", "training, %", "robust"),
    WEIGHT_NORM: Column("weight norm"),
}


def association_table(found: Findings) -> Numbers:
    """Every measure and control with every target."""

    def body(finding: Finding) -> Body:
        icc = Cell(decimal(finding.intraclass))
        rows = [_association(one, icc if not index else Cell("")) for index, one in enumerate(finding.associations)]
        return Body(finding.measure.name, None, tuple(rows))

    return Numbers(
        label="Associations of every measure with every target",
        caption=(
            f"Over models that are trained well enough. In brackets: 95 % percentile intervals over {found.resamples} "
            "bootstrap resamples of runs and, where they are by setting, of whole settings (models that agree in all "
            f"axes but the seed; {found.settings} in all). Runs of one setting with different seeds count as "
            "independent in the former and in p, so that intervals are narrow for claims about settings. p: two-sided, "
            f"{found.permutations} permutations of runs. Seed of all draws: {found.seed}. The last ones are controls "
            "in a measure's place; with the gap in loss, training robust loss has an association by definition, and a "
            "control given itself is 0. No sign is expected of controls, nor of test robust accuracy: they have no "
            "sign error and no verdict."
        ),
        columns=(
            Column("τ-b", "95 % interval by run", "tau"),
            Column("95 % interval", "by setting", "setting"),
            Column("p", "", "p"),
            Column("given loss", "training, robust", "partial"),
            Column("given weight norm", "", "partial"),
            Column("Spearman"),
            Column("Pearson"),
            Column("Ψ", "", "psi"),
            Column("worst sign error", "axis", "sign-error"),
            Column("without a method", "least to most τ-b", "without"),
            Column("with undertrained", "τ-b", "undertrained"),
            Column("ICC", "", "icc"),
            Column("verdict", "", "verdict"),
        ),
        bodies=tuple(map(body, (*found.measures, *found.controls))),
        row_labels=Column("target"),
        corner="measure",
    )


def _association(one: Association, icc: Cell) -> Row:
    taus = [*one.without_method.values()]
    finite = [tau for tau in taus if math.isfinite(tau)]
    detail = ", ".join(f"without {name}: {decimal(tau)}" for name, tau in one.without_method.items())
    least_to_most = Cell(f"{decimal(min(finite))} to {decimal(max(finite))}", "", detail) if finite else Cell(MISSING)
    interval = bracketed(one.tau_by_setting)
    axes = ", ".join(f"{axis.name}: ψ = {decimal(axis.psi)} ({axis.pairs} pairs)" for axis in one.axes)
    return Row(
        TARGET_WORDS[one.target],
        (
            _estimate(one.tau),
            Cell("" if interval else MISSING, interval),
            Cell(p_words(one.p) if math.isfinite(one.p) else MISSING),
            _estimate(one.given_train_loss),
            _estimate(one.given_weight_norm),
            Cell(decimal(one.spearman)),
            Cell(decimal(one.pearson)),
            Cell(decimal(one.psi), "", axes),
            Cell(decimal(one.worst_sign_error), one.worst_axis or ""),
            least_to_most,
            _estimate(one.with_undertrained),
            icc,
            Cell(VERDICT_WORDS[one.verdict] if one.verdict else "", ""),
        ),
    )


def axes_table(found: Findings) -> Numbers:
    """psi along every hyper-parameter, with the gap in loss."""
    every = [one.with_target(GAP_LOSS).axes for one in found.measures]
    names = list(dict.fromkeys(axis.name for axes in every for axis in axes))

    def row(finding: Finding) -> Row:
        by_name = {axis.name: axis for axis in finding.with_target(GAP_LOSS).axes}
        cells = [
            Cell(decimal(by_name[name].psi), f"({by_name[name].pairs})") if name in by_name else Cell(MISSING)
            for name in names
        ]
        return Row("", tuple(cells))

    return Numbers(
        label="Agreement along every hyper-parameter",
        caption="ψ with the gap in loss along one hyper-parameter, all others and the seed being equal; in brackets, "
        "how many pairs of models it rests on. −1: always ordered oppositely; +1: always alike.",
        columns=tuple(Column(name, "ψ", "psi") for name in names),
        bodies=tuple(Body(one.measure.name, None, (row(one),)) for one in found.measures if names),
        corner="measure",
    )


def measure_table(found: Findings) -> Numbers:
    """What every measure is, on how many models it rests, and how far it repeats."""

    def row(finding: Finding) -> Row:
        measure = finding.measure
        return Row(
            "",
            (
                Cell(measure.unit or MISSING),
                Cell({1: "+", -1: "−", 0: "control"}[measure.sign]),
                Cell(str(finding.models)),
                Cell(str(finding.runs)),
                Cell(str(finding.missing)),
                Cell(str(finding.repeated)),
                Cell(decimal(finding.intraclass)),
                Cell(decimal(finding.repeated_tau)),
            ),
        )

    return Numbers(
        label="Units, numbers and repeatability of the measures",
        caption="Expected sign: fixed before anything was measured; + where more of a measure should go with a larger "
        "gap, − for widths. Repeated: models that were measured twice, with other draws.",
        columns=(
            Column("unit"),
            Column("expected sign"),
            Column("models"),
            Column("runs"),
            Column("without a value", "models"),
            Column("repeated", "models"),
            Column("ICC", "", "icc"),
            Column("τ-b", "of the two", "tau"),
        ),
        bodies=tuple(Body(one.measure.name, None, (row(one),)) for one in found.measures),
        corner="measure",
    )


def models_table(table: Table) -> Numbers:
    """Every model, undertrained ones included, in the colours of their methods."""
    series = {method: place for place, method in enumerate(table.methods)}

    def row(model: Model) -> Row:
        axes = [Cell(shown(model.axes.get(name)) if name in model.axes else MISSING) for name in table.axes]
        values = [_number(model, "targets", name) for name in TARGETS]
        values += [_number(model, "controls", name) for name in CONTROLS]
        values += [_number(model, "measures", measure.name) for measure in table.measures]
        note = ", ".join(part for part in ("undertrained" if table.undertrained(model) else "", model.note) if part)
        return Row(model.cluster, (*axes, *values, Cell(note)))

    return Numbers(
        label="All models",
        caption="± is the standard error of a measure, where it has one. Gaps: test − training for losses, training − "
        "test for accuracies.",
        columns=(
            *(Column(name) for name in table.axes),
            *(HEADS[name] for name in (*TARGETS, *CONTROLS)),
            *(Column(measure.name, measure.unit) for measure in table.measures),
            Column("note"),
        ),
        bodies=tuple(Body(model.name, series[model.method], (row(model),)) for model in table.models),
        row_labels=Column("run"),
        corner="model",
    )


def as_csv(table: Table) -> str:
    """A line per model: all that the table has of it, nothing where a value is missing."""
    measures = [measure.name for measure in table.measures]
    places: list[tuple[str, Part, str]] = [(name, "targets", name) for name in TARGETS]
    places += [(name, "controls", name) for name in CONTROLS]
    places += [(name, "measures", name) for name in measures]
    places += [(f"{name} (standard error)", "errors", name) for name in measures]
    places += [(f"{name} (again)", "again", name) for name in measures]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["model", "run", "method", "undertrained", *table.axes, *(head for head, _, _ in places), "note"])
    for model in table.models:
        values = [number(getattr(model, part).get(name)) for _, part, name in places]
        lines.writerow(
            [
                model.name,
                model.cluster,
                model.method,
                int(table.undertrained(model)),
                *(shown(model.axes[name]) if name in model.axes else "" for name in table.axes),
                *(repr(value) if math.isfinite(value) else "" for value in values),
                model.note,
            ]
        )
    return text.getvalue()


def shown(value: Value) -> str:
    """
    >>> shown(0.005), shown("at"), shown(None), shown(True)
    ('0.005', 'at', 'none', 'true')
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def digits(value: float) -> str:
    """Four significant digits.

    >>> digits(0.0123456), digits(-1234567.0), digits(float("nan"))
    ('0.01235', '−1.235e+06', '–')
    """
    return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else MISSING


def _number(model: Model, part: Part, name: str) -> Cell:
    error = number(model.errors.get(name)) if part == "measures" else math.nan
    return Cell(digits(number(getattr(model, part).get(name))), f"± {error:.2g}" if math.isfinite(error) else "")


def _estimate(value: Estimate) -> Cell:
    return Cell(decimal(value.value), bracketed(value))
