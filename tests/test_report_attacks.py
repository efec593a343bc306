"""The figure of robust accuracies by attack: what its marks stand for."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import scipy.stats
from run_folders import groups_in, outcome, synthetic_run, two_groups, write

from saltflat.lab.report.attacks import attacks_plate


def labels(folders: list[Path]) -> list[str]:
    plate = attacks_plate(groups_in(folders))
    assert plate is not None
    return [ElementTree.fromstring(str(panel)).attrib["aria-label"] for panel in plate.panels]


def test_a_mark_is_a_mean_with_student_s_interval_and_one_run_has_its_own(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20, 20], [10], robust=45.0)
    for folder, robust in zip(folders, (44.0, 45.0, 47.0), strict=False):
        write(folder / "outcomes" / "last.json", outcome("last", robust))
    best, last = labels(folders)
    assert best.startswith("Robust accuracy by attack in percent, best weights, 2000 test images. fgsm: at 52.0")
    low, high = scipy.stats.t.interval(0.95, 2, loc=136 / 3, scale=scipy.stats.sem([44, 45, 47]))
    assert f"pgd-20: at {136 / 3:.1f} ({low:.1f} to {high:.1f}), at-awp 45.0 (43.0 to 47.0)" in last
    assert "clean" not in last


def test_panels_share_an_axis_and_stand_in_their_order(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    write(folder / "outcomes" / "another.json", outcome("epoch-3", 12.0))
    plate = attacks_plate(groups_in([folder]))
    assert plate is not None
    titles = [re.search(r">([^<]*) weights<", str(panel)) for panel in plate.panels]
    assert [found and found[1] for found in titles] == ["best", "last", "epoch-3"]
    ticks = [set(re.findall(r">(\d+)</text>", str(panel))) for panel in plate.panels]
    assert ticks[0] == ticks[1] == ticks[2]


def test_an_interval_stays_between_nothing_and_all(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    for folder, accuracy in zip(folders, (0.0, 0.5), strict=True):
        attack = {"name": "pgd-20", "description": "", "accuracy": accuracy}
        write(folder / "outcomes" / "last.json", outcome("last", 40) | {"attacks": [attack]})
    assert "pgd-20: at 25.0 (0.0 to 100.0)" in labels(folders)[-1]


def test_one_run_without_an_interval_on_record_has_none(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    attack = {"name": "pgd-20", "description": "", "accuracy": 0.25}
    write(folder / "outcomes" / "last.json", outcome("last", 40) | {"attacks": [attack]})
    assert labels([folder])[-1].endswith("images. pgd-20: at 25.0.")


def test_what_was_attacked_in_another_way_is_not_averaged(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20, 20], [], robust=45.0)
    other = outcome("last", 0.0) | {"settings": {"precision": "bf16", "seed": 9}}
    write(folders[0] / "outcomes" / "other.json", other)
    _, usual, unusual = labels(folders)
    assert "last weights, 2000 test images. " in usual
    assert "pgd-20: at 45.0 (45.0 to 45.0)" in usual
    assert "last weights, 2000 test images, precision bf16, seed 9. " in unusual
    assert "pgd-20: at 0.0" in unusual
    plate = attacks_plate(groups_in(folders))
    assert plate is not None
    assert "(at: 1 or 3 seeds)" in plate.caption


def test_one_name_for_two_attacks_is_two_rows(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    record = outcome("last", 40.0)
    record["attacks"][2]["description"] = "half the radius"
    write(folders[0] / "outcomes" / "last.json", record)
    last = labels(folders)[-1]
    assert "pgd-20: half the radius: at 40.0" in last
    assert "pgd-20: pgd-20, described exactly: at 45.0" in last


@pytest.mark.parametrize("attacks", [[], [{"name": "clean", "description": "no attack", "accuracy": 0.9}]])
def test_without_an_attack_there_is_no_figure(tmp_path: Path, attacks: list[dict[str, object]]) -> None:
    folder = synthetic_run(tmp_path / "run")
    for checkpoint in ("best", "last"):
        write(folder / "outcomes" / f"{checkpoint}.json", outcome(checkpoint, 40.0) | {"attacks": attacks})
    assert attacks_plate(groups_in([folder])) is None
