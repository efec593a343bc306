"""Drawing: a matplotlib figure made within a page's frame, and its SVG text rewritten to stand inside a page.

Text stays text, every colour becomes a CSS variable whose fallback is the light theme's value (a page has dark values;
a file on its own is legible as it is), and every id carries the figure's identity, so that several figures in one page
do not clash. Equal arrays give equal text: matplotlib's objects are used without a global figure or a backend.

The series' colours are Okabe and Ito's, which colour-blind readers can tell apart, darkened until words set in them are
readable; the series differ in dash as well.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1d2226", "#5d6770", "#e3e5e4"
SERIES = ("#0a68a6", "#b84d00", "#00785a", "#9c4a80", "#7a6400", "#4a5058")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.4)), (0, (7, 2, 2, 2)), (0, (10, 3)), (0, (1, 1)))
VARIABLES = {INK: "--figure-ink", MUTED: "--figure-muted", GRID: "--figure-grid"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES, 1)
}
WIDTH, HEIGHT = 460.0, 340.0  # of one panel, in CSS pixels when shown at its natural size
TINY, SMALL, TEXT, HEADING = 10.5, 11.5, 12.5, 14.5  # pixels


@dataclass(frozen=True)
class Frame:
    """Where a figure's axes lie in it, in percent from its left and from its top, and what their ends stand for."""

    left: float
    right: float
    top: float
    bottom: float
    across: tuple[float, float]
    up: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """In percent from the figure's left and from its top.

        >>> Frame(10.0, 90.0, 20.0, 80.0, (0.0, 4.0), (0.0, 1.0)).place(1.0, 1.0)
        (30.0, 20.0)
        """
        share_x = (x - self.across[0]) / (self.across[1] - self.across[0])
        share_y = (y - self.up[0]) / (self.up[1] - self.up[0])
        across = self.left + share_x * (self.right - self.left)
        return round(across, 2), round(self.bottom - share_y * (self.bottom - self.top), 2)


@dataclass(frozen=True)
class Drawn:
    """A figure's SVG text, and the frame of its axes, so that a page can point at what is in it."""

    svg: str
    frame: Frame


def drawn(figure: Figure, axes: Axes, identity: str, description: str) -> Drawn:
    """The figure as `svg` makes it, with its frame."""
    text = svg(figure, identity, description)
    box, across, up = axes.get_position(), axes.get_xlim(), axes.get_ylim()
    left, right, top, bottom = (round(100 * end, 3) for end in (box.x0, box.x1, 1 - box.y1, 1 - box.y0))
    return Drawn(text, Frame(left, right, top, bottom, across, up))


def panel(
    title: str,
    note: str,
    *,
    right: float,
    series: int | None = None,
    legend_rows: int = 0,
    footnotes: Sequence[str] = (),
    height: float = HEIGHT,
) -> tuple[Figure, Axes]:
    """Quiet axes under a title, a note and room for a legend, above lines of small print; margins in pixels.

    The title's colour is that of its `series`. Panels of one kind have the same margins; legend and footnotes make a
    panel higher and leave its axes as large as they are.
    """
    small_print = wrapped(footnotes, WIDTH - 8, TINY)
    room, foot = 18 * legend_rows + (8 if legend_rows else 0), 14 * len(small_print) + (6 if small_print else 0)
    top, left, bottom = 56 + room, 44, 46 + foot
    height = height + room + foot
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none", dpi=72)
    box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    axes = figure.add_axes(box, facecolor="none")
    axes.grid(axis="y", color=GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=SMALL, width=0.8, length=4)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.label.set(color=MUTED, fontsize=SMALL)
    ink = INK if series is None else colour(series)
    figure.text(4 / WIDTH, 1 - 18 / height, shortened(title, 46), fontsize=HEADING, fontweight="bold", color=ink)
    figure.text(4 / WIDTH, 1 - 37 / height, fitted(note.split(" · "), WIDTH - 8), fontsize=SMALL, color=MUTED)
    for index, line in enumerate(reversed(small_print)):
        figure.text(4 / WIDTH, (6 + 14 * index) / height, line, fontsize=TINY, color=MUTED)
    return figure, axes


def line(figure: Figure, text: str, down: float, *, size: float, ink: str, weight: str = "normal") -> None:
    """Text at the left edge, its base line so many pixels below the top."""
    width, height = figure.get_size_inches() * 72
    figure.text(4 / width, 1 - down / height, shortened(text, 200), fontsize=size, fontweight=weight, color=ink)


