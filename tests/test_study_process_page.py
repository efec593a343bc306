"""The page of one run over its epochs: what it says follows from the record, and it is safe and complete."""

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from run_folders import HOSTILE, Parsed, plain

from saltflat.lab.study.association import tau_b
from saltflat.lab.study.process_figures import DARK_RAMP, RAMP, ramp
from saltflat.lab.study.process_page import as_csv, render, write
from saltflat.lab.study.process_record import AREA, AVERAGE, Process, read
from saltflat.lab.study.process_words import Change, headline, notes

KEPT = (1, 10, 20, 21, 30, 31, 40)
ALPHAS = np.linspace(-1, 1, 11)


def run(
    gaps: Sequence[float] = (0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8),
    areas: Sequence[float | None] = (0.1, 0.5, 1.0, 1.6, 2.0, 2.2, 2.4),
    averages: Sequence[float | None] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    *,
    kept: Sequence[int] = KEPT,
    drops: Sequence[int] = (20, 30),
    best: int | None = 21,
    epochs: int = 40,
    error: float | None = 0.01,
) -> dict[str, Any]:
    """A record whose gaps in loss and measures at the kept epochs are exactly these; accuracies follow the gap."""
    points = [
        point(epoch, gap, area, average, error, _role(epoch, drops, best, kept[-1]))
        for epoch, gap, area, average in zip(kept, gaps, areas, averages, strict=True)
    ]
    return {
        "run": "at-0",
        "recipe": "at",
        "seed": 3,
        "epochs": epochs,
        "drops": list(drops),
        "alphas": ALPHAS.tolist(),
        "settings": {
            "gap": "PGD-20, Linf, eps 8/255; n = 1000 training and 1000 test images",
            "landscape": {
                "n": 512,
                "split": "test",
                "direction": "random",
                "normalisation": "filter by filter",
                "attack": "PGD-10, made afresh at each point",
                "batch_norm": "eval mode",
            },
            "flatness": {
                "n": 256,
                "split": "train",
                "attack": "PGD-11",
                "batch_norm": "eval mode",
                "directions": 3,
                "draws": 10,
            },
        },
        "points": points,
        "trajectory": [line(epoch, drops) for epoch in range(1, kept[-1] + 1)],
        "evaluation": {"attack": "PGD-12, Linf, eps 8/255", "mode": "eval"},
    }


def _role(epoch: int, drops: Sequence[int], best: int | None, last: int) -> str:
    roles = {
        "before a drop of the rate": epoch in drops,
        "after a drop of the rate": epoch - 1 in drops,
        "best on validation": epoch == best,
        "last": epoch == last,
    }
    return ", ".join(role for role, holds in roles.items() if holds)


def side(accuracy: float, loss: float) -> dict[str, float]:
    return {"n": 1000, "clean_accuracy": 0.9, "clean_loss": 0.3, "robust_accuracy": accuracy, "robust_loss": loss}


def line(epoch: int, drops: Sequence[int]) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "learning_rate": 0.1 * 0.1 ** sum(epoch > drop for drop in drops),
        "train": side(0.3 + 0.01 * epoch, 2.0 - 0.03 * epoch),
        "test": side(0.3 + 0.005 * epoch, 2.0 - 0.01 * epoch),
    }


def point(
    epoch: int, gap: float, area: float | None, average: float | None, error: float | None, role: str
) -> dict[str, Any]:
    def measure(name: str, value: float | None, error: float | None) -> dict[str, Any]:
        note = "" if value is not None else "not a number"
        known = error if value is not None else None
        return {
            "name": name,
            "value": value,
            "standard_error": known,
            "unit": "nats",
            "settings": f"how {name}",
            "note": note,
        }

    curvature = math.nan if area is None else area
    return {
        "checkpoint": f"epoch-{epoch}",
        "epoch": epoch,
        "role": role,
        "train": side(0.5 + 0.3 * gap, 1.2 - gap),
        "test": side(0.5, 1.2),
        "gap": {"loss": gap, "accuracy": 0.3 * gap},
        "curves": [
            [1.2 + value if math.isfinite(value) else None for value in curvature * scale * ALPHAS**2]
            for scale in (0.9, 1.0, 1.1)
        ],
        "measures": [
            measure(AREA, area, error),
            measure(AVERAGE, average, error),
            measure("weight norm", 10.0 + epoch, 0.0),
        ],
    }


def said(report: dict[str, Any]) -> list[str]:
    return [plain(f"{sentence.claim} {sentence.evidence}") for sentence in headline(read(report))]


