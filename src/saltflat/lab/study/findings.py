"""What a table shows: a pure function of it, with the rules by which a result is called what it is.

Main results are over models that are trained well enough. A measure's verdict on a gap follows from two intervals of
95 %, that of tau and that of the partial tau given robust training loss, and from the sign that was fixed in advance:

    supported      both exclude 0 on the expected side
    explained      tau does, its partial does not: "explained by how far the model is trained"
    contradicted   tau excludes 0 on the other side
    none           tau's interval holds 0
    no difference  the measure, or the gap, is the same for all models: nothing is said
    too few        fewer than five runs, or so few that differ that most resamples hold none of them: nothing is said

No sign is expected of a control in a measure's place, nor of the negative control: they have no verdict, and no sign
error.

Intervals by run take runs that differ in the seed alone for independent, and so are narrow for a claim about settings.
Beside them stands that of tau by setting, in which such runs are drawn together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from saltflat.lab.study.association import Array, intraclass, kendall, partial, pearson, permuted, spearman, tau_b
from saltflat.lab.study.granulation import Axis, granulated, psi, without_each, worst
from saltflat.lab.study.resampling import arrangements, cluster_counts, interval, p_value, permutations
from saltflat.lab.study.table import (
    NEGATIVE,
    TARGETS,
    TRAIN_LOSS,
    WEIGHT_NORM,
    Measure,
    Model,
    Part,
    Table,
    column,
    number,
    plain,
)

LEAST = 5  # runs, or settings
WITH = ("", *TARGETS, TRAIN_LOSS, WEIGHT_NORM)  # columns whose taus are taken together, the measure first
LEAST_ARRANGEMENTS = 100  # fewer permutations of runs than this, and p says little
CONTROL_MEASURES = {
    TRAIN_LOSS: Measure("training robust loss", "nats", "", 0),
    WEIGHT_NORM: Measure("weight norm", "", "", 0),
}


class Verdict(StrEnum):
    """What may be said of a measure and a gap."""

    SUPPORTED = "supported"
    EXPLAINED = "explained"
    CONTRADICTED = "contradicted"
    NONE = "none"
    SAME = "no difference"
    TOO_FEW = "too few"


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def excludes_zero(self, sign: int) -> bool:
        """Whether the whole interval lies on this side of 0."""
        return min(sign * self.low, sign * self.high) > 0


@dataclass(frozen=True)
class Association:
    """A measure and a target, over the models that have the measure."""

    target: str
    tau: Estimate
    tau_by_setting: Estimate
    p: float  # two-sided, by permutation of runs; nan where these are too few
    given_train_loss: Estimate
    given_weight_norm: Estimate
    spearman: float
    pearson: float
    psi: float
    axes: tuple[Axis, ...]
    worst_axis: str | None
    worst_sign_error: float  # nan where no sign is expected
    without_method: dict[str, float]  # tau without the models of each method
    with_undertrained: Estimate
    verdict: Verdict | None  # None where no sign is expected


@dataclass(frozen=True)
class Finding:
    """A measure: the models that it rests on, what it goes with, and how far it repeats."""

    measure: Measure
    models: int
    runs: int
    missing: int
    associations: tuple[Association, ...]
    repeated: int  # models that were measured again
    intraclass: float
    repeated_tau: float

    def with_target(self, target: str) -> Association:
        """One of the three associations."""
        return next(one for one in self.associations if one.target == target)


@dataclass(frozen=True)
class Findings:
    """All that the page says in numbers."""

    models: int  # trained well enough
    runs: int
    settings: int  # of those runs; what differs in the seed alone is one
    seeds: int
    methods: tuple[str, ...]
    undertrained: tuple[str, ...]
    incomplete: tuple[str, ...]  # without a target, or without a control that is conditioned on
    floor: float
    measures: tuple[Finding, ...]
    controls: tuple[Finding, ...]  # robust training loss, weight norm and other norms in a measure's place
    resamples: int
    permutations: int
    seed: int

    def with_verdict(self, target: str, verdict: Verdict) -> list[Finding]:
        """Measures of one verdict, the strongest association first."""
        found = [one for one in self.measures if one.with_target(target).verdict is verdict]
        return sorted(found, key=lambda one: -abs(np.nan_to_num(one.with_target(target).tau.value)))


def findings(table: Table, *, resamples: int = 2000, permutations: int = 2000, seed: int = 0) -> Findings:
    """Everything that can be said of a table; equal tables and seeds give equal findings."""
    measured = [model for model in table.models if _complete(model)]
    trained = [model for model in measured if not table.undertrained(model)]
    settings = _settings(table.models)
    draws = _Draws(resamples, permutations, seed, settings)

    def finding(part: Part, name: str, measure: Measure) -> Finding:
        return _finding(part, name, measure, trained, measured, draws)

    return Findings(
        models=len(trained),
        runs=len({model.cluster for model in trained}),
        settings=len({settings[model.cluster] for model in trained}),
        seeds=len({model.axes["seed"] for model in trained if "seed" in model.axes}),
        methods=tuple(dict.fromkeys(model.method for model in trained)),
        undertrained=tuple(model.name for model in measured if table.undertrained(model)),
        incomplete=tuple(model.name for model in table.models if not _complete(model)),
        floor=table.floor,
        measures=tuple(finding("measures", measure.name, measure) for measure in table.measures if measure.sign),
        controls=(
            *(finding("controls", name, measure) for name, measure in CONTROL_MEASURES.items()),
            *(finding("measures", measure.name, measure) for measure in table.measures if not measure.sign),
        ),
        resamples=resamples,
        permutations=permutations,
        seed=seed,
    )


def as_record(found: Findings) -> dict[str, Any]:
    """The findings as plain JSON, null where a number has no value."""
    record = plain(asdict(found))
    assert isinstance(record, dict)
    return record


@dataclass(frozen=True)
class _Draws:
    """How much is drawn. Every measure is given the same draws, so that measures are compared on equal resamples."""

    resamples: int
    permutations: int
    seed: int
    settings: Mapping[str, str]  # of each run

    def counts(self, clusters: Sequence[str]) -> Array:
        return cluster_counts(clusters, self.resamples, np.random.default_rng([self.seed, 0]))

    def p_values(self, models: Sequence[Model], x: Array, others: Array, observed: Sequence[float]) -> list[float]:
        clusters = [model.cluster for model in models]
        if not _enough(clusters) or arrangements(clusters) < LEAST_ARRANGEMENTS:
            return [math.nan] * len(others)
        orders = permutations(clusters, self.permutations, np.random.default_rng([self.seed, 1]))
        return [p_value(*each) for each in zip(observed, permuted(x, others, orders).T, strict=True)]


def _settings(models: Sequence[Model]) -> dict[str, str]:
    """The setting of each run, named after its first run: runs belong together that hold models which agree in all axes
    but the seed. A run whose axes are not on record stands alone.
    """
    alike: dict[object, set[str]] = {}
    for model in models:
        rest = frozenset((name, value) for name, value in model.axes.items() if name != "seed")
        alike.setdefault(rest if model.axes else model.cluster, set()).add(model.cluster)
    settings: list[set[str]] = []
    for runs in alike.values():  # a run has several checkpoints, and so may belong to several
        joined = [other for other in settings if other & runs]
        settings = [other for other in settings if not other & runs] + [runs.union(*joined)]
    return {run: min(runs) for runs in settings for run in runs}


def _finding(
    part: Part, name: str, measure: Measure, trained: Sequence[Model], everyone: Sequence[Model], draws: _Draws
) -> Finding:
    models, all_models = ([one for one in those if _has(one, part, name)] for those in (trained, everyone))
    runs = [model.cluster for model in models]
    settings = [draws.settings[run] for run in runs]
    taus = _taus(part, name, models, runs, draws)
    taus_by_setting = taus if settings == runs else _taus(part, name, models, settings, draws)
    all_runs = [model.cluster for model in all_models]
    all_taus = taus if all_runs == runs else _taus(part, name, all_models, all_runs, draws)
    x, targets = column(models, part, name), [column(models, "targets", target) for target in TARGETS]
    p_values = draws.p_values(models, x, np.stack(targets), [taus.of(target).value for target in TARGETS])
    again = column(models, "again", name) if part == "measures" else np.full(len(models), math.nan)
    twice = np.isfinite(again)

    def association(target: str, y: Array, p: float) -> Association:
        axes = granulated([model.axes for model in models], x, y)
        tau, given = taus.of(target), taus.given(target, TRAIN_LOSS)
        expected = measure.sign != 0 and target != NEGATIVE
        least = worst(axes, measure.sign) if expected else None
        wide = taus_by_setting.of(target)
        return Association(
            target=target,
            tau=tau,
            tau_by_setting=replace(tau, low=wide.low, high=wide.high),
            p=p,
            given_train_loss=given,
            given_weight_norm=taus.given(target, WEIGHT_NORM),
            spearman=spearman(x, y) if _enough(runs) else math.nan,
            pearson=pearson(x, y) if _enough(runs) else math.nan,
            psi=psi(axes),
            axes=axes,
            worst_axis=least.name if least else None,
            worst_sign_error=least.sign_error(measure.sign) if least else math.nan,
            without_method=without_each([model.method for model in models], x, y),
            with_undertrained=all_taus.of(target),
            verdict=verdict(len(set(runs)), tau, given, measure.sign) if expected else None,
        )

    return Finding(
        measure=measure,
        models=len(models),
        runs=len(set(runs)),
        missing=len(trained) - len(models),
        associations=tuple(map(association, TARGETS, targets, p_values)),
        repeated=int(twice.sum()),
        intraclass=intraclass(x[twice], again[twice]),
        repeated_tau=tau_b(x[twice], again[twice]),
    )


def verdict(runs: int, tau: Estimate, given_train_loss: Estimate, sign: int) -> Verdict:
    """The rule of this file's head; of enough runs, tau has no value where one of the two is the same for all."""
    if runs < LEAST:
        return Verdict.TOO_FEW
    if not math.isfinite(tau.value):
        return Verdict.SAME
    if not math.isfinite(tau.low):
        return Verdict.TOO_FEW
    if tau.excludes_zero(-sign):
        return Verdict.CONTRADICTED
    if not tau.excludes_zero(sign):
        return Verdict.NONE
    return Verdict.SUPPORTED if given_train_loss.excludes_zero(sign) else Verdict.EXPLAINED


