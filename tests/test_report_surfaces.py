"""Landscapes over planes: contours, the page's island of data, and the script that draws it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import HOSTILE, groups_in, hostile_runs, page, plane_record, synthetic_run, with_plane, write

from saltflat.lab.report import planes, read_run
from saltflat.lab.report.figures import contour
from saltflat.lab.report.page import READER, SCRIPT
from saltflat.lab.report.planes import plane_plates
from saltflat.lab.report.surfaces import Surface, extent, levels_between

ISLAND = re.compile(r'<script type="application/json" id="(plane-[^"]*)">(.*?)</script>', re.DOTALL)
PROGRAM = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def two_planes(folder: Path) -> list[Path]:
    return [
        with_plane(folder / recipe, curvature, recipe=recipe, gaps=gaps)
        for recipe, curvature, gaps in (("at", 20.0, [(1, 2)]), ("at-awp", 10.0, []))
    ]


def test_the_island_parses_back_to_the_record(tmp_path: Path) -> None:
    ((identity, text),) = ISLAND.findall(page(two_planes(tmp_path)))
    data, record = json.loads(text), plane_record(20.0, gaps=[(1, 2)])
    assert data["alphas"] == record["alphas"]
    assert data["betas"] == record["betas"]
    assert [(run["name"], run["series"]) for run in data["runs"]] == [("at, seed 0", 1), ("at-awp, seed 0", 2)]
    assert [(one["name"], one["unit"]) for one in data["quantities"]] == [
        ("robust loss", "nats"),
        ("robust accuracy", "%"),
        ("clean loss", "nats"),
    ]
    loss, accuracy, clean = data["runs"][0]["values"]
    assert loss == record["robust_loss"]
    assert clean == record["clean_loss"]
    assert loss[1][2] is None
    percent = 100 * np.array(record["robust_accuracy"], dtype=float)
    np.testing.assert_array_equal(np.array(accuracy, dtype=float), percent)
    assert (data["alphas"][data["origin"][0]], data["betas"][data["origin"][1]]) == (0.0, 0.0)
    assert f'data-island="{identity}"' in page([tmp_path / "at", tmp_path / "at-awp"])


def test_runs_side_by_side_share_their_range(tmp_path: Path) -> None:
    ((_, text),) = ISLAND.findall(page(two_planes(tmp_path)))
    data = json.loads(text)
    for index, quantity in enumerate(data["quantities"]):
        values = np.array([run["values"][index] for run in data["runs"]], dtype=float)
        assert quantity["range"] == [np.nanmin(values), np.nanmax(values)]


def test_the_page_s_policy_allows_its_own_scripts_alone(tmp_path: Path) -> None:
    text = page(two_planes(tmp_path))
    programs = PROGRAM.findall(text)
    assert programs == [path.read_text(encoding="utf-8") for path in (READER, SCRIPT)]
    hashes = [base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() for program in programs]
    assert "img-src data:; script-src " + " ".join(f"'sha256-{one}'" for one in hashes) + '"' in text
    assert text.count("<script") == len(programs) + text.count('<script type="application/json"')


def test_there_is_no_script_of_surfaces_without_a_plane(tmp_path: Path) -> None:
    text = page([synthetic_run(tmp_path / "run")])
    assert PROGRAM.findall(text) == [READER.read_text(encoding="utf-8")]
    assert text.count("'sha256-") == 1


@pytest.mark.parametrize("path", [READER, SCRIPT], ids=lambda path: path.name)
def test_the_scripts_ask_for_nothing_and_make_no_markup(path: Path) -> None:
    program = path.read_text(encoding="utf-8")
    for word in (
        "http",
        "fetch(",
        "XMLHttpRequest",
        "import",
        "eval",
        "innerHTML",
        "insertAdjacent",
        "document.write",
        "</",
    ):
        assert word not in program


def test_hostile_names_do_not_leave_the_island(tmp_path: Path) -> None:
    text = page(hostile_runs(tmp_path))
    ((_, island),) = ISLAND.findall(text)
    assert "<" not in island
    data = json.loads(island)
    assert data["facts"][-1] == HOSTILE
    assert data["runs"][0]["name"].startswith("<script>alert(1)</script>")
    assert len(PROGRAM.findall(text)) == 2


def test_a_contour_stands_beside_the_surface_for_pages_without_scripts(tmp_path: Path) -> None:
    (plate,) = plane_plates(groups_in(two_planes(tmp_path)))
    assert len(plate.plate.panels) == 2
    text = page([tmp_path / "at", tmp_path / "at-awp"])
    assert re.search(r'<div class="surfaces" data-island="[^"]*" hidden></div>', text)
    for words in (
        "robust loss, g(α, β) − g(0, 0) in nats · g(0, 0) = 1.400",
        "7 × 7 points at α from −1 to 1 and β from −0.5 to 0.5",
        "PGD-10, made afresh at each point",
        ">w</text>",
        ">0.5</text>",
    ):
        assert words in text
    assert "(at, seed 0 at α = −0.67, β = −0.17: the loss is not finite)" in plate.plate.caption


def test_planes_measured_in_different_ways_have_no_scale_in_common(tmp_path: Path) -> None:
    folders = two_planes(tmp_path)
    other = plane_record(500.0)
    write(folders[1] / "landscapes" / "plane.json", other | {"settings": other["settings"] | {"attack": "FGSM"}})
    first, second = plane_plates(groups_in(folders))
    ranges = [json.loads(str(plate.island))["quantities"][0]["range"][1] for plate in (first, second)]
    assert ranges == pytest.approx([1.4 + 2 * 1.25, 1.4 + 50 * 1.25])
    assert "attack: FGSM" in second.plate.caption


@pytest.mark.parametrize(
    "change",
    [
        {"betas": [0.1 * index for index in range(1, 8)]},
        {"betas": [0.0] * 7},
        {"robust_loss": [[1.0] * 7] * 6},
        {"robust_loss": None},
        {"clean_loss": [[1.0]]},
    ],
)
def test_a_plane_that_does_not_fit_becomes_a_note(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "landscapes" / "plane.json", plane_record(10) | change)
    run = read_run(folder)
    assert not run.planes
    assert len(run.lines) == 1
    assert "A damaged file was skipped: landscapes/plane.json" in run.notes


def test_a_quantity_that_no_run_has_is_not_offered(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    record = plane_record(10)
    del record["robust_accuracy"]
    write(folder / "landscapes" / "plane.json", record)
    (plate,) = plane_plates(groups_in([folder]))
    assert [one["name"] for one in json.loads(str(plate.island))["quantities"]] == ["robust loss", "clean loss"]


@pytest.mark.parametrize(
    "values",
    [np.ones((3, 3)), np.full((3, 3), np.nan), np.where(np.eye(3) == 1, np.nan, 1e9), 1.0 - np.eye(3)],
    ids=["flat", "all gaps", "gaps on the diagonal", "a ridge"],
)
def test_a_contour_of_anything_is_drawn_without_a_warning(values: np.ndarray) -> None:
    steps = np.array([-1.0, 0.0, 1.0])
    surface = Surface("at", steps, steps, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = contour(surface, levels_between(*extent([surface.centred])), identity="one", description="")
    assert svg.endswith("</svg>")


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_levels_lie_inside_and_are_one_two_or_five(one: float, other: float) -> None:
    low, high = sorted((one, other))
    levels = levels_between(low, high)
    assert (np.diff(levels) > 0).all()
    assert ((levels > low) & (levels < high)).all()
    assert all(f"{abs(level):e}"[0] in "125" and f"{abs(level):.1e}"[2] == "0" for level in levels)
    assert len(levels) <= 18
    if low < 0 < high:
        largest = max(-low, high)
        assert largest < 1e-300 or np.abs(levels).max() >= largest / 2.5 * (1 - 1e-9)


def test_levels_resolve_a_flat_surface_beside_a_sharp_one() -> None:
    assert levels_between(0.0, 20.5).tolist() == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]


def test_equal_planes_give_equal_islands(tmp_path: Path) -> None:
    first, second = (plane_plates(groups_in(two_planes(tmp_path / name)))[0] for name in ("a", "b"))
    assert first == second
    assert planes.QUANTITIES[0].unit == "nats"


def evaluated(expression: str) -> Any:
    """What an expression is in a context in which the script has run, on a page without islands."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no engine for the script")
    program = (
        "const vm = require('vm'), fs = require('fs');"
        "const context = vm.createContext({ document: { querySelectorAll: () => [] } });"
        "vm.runInContext(fs.readFileSync(process.argv[1], 'utf8'), context);"
        "console.log(JSON.stringify(vm.runInContext(process.argv[2], context)))"
    )
    done = subprocess.run([node, "-e", program, str(SCRIPT), expression], capture_output=True, check=True, text=True)
    return json.loads(done.stdout)