def page(report: dict[str, Any], folder: Path) -> str:
    write(report, folder)
    return (folder / "process.html").read_text(encoding="utf-8")


def test_a_gap_that_opens_with_a_sharpening_landscape_is_said_to() -> None:
    answer, gap, flat, together, best = said(run())
    assert answer.startswith("As the robust gap opens, the landscape sharpens by its area and by the average case.")
    assert "From epoch 20, the last before the first drop of the learning rate (0.1 → 0.01), to epoch 40" in answer
    assert "The gap in robust loss grows from 0.200 to 0.800 nats" in gap
    assert "in robust accuracy grows from 6.0 to 24.0 points" in gap
    assert "+0.600 nats" in gap
    assert "The landscape area rises from 1.00 ± 0.01 to 2.40 ± 0.01 nats" in flat
    assert "over 3 directions for the area and 10 draws" in flat
    assert "the gap in robust loss rises together with the landscape area (τ = 1.00) and the average case" in together
    assert "not independent" in together
    assert "no interval is given" in together
    assert "From the best epoch (21, chosen on validation) to the last (40)" in best


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"gaps": [0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0.1]}, "As the robust gap closes, the landscape sharpens by its area"),
        (
            {"areas": [2.4, 2.2, 2.0, 1.6, 1.0, 0.5, 0.1]},
            "the landscape flattens by its area and sharpens by the average case.",
        ),
        ({"error": 10.0}, "opens, the landscape is the same within twice the error by its area and by the average"),
        ({"gaps": [0.2] * 7}, "The robust gap changes by less than twice its sampling error; the landscape sharpens"),
        ({"gaps": [0.2] * 6 + [0.22]}, "The robust gap grows by less than twice its sampling error;"),
        ({"areas": [None] * 7}, "As the robust gap opens, the landscape sharpens by the average case."),
        ({"areas": [None] * 7, "averages": [None] * 7}, "nothing can be said of the landscape"),
        (
            {"drops": ()},
            "From epoch 1, the first that was measured (training robust accuracy 50.0 %; the learning rate",
        ),
        ({"drops": (25, 30)}, "From epoch 21, the last that was measured before the first drop of the learning rate"),
        ({"drops": (60,)}, "the learning rate does not drop"),
        ({"epochs": 60}, "to epoch 40, the last, where the run of 60 stopped."),
    ],
)
def test_the_answer_follows_the_numbers(changed: dict[str, Any], answer: str) -> None:
    assert answer in said(run(**changed))[0]


def test_a_gap_that_moves_two_ways_is_neither_opening_nor_closing() -> None:
    report = run()
    report["points"][-1]["train"]["robust_accuracy"] = 0.3
    assert said(report)[0].startswith("The robust gap moves one way in loss and the other way in accuracy;")


def test_best_and_last_are_compared_only_where_there_are_two() -> None:
    assert said(run(best=None))[-1].startswith("The best epoch is not on record")
    assert said(run(best=40))[-1].startswith("The last epoch, 40, is also the best")


def test_one_epoch_makes_a_page_that_says_so(tmp_path: Path) -> None:
    report = run([0.1], [1.0], [0.1], kept=[40], drops=(), best=None)
    assert "Nothing can be compared" in Parsed(page(report, tmp_path)).text


def test_tau_is_of_the_epochs_that_have_both_values() -> None:
    areas = [0.3, None, 0.1, 0.4, 0.2, 0.6, 0.5]
    report = run(areas=areas)
    there = [place for place, area in enumerate(areas) if area is not None]
    gaps = np.array([0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8])
    expected = tau_b(np.array([areas[place] for place in there], dtype=float), gaps[there])
    assert f"the landscape area (τ = {expected:.2f}, 6 epochs)" in said(report)[3]


def test_two_epochs_have_no_tau() -> None:
    together = said(run([0.1, 0.5], [1.0, 2.0], [0.1, 0.2], kept=[20, 40]))[3]
    assert "cannot be compared with the landscape area (τ = –, 2 epochs)" not in together
    assert "cannot be compared with the landscape area (τ = –)" in together


def test_a_change_counts_beyond_twice_its_error() -> None:
    assert Change(1.0, 1.3, 0.1).sign == 1
    assert Change(1.0, 1.19, 0.1).sign == 0
    assert Change(1.0, 0.7, 0.1).sign == -1
    assert Change(1.0, 0.99).sign == -1
    assert Change(1.0, math.nan, 0.1).sign == 0