@dataclass(frozen=True, eq=False)
class _Taus:
    """All taus among a measure, the targets and the controls: as they are, (k, k), and in each resample, (R, k, k)."""

    whole: Array
    resampled: Array

    def of(self, target: str) -> Estimate:
        y = WITH.index(target)
        return self._estimate(lambda taus: taus[..., 0, y])

    def given(self, target: str, control: str) -> Estimate:
        y, z = WITH.index(target), WITH.index(control)
        return self._estimate(lambda taus: partial(taus[..., 0, y], taus[..., 0, z], taus[..., y, z]))

    def _estimate(self, read: Callable[[Array], Array]) -> Estimate:
        return Estimate(float(read(self.whole)), *interval(read(self.resampled)))


def _taus(part: Part, name: str, models: Sequence[Model], clusters: Sequence[str], draws: _Draws) -> _Taus:
    if not _enough(clusters):
        nothing = np.full((len(WITH), len(WITH)), math.nan)
        return _Taus(nothing, nothing[None])
    columns = np.stack([column(models, *place) for place in _places(part, name)])
    return _Taus(kendall(columns), kendall(columns, draws.counts(clusters)))


def _enough(clusters: Sequence[str]) -> bool:
    return len(set(clusters)) >= LEAST


def _places(part: Part, name: str) -> list[tuple[Part, str]]:
    """Where the columns of WITH are found."""
    targets: list[tuple[Part, str]] = [("targets", target) for target in TARGETS]
    return [(part, name), *targets, ("controls", TRAIN_LOSS), ("controls", WEIGHT_NORM)]


def _has(model: Model, part: Part, name: str) -> bool:
    return math.isfinite(number(getattr(model, part).get(name)))


def _complete(model: Model) -> bool:
    """Whether a model has all targets and the controls that are conditioned on."""
    return all(_has(model, *place) for place in _places("controls", TRAIN_LOSS))
