"""Probes: the words and places that a reader of a figure is given, against the figure itself."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import groups_in, landscape_record, page, synthetic_run, two_groups, write

from saltflat.lab.report.lines import line_plates
from saltflat.lab.report.plates import curves_plate

ISLAND = re.compile(r'<script type="application/json" id="([^"]*probe[^"]*)">(.*?)</script>', re.DOTALL)


def corners(panel: str) -> np.ndarray:
    """Every corner of every line in a figure, in percent of its width and height."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', panel)
    assert found
    size = [float(side) for side in found.groups()]
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", panel)]) / size * 100


def test_marks_lie_on_the_curves(tmp_path: Path) -> None:
    groups = groups_in(two_groups(tmp_path, [20, 21, 22], [10, 11, 12]))
    curves = curves_plate(groups)
    (lines,) = line_plates(groups)
    assert curves is not None
    for plate, stops in ((curves, 6), (lines, 11)):
        assert len(plate.probes) == len(plate.panels)
        for panel, probe in zip(plate.panels, plate.probes, strict=True):
            assert probe is not None
            assert len(probe.stops) == stops
            points = corners(str(panel))
            for stop in probe.stops:
                for reading in stop.readings:
                    if reading.top is not None:
                        nearest = np.abs(points - [stop.left, reading.top]).max(axis=1).min()
                        assert nearest < 0.02, (probe.label, stop.at, reading)


def test_words_are_the_values(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 22], [])
    groups = groups_in(folders)
    curves = curves_plate(groups)
    assert curves is not None
    (probe,) = curves.probes
    assert probe is not None
    end = {reading.name: reading.words.replace("\u00a0", " ") for reading in probe.stops[-1].readings}
    assert end == {
        "robust, test": "45.00 %",
        "robust, training subset": "66.00 %",
        "clean, test": "76.00 %",
        "gap": "21.00 points",
    }
    assert (probe.stops[probe.start].at, probe.stops[0].at) == ("epoch 6", "epoch 1")
    (plate,) = line_plates(groups)
    records = [json.loads((folder / "landscapes" / "last.json").read_text()) for folder in folders]
    losses = np.concatenate([[curve["robust_loss"] for curve in record["curves"]] for record in records])
    raw = plate.probes[1]
    assert raw is not None
    for index, stop in enumerate(raw.stops):
        mean, deviation = losses[:, index].mean(), losses[:, index].std(ddof=1)
        assert stop.readings[0].words == f"{mean:.3f} ± {deviation:.3f}\u00a0nats"
    assert raw.stops[raw.start].at == "α = 0"
    assert raw.stops[0].at == "α = −1"


def test_a_gap_has_words_and_no_mark(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    record = landscape_record(10, np.random.default_rng(0))
    record["curves"][0]["robust_loss"][2] = None
    write(folder / "landscapes" / "last.json", record)
    (plate,) = line_plates(groups_in([folder]))
    assert plate.probes[0] is not None
    (reading,) = plate.probes[0].stops[2].readings
    assert (reading.words, reading.top) == ("not measured", None)


def test_islands_hold_one_probe_for_each_panel_and_no_markup(tmp_path: Path) -> None:
    folders = [synthetic_run(tmp_path / str(i), recipe=name) for i, name in enumerate(("</script><b>", "at & co"))]
    islands = dict(ISLAND.findall(page(folders)))
    assert set(islands) == {"curves-probe", "landscape-probe-0"}
    for text, panels in zip(islands.values(), (2, 4), strict=True):
        assert not set("<>&") & set(text)
        assert len(json.loads(text)) == panels
    assert "</script><b>" in json.loads(islands["landscape-probe-0"])[0]["stops"][0]["readings"][0]["name"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_runs_of_few_epochs_can_be_read(tmp_path: Path, epochs: int) -> None:
    plate = curves_plate(groups_in([synthetic_run(tmp_path / "run", epochs=epochs)]))
    assert plate is not None
    (probe,) = plate.probes
    assert probe is not None
    assert [stop.at for stop in probe.stops] == [f"epoch {number + 1}" for number in range(epochs)]
    assert all(0 <= stop.left <= 100 for stop in probe.stops)
