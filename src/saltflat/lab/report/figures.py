"""A figure is a pure function from arrays to SVG text.

It is drawn with matplotlib's objects (no global figure, no backend) and then rewritten to stand inside a page: text
stays text, every colour becomes a CSS variable whose fallback is the light theme's value (a page gives dark values; a
file on its own is legible as it is), and every id carries the figure's identity, so that several figures in one page do
not clash. Equal arrays give equal text.

The series' colours are Okabe and Ito's, which colour-blind readers can tell apart, darkened until words set in them are
readable; the series differ in dash as well. Units: accuracies in percent, losses in nats, alpha in lengths of the
(normalised) direction.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from saltflat.lab.report.curves import GroupCurves, GroupLandscape, SeedCurves, mean_and_deviation, mean_curves



def learning_curves(group: GroupCurves, *, among: Sequence[GroupCurves], identity: str, description: str) -> str:
    """One panel: robust accuracy on the training subset and on test, the gap between them shaded, and clean test.

    The axes hold every curve of the groups that it is shown `among`, so that panels can be compared by eye.
    """
    with drawing(identity):
        figure, axes = panel(group.name, group.note, series=group.series, right=102)
        _share_axes(axes, [seed for other in among for seed in other.seeds])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        colour = colour(group.series)
        for seed in group.seeds:
            _thin_lines(axes, seed, colour)
        epochs, (train, test, clean) = mean_curves(group.seeds)
        marker = "o" if len(epochs) == 1 else ""
        axes.plot(epochs, clean, color=MUTED, linewidth=1.6, linestyle=(0, (1.2, 1.6)), marker=marker, zorder=3)
        axes.plot(epochs, train, color=colour, linewidth=2.0, linestyle=(0, (5, 2)), marker=marker, zorder=4)
        axes.plot(epochs, test, color=colour, linewidth=2.6, marker=marker, zorder=5)
        axes.fill_between(epochs, test, train, color=colour, alpha=0.13, linewidth=0, zorder=2)
        if len(epochs):
            lines = (("clean test", clean, MUTED), ("robust train", train, colour), ("robust test", test, colour))
            ends = [(text, float(line[-1]), ink) for text, line, ink in lines if np.isfinite(line[-1])]
            _label_ends(axes, float(epochs[-1]), ends)
        return svg(figure, identity, description)


def landscape(groups: Sequence[GroupLandscape], *, centred: bool, note: str, identity: str, description: str) -> str:
    """The loss along random directions, averaged over directions and seeds, with a band of one standard deviation."""
    with drawing(identity):
        title, quantity = ("Centred", "g(α) − g(0)") if centred else ("As measured", "g(α)")
        figure, axes = panel(title, f"{quantity} in nats · {note}", right=14, legend_rows=len(groups))
        handles = []
        for group in groups:
            colour, dash = colour(group.series), DASHES[group.series % len(DASHES)]
            curves = group.centred if centred else group.curves
            mean, deviation = mean_and_deviation(curves)
            if len(curves) > 1:
                band = (mean - deviation, mean + deviation)
                axes.fill_between(group.alphas, *band, color=colour, alpha=0.13, linewidth=0, zorder=2)
            handles += axes.plot(group.alphas, mean, color=colour, linestyle=dash, linewidth=2.3, zorder=4)
        axes.axvline(0.0, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlim(min(group.alphas.min() for group in groups), max(group.alphas.max() for group in groups))
        axes.set_xlabel("α, in lengths of the normalised direction")
        legend(axes, handles, [f"{shortened(group.name, 34)} · {group.origin}" for group in groups])
        return svg(figure, identity, description)


def _thin_lines(axes: Axes, seed: SeedCurves, colour: str) -> None:
    opacity = 0.4 if seed.averaged else 0.75  # an unfinished run has no thick line to lean on
    for values, line in ((seed.test_clean, MUTED), (seed.train_robust, colour), (seed.test_robust, colour)):
        axes.plot(seed.epochs, values, color=line, linewidth=0.8, alpha=opacity, zorder=2)
    at_best = seed.epochs == seed.best_epoch
    axes.plot(seed.epochs[at_best], seed.test_robust[at_best], "o", color=colour, markersize=5, zorder=6, clip_on=False)


def _share_axes(axes: Axes, seeds: Sequence[SeedCurves]) -> None:
    epochs = np.concatenate([seed.epochs for seed in seeds])
    accuracies = np.concatenate([np.r_[seed.train_robust, seed.test_robust, seed.test_clean] for seed in seeds])
    finite = accuracies[np.isfinite(accuracies)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 100.0)
    margin = 0.5 if epochs.min() == epochs.max() else 0.0
    axes.set_xlim(epochs.min() - margin, epochs.max() + margin)
    axes.set_ylim(max(0.0, 10 * np.floor((low - 1) / 10)), min(100.0, 10 * np.ceil((high + 1) / 10)))


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[str, float, str]]) -> None:
    """A name, a value and a colour at the end of each line, at places that keep them legible."""
    low, high = axes.get_ylim()
    least = (high - low) * 15 / axes.get_window_extent().height
    places = spread_apart([value for _, value, _ in ends], least=least, low=low, high=high)
    for (text, value, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            f"{text} {value:.1f}",
            (x, place),
            xytext=(7, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            color=colour,
            fontsize=SMALL,
            fontweight="bold" if text == "robust test" else "normal",
        )


def spread_apart(values: Sequence[float], *, least: float, low: float, high: float) -> list[float]:
    """Places near `values`, in the same order, at least `least` apart and within [low, high] as far as they fit.

    >>> spread_apart([5.0, 1.0, 5.5], least=2.0, low=0.0, high=6.0)
    [4.0, 1.0, 6.0]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = list(values)
    floor, ceiling = low, high
    for index in order:
        places[index] = max(places[index], floor)
        floor = places[index] + least
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - least
    return places
