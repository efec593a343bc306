"""Plates of spectral densities of the Hessian: what was measured in different ways never shares a figure.

    phi(t) = (1/C) sum_c sum_j s_cj N(t; theta_cj, sigma^2)

theta (C, m): Ritz values that C runs of stochastic Lanczos quadrature found, of all seeds of a group; s (C, m): their
masses, which sum to 1 in each run; sigma: 1 % of the largest |theta| of all runs in the figure, so that curves which
are compared are smoothed alike. Eigenvalues are in nats / weight^2, phi is per nats / weight^2.

Sources: Lin, Saad, Yang, arXiv 1308.5467 (smoothing); Ghorbani, Krishnan, Xiao, arXiv 1901.10159 (of Hessians of
networks).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from saltflat.lab.report.captions import UNKNOWN, settings_in_words
from saltflat.lab.report.curves import Array, mean_and_deviation
from saltflat.lab.report.drawing import DASHES, MUTED, colour, drawing, legend, panel, shortened, svg
from saltflat.lab.report.notation import counted
from saltflat.lab.report.plates import Plate
from saltflat.lab.report.questions import Question, answers
from saltflat.lab.report.runs import Spectrum
from saltflat.lab.report.statistics import Group

SHARE = 0.01  # of the largest |theta|, the Gaussian's standard deviation
REACH = 5.0  # widths from the outermost theta to the frame; there, a Gaussian has 4e-6 of its height
FINE = 3.0  # points of the grid per width: between two of them, a Gaussian falls by 1.4 % of its height at most
DECADES = 10.0  # below the peak: whatever is lower is not shown
UNIT = "nats / weight²"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class _Asked:
    """What must be equal for two densities to stand in one figure: the question, and the shape of its answer."""

    question: Question
    runs: int
    products: int


Spectra = Mapping[Group, Mapping[int, Spectrum]]


@dataclass(frozen=True, eq=False)
class GroupSpectrum:
    """Ritz values and their masses, (C, m), a row for each run of each seed."""

    name: str
    nodes: Array
    weights: Array
    series: int = 0

    @property
    def ends(self) -> str:
        """The outermost Ritz values in words."""
        return f"from {_number(self.nodes.min())} to {_number(self.nodes.max())}"


def spectrum_plates(groups: Sequence[Group]) -> list[Plate]:
    """One plate per question, with a curve per group; of two answers of a run to one question the first counts."""
    found: dict[_Asked, dict[Group, dict[int, Spectrum]]] = {}
    for question, by_group in answers(groups).items():
        for group, by_seed in by_group.items():
            for seed, one in by_seed.items():
                if one.spectrum is not None:
                    asked = _Asked(question, len(one.spectrum.nodes), len(one.spectrum.nodes[0]))
                    found.setdefault(asked, {}).setdefault(group, {})[seed] = one.spectrum
    return [_plate(asked, spectra, f"spectrum-{index}") for index, (asked, spectra) in enumerate(found.items())]


def smoothed(grid: Array, nodes: Array, weights: Array, width: float) -> Array:
    """Every run's atoms, each a Gaussian of this standard deviation, at the points of the grid (G,): (C, G).

    >>> smoothed(np.array([2.0, 3.0]), np.array([[2.0]]), np.array([[1.0]]), 0.5).round(4).tolist()
    [[0.7979, 0.108]]
    """
    distance = (grid - nodes[..., None]) / width
    kernel = np.exp(-np.square(distance) / 2) / (width * math.sqrt(2 * math.pi))
    return np.asarray((weights[..., None] * kernel).sum(axis=1))


def mean_and_error(curves: Array) -> tuple[Array, Array]:
    """Over runs (C, G): the mean and its standard error (G,), 0 where there is one run.

    >>> mean_and_error(np.array([[1.0], [2.0], [6.0], [7.0]]))[1].round(4).tolist()  # of deviations −3, −2, 2, 3
    [1.472]
    """
    mean, deviation = mean_and_deviation(curves)
    return mean, deviation / math.sqrt(len(curves))


def width_for(groups: Sequence[GroupSpectrum]) -> float:
    """The Gaussian's for groups that are compared; where all eigenvalues are 0, that of eigenvalues up to 1."""
    largest = max(float(np.abs(group.nodes).max()) for group in groups)
    return SHARE * (largest if largest > 1e-100 else 1.0)