def test_the_view_is_a_rotation() -> None:
    turn, rise = 0.6, 0.5
    basis = evaluated(f"[[1,0,0],[0,1,0],[0,0,1]].map(p => project({{turn: {turn}, rise: {rise}}}, p))")
    rotation = np.array(basis).T
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    upright = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.sin(rise), np.cos(rise)], [0, np.cos(rise), -np.sin(rise)]])
    np.testing.assert_allclose(rotation, tilt @ upright, atol=1e-12)


def test_a_gap_is_a_hole_and_the_nearest_faces_come_last() -> None:
    data = "{alphas: [-1, 0, 1], betas: [-2, 0, 2]}"
    values = "[[0, 1, 2], [1, 2, 3], [2, 3, null]]"
    points = evaluated(f"placed({data}, {values}, [0, 4])")
    np.testing.assert_allclose(points[1][1], [0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(points[0][0], [-1, -1, -0.7])
    assert points[2][2] is None
    faces = evaluated(f"facesOf(placed({data}, {values}, [0, 4]), FIRST_VIEW)")
    assert sorted(face["corners"][0] for face in faces) == [[0, 0], [0, 1], [1, 0]]
    away = [face["away"] for face in faces]
    assert away == sorted(away, reverse=True)


def test_pointing_finds_the_corner_of_the_nearest_face() -> None:
    data, values = "{alphas: [-1, 0, 1], betas: [-1, 0, 1]}", "[[0, 0, 0], [0, 0, 0], [0, 0, 0]]"
    faces = f"facesOf(placed({data}, {values}, [0, 4]), {{turn: 0, rise: Math.PI / 2}})"
    assert evaluated(f"pick({faces}, 0.9, -0.8)") == [2, 0]  # from above, right is alpha and up is beta
    assert evaluated(f"pick({faces}, 0.1, 0.2)") == [1, 1]
    assert evaluated(f"pick({faces}, 1.1, 0)") is None


def test_readings_have_units_and_true_minus_signs() -> None:
    quantity = "{name: 'robust loss', unit: 'nats', places: 3}"
    data = f"{{alphas: [-1, 0], betas: [0, 0.5], origin: [1, 0], quantities: [{quantity}]}}"
    run = "{values: [[[1.5, null], [1.25, 1]]]}"

    def said(picked: str) -> str:
        return str(evaluated(f"reading({data}, {{quantity: 0, picked: {picked}}}, {run})"))

    assert said("null") == "at w: 1.250 nats"
    assert said("[0, 0]") == "α = −1, β = 0: 1.500 nats (+0.250 from w)"
    assert said("[1, 1]") == "α = 0, β = 0.5: 1.000 nats (−0.250 from w)"
    assert said("[0, 1]") == "α = −1, β = 0.5: not measured"


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-1, 1, [-1, -0.5, 0, 0.5, 1]), (1.4, 8.5, [2, 4, 6, 8]), (3, 3, [3])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert evaluated(f"ticks({low}, {high}, 4)") == pytest.approx(expected)
