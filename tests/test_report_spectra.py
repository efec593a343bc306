"""Spectral densities in a report: their mass, what they are compared with, and what is never drawn over another."""

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import HOSTILE, Parsed, flatness_record, groups_in, page, plain, synthetic_run, two_groups, write

from saltflat.lab.report import read_run
from saltflat.lab.report.markdown import brief, figures
from saltflat.lab.report.spectra import GroupSpectrum, grid_for, smoothed, spectral_density, spectrum_plates, width_for

NAME = "share of negative Hessian eigenvalues"
WORDS = "stochastic Lanczos quadrature, 2 runs of 3 products; examples attacked once, at w"
ATOMS = {"nodes": [[4.0, 0.5, -1.0], [5.0, 0.25, -0.5]], "weights": [[0.001, 0.9, 0.099], [0.002, 0.95, 0.048]]}


def record_of(atoms: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
    record = flatness_record(1.0, **settings)
    measure = {"name": NAME, "value": 0.1, "standard_error": 0.01, "unit": "of 1", "settings": WORDS, "seconds": 1.0}
    record["measures"] = [*record["measures"], measure | {"spectrum": atoms}]
    return deepcopy(record)


def measured(folder: Path, record: dict[str, Any], **options: Any) -> Path:
    folder = synthetic_run(folder, landscape=False, **options)
    write(folder / "flatness" / "last.json", record)
    return folder


def times(factor: float) -> dict[str, Any]:
    return {**ATOMS, "nodes": [[factor * node for node in run] for run in ATOMS["nodes"]]}


def of(atoms: dict[str, Any]) -> GroupSpectrum:
    return GroupSpectrum("at", np.array(atoms["nodes"]), np.array(atoms["weights"]))


def drawn(*groups: GroupSpectrum) -> str:
    return spectral_density(groups, identity="one", description="words")


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=6),
    st.sampled_from([1e-90, 1e-3, 1.0, 1e6, 1e99]),
    st.integers(0, 9),
)
def test_a_smoothed_density_has_mass_1_and_the_mean_of_its_atoms(places: list[float], scale: float, seed: int) -> None:
    nodes = scale * np.array([places])
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(places)))[None]
    group = GroupSpectrum("at", nodes, weights)
    grid, width = grid_for([group]), width_for([group])
    (curve,) = smoothed(grid, nodes, weights, width) * (grid[1] - grid[0])
    assert curve.sum() == pytest.approx(1, abs=1e-6)
    assert (curve * grid).sum() == pytest.approx((weights * nodes).sum(), abs=1e-5 * np.abs(grid).max())
    assert 0.0 in grid


def test_a_single_atom_is_a_gaussian() -> None:
    grid = np.linspace(-1, 5, 61)
    expected = np.exp(-((grid - 2) ** 2) / (2 * 0.3**2)) / math.sqrt(2 * math.pi * 0.3**2)
    (curve,) = smoothed(grid, np.array([[2.0]]), np.array([[1.0]]), 0.3)
    np.testing.assert_allclose(curve, expected, rtol=1e-13)


def test_atoms_of_a_run_add_up_and_runs_stay_apart() -> None:
    grid, group = grid_for([of(ATOMS)]), of(ATOMS)
    curves = smoothed(grid, group.nodes, group.weights, 0.05)
    for curve, nodes, weights in zip(curves, group.nodes, group.weights, strict=True):
        pairs = zip(nodes, weights, strict=True)
        alone = [weight * smoothed(grid, np.array([[node]]), np.array([[1.0]]), 0.05)[0] for node, weight in pairs]
        np.testing.assert_allclose(curve, np.sum(alone, axis=0), rtol=1e-12)


