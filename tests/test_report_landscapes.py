"""Landscapes along lines: what stands on the figures, where lines break, and what is never drawn over another."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from run_folders import HOSTILE, Parsed, groups_in, landscape_record, page, plain, synthetic_run, two_groups, write

from saltflat.lab.report import read_run
from saltflat.lab.report.curves import ACCURACY, CENTRED, CLEAN, RAW, GroupLandscape
from saltflat.lab.report.drawing import SMALL, TINY, WIDTH, fitted, panel, wrapped
from saltflat.lab.report.figures import landscape
from saltflat.lab.report.lines import line_plates

ATTACK = "PGD-10, Linf, eps 8/255, step 2/255, uniform start, made afresh at each alpha, starts per example"


def measured(folder: Path, record: dict[str, Any]) -> Path:
    folder = synthetic_run(folder, landscape=False)
    write(folder / "landscapes" / "one.json", record)
    return folder


def record_with(**settings: str) -> dict[str, Any]:
    record = landscape_record(10, np.random.default_rng(0))
    return record | {"settings": record["settings"] | settings}


def with_gap(index: int, **extra: Any) -> dict[str, Any]:
    record = landscape_record(10, np.random.default_rng(0))
    for key in ("robust_loss", "robust_accuracy", "clean_loss"):
        record["curves"][2][key][index] = None
    return record | extra


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_record_s_arrays_are_read_in_the_order_of_alpha(tmp_path: Path) -> None:
    record = landscape_record(10, np.random.default_rng(0))
    shuffled = record | {
        "alphas": record["alphas"][::-1],
        "curves": [{key: list(row)[::-1] if key != "direction_seed" else row for key, row in curve.items()}
                   for curve in record["curves"]],
    }  # fmt: skip
    (straight,), (turned,) = (
        read_run(measured(tmp_path / name, one)).lines for name, one in (("a", record), ("b", shuffled))
    )
    for name in ("alphas", "robust_loss", "robust_accuracy", "clean_loss"):
        np.testing.assert_array_equal(getattr(turned, name), getattr(straight, name))
    np.testing.assert_array_equal(straight.robust_loss[1], record["curves"][1]["robust_loss"])
    assert np.isnan(straight.objective).all()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sphere"},
        {"alphas": [0.0]},
        {"alphas": [0.5 * index for index in range(1, 12)]},
        {"curves": [{"robust_loss": [1.0, 2.0]}]},
        {"curves": [{"robust_accuracy": [0.1] * 11}]},
        {"gaps": [{"why": "no alpha"}]},
    ],
)
def test_a_record_that_does_not_fit_becomes_a_note(tmp_path: Path, change: dict[str, Any]) -> None:
    run = read_run(measured(tmp_path / "run", landscape_record(10, np.random.default_rng(0)) | change))
    assert not run.lines
    assert "A damaged file was skipped: landscapes/one.json" in run.notes


def test_an_old_record_with_losses_alone_still_reads(tmp_path: Path) -> None:
    record = landscape_record(10, np.random.default_rng(0))
    record["curves"] = [{"robust_loss": curve["robust_loss"]} for curve in record["curves"]]
    (plate,) = line_plates(groups_in([measured(tmp_path / "run", record)]))
    assert len(plate.panels) == 2


def test_one_panel_per_quantity_on_record_with_the_settings_on_each(tmp_path: Path) -> None:
    record = record_with(attack=ATTACK, normalisation="by filter")
    record["curves"] = [curve | {"objective": [3.0] * 11} for curve in record["curves"]]
    (plate,) = line_plates(groups_in([measured(tmp_path / "run", record)]))
    titles = ("Centred", "As measured", "Robust accuracy", "Clean loss", "Objective")
    for title, drawn in zip(titles, plate.panels, strict=True):
        words = texts(str(drawn))
        assert title in words
        assert "11 points at α from −1 to 1 · n = 500 test images · BatchNorm: eval mode" in words
        assert "random, filter-normalised · by filter" in words
        assert any(text.startswith("PGD-10, Linf, eps 8/255, step 2/255, uniform start, ") for text in words)


@pytest.mark.parametrize(
    ("ordinate", "origin"),
    [(CENTRED, "g(0) = 2.000 ± 1.414"), (RAW, "g(0) = 2.000 ± 1.414"), (CLEAN, "at w: 2.000 ± 1.414")],
)
def test_the_value_at_w_is_a_mean_over_seeds(ordinate: Any, origin: str) -> None:
    group = GroupLandscape("at", np.array([-1.0, 0.0]), (np.array([[5.0, 1.0]]), np.array([[5.0, 3.0]])))
    assert group.origin(ordinate) == origin
    expected = [[4.0, 0.0], [2.0, 0.0]] if ordinate.centred else [[5.0, 1.0], [5.0, 3.0]]
    np.testing.assert_array_equal(group.curves(ordinate), expected)


def test_a_gap_breaks_the_line_is_marked_and_is_explained(tmp_path: Path) -> None:
    whole, broken = (
        str(line_plates(groups_in([measured(tmp_path / name, record)]))[0].panels[0])
        for name, record in (
            ("whole", with_gap(0) | landscape_record(10, np.random.default_rng(0))),
            ("b", with_gap(7)),
        )
    )

    def longest(svg: str) -> list[str]:
        """The drawing steps of the mean's line, M for a start and L for a step."""
        lines = re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 2\.3[^>]*>', svg)
        return re.findall("[ML]", max(lines, key=len))

    assert "".join(longest(whole)) == "M" + "L" * 10
    assert "".join(longest(broken)) == "M" + "L" * 6 + "M" + "L" * 2
    gaps = [
        {"direction_seed": 2, "alpha": landscape_record(1, np.random.default_rng(0))["alphas"][7], "why": "diverged"}
    ]
    text = plain(Parsed(page([measured(tmp_path / "said", with_gap(7, gaps=gaps))])).text)
    assert "× marks what could not be measured (at, seed 0 at α = 0.40: diverged)." in text
    text = plain(Parsed(page([measured(tmp_path / "unsaid", with_gap(7))])).text)
    assert "× marks what could not be measured (at, seed 0 at α = 0.40: not on record)." in text