def spectral_density(
    groups: Sequence[GroupSpectrum], *, footnotes: Sequence[str] = (), identity: str, description: str
) -> str:
    """Mean density of each group over its runs, with a band of one standard error where there are several runs.

    The axis of densities is logarithmic. Ticks at its foot mark the smallest and the largest Ritz value of every run.
    """
    width, grid = width_for(groups), grid_for(groups)
    curves = [smoothed(grid, group.nodes, group.weights, width) for group in groups]
    low, high = _frame(grid, groups, curves)
    with drawing(identity):
        figure, axes = panel(
            "Spectral density of the Hessian",
            f"share of eigenvalues per {UNIT}, its integral is 1",
            right=14,
            legend_rows=len(groups),
            footnotes=footnotes,
            height=320,
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        axes.set_ylim(low, high)
        axes.set_xlim(grid[0], grid[-1])
        axes.set_xlabel(f"eigenvalue, in {UNIT}")
        axes.axvline(0.0, color=MUTED, linewidth=0.8, zorder=1)
        handles = []
        for row, (group, own) in enumerate(zip(groups, curves, strict=True)):
            ink, dash = colour(group.series), DASHES[group.series % len(DASHES)]
            mean, error = mean_and_error(own)
            if len(own) > 1:
                band = (_above(mean - error, low), _above(mean + error, low))
                axes.fill_between(grid, *band, color=ink, alpha=0.13, linewidth=0, zorder=2)
            handles += axes.plot(grid, _above(mean, low), color=ink, linestyle=dash, linewidth=2.0, zorder=4)
            ends = np.concatenate([group.nodes.min(axis=1), group.nodes.max(axis=1)])
            foot = np.full(len(ends), 0.03 + 0.04 * row)
            at_the_foot = axes.get_xaxis_transform()
            axes.plot(ends, foot, "|", color=ink, markersize=8, markeredgewidth=1.4, transform=at_the_foot)
        legend(axes, handles, [f"{shortened(group.name, 34)} · θ {group.ends}" for group in groups])
        return svg(figure, identity, description)


def grid_for(groups: Sequence[GroupSpectrum]) -> Array:
    """Points from beyond the smallest Ritz value of all groups to beyond the largest, with 0 among them."""
    width = width_for(groups)
    low = min([0.0, *(float(group.nodes.min()) for group in groups)]) / width - REACH
    high = max([0.0, *(float(group.nodes.max()) for group in groups)]) / width + REACH
    return np.arange(math.floor(FINE * low), math.ceil(FINE * high) + 1, dtype=np.float64) * width / FINE


def _frame(grid: Array, groups: Sequence[GroupSpectrum], curves: Sequence[Array]) -> tuple[float, float]:
    """Densities that the figure shows: every group's peak, and its curve at each of its atoms."""
    means = [own.mean(axis=0) for own in curves]
    peak = max(float(mean.max()) for mean in means)
    at_atoms = [float(np.interp(group.nodes, grid, mean).min()) for group, mean in zip(groups, means, strict=True)]
    return max(min(*at_atoms, peak / 1000) / 3, peak / 10**DECADES), 2 * peak


def _above(values: Array, low: float) -> Array:
    """Where a logarithm can be taken; what is raised stays below the frame."""
    return np.maximum(values, low / 10)


def _power(value: float, _: object = None) -> str:
    """
    >>> _power(1e-12)
    '10⁻¹²'
    """
    return "10" + str(round(math.log10(value))).translate(RAISED)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _plate(asked: _Asked, spectra: Spectra, identity: str) -> Plate:
    drawn = [_of_group(group, by_seed) for group, by_seed in spectra.items()]
    width = f"{_number(width_for(drawn))} {UNIT}"
    picture = spectral_density(
        drawn, footnotes=_footnotes(asked, width), identity=identity, description=_description(drawn, width)
    )
    return Plate(
        (Markup(picture),), _caption(asked, spectra, width), f"Weights: {shortened(asked.question.checkpoint, 80)}"
    )


def _of_group(group: Group, by_seed: Mapping[int, Spectrum]) -> GroupSpectrum:
    nodes, weights = (
        np.concatenate([np.array(getattr(one, part)) for one in by_seed.values()]) for part in ("nodes", "weights")
    )
    return GroupSpectrum(group.name, nodes, weights, group.series)


def _footnotes(asked: _Asked, width: str) -> list[str]:
    settings = dict(asked.question.settings)
    return [
        f"Gaussian of width {width}",
        f"{counted(asked.runs, 'run')} of {counted(asked.products, 'product')}",
        f"n = {asked.question.n} {asked.question.split} images",
        f"BatchNorm: {settings.get('batch_norm', UNKNOWN)}",
        settings.get("attack", f"attack {UNKNOWN}"),
    ]


def _description(drawn: Sequence[GroupSpectrum], width: str) -> str:
    words = "; ".join(f"{group.name}, Ritz values θ {group.ends}" for group in drawn)
    return f"Spectral density of the Hessian, smoothed by a Gaussian of width {width}: {words}."


def _caption(asked: _Asked, spectra: Spectra, width: str) -> str:
    counts = "; ".join(
        f"{group.name}: {counted(len(by_seed), 'seed')} × {counted(asked.runs, 'run')}"
        for group, by_seed in spectra.items()
    )
    runs, question = f"{counted(asked.runs, 'run')} of {counted(asked.products, 'product')}", asked.question
    sentences = (
        f"Density of the eigenvalues of the Hessian of the robust loss on n = {question.n} {question.split} images: "
        f"Ritz values θ and their shares, from {runs}, smoothed by a Gaussian of standard deviation {width}, "
        f"{100 * SHARE:g} % of the largest θ in magnitude in the figure.",
        f"Line: mean over seeds and runs; band: standard error over all of them ({counts}). Ticks at the foot: the "
        "smallest and the largest θ of every run.",
        f"Measured with the {question.name}: {question.words}." if question.words else "",
        f"Settings: {settings_in_words(dict(question.settings), always=('attack', 'batch_norm'))}.",
    )
    return " ".join(sentence for sentence in sentences if sentence)