def test_curves_that_are_compared_are_smoothed_alike_by_a_share_of_the_largest_eigenvalue(tmp_path: Path) -> None:
    assert width_for([of(ATOMS), of(times(-2.0))]) == pytest.approx(0.1)
    folders = [
        measured(tmp_path / name, record_of(times(factor)), recipe=name) for name, factor in (("a", 1), ("b", 2))
    ]
    (plate,) = spectrum_plates(groups_in(folders))
    (picture,) = plate.panels
    assert "1 % of the largest θ in magnitude" in plate.caption
    assert "a Gaussian of standard deviation 0.1 nats / weight²" in plate.caption
    assert texts(picture).count("a · θ from −1 to 5") == 1
    assert texts(picture).count("b · θ from −2 to 10") == 1


def test_a_figure_says_how_it_was_measured(tmp_path: Path) -> None:
    (plate,) = spectrum_plates(groups_in([measured(tmp_path / "run", record_of(ATOMS))]))
    words = " · ".join(texts(plate.panels[0]))
    for fact in (
        "Gaussian of width 0.05 nats / weight²",
        "2 runs of 3 products",
        "n = 500 test images",
        "BatchNorm: eval mode",
        "PGD-20, 1 start",
        "eigenvalue, in nats / weight²",
        "10⁻¹",
    ):
        assert fact in words
    assert WORDS in plate.caption
    assert plate.title == "Weights: last"


def test_the_mean_is_over_the_runs_of_all_seeds(tmp_path: Path) -> None:
    """Another seed with the same runs moves no line."""
    folders = [measured(tmp_path / str(seed), record_of(ATOMS), seed=seed) for seed in (0, 1)]
    one, two = (spectrum_plates(groups_in(folders[:n]))[0] for n in (1, 2))
    line = re.compile(r'<path d="([^"]*)"[^>]*stroke-width: 2[;"]')
    assert line.findall(one.panels[0])
    assert line.findall(one.panels[0]) == line.findall(two.panels[0])
    assert "(at: 1 seed × 2 runs)" in one.caption
    assert "(at: 2 seeds × 2 runs)" in two.caption


def test_a_band_needs_several_runs() -> None:
    once = {part: rows[:1] for part, rows in ATOMS.items()}
    assert drawn(of(ATOMS)).count("PolyCollection") == 1
    assert drawn(of(once)).count("PolyCollection") == 0


