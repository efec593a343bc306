"""Does an association hold along every hyper-parameter, or by one of them alone?

    psi_a = mean over groups of models that agree in all axes but a, of the mean over pairs of a group that differ in a
            of sign(x_i − x_j) sign(y_i − y_j)
    Psi   = mean of psi_a over axes a                                      (Jiang et al., arXiv 1912.02178)
    SE_a  = (1 − s psi_a) / 2, s = ±1 the expected sign; the worst: max over a (Dziugaite et al., arXiv 2010.11924)

A measure that only knows one hyper-parameter has a large tau where this one decides the gap, and a small Psi. A sign
error of 0.5 is a coin's; above it, the measure is more often wrong than right along that axis.

Deviation: environments of the worst sign error are whole axes, not single pairs of their values, since a small study
has few pairs in each; and no pair is left out for being within noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saltflat.lab.study.association import Array, signs, tau_b

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Axis:
    """psi of one hyper-parameter, and how many groups and pairs of models it rests on."""

    name: str
    psi: float
    groups: int
    pairs: int

    def sign_error(self, sign: int) -> float:
        """Mean over groups of the share of a group's pairs that are ordered against the expected sign, ties counting
        half: every group weighs the same, however many pairs it has.

        >>> Axis("gamma", psi=0.5, groups=1, pairs=4).sign_error(1)
        0.25
        """
        return (1 - sign * self.psi) / 2


def granulated(models: Sequence[Mapping[str, Value]], x: Array, y: Array, *, apart: str = "seed") -> tuple[Axis, ...]:
    """psi along every axis that has pairs, in the order of the axes' first appearance.

    `models`: the axes of each model. Groups agree in `apart` too, but it is no axis itself: nobody chooses a seed.
    """
    names = dict.fromkeys(name for axes in models for name in axes)
    found = (_along(name, models, x, y) for name in names if name != apart)
    return tuple(axis for axis in found if axis.groups)


def _along(name: str, models: Sequence[Mapping[str, Value]], x: Array, y: Array) -> Axis:
    groups: dict[frozenset[tuple[str, Value]], list[int]] = {}
    for place, axes in enumerate(models):
        if name in axes:
            rest = frozenset((other, value) for other, value in axes.items() if other != name)
            groups.setdefault(rest, []).append(place)
    agreements = []
    for places in groups.values():
        values = [models[place][name] for place in places]
        differ = np.array([[one != other for other in values] for one in values])
        if differ.any():
            agreements.append((signs(x[places]) * signs(y[places]))[differ])
    psi = float(np.mean([agreement.mean() for agreement in agreements])) if agreements else float("nan")
    return Axis(name, psi, len(agreements), sum(agreement.size for agreement in agreements) // 2)


def psi(axes: Sequence[Axis]) -> float:
    """Psi: the mean over axes, nan without any."""
    return float(np.mean([axis.psi for axis in axes])) if axes else float("nan")


def worst(axes: Sequence[Axis], sign: int) -> Axis | None:
    """The axis of the largest sign error, the first of equals."""
    return max(axes, key=lambda axis: axis.sign_error(sign), default=None)


def without_each(labels: Sequence[str], x: Array, y: Array) -> dict[str, float]:
    """Kendall's tau-b without the models of each label in turn; nothing where there is only one label."""
    known = np.array(labels, dtype=object)
    names = list(dict.fromkeys(labels))
    return {name: tau_b(x[known != name], y[known != name]) for name in names} if len(names) > 1 else {}
