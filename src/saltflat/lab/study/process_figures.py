"""Figures of one run over its epochs, as SVG: robust accuracy and loss, the landscape's curves, flatness and gap.

The epochs of the curves stand on a ramp from blue (early) to the theme's strongest brown or yellow (late), monotone in
lightness, so that it is read without hue; every curve has its epoch written at its end. Units: accuracies in percent,
losses in nats, alpha in lengths of the normalised direction.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from saltflat.lab.report.curves import Array, centre, mean_and_deviation
from saltflat.lab.report.drawing import GRID, INK, MUTED, SMALL, TINY, colour, drawing, panel, shortened, svg
from saltflat.lab.report.figures import alone, spread_apart
from saltflat.lab.report.notation import decimal
from saltflat.lab.study.process_record import AREA, AVERAGE, Moment, Process, Trajectory

# Colours of early to late epochs: steps from blue over purple to brown (or yellow), straight in OKLab.
RAMP = ("#4f94c8", "#6585c0", "#7576b8", "#8066b0", "#8a5aa8", "#824e81", "#7b415b", "#733235", "#6b1f00")
DARK_RAMP = ("#3f78ad", "#6377b2", "#7f76b6", "#9873bb", "#b06fc0", "#c28ab5", "#d6a3a6", "#eabb94", "#ffd27a")
LINE = 13.0  # pixels from one label at the right to the next
NAME_WIDTH = 30.0  # pixels that "best" or "last" take
TRAIN_DASH = (0, (5, 2))


@dataclass(frozen=True)
class Quantity:
    """What is drawn over all epochs, on training and test images; `above`: of a gap, test is the upper side."""

    title: str
    words: str
    unit: str
    places: int
    above: bool
    of: Callable[[Trajectory], tuple[Array, Array]]  # training, test


ACCURACY = Quantity(
    "Robust accuracy", "in %", "%", 1, False, lambda followed: (followed.train_accuracy, followed.test_accuracy)
)
LOSS = Quantity("Robust loss", "in nats", "nats", 2, True, lambda followed: (followed.train_loss, followed.test_loss))


def over_epochs(
    process: Process, quantity: Quantity, *, footnotes: Sequence[str], identity: str, description: str
) -> str:
    """Training and test over all epochs, the gap shaded; a dot on test at every epoch that was measured again."""
    followed, ink = process.trajectory, colour(0)
    train, test = quantity.of(followed)
    with drawing(identity):
        figure, axes = panel(
            quantity.title, f"{quantity.words} · {process.recipe}, seed {process.seed}", right=104, footnotes=footnotes
        )
        _epoch_axis(axes, process)
        _drops(axes, process, labelled=True)
        marker = "o" if len(followed.epochs) == 1 else ""
        axes.fill_between(followed.epochs, test, train, color=ink, alpha=0.13, linewidth=0, zorder=2)
        axes.plot(followed.epochs, train, color=ink, linewidth=2.0, linestyle=TRAIN_DASH, marker=marker, zorder=4)
        axes.plot(followed.epochs, test, color=ink, linewidth=2.6, marker=marker, zorder=5)
        axes.margins(y=0.12)
        kept = np.isin(followed.epochs, [moment.epoch for moment in process.moments])
        axes.plot(followed.epochs[kept], test[kept], "o", color=ink, markersize=4.5, zorder=6, clip_on=False)
        _name_best_and_last(axes, process, test, above=quantity.above)
        _label_lines(axes, quantity, train, test)
        return svg(figure, identity, description)


def _label_lines(axes: Axes, quantity: Quantity, train: Array, test: Array) -> None:
    """Name and value at the right end of each line."""
    ends = [(name, float(line[-1])) for name, line in (("training", train), ("test", test)) if len(line)]
    _at_right(axes, [(f"{name} {decimal(y, quantity.places)}", 1.0, y, colour(0)) for name, y in ends], ahead=9)


def _name_best_and_last(axes: Axes, process: Process, test: Array, *, above: bool) -> None:
    """Names beside the test line, on the side where the gap is not; one below the other where they would collide."""
    epochs = process.trajectory.epochs
    best, last = process.best, process.last
    names: dict[int, str] = {}
    for moment, name in ((best, "best"), (last, "last")):
        if moment is not None:
            names[moment.epoch] = f"{names[moment.epoch]}, {name}" if moment.epoch in names else name
    shown = [(epoch, name) for epoch, name in names.items() if np.isfinite(test[epochs == epoch]).any()]
    width = axes.get_window_extent().width
    across = [_share(axes, epoch) * width for epoch, _ in shown]
    apart = across[-1] - across[0] if len(shown) > 1 else width
    for place, (epoch, name) in enumerate(shown):
        stacked = place == 0 and apart < NAME_WIDTH
        left = apart < 1.5 * NAME_WIDTH or across[place] > width - NAME_WIDTH / 2
        away = 31.0 if stacked else 15.0
        axes.annotate(
            name,
            (epoch, float(test[epochs == epoch][0])),
            xytext=(3 if left else 0, away if above else -away),
            textcoords="offset points",
            horizontalalignment="right" if left else "center",
            verticalalignment="center",
            color=INK,
            fontsize=SMALL,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 3}
            if stacked
            else None,
            zorder=7,
        )


def landscape_curves(
    process: Process, *, footnotes: Sequence[str], height: float, identity: str, description: str
) -> str:
    """g(α) − g(0) of every measured epoch, mean over directions; a band at the first and the last."""
    moments, alphas = process.moments, process.alphas
    with drawing(identity):
        words = "robust loss, g(α) − g(0) in nats · mean over directions"
        figure, axes = panel("Weight loss landscape by epoch", words, right=104, footnotes=footnotes, height=height)
        axes.axvline(0.0, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlim(alphas.min(), alphas.max())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        ends = []
        for place, (moment, ink) in enumerate(zip(moments, ramp(len(moments)), strict=True)):
            outer = place in (0, len(moments) - 1)
            mean, deviation = centred(moment, alphas)
            if outer and len(moment.curves) > 1:
                axes.fill_between(
                    alphas, mean - deviation, mean + deviation, color=ink, alpha=0.13, linewidth=0, zorder=2
                )
            axes.plot(alphas, mean, color=ink, linewidth=2.4 if outer else 1.5, zorder=4 if outer else 3)
            single = alone(mean)
            axes.plot(alphas[single], mean[single], "o", color=ink, markersize=4, zorder=4)
            finite = np.flatnonzero(np.isfinite(mean))
            if len(finite):
                x = _share(axes, float(alphas[finite[-1]]))
                ends.append((_epoch_name(process, moment), x, float(mean[finite[-1]]), ink))
        axes.set_xlabel("α, in lengths of the normalised direction")
        axes.annotate(
            "epoch", (1.0, 1.0), (20, 15), "axes fraction", "offset points", color=MUTED, fontsize=SMALL, va="center"
        )  # fmt: skip
        _at_right(axes, _fewer(process, axes, ends), ahead=20, inks=False)
        return _themed(svg(figure, identity, description))


def centred(moment: Moment, alphas: Array) -> tuple[Array, Array]:
    """g(α) − g(0), mean and sample standard deviation over directions; nan where one of them is not finite."""
    if not len(moment.curves):
        return np.full(len(alphas), np.nan), np.full(len(alphas), np.nan)
    return mean_and_deviation(moment.curves - centre(alphas, moment.curves))


def ramp(n: int) -> list[str]:
    """Colours of n epochs, early to late.

    >>> ramp(1) == [RAMP[-1]], ramp(2) == [RAMP[0], RAMP[-1]]
    (True, True)
    """
    return [RAMP[round((len(RAMP) - 1) * place / (n - 1))] for place in range(n)] if n > 1 else [RAMP[-1]]


def _epoch_name(process: Process, moment: Moment) -> str:
    names = [name for name, is_it in (("best", moment.best), ("last", moment is process.last)) if is_it]
    return f"{moment.epoch} {', '.join(names)}".strip()


def _fewer(
    process: Process, axes: Axes, ends: Sequence[tuple[str, float, float, str]]
) -> list[tuple[str, float, float, str]]:
    """As many labels as there is room for: the ends, the best and both sides of each drop first."""
    room = int(axes.get_window_extent().height // LINE)
    if len(ends) <= room:
        return list(ends)
    sides = {str(epoch) for drop in process.drops for epoch in (drop, drop + 1)}
    first = [place for place, (name, *_) in enumerate(ends) if " " in name or name in sides]
    wanted = [0, len(ends) - 1, *first, *np.linspace(0, len(ends) - 1, room).round().astype(int).tolist()]
    chosen = list(dict.fromkeys(wanted))[:room]
    return [ends[place] for place in sorted(chosen)]


@dataclass(frozen=True)
class Strip:
    """One quantity of the measured epochs, with standard errors where it has them."""

    title: str
    series: int
    values: Array  # (E,)
    errors: Array  # (E,)


def strips(process: Process) -> tuple[Strip, ...]:
    """Landscape area, average-case flatness and the gap in loss."""

    def of_measure(name: str, series: int) -> Strip:
        found = [moment.measured(name) for moment in process.moments]
        unit = next((one.unit for one in found if one.unit), "nats")
        values, errors = (np.array([getattr(one, part) for one in found]) for part in ("value", "standard_error"))
        return Strip(f"{name[0].upper()}{name[1:]}, {unit}", series, values, errors)

    gaps = np.array([moment.gap_loss for moment in process.moments])
    gap = Strip("Gap in robust loss, test − training, nats", 0, gaps, np.full(len(gaps), math.nan))
    return of_measure(AREA, 1), of_measure(AVERAGE, 2), gap


def flatness_and_gap(
    process: Process, *, footnotes: Sequence[str], height: float, identity: str, description: str
) -> str:
    """Three quantities below each other, over the same epochs; bars: one standard error."""
    drawn = strips(process)
    with drawing(identity):
        figure, whole = panel(
            "Flatness and gap by epoch",
            "measured epochs · bars: one standard error",
            right=14,
            footnotes=footnotes,
            height=height,
        )
        box, pixel = whole.get_position(), whole.get_position().height / whole.get_window_extent().height
        whole.remove()
        tall = box.height / len(drawn)
        for place, strip in enumerate(drawn):
            bottom = box.y1 - (place + 1) * tall
            axes = figure.add_axes((box.x0, bottom, box.width, tall - 32 * pixel), facecolor="none")
            _strip(axes, process, strip, lowest=place == len(drawn) - 1)
        return svg(figure, identity, description)


def _strip(axes: Axes, process: Process, strip: Strip, *, lowest: bool) -> None:
    ink = colour(strip.series)
    epochs = np.array([float(moment.epoch) for moment in process.moments])
    _epoch_axis(axes, process)
    _drops(axes, process, labelled=False)
    axes.grid(axis="y", color=GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=SMALL, width=0.8, length=4, labelbottom=lowest)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch" if lowest else "", color=MUTED, fontsize=SMALL)
    title = shortened(strip.title, 60)
    axes.annotate(title, (0, 1), (-40, 9), "axes fraction", "offset points", color=ink, fontsize=SMALL, va="center")
    axes.plot(epochs, strip.values, color=ink, linewidth=1.6, marker="o", markersize=5, zorder=4, clip_on=False)
    known = np.isfinite(strip.values) & np.isfinite(strip.errors)
    low, high = (strip.values - strip.errors)[known], (strip.values + strip.errors)[known]
    axes.vlines(epochs[known], low, high, color=ink, linewidth=1.3, zorder=3, clip_on=False)
    gap = np.isnan(strip.values)
    foot = np.full(int(gap.sum()), 0.06)
    axes.plot(
        epochs[gap], foot, "x", color=ink, markersize=6, markeredgewidth=1.6, transform=axes.get_xaxis_transform()
    )
    ends = np.r_[0.0, strip.values[np.isfinite(strip.values)], low, high]
    margin = 0.08 * (ends.max() - ends.min() or 1.0)
    axes.set_ylim(ends.min() - (margin if ends.min() < 0 else 0), ends.max() + margin)


def _epoch_axis(axes: Axes, process: Process) -> None:
    """From the first epoch to the last, the same in all figures."""
    epochs = [*process.trajectory.epochs.tolist(), *(float(moment.epoch) for moment in process.moments)]
    margin = 0.5 if min(epochs) == max(epochs) else 0.0
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _drops(axes: Axes, process: Process, *, labelled: bool) -> None:
    """A line between the epochs of each drop of the learning rate, with the new rate where there is room for it."""
    width, taken = axes.get_window_extent().width, -math.inf
    for drop in process.drops:
        axes.axvline(drop + 0.5, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), zorder=1)
        rate, at = process.rate(drop + 1), _share(axes, drop + 0.5) * width
        if labelled and math.isfinite(rate) and at - taken > 60:
            axes.annotate(
                f"rate {rate:.3g}",
                (drop + 0.5, 1.0),
                (0, 6),
                axes.get_xaxis_transform(),
                "offset points",
                horizontalalignment="center",
                color=MUTED,
                fontsize=TINY,
            )
            taken = at


def _at_right(axes: Axes, ends: Sequence[tuple[str, float, float, str]], *, ahead: float, inks: bool = True) -> None:
    """Text right of the axes for (text, share of the width, y, colour); a line leads to each from (share, y)."""
    ends = [end for end in ends if math.isfinite(end[2])]
    low, high = axes.get_ylim()
    box = axes.get_window_extent()
    least = (high - low) * LINE / box.height
    places = spread_apart([y for _, _, y, _ in ends], least=least, low=low, high=high)
    for (text, x, y, ink), place in zip(ends, places, strict=True):
        turn = 1 + (ahead - 3) / box.width
        axes.plot(
            [x, turn],
            [y, place],
            color=ink,
            linewidth=0.9,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
            zorder=2,
        )
        axes.annotate(
            text,
            (1.0, place),
            (ahead, 0),
            axes.get_yaxis_transform(),
            "offset points",
            verticalalignment="center",
            annotation_clip=False,
            color=ink if inks else INK,
            fontsize=SMALL,
            fontweight="bold" if " " in text and not inks else "normal",
        )
    axes.set_ylim(low, high)


def _share(axes: Axes, x: float) -> float:
    """Where x stands between the left and the right end of the axes, 0 to 1."""
    left, right = axes.get_xlim()
    return (x - left) / (right - left)


def _themed(drawn: str) -> str:
    """The ramp's colours as CSS variables, as `svg` does for those that all pages have."""
    numbers = {ink: number for number, ink in enumerate(RAMP, 1)}
    return re.sub(
        rf"(fill|stroke): ({'|'.join(RAMP)})\b",
        lambda found: f"{found[1]}: var({variable(numbers[found[2]])}, {found[2]})",
        drawn,
    )


def variable(number: int) -> str:
    return f"--epoch-{number}"


def variables(ramp: Sequence[str]) -> Mapping[str, str]:
    """CSS variables of a theme's ramp, to values."""
    return {variable(number): ink for number, ink in enumerate(ramp, 1)}