def test_the_outermost_ritz_values_of_every_run_and_zero_are_marked() -> None:
    """Two runs with two ends each; all at other places."""
    svg, group = drawn(of(ATOMS)), of(ATOMS)
    grid = grid_for([group])
    ends = np.array([-1.0, -0.5, 4.0, 5.0])
    marks = sorted(float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"[^>]*stroke: var\(--series-1', svg))
    shares = (ends - grid[0]) / (grid[-1] - grid[0])
    left, right = 44.0, 460.0 - 14.0
    np.testing.assert_allclose(marks, left + shares * (right - left), atol=1e-3)
    zero = left - grid[0] / (grid[-1] - grid[0]) * (right - left)
    upright = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [\d.]+\s+"[^>]*stroke: var\(--figure-muted', svg)
    assert any(a == b and float(a) == pytest.approx(zero, abs=1e-3) for a, b in upright)


@pytest.mark.parametrize("change", ["settings", "words", "name", "n", "split", "checkpoint", "runs", "products"])
def test_only_what_was_measured_alike_shares_a_figure(tmp_path: Path, change: str) -> None:
    record = record_of(ATOMS)
    if change == "settings":
        record["settings"]["attack"] = "PGD-50"
    elif change in ("words", "name"):
        record["measures"][-1]["settings" if change == "words" else "name"] = "another"
    elif change in ("runs", "products"):
        fewer = {"nodes": [[4.0]] * 2, "weights": [[1.0]] * 2}
        record["measures"][-1]["spectrum"] = fewer if change == "products" else {k: v[:1] for k, v in ATOMS.items()}
    else:
        record[change] = 7 if change == "n" else "another"
    folders = two_groups(tmp_path, [20], [10])
    write(folders[0] / "flatness" / "last.json", record_of(ATOMS))
    write(folders[1] / "flatness" / "last.json", record)
    plates = spectrum_plates(groups_in(folders))
    assert [len(re.findall(r" · θ from", " ".join(texts(plate.panels[0])))) for plate in plates] == [1, 1]
    write(folders[1] / "flatness" / "last.json", record_of(ATOMS))
    (plate,) = spectrum_plates(groups_in(folders))
    assert " ".join(texts(plate.panels[0])).count(" · θ from") == 2


@pytest.mark.parametrize("atoms", ["none", "absent"])
def test_a_record_without_a_spectrum_reads_and_draws_nothing(tmp_path: Path, atoms: str) -> None:
    record = record_of(None)
    if atoms == "absent":
        del record["measures"][-1]["spectrum"]
    folder = measured(tmp_path / "run", record)
    run = read_run(folder)
    assert [measure.spectrum for measure in run.flatness[0].measures] == [None] * 5
    assert not [note for note in run.notes if "flatness" in note]
    assert spectrum_plates(groups_in([folder])) == []
    assert "Spectral density of the Hessian" not in page([folder])


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": [[1.0, 2.0, 3.0]]},
        {"nodes": [[4.0, 0.5, -1.0], [5.0, 0.25]]},
        {"nodes": [[4.0, 0.5, None], [5.0, 0.25, -0.5]]},
        {"nodes": [[4.0, 0.5, 1e300], [5.0, 0.25, -0.5]]},
        {"nodes": [["4.0", 0.5, -1.0], [5.0, 0.25, -0.5]]},
        {"weights": [[0.5, 0.25, 0.125], [1.0, 0.0, 0.0]]},
        {"weights": [[1.5, -0.5, 0.0], [1.0, 0.0, 0.0]]},
        {"nodes": [], "weights": []},
        {"nodes": [[], []], "weights": [[], []]},
        {"nodes": 3},
    ],
)
def test_a_damaged_spectrum_becomes_a_note(tmp_path: Path, change: dict[str, Any]) -> None:
    run = read_run(measured(tmp_path / "run", record_of(ATOMS | change)))
    assert run.flatness == ()
    assert "A damaged file was skipped: flatness/last.json" in run.notes


@pytest.mark.parametrize("nodes", [[[0.0]], [[-1e100, 1e100]], [[1e-310, 0.0]], [[3.0, 3.0, 3.0]]])
def test_any_eigenvalues_can_be_drawn(nodes: list[list[float]]) -> None:
    values = np.array(nodes)
    svg = drawn(GroupSpectrum("at", values, np.full(values.shape, 1 / values.shape[1])))
    assert not re.search(r"\b(nan|inf)\b", svg)
    ElementTree.fromstring(svg)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    record = record_of(ATOMS) | {"checkpoint": HOSTILE, "split": HOSTILE}
    record["settings"] = {HOSTILE: HOSTILE, "attack": HOSTILE, "batch_norm": HOSTILE}
    record["measures"][-1] |= {"name": HOSTILE, "unit": HOSTILE, "settings": HOSTILE}
    folder = measured(tmp_path / "run", record, recipe=HOSTILE)
    (plate,) = spectrum_plates(groups_in([folder]))
    assert "<script>" in "".join(ElementTree.fromstring(str(plate.panels[0])).itertext())
    text = page([folder])
    parsed = Parsed(text)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


def test_equal_records_give_equal_figures_on_the_page_and_beside_markdown(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20], [10])
    for folder in folders:
        write(folder / "flatness" / "last.json", record_of(ATOMS))
    text = page(folders)
    assert text == page(folders)
    assert text.index('id="flatness"') < text.index('id="spectrum-0"') < text.index('id="cost"')
    assert "Spectral density of the Hessian" in plain(Parsed(text).text)
    ids = [value for name, value in Parsed(text).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert "spectrum-0-0" in figures(folders)
    assert "](landscape-0-0.svg)" in brief(folders, ".").replace("./", "")
