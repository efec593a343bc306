"""Plates: figures side by side under a caption, each with a description for those who cannot see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.curves import GroupCurves, GroupLandscape, SeedCurves, mean_and_deviation, mean_curves
from saltflat.lab.report.figures import landscape, learning_curves
from saltflat.lab.report.notation import counted, decimal
from saltflat.lab.report.runs import Landscape, Run
from saltflat.lab.report.statistics import Group, measured
from saltflat.lab.report.words import distinct, measurement_caption


@dataclass(frozen=True)
class Plate:
    """Figures side by side under one caption."""

    panels: tuple[Markup, ...]
    caption: str
    title: str = ""


def curves_plate(groups: Sequence[Group]) -> Plate | None:
    """Learning curves, one panel per group, on the same axes."""
    drawn = [_group_curves(group) for group in measured(groups)]
    if not drawn:
        return None
    panels = (
        learning_curves(curves, among=drawn, identity=f"curves-{index}", description=_curve_words(curves))
        for index, curves in enumerate(drawn)
    )
    return Plate(
        tuple(map(Markup, panels)),
        "Accuracy against epoch; thick: mean over seeds, thin: each seed. Solid: robust accuracy on test. Dashed: "
        "robust accuracy on the training subset. The shaded area between them is the robust generalisation gap. "
        "Dotted: clean accuracy on test. A dot marks the best epoch of a seed, chosen on validation. All panels have "
        "the same axes. " + measurement_caption(groups),
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


def landscape_plates(groups: Sequence[Group]) -> list[Plate]:
    """One plate per question: what was measured in different ways is never averaged.

    Of two answers of a run to one question the one with more directions counts: it holds the other's.
    """
    asked: dict[tuple[object, ...], dict[Group, dict[int, Landscape]]] = {}
    for group in groups:
        for run in group.finished:
            for part in run.landscapes:
                answers = asked.setdefault(_question(part), {}).setdefault(group, {})
                known = answers.get(run.seed)
                if known is None or len(part.robust_loss) > len(known.robust_loss):
                    answers[run.seed] = part
    return [_landscape_plate(answers, f"landscape-{index}") for index, answers in enumerate(asked.values())]


def _question(part: Landscape) -> tuple[object, ...]:
    return part.checkpoint, part.split, part.n, tuple(part.alphas), tuple(sorted(part.settings.items()))


def _landscape_plate(groups: Mapping[Group, Mapping[int, Landscape]], identity: str) -> Plate:
    parts = [part for by_seed in groups.values() for part in by_seed.values()]
    drawn = []
    for group, by_seed in groups.items():
        losses = tuple(part.robust_loss for part in by_seed.values())
        drawn.append(GroupLandscape(group.name, parts[0].alphas, losses, group.series))
    note = f"n = {distinct(str(part.n) for part in parts)} {parts[0].split} images"
    words = f"Robust loss along random directions in weight space: {'; '.join(map(_landscape_words, drawn))}."
    panels = (
        landscape(
            drawn,
            centred=name == "centred",
            note=note,
            identity=f"{identity}-{name}",
            description=f"{name.capitalize()} curves. {words}",
        )
        for name in ("centred", "raw")
    )
    return Plate(tuple(map(Markup, panels)), _landscape_caption(drawn, parts), f"Weights: {parts[0].checkpoint}")


def _landscape_words(group: GroupLandscape) -> str:
    mean, _ = mean_and_deviation(group.centred)
    ends = [f"{decimal(float(mean[end]))} at α = {group.alphas[end]:g}" for end in (0, -1)]
    return f"{group.name}, {group.origin}, rises by {' and '.join(ends)}"


def _landscape_caption(drawn: Sequence[GroupLandscape], parts: Sequence[Landscape]) -> str:
    def count(group: GroupLandscape) -> str:
        sizes = sorted({len(losses) for losses in group.losses})
        directions = f"{' or '.join(map(str, sizes))} direction{'' if sizes == [1] else 's'}"
        return f"{group.name}: {counted(len(group.losses), 'seed')} × {directions}"

    alphas = parts[0].alphas
    names = {"direction": "Direction", "attack": "attack", "batch_norm": "BatchNorm"}
    keys = dict.fromkeys([*names, *(key for part in parts for key in part.settings)])
    values = {key: distinct(part.settings.get(key) for part in parts) or "not on record" for key in keys}
    settings = "; ".join(f"{names.get(key, key)}: {value}" for key, value in values.items())
    return (
        f"Robust loss g(α) at w + α d on n = {distinct(str(part.n) for part in parts)} {parts[0].split} images, "
        f"{len(alphas)} values of α from {decimal(float(alphas[0]))} to {decimal(float(alphas[-1]))}. "
        f"Line: mean over directions and seeds; band: one sample standard deviation over all curves "
        f"({'; '.join(map(count, drawn))}). g(0): mean over seeds. {settings}."
    )
