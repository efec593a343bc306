"""The table of flatness: means and spreads over seeds, and only what was measured alike in one row."""

import statistics
from pathlib import Path

import pytest
from run_folders import Parsed, flatness_record, groups_in, page, plain, synthetic_run, two_groups, write

from saltflat.lab.report import read_run
from saltflat.lab.report.flatness import flatness_table
from saltflat.lab.report.markdown import as_markdown
from saltflat.lab.report.notation import UNBROKEN


def test_a_cell_is_the_mean_and_the_sample_standard_deviation_over_seeds(tmp_path: Path) -> None:
    values = [0.0123, 0.0145, 0.0101]
    folders = two_groups(tmp_path, [20, 20, 20], [10])
    for folder, value in zip(folders, [*values, 0.5], strict=True):
        write(folder / "flatness" / "last.json", flatness_record(value))
    table = flatness_table(groups_in(folders))
    assert [(column.text, column.unit) for column in table.columns] == [
        ("images", ""),
        ("at", "3 seeds"),
        ("at-awp", "1 seed"),
    ]
    first = table.bodies[0]
    assert (first.name, first.detail) == ("average case, ball", "nats; 10 draws, gamma 0.01 for every layer")
    images, at, awp = first.rows[0].cells
    assert images.mean == "500 test"
    assert (at.mean, at.spread) == (f"{statistics.mean(values):.4f}", f"± {statistics.stdev(values):.4f}")
    assert (awp.mean, awp.spread) == ("0.500", f"[s.e.{UNBROKEN}0.012]")
    assert at.detail.startswith("seed 0: 0.0123 (s.e. 0.0123, 1.2 s), seed 1: 0.0145")


def test_a_measure_that_failed_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "flatness" / "last.json", flatness_record(1.0))
    table = flatness_table(groups_in([folder]))
    cell = table.bodies[1].rows[0].cells[1]
    assert (cell.mean, cell.detail) == ("–", "seed 0: not a number; not converged to 1e-3")
    assert (
        "Not or only partly measured: largest Hessian eigenvalue (not a number; not converged to 1e-3); landscape "
        "half-width (along 2 of 3 directions it is not reached by 1)." in table.caption
    )


def test_a_maximum_says_on_hover_what_each_start_found(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    for folder, value in zip(folders, (0.1, 0.2), strict=True):
        write(folder / "flatness" / "last.json", flatness_record(value))
    table = flatness_table(groups_in(folders))
    average, _, worst, _ = (body.rows[0].cells[1] for body in table.bodies)
    assert worst.detail == (
        "seed 0: 0.200 (4.0 s; from each start: 0.200, 0.100), seed 1: 0.400 (4.0 s; from each start: 0.400, 0.200)"
    )
    assert "start" not in average.detail
    assert "start" not in table.caption.partition("Settings: ")[0]


def test_a_start_that_found_no_number_is_a_dash(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    record = flatness_record(0.1)
    record["measures"][2]["starts"][1] = None
    write(folder / "flatness" / "last.json", record)
    cell = flatness_table(groups_in([folder])).bodies[2].rows[0].cells[1]
    assert cell.detail == "seed 0: 0.200 (4.0 s; from each start: 0.200, –)"


def test_fewer_seeds_than_the_group_has_are_counted(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20, 20], [])
    for folder in folders[:2]:
        write(folder / "flatness" / "last.json", flatness_record(2.0))
    cell = flatness_table(groups_in(folders)).bodies[0].rows[0].cells[1]
    assert (cell.mean, cell.spread) == ("2.00", "± 0.00 (2 of 3 seeds)")


@pytest.mark.parametrize("change", ["record's settings", "measure's settings", "n", "split", "checkpoint", "unit"])
def test_only_what_was_measured_alike_stands_in_one_row(tmp_path: Path, change: str) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    records = [flatness_record(1.0), flatness_record(3.0)]
    if change == "record's settings":
        records[1]["settings"]["attack"] = "PGD-50"
    elif change in ("measure's settings", "unit"):
        records[1]["measures"][0][change.removeprefix("measure's ")] = "another"
    else:
        records[1][change] = 7 if change == "n" else "another"
    for folder, record in zip(folders, records, strict=True):
        write(folder / "flatness" / "last.json", record)
    bodies = [body for body in flatness_table(groups_in(folders)).bodies if body.name == "average case, ball"]
    assert [body.rows[0].cells[1].mean for body in bodies] == ["1.00", "3.00"]


def test_settings_that_differ_are_said_in_the_row_and_common_ones_in_the_caption(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "flatness" / "a.json", flatness_record(1.0))
    write(folder / "flatness" / "b.json", flatness_record(2.0, attack="PGD-50"))
    table = flatness_table(groups_in([folder]))
    details = [body.detail for body in table.bodies if body.name == "average case, ball"]
    assert [detail.rpartition("; ")[2] for detail in details] == ["attack: PGD-20, 1 start", "attack: PGD-50"]
    assert "Settings: BatchNorm: eval mode; seed: 0." in table.caption


def test_the_order_of_settings_in_a_file_makes_no_difference(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    records = [flatness_record(1.0), flatness_record(3.0)]
    records[1]["settings"] = dict(reversed(records[1]["settings"].items()))
    for folder, record in zip(folders, records, strict=True):
        write(folder / "flatness" / "last.json", record)
    assert flatness_table(groups_in(folders)).bodies[0].rows[0].cells[1].mean == "2.00"


def test_no_record_no_section_and_no_complaint(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    text = page([folder])
    assert 'id="flatness"' not in text
    assert "flatness/" not in text
    assert "Every run is complete" in text


def test_a_damaged_record_becomes_a_note(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "flatness" / "bad.json", {"checkpoint": "last", "measures": [{"name": "x"}]})
    write(folder / "flatness" / "good.json", flatness_record(1.0))
    run = read_run(folder)
    assert len(run.flatness) == 1
    assert "A damaged file was skipped: flatness/bad.json" in run.notes


def test_the_page_and_markdown_show_the_same_numbers(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "flatness" / "last.json", flatness_record(0.25))
    text = plain(Parsed(page([folder])).text)
    assert "average case, ball" in text
    assert "[s.e. 0.012]" in text
    lines = plain(as_markdown(flatness_table(groups_in([folder])))).splitlines()
    assert lines[2] == "| measure | weights | images | at (1 seed) |"
    assert lines[4] == (
        "| average case, ball (nats; 10 draws, gamma 0.01 for every layer) | last | 500 test | 0.250 [s.e. 0.012] |"
    )
