"""A figure is a pure function from arrays to SVG text: equal arrays give equal text.

Units: accuracies in percent, losses in nats, alpha in lengths of the (normalised) direction.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.contour import QuadContourSet
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from saltflat.lab.report.curves import (
    Array,
    GroupCurves,
    GroupLandscape,
    Ordinate,
    SeedCurves,
    mean_and_deviation,
    mean_curves,
)
from saltflat.lab.report.drawing import (
    DASHES,
    INK,
    MUTED,
    SMALL,
    TEXT,
    TINY,
    Drawn,
    colour,
    drawing,
    drawn,
    legend,
    panel,
    shortened,
    svg,
)
from saltflat.lab.report.surfaces import Surface, extent, level_in_words

GOLDEN_ANGLE = np.pi * (3 - 5**0.5)  # turned by it again and again, no two directions are near


def learning_curves(group: GroupCurves, *, among: Sequence[GroupCurves], identity: str, description: str) -> Drawn:
    """One panel: robust accuracy on the training subset and on test, the gap between them shaded, and clean test.

    The axes hold every curve of the groups that it is shown `among`, so that panels can be compared by eye.
    """
    with drawing(identity):
        figure, axes = panel(group.name, group.note, series=group.series, right=120)
        _share_axes(axes, [seed for other in among for seed in other.seeds])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        ink = colour(group.series)
        for seed in group.seeds:
            _thin_lines(axes, seed, ink)
        epochs, (train, test, clean) = mean_curves(group.seeds)
        marker = "o" if len(epochs) == 1 else ""
        axes.plot(epochs, clean, color=MUTED, linewidth=1.6, linestyle=(0, (1.2, 1.6)), marker=marker, zorder=3)
        axes.plot(epochs, train, color=ink, linewidth=2.0, linestyle=(0, (5, 2)), marker=marker, zorder=4)
        axes.plot(epochs, test, color=ink, linewidth=2.6, marker=marker, zorder=5)
        axes.fill_between(epochs, test, train, color=ink, alpha=0.13, linewidth=0, zorder=2)
        if len(epochs):
            lines = (("clean test", clean, MUTED), ("robust train", train, ink), ("robust test", test, ink))
            ends = [(text, float(line[-1]), end) for text, line, end in lines if np.isfinite(line[-1])]
            _label_ends(axes, float(epochs[-1]), ends)
        return drawn(figure, axes, identity, description)


def landscape(
    groups: Sequence[GroupLandscape],
    ordinate: Ordinate,
    *,
    footnotes: Sequence[str] = (),
    identity: str,
    description: str,
) -> Drawn:
    """A quantity along directions, averaged over directions and seeds, with a band of one standard deviation.

    Where a value is missing the line breaks, and a cross at the foot of the axes marks the gap.
    """
    with drawing(identity):
        figure, axes = panel(
            ordinate.title, ordinate.words, right=14, legend_rows=len(groups), footnotes=footnotes, height=320
        )
        handles = []
        for row, group in enumerate(groups):
            ink, dash = colour(group.series), DASHES[group.series % len(DASHES)]
            curves = group.curves(ordinate)
            mean, deviation = mean_and_deviation(curves)
            if len(curves) > 1:
                band = (mean - deviation, mean + deviation)
                axes.fill_between(group.alphas, *band, color=ink, alpha=0.13, linewidth=0, zorder=2)
            handles += axes.plot(group.alphas, mean, color=ink, linestyle=dash, linewidth=2.3, zorder=4)
            single, gap = alone(mean), np.isnan(mean)
            axes.plot(group.alphas[single], mean[single], "o", color=ink, markersize=4, zorder=4)
            foot = np.full(int(gap.sum()), 0.03 + 0.04 * row)
            axes.plot(
                group.alphas[gap],
                foot,
                "x",
                color=ink,
                markersize=6,
                markeredgewidth=1.6,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
            )
        axes.axvline(0.0, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlim(min(group.alphas.min() for group in groups), max(group.alphas.max() for group in groups))
        axes.set_xlabel("α, in lengths of the normalised direction")
        legend(axes, handles, [f"{shortened(group.name, 34)} · {group.origin(ordinate)}" for group in groups])
        return drawn(figure, axes, identity, description)


def alone(values: Array) -> NDArray[np.bool_]:
    """Where a value stands between two gaps, so that no line leads to it.

    >>> alone(np.array([np.nan, 1.0, np.nan, 2.0, 3.0])).tolist()
    [False, True, False, False, False]
    """
    finite = np.isfinite(values)
    before, after = np.r_[False, finite[:-1]], np.r_[finite[1:], False]
    return np.asarray(finite & ~before & ~after)


def contour(
    surface: Surface,
    levels: Array,
    *,
    footnotes: Sequence[str] = (),
    identity: str,
    description: str,
) -> str:
    """Labelled levels of g(alpha, beta) − g(0, 0) over a plane in weight space; w is marked, and so is every gap."""
    with drawing(identity):
        words = f"robust loss, g(α, β) − g(0, 0) in nats · {surface.origin}"
        figure, axes = panel(
            surface.name, words, right=14, series=surface.series, footnotes=footnotes, height=56 + 402 + 46
        )
        axes.grid(visible=False)
        axes.set_xlim(surface.alphas[0], surface.alphas[-1])
        axes.set_ylim(surface.betas[0], surface.betas[-1])
        ink, values = colour(surface.series), surface.centred
        low, high = extent([values])
        inside = levels[(levels > low) & (levels < high)]
        if len(inside):
            plane = (surface.alphas, surface.betas, values.T)
            edges = np.unique(np.r_[low, inside, high])
            shades = [to_rgba(ink, 0.42 * index / (len(levels) + 1)) for index in range(len(edges) - 1)]
            axes.contourf(*plane, levels=edges, colors=shades, antialiased=True)
            lines = axes.contour(*plane, levels=inside, colors=[ink], linewidths=1.2, linestyles="solid")
            _label_levels(axes, lines)
        gaps = np.argwhere(np.isnan(values))
        axes.plot(surface.alphas[gaps[:, 0]], surface.betas[gaps[:, 1]], "x", color=INK, markersize=6, clip_on=False)
        axes.plot([0.0], [0.0], "o", color=INK, markersize=5, zorder=6)
        axes.annotate("w", (0.0, 0.0), xytext=(6, 3), textcoords="offset points", color=INK, fontsize=TEXT, zorder=6)
        axes.set_xlabel("α, in lengths of the normalised direction")
        axes.set_ylabel("β", color=MUTED, fontsize=SMALL, rotation=0, labelpad=2)
        return svg(figure, identity, description)


def _label_levels(axes: Axes, lines: QuadContourSet) -> None:
    """Each level once, the outer first and neighbours on different sides of w, where there is room for a label."""
    w = axes.transData.transform((0.0, 0.0))
    taken = [w]
    for index, rings in enumerate(reversed(lines.allsegs)):
        pixels = axes.transData.transform(np.concatenate([*rings, np.empty((0, 2))]))
        right, up = (pixels - w).T
        from_edge = np.minimum(pixels - axes.bbox.min, axes.bbox.max - pixels).min(axis=1)
        from_others = np.min([np.hypot(*(pixels - place).T) for place in taken], axis=0)
        free = (from_edge > 9) & (from_others > 30)
        if free.any():
            off = np.abs(np.angle((right + 1j * up) * np.exp(-1j * GOLDEN_ANGLE * index)))
            taken.append(pixels[np.argmin(np.where(free, off, np.inf))])
    places = [tuple(place) for place in axes.transData.inverted().transform(taken)[1:]]
    if places:
        for label in axes.clabel(lines, fontsize=TINY, fmt=level_in_words, inline_spacing=3, manual=places):
            label.set_color(INK)


def _thin_lines(axes: Axes, seed: SeedCurves, ink: str) -> None:
    opacity = 0.4 if seed.averaged else 0.75  # an unfinished run has no thick line to lean on
    for values, line in ((seed.test_clean, MUTED), (seed.train_robust, ink), (seed.test_robust, ink)):
        axes.plot(seed.epochs, values, color=line, linewidth=0.8, alpha=opacity, zorder=2)
    at_best = seed.epochs == seed.best_epoch
    axes.plot(seed.epochs[at_best], seed.test_robust[at_best], "o", color=ink, markersize=5, zorder=6, clip_on=False)


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
    for (text, value, ink), place in zip(ends, places, strict=True):
        axes.annotate(
            f"{text} {value:.1f}",
            (x, place),
            xytext=(7, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            color=ink,
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