def test_a_landscape_without_a_value_at_w_is_drawn_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (plate,) = line_plates(groups_in([measured(tmp_path / "run", with_gap(5))]))
    assert "at · g(0) = –" in texts(str(plate.panels[0]))


def test_a_value_between_two_gaps_is_a_dot() -> None:
    alphas = np.linspace(-1, 1, 5)
    values = np.array([[1.0, np.nan, 0.5, np.nan, 1.0]])
    kept = [
        landscape([GroupLandscape("at", alphas, (row,))], RAW, identity="one", description="").svg
        for row in (values, np.ones((1, 5)))
    ]
    dots = [svg.count("<use") for svg in kept]
    assert dots[0] - dots[1] >= 2 + 3  # two crosses, three values that stand alone


def test_another_direction_is_another_plate(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20], [10])
    for folder in folders:
        write(folder / "landscapes" / "adversarial.json", record_with(direction="adversarial, 10 steps of ascent"))
    adversarial, random = line_plates(groups_in(folders))
    assert adversarial.title == "Weights: last, direction: adversarial, 10 steps of ascent"
    assert random.title == "Weights: last, direction: random, filter-normalised"
    assert "Direction: random" not in adversarial.caption
    for plate in (adversarial, random):
        assert "at: 1 seed × 4 directions; at-awp: 1 seed × 4 directions" in plate.caption


@pytest.mark.parametrize("key", ["normalisation", "attack", "batch_norm", "loss", "seed"])
def test_no_two_settings_share_a_plate(tmp_path: Path, key: str) -> None:
    folders = two_groups(tmp_path, [20], [10])
    write(folders[1] / "landscapes" / "last.json", record_with(**{key: "another"}))
    assert len(line_plates(groups_in(folders))) == 2


@pytest.mark.parametrize("size", [TINY, SMALL])
@pytest.mark.parametrize(
    "facts",
    [["W" * 200], [ATTACK, ATTACK], [HOSTILE] * 3, ["対抗" * 60, "n = 500"], ["i" * 300], [" ", "", "\x00" * 99]],
)
def test_lines_of_facts_fit_whatever_they_say(facts: list[str], size: float) -> None:
    for line in filter(str.strip, (fitted(facts, 300, size), *wrapped(facts, 300, size))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # signs that the font lacks
            ink = TextPath((0, 0), line, size=size, prop=FontProperties(family="DejaVu Sans"), usetex=False)
        assert ink.get_extents().x1 <= 300


def test_facts_lose_their_last_clauses_first() -> None:
    assert fitted(["n = 500", "PGD-10, eps 8/255"], 1000) == "n = 500 · PGD-10, eps 8/255"
    assert fitted(["n = 500", "PGD-10, eps 8/255"], 120) == "n = 500 · PGD-10, …"
    assert fitted(["", "W" * 300], 100).endswith("W…")
    assert fitted([], 100) == ""


def test_facts_go_on_to_the_next_line_before_any_is_cut() -> None:
    facts = ["one, two", "three, four", "five, six, seven, eight, nine"]
    assert wrapped(facts, 1000) == ["one, two · three, four · five, six, seven, eight, nine"]
    assert wrapped(facts, 150) == ["one, two · three, four", "five, six, seven, eight, …"]
    assert wrapped(["", ""], 100) == []


def test_footnotes_stand_below_the_axes_and_inside_the_frame() -> None:
    figure, axes = panel("Title", "note", right=14, footnotes=[word * 11 for word in ("once", "twice", "thrice")])
    axes.set_xlabel("α")
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in figure.texts}
    label = axes.xaxis.get_tightbbox(renderer)
    assert label is not None
    assert label.y0 >= boxes["once" * 11].y1
    assert boxes["once" * 11].y0 >= boxes["twice" * 11].y1 - 1
    assert boxes["thrice" * 11].y0 >= 0
    assert figure.get_size_inches()[0] * 72 == WIDTH


def test_accuracies_are_percentages(tmp_path: Path) -> None:
    (plate,) = line_plates(groups_in([measured(tmp_path / "run", record_with())]))
    assert "at · at w: 40.0 %" in texts(str(plate.panels[2]))
    assert ACCURACY.unit == " %"