def test_the_error_of_a_change_holds_those_of_both_epochs() -> None:
    assert f"+1.40 ± {math.hypot(0.3, 0.3):.2f}" in said(run(error=0.3))[2]
    assert "no error is known" in said(run(error=None))[2]


def test_what_is_missing_is_said_and_left_empty(tmp_path: Path) -> None:
    report = run(areas=[0.1, 0.5, 1.0, None, 2.0, 2.2, None])
    report["points"][2]["train"]["robust_loss"] = None
    text = plain(Parsed(page(report, tmp_path)).text)
    assert "No finite landscape area at epochs 21 and 40 not a number" in text
    assert "No finite gap in loss at epoch 20" in text
    assert "Robust losses along a direction that are not finite, at epochs 21 and 40" in text
    with open(tmp_path / "process.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[3][AREA] == rows[3][f"{AREA} (standard error)"] == rows[2]["gap_loss"] == ""
    assert not notes(read(run()))


def test_a_whole_record_of_nothing_finite_still_makes_a_page(tmp_path: Path) -> None:
    report = run(areas=[None] * 7, averages=[None] * 7)
    for part in report["points"] + report["trajectory"]:
        for split in ("train", "test"):
            part[split]["robust_loss"] = part[split]["robust_accuracy"] = None
    assert "The robust gap is not known at both epochs; nothing can be said" in Parsed(page(report, tmp_path)).text


def test_the_csv_has_the_record_s_numbers() -> None:
    report = run()
    rows = list(csv.DictReader(as_csv(read(report)).splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(KEPT)
    for row, given in zip(rows, report["points"], strict=True):
        assert row["role"] == given["role"]
        assert float(row["train_robust_loss"]) == given["train"]["robust_loss"]
        assert float(row["gap_loss"]) == pytest.approx(given["gap"]["loss"])
        assert float(row["gap_accuracy"]) == pytest.approx(given["gap"]["accuracy"])
        assert float(row[AREA]) == given["measures"][0]["value"]
        assert float(row[f"{AVERAGE} (standard error)"]) == 0.01
        assert float(row["weight norm"]) == 10.0 + given["epoch"]


def test_points_in_another_order_make_the_same_page() -> None:
    report = run()
    assert render(read({**report, "points": report["points"][::-1]})) == render(read(report))


def test_figures_say_how_they_were_measured(tmp_path: Path) -> None:
    accuracy, loss, landscape, strips = figures(page(run(), tmp_path))
    for drawn in (accuracy, loss):
        words = " ".join(texts(drawn))
        for fact in ("n = 1000 training and 1000 test images", "PGD-12", "BatchNorm: eval mode", "rate 0.01", "rate 0"):
            assert fact in words, fact
        assert {"best", "last"} <= set(texts(drawn))
    words = " ".join(texts(landscape))
    for fact in ("n = 512 test images", "random, filter by filter", "afresh at each point", "eval mode", "nats"):
        assert fact in words, fact
    words = " ".join(texts(strips))
    for fact in ("n = 256 train images", "PGD-11", "PGD-20", "n = 1000 training", "eval mode", "how average case"):
        assert fact in words, fact


def test_every_drop_is_marked_in_every_figure_over_epochs(tmp_path: Path) -> None:
    def dashed(drawn: str) -> int:
        return len(re.findall(r"stroke-dasharray: 3,2", drawn))

    accuracy, loss, landscape, strips = figures(page(run(), tmp_path / "two"))
    assert [dashed(drawn) for drawn in (accuracy, loss, landscape, strips)] == [2, 2, 0, 6]
    assert [dashed(drawn) for drawn in figures(page(run(drops=()), tmp_path / "none"))] == [0, 0, 0, 0]


@pytest.mark.parametrize("number", [2, 7, 100])
def test_labels_of_epochs_do_not_collide(tmp_path: Path, number: int) -> None:
    kept = list(range(1, number + 1))
    flat = [1e-3 * place for place in range(number)]  # all curves end within a few pixels
    report = run(flat, flat, flat, kept=kept, drops=(), best=number // 2, epochs=number)
    report["points"][0]["curves"] = [[1.2 + 3 * alpha**2 for alpha in ALPHAS]]
    landscape = figures(page(report, tmp_path))[2]
    labels = {text: down for text, across, down in placed(landscape) if across > 370 and text[0].isdigit()}
    first, best = "1 best" if number == 2 else "1", f"{number // 2} best"
    assert {first, best, f"{number} last"} <= set(labels)
    assert len(labels) == number if number < 20 else 20 <= len(labels) < 30
    heights = sorted(labels.values())
    assert np.diff(heights).min() > 11
    assert heights[0] > 50
    assert heights[-1] < 400


def test_the_ramp_is_monotone_in_luminance_in_both_themes() -> None:
    for colours, darker in ((RAMP, True), (DARK_RAMP, False)):
        luminance = np.array([_luminance(ink) for ink in colours])
        assert (np.diff(luminance) < 0).all() if darker else (np.diff(luminance) > 0).all()
        paper = _luminance("#ffffff" if darker else "#191d20")
        contrast = (np.maximum(luminance, paper) + 0.05) / (np.minimum(luminance, paper) + 0.05)
        assert contrast.min() > 3
    assert len(RAMP) == len(DARK_RAMP)
    assert ramp(50)[0] == RAMP[0]
    assert ramp(50)[-1] == RAMP[-1]


def _luminance(ink: str) -> float:
    """WCAG's relative luminance."""
    channels = np.array([int(ink[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_the_ramp_has_values_of_its_own_in_the_dark(tmp_path: Path) -> None:
    text = page(run(), tmp_path)
    used = set(re.findall(r"var\((--epoch-\d), #", text))
    assert len(used) == len(KEPT)
    light, _, dark = text.partition("@media (prefers-color-scheme: dark) { :root { --epoch-1")
    assert all(f"{name}: " in light for name in used)
    assert all(ink in dark.partition("</style>")[0] for ink in DARK_RAMP)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    odd = HOSTILE + "\ud800\x00"
    report = run(areas=[0.1, 0.5, 1.0, None, 2.0, 2.2, 2.4])
    report |= {"run": odd, "recipe": odd, "evaluation": {"attack": odd, "mode": odd, odd: odd}}
    report["settings"] = {"gap": odd, "landscape": {odd: odd, "attack": odd, "direction": odd}, "flatness": {odd: odd}}
    for given in report["points"]:
        given["role"] = odd
        for row in given["measures"]:
            row |= {"settings": odd, "unit": odd, "note": odd}
    parsed = Parsed(page(report, tmp_path / "hostile"))
    assert set(parsed.tags) <= set(Parsed(page(run(areas=[None] * 7), tmp_path / "ordinary")).tags)
    assert not {"script", "img"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count("<script>alert(1)</script>") > 20
    assert len([texts(drawn) for drawn in figures((tmp_path / "hostile" / "process.html").read_text())]) == 4


def test_the_page_asks_the_network_for_nothing_and_its_references_hold(tmp_path: Path) -> None:
    text = page(run(), tmp_path)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text).replace("http-equiv", "")
    assert not re.findall(r"url\((?!#)", text)
    attributes = Parsed(text).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value or "" for name, value in attributes if name.endswith("href")]
    assert all(value.startswith("#") or value == "data:," for value in targets)
    used = {value[1:] for value in targets if value.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)


def test_an_equal_record_gives_equal_bytes_without_torch(tmp_path: Path) -> None:
    report = run()
    page(report, tmp_path / "here")
    (tmp_path / "report.json").write_text(json.dumps(report))
    program = (
        "import json, sys; from pathlib import Path; from saltflat.lab.study.process_page import write; "
        "write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])); "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "report.json"), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}, cwd=tmp_path)
    for name in ("process.html", "process.csv", "process.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert json.loads((tmp_path / "here" / "process.json").read_text()) == report


@pytest.mark.parametrize("damage", [{"points": []}, {"alphas": [0.0]}])
def test_a_record_that_is_none_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        read(run() | damage)


def figures(text: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)


def texts(drawn: str) -> list[str]:
    """All texts of a figure, which is sound XML."""
    return ["".join(part.itertext()) for part in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]


def placed(drawn: str) -> list[tuple[str, float, float]]:
    """Texts with the places that matplotlib gives them, in pixels."""
    found = []
    for part in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text"):
        place = re.search(r"translate\(([\d.-]+) ([\d.-]+)\)", part.get("transform", ""))
        x, y = (place[1], place[2]) if place else (part.get("x", "nan"), part.get("y", "nan"))
        found.append(("".join(part.itertext()), float(x), float(y)))
    return found


def test_a_process_knows_where_it_starts_and_ends() -> None:
    process: Process = read(run())
    assert (process.start.epoch, process.last.epoch) == (20, 40)
    assert process.best is not None
    assert process.best.epoch == 21
    assert process.rate(21) == pytest.approx(0.01)
    assert math.isnan(process.rate(99))
