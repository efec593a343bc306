"""Plates of the study of the paper's claims: what AWP changes, pair by pair; learning curves; landscapes; and what the
size gamma does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.curves import CENTRED, GroupCurves, GroupLandscape, SeedCurves
from saltflat.lab.report.figures import landscape, learning_curves
from saltflat.lab.report.notation import counted, decimal
from saltflat.lab.report.plates import Plate
from saltflat.lab.study.claims_figures import Strip, dose, forest
from saltflat.lab.study.claims_results import Group, Pair, Result, drop, flatness, gap, losses, rise, robust
from saltflat.lab.study.claims_words import interval, with_awp

MANY = (
    "Intervals are over seeds alone, which all have the same images. Where nothing differed, one in twenty would still "
    "leave out 0, and those that share a baseline err together."
)
METHODS = 6  # groups in one figure of landscapes, at most: as many as there are colours


def claim_plate(groups: Sequence[Group]) -> Plate | None:
    """The figure of the claim: gap and drop, and what they are made of, with AWP minus without."""
    some = [pair for pair in with_awp(groups) if pair.difference(gap).n]
    if not some:
        return None
    first = some[0].arm.runs[0]
    strips = [
        Strip("gap", "points, last epoch", [pair.difference(gap) for pair in some]),
        Strip("drop, best to last", "points of robust accuracy", [pair.difference(drop) for pair in some]),
        Strip("robust accuracy, last", "points, test", [pair.difference(robust("last")) for pair in some]),
        Strip("robust accuracy, best", "points, test", [pair.difference(robust("best")) for pair in some]),
    ]
    words = "; ".join(
        f"{_named(pair)}: gap {interval(pair.difference(gap))}, drop {interval(pair.difference(drop))}" for pair in some
    )
    drawn = forest(
        [_named(pair) for pair in some],
        strips,
        title="What AWP changes: with AWP − without",
        note=f"PGD-{first.plan['gap']['steps']} · {images(first)} · {_seeds(some)}, paired · bars: 95 % intervals",
        identity="claim",
        description=f"Difference with AWP minus without, in points, with 95 % intervals. {words}.",
    )
    return Plate(
        (Markup(drawn),),
        "A row for every pair of arms that differ in AWP alone. Dot: mean difference over seeds; bar: Student's 95 % "
        "interval of that mean; small marks: the single seeds. The paper claims that AWP lowers the gap and the drop: "
        f"left of 0 in the first two columns. {MANY} {threats(groups)}",
    )


def curves_plate(groups: Sequence[Group]) -> Plate | None:
    """Learning curves of the first pairs, without and with AWP, all on the same axes."""
    shown = _both(with_awp(groups)[:2])
    curves = [_curves(group, series) for series, group in enumerate(shown) if any(run.epochs for run in group.runs)]
    if not curves:
        return None
    panels = [
        learning_curves(one, among=curves, identity=f"claim-curves-{i}", description=_curve_words(one))
        for i, one in enumerate(curves)
    ]
    return Plate(
        tuple(Markup(panel.svg) for panel in panels),
        "Accuracy against epoch, as measured in training by a short attack on a few images; thick: mean over seeds, "
        "thin: each seed. Solid: robust accuracy on test. Dashed: robust accuracy on training images. The shaded area "
        "between them is the robust generalisation gap. Dotted: clean accuracy on test. A dot marks the best epoch of "
        f"a seed, chosen on validation. The final numbers are of PGD-{shown[0].runs[0].plan['gap']['steps']}.",
    )


def landscape_plate(groups: Sequence[Group]) -> Plate | None:
    """g(alpha) − g(0) of the methods, without and with AWP."""
    shown = [group for group in _both(with_awp(groups)) if any(run.landscape for run in group.runs)][:METHODS]
    if not shown:
        return None
    drawn = []
    for series, group in enumerate(shown):
        runs = [run for run in group.runs if run.landscape]
        alphas = np.array(runs[0].landscape["alphas"], dtype=np.float64)
        drawn.append(GroupLandscape(group.arm, alphas, tuple(losses(run) for run in runs), series))
    of = next(run for run in shown[0].runs if run.landscape).landscape
    rises = "; ".join(f"{group.arm}: mean rise {decimal(group.spread(rise).mean)} nats" for group in shown)
    figure = landscape(
        drawn,
        CENTRED,
        footnotes=(f"n = {of['n']} {of['split']} images", f"last checkpoint, {of['settings']['attack']}"),
        identity="claim-landscape",
        description=f"Robust loss along random filter-normalised directions, less its value at w. {rises}.",
    )
    return Plate(
        (Markup(figure.svg),),
        f"Robust loss g(α) − g(0) of the last checkpoints on n = {of['n']} {of['split']} images, attacked afresh at "
        f"every α ({of['settings']['attack']}). Line: mean over seeds and directions; band: one sample standard "
        "deviation.",
    )


def dose_plate(groups: Sequence[Group]) -> Plate | None:
    """What the size gamma does to gap, drop and robust accuracy, from plain AT on."""
    plain = next((group for group in groups if group.arm == "at"), None)
    arms = [pair.arm for pair in with_awp(groups) if pair.against is plain]
    if plain is None or len(arms) < 2:
        return None
    arms.sort(key=gamma)
    panels = []
    for place, (name, quantity) in enumerate(
        (("gap, points", gap), ("robust accuracy on test at the last epoch, %", robust("last")),
         ("average-case flatness, nats", flatness))
    ):  # fmt: skip
        drawn = dose(
            [gamma(arm) for arm in arms],
            [arm.spread(quantity) for arm in arms],
            plain.spread(quantity),
            title=name,
            note=f"mean and 95 % interval · {counted(plain.spread(quantity).n, 'seed')} · line: AT",
            series=place,
            identity=f"claim-dose-{place}",
            description=f"{name} against gamma: "
            + "; ".join(f"{gamma(arm):g}: {decimal(arm.spread(quantity).mean)}" for arm in arms)
            + f"; without AWP: {decimal(plain.spread(quantity).mean)}.",
        )
        panels.append(Markup(drawn))
    return Plate(
        tuple(panels),
        "Against the size gamma of AT-AWP's perturbation; dashed, with its interval as a band: AT without it. The gap "
        f"and the accuracy are of {about(plain.runs[0])} Flatness is on training images.",
    )


def plates(groups: Sequence[Group]) -> list[tuple[str, str, Plate]]:
    """All that there is to be drawn: a name for files, a heading, a plate."""
    made = (
        ("claim", "What AWP changes", claim_plate(groups)),
        ("curves", "Learning curves", curves_plate(groups)),
        ("landscape", "Weight loss landscapes", landscape_plate(groups)),
        ("gamma", "The size of the perturbation", dose_plate(groups)),
    )
    return [(name, heading, plate) for name, heading, plate in made if plate]


def gamma(group: Group) -> float:
    return float(group.runs[0].config["awp"]["gamma"])


def attack(of: Result) -> str:
    """Of the gap, in words."""
    return str(of.last["gap"]["settings"]["attack"]) if of.last else f"PGD-{of.plan['gap']['steps']}"


def images(of: Result) -> str:
    if not of.last:
        return "n not on record"
    sides = of.last["gap"]
    return f"n = {sides['train']['n']} training, {sides['test']['n']} test images"


def about(of: Result) -> str:
    """How the numbers of a run were measured."""
    return f"{attack(of)}; {images(of)}; at w, in eval mode, without augmentation."


def threats(groups: Sequence[Group]) -> str:
    """How the numbers of all runs were measured: the first threat, and each other with the arms that face it."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for words in {about(run) for run in group.runs if run.last}:
            found.setdefault(words, []).append(group.arm)
    (usual, _), *others = found.items() or [("", [])]
    more = [f"{', '.join(arms)}: {words}" for words, arms in others]
    return " ".join([f"Attack: {usual}", *more]) if usual else ""


