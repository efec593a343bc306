"""Plates: figures side by side under a caption, each with a description for those who cannot see it, and perhaps with
a probe for those who want its values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.curves import GroupCurves, SeedCurves, mean_curves
from saltflat.lab.report.figures import learning_curves
from saltflat.lab.report.notation import counted
from saltflat.lab.report.probes import Probe, along_epochs, island
from saltflat.lab.report.runs import Run
from saltflat.lab.report.statistics import Group, measured
from saltflat.lab.report.words import distinct, measurement_caption


@dataclass(frozen=True)
class Plate:
    """Figures side by side under one caption; `probes`: one for each figure that has values to be read, or none."""

    panels: tuple[Markup, ...]
    caption: str
    title: str = ""
    probes: tuple[Probe | None, ...] = ()

    @property
    def island(self) -> Markup:
        """The probes as JSON for the page's script; empty without any."""
        return island(self.probes) if any(self.probes) else Markup("")


def curves_plate(groups: Sequence[Group]) -> Plate | None:
    """Learning curves, one panel per group, on the same axes."""
    shown = [_group_curves(group) for group in measured(groups)]
    if not shown:
        return None
    figures = [
        learning_curves(curves, among=shown, identity=f"curves-{index}", description=_curve_words(curves))
        for index, curves in enumerate(shown)
    ]
    return Plate(
        tuple(Markup(figure.svg) for figure in figures),
        "Accuracy against epoch; thick: mean over seeds, thin: each seed. Solid: robust accuracy on test. Dashed: "
        "robust accuracy on the training subset. The shaded area between them is the robust generalisation gap. "
        "Dotted: clean accuracy on test. A dot marks the best epoch of a seed, chosen on validation. All panels have "
        "the same axes. " + measurement_caption(groups),
        probes=tuple(along_epochs(curves, figure.frame) for curves, figure in zip(shown, figures, strict=True)),
    )


def _group_curves(group: Group) -> GroupCurves:
    def curves(run: Run) -> SeedCurves:
        return SeedCurves(
            epochs=np.array([float(epoch.number) for epoch in run.epochs]),
            train_robust=np.array([epoch.robust_train for epoch in run.epochs]),
            test_robust=np.array([epoch.robust for epoch in run.epochs]),
            test_clean=np.array([epoch.clean for epoch in run.epochs]),
            best_epoch=run.best.number if run.best else None,
            averaged=run in group.finished,
        )

    runs = [run for run in group.runs if run.epochs]
    end = runs[-1].epochs[-1]
    attack = distinct(run.evaluation.get("attack", "").partition(",")[0] for run in runs)
    images = f"n = {end.train.n} train, {end.test.n} test"
    facts = ("accuracy in %", attack, counted(len(group.finished), "seed"), images)
    note = " · ".join(fact for fact in facts if fact)
    return GroupCurves(group.name, note, tuple(map(curves, runs)), group.series)


def _curve_words(group: GroupCurves) -> str:
    epochs, (train, test, clean) = mean_curves(group.seeds)
    if not len(epochs):
        return f"Learning curves of {group.name}: the runs have no epoch in common."
    return (
        f"Learning curves of {group.name}, mean over seeds: at epoch {epochs[-1]:.0f}, robust accuracy is "
        f"{train[-1]:.1f} % on the training subset and {test[-1]:.1f} % on test; "
        f"clean accuracy on test is {clean[-1]:.1f} %."
    )