def legend(axes: Axes, handles: list[Line2D], texts: list[str]) -> None:
    """One entry a row, between the note and the axes."""
    drawn = axes.legend(
        handles,
        [str(index) for index in range(len(handles))],  # a label that starts with "_" would be left out
        loc="lower left",
        bbox_to_anchor=(4 / WIDTH, axes.get_position().y1 + 0.035),
        bbox_transform=axes.figure.transFigure,
        frameon=False,
        fontsize=TEXT,
        handlelength=2.6,
        labelspacing=0.35,
        borderpad=0.0,
        borderaxespad=0.0,
    )
    for entry, text in zip(drawn.get_texts(), texts, strict=True):
        entry.set(text=text, color=INK)


def colour(series: int) -> str:
    """The colour of a series, by its place on the page."""
    return SERIES[series % len(SERIES)]


def shortened(text: str, most: int) -> str:
    """One printable line: control characters cannot stand in XML, and a long name would leave the figure."""
    line = "".join(sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in text)
    return line if len(line) <= most else line[: most - 1] + "…"


def fitted(facts: Sequence[str], width: float, size: float = SMALL) -> str:
    """Facts on one line of at most `width` pixels: the longest fact loses its last clauses, then its last letters.

    >>> fitted(["n = 500 test images", "PGD-10, Linf, eps 8/255, step 2/255, uniform start"], 300)
    'n = 500 test images · PGD-10, Linf, eps 8/255, …'
    """
    left = [shortened(fact, 200) for fact in facts if fact]
    while (line := " · ".join(left)) and _width(line, size) > width:
        longest = max(range(len(left)), key=lambda index: len(left[index]))
        left[longest] = _cut(left[longest])
        if left[longest] == "…":
            del left[longest]
    return line


def wrapped(facts: Sequence[str], width: float, size: float = SMALL) -> list[str]:
    """Facts on as many lines as they need; one that is too long for a line of its own is cut.

    >>> wrapped(["n = 500 test images", "BatchNorm: eval mode", "PGD-10, Linf, eps 8/255"], 300)
    ['n = 500 test images · BatchNorm: eval mode', 'PGD-10, Linf, eps 8/255']
    """
    lines: list[str] = []
    for fact in (fitted([fact], width, size) for fact in facts if fact):
        joined = " · ".join([*lines[-1:], fact])
        if lines and _width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(fact)
    return lines


def _cut(fact: str) -> str:
    words = fact.removesuffix("…").rstrip(", ")
    rest, comma, _ = words.rpartition(", ")
    return f"{rest}, …" if comma else f"{words[:-1]}…"


def _width(line: str, size: float) -> float:
    """In pixels, in matplotlib's font, which is wider than most; signs that it lacks are taken as wide as high."""
    with warnings.catch_warnings():
        _keep_quiet_about_glyphs()
        font = FontProperties(family="DejaVu Sans", size=size)
        width, _, _ = text_to_path.get_text_width_height_descent(line, font, ismath=False)
    return float(width) + size * sum(unicodedata.east_asian_width(sign) in "WF" for sign in line)


@contextmanager
def drawing(identity: str) -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's matplotlibrc says; names are never read as formulas."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", identity):
        raise ValueError(f"identity must be lower-case letters, digits and dashes, got {identity!r}")
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": identity, "text.parse_math": False, "text.color": INK}
        )
        _keep_quiet_about_glyphs()
        yield


def _keep_quiet_about_glyphs() -> None:
    """The reader's browser chooses the font, so a sign that matplotlib's font lacks is no fault."""
    warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)


def svg(figure: Figure, identity: str, description: str) -> str:
    """The figure as one `<svg>` element; `description` is for those who cannot see it."""
    buffer = io.StringIO()
    canvas = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # type: ignore[no-untyped-call]
    drawn = buffer.getvalue()
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    # The style element would restyle the whole page that the figure stands in.
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" id="{identity}" role="img" '
        f'aria-label={quoteattr(shortened(description, 1000))} style="stroke-linejoin: round; stroke-linecap: butt">'
    )
    # Inside text, matplotlib escapes < and >, so that only real tags are rewritten.
    return opening + re.sub(r"<[^>]*>", lambda tag: _rewritten(tag.group(), identity), body).strip()


def _rewritten(tag: str, identity: str) -> str:
    tag = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{identity}-", tag)
    tag = re.sub(r"font-family: [^;\"]*", "font-family: var(--figure-font, sans-serif)", tag)
    return re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})\b",
        lambda match: f"{match[1]}: var({VARIABLES[match[2]]}, {match[2]})" if match[2] in VARIABLES else match[0],
        tag,
    )