def _both(some: Sequence[Pair]) -> list[Group]:
    """What was held against, then the arm, each once."""
    return list({group.arm: group for pair in some for group in (pair.against, pair.arm)}.values())


def _named(pair: Pair) -> str:
    return f"{pair.against.arm} → {pair.arm.arm}"


def _seeds(some: Sequence[Pair]) -> str:
    numbers = sorted({pair.difference(gap).n for pair in some})
    return f"{numbers[0]} to {numbers[-1]} seeds" if len(numbers) > 1 else counted(numbers[0], "seed")


def _curves(group: Group, series: int) -> GroupCurves:
    def of(run: Result) -> SeedCurves:
        best = [epoch["epoch"] for epoch in run.epochs if epoch["best"]]
        return SeedCurves(
            epochs=np.array([float(epoch["epoch"]) for epoch in run.epochs]),
            train_robust=np.array([100 * epoch["train"]["robust_accuracy"] for epoch in run.epochs]),
            test_robust=np.array([100 * epoch["test"]["robust_accuracy"] for epoch in run.epochs]),
            test_clean=np.array([100 * epoch["test"]["clean_accuracy"] for epoch in run.epochs]),
            best_epoch=best[-1] if best else None,
        )

    runs = [run for run in group.runs if run.epochs]
    return GroupCurves(group.arm, f"accuracy in % · {counted(len(runs), 'seed')}", tuple(map(of, runs)), series)


def _curve_words(of: GroupCurves) -> str:
    last = np.mean([(seed.train_robust[-1], seed.test_robust[-1]) for seed in of.seeds], axis=0)
    return (
        f"Learning curves of {of.name}, mean over seeds: at the end, robust accuracy is {last[0]:.1f} % on training "
        f"images and {last[1]:.1f} % on test."
    )
