"""Numbers of the report against the standard library: groups, spreads, tables, means of curves."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_folders import groups_in, outcome, synthetic_run, two_groups, write

from saltflat.lab.config import Compute, as_text
from saltflat.lab.recipes import RECIPES
from saltflat.lab.report import read_run
from saltflat.lab.report.curves import SeedCurves, centre, mean_and_deviation, mean_curves
from saltflat.lab.report.notation import decimal
from saltflat.lab.report.settings import configuration
from saltflat.lab.report.statistics import at, drop, last, over_seeds
from saltflat.lab.report.tables import accuracy_table, outcome_table


def test_runs_that_differ_only_in_seed_form_a_group(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 21, 22], [10, 11, 12])
    groups = groups_in(reversed(folders))
    assert [group.name for group in groups] == ["at-awp", "at"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1, 2], [0, 1, 2]]


def test_how_often_a_run_was_saved_is_no_method(tmp_path: Path) -> None:
    changes = ({}, {"checkpoint_minutes": 5.0}, {"keep_every": 1})
    folders = [synthetic_run(tmp_path / str(seed), seed=seed, config=more) for seed, more in enumerate(changes)]
    (group,) = groups_in(folders)
    assert len(group.runs) == 3


def test_one_recipe_with_two_values_of_a_field_is_two_groups(tmp_path: Path) -> None:
    folders = [
        synthetic_run(tmp_path / f"{gamma}-{seed}", seed=seed, config={"awp": {"gamma": gamma}, "threads": seed})
        for gamma in (0.005, 0.01)
        for seed in (0, 1)
    ]
    groups = groups_in(folders)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("at (awp.gamma 0.005)", 2),
        ("at (awp.gamma 0.01)", 2),
    ]


def older(config):
    """A run's config as a version without these sections and fields wrote it."""
    tree = yaml.safe_load(as_text(config))
    del tree["compute"], tree["awp"]["amortised"], tree["awp"]["joint_mode"], tree["awp"]["every"], tree["keep_every"]
    return tree


def test_what_an_older_config_does_not_say_is_today_s_default(tmp_path: Path) -> None:
    config = RECIPES["at-awp"]
    trees = {
        "old": older(config),
        "new": yaml.safe_load(as_text(replace(config, seed=1))),
        "bf16": yaml.safe_load(as_text(replace(config, compute=Compute("bf16")))),
    }
    for name, tree in trees.items():
        synthetic_run(tmp_path / name, config=tree)
    groups = groups_in(tmp_path / name for name in trees)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("at-awp (compute.precision auto)", 2),
        ("at-awp (compute.precision bf16)", 1),
    ]


def test_what_both_say_differently_is_named_before_what_one_does_not_know(tmp_path: Path) -> None:
    folders = [
        synthetic_run(tmp_path / "a", config={"a": 1, "b": 1, "c": 1, "steps": 1}),
        synthetic_run(tmp_path / "b", config={"steps": 2}),
    ]
    assert [group.name for group in groups_in(folders)] == [
        "at (steps 1, a 1, b 1, …)",
        "at (steps 2, a –, b –, …)",
    ]


def test_spread_is_the_sample_standard_deviation(tmp_path: Path) -> None:
    gaps = [20.0, 21.5, 17.25]
    group = groups_in(two_groups(tmp_path, gaps, []))[0]
    spread = over_seeds(group.finished, at(last, lambda epoch: epoch.gap))
    assert spread.mean == pytest.approx(statistics.mean(gaps))
    assert spread.deviation == pytest.approx(statistics.stdev(gaps))
    row = accuracy_table([group]).bodies[0].rows[1]
    assert row.cells[5].mean == decimal(statistics.mean(gaps))
    assert row.cells[5].spread == f"± {statistics.stdev(gaps):.2f}"


def test_drop_and_best_come_from_the_latest_mark(tmp_path: Path) -> None:
    run = read_run(synthetic_run(tmp_path / "run", epochs=9))
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    chosen = max(recorded, key=lambda line: line["validation"]["robust_accuracy"])
    assert run.best is not None
    assert run.best.number == chosen["epoch"]
    expected = 100 * (chosen["test"]["robust_accuracy"] - recorded[-1]["test"]["robust_accuracy"])
    assert drop(run) == pytest.approx(expected)


def test_a_gap_is_train_minus_test_and_a_loss_gap_is_test_minus_train(tmp_path: Path) -> None:
    run = read_run(synthetic_run(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for epoch, line in zip(run.epochs, lines, strict=True):
        assert epoch.gap == pytest.approx(100 * line["gap"]["accuracy"])
        assert epoch.loss_gap == pytest.approx(line["gap"]["loss"])


def test_one_run_shows_its_interval_and_several_their_spread(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [10])
    table = outcome_table(groups_in(folders))
    assert [column.text for column in table.columns[2:]] == ["clean", "fgsm", "pgd-20", "cw-20"]
    assert table.bodies[0].rows[1].cells[4].spread == "± 0.00"
    assert table.bodies[1].rows[1].cells[4].spread == "[43.00, 47.00]"


def test_outcomes_of_unlike_attacks_stand_in_unlike_columns(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    record = outcome("best", 40.0)
    record["attacks"][2]["description"] = "pgd-20 with half the radius"
    write(folders[0] / "outcomes" / "best.json", record)
    table = outcome_table(groups_in(folders))
    assert [column.text for column in table.columns].count("pgd-20") == 2


def test_configuration_shows_first_what_differs(tmp_path: Path) -> None:
    folders = [
        synthetic_run(tmp_path / recipe, recipe=recipe, config={"awp": {"gamma": gamma}})
        for recipe, gamma in (("at", 0.0), ("at-awp", 0.005))
    ]
    settings = configuration(groups_in(folders))
    assert settings.heads == ("at", "at-awp")
    assert settings.different == (("awp.gamma", ("0.0", "0.005")),)
    assert ("attack.norm", "Linf") in settings.common


def test_mean_curves_use_the_epochs_that_all_finished_seeds_have() -> None:
    def seed(epochs: list[float], level: float, averaged: bool = True) -> SeedCurves:
        values = np.full(len(epochs), level)
        return SeedCurves(np.array(epochs), values, values + 1, values + 2, best_epoch=None, averaged=averaged)

    epochs, (train, test, clean) = mean_curves(
        [seed([1, 2, 3], 10.0), seed([2, 3], 20.0), seed([1], 99.0, averaged=False)]
    )
    np.testing.assert_array_equal(epochs, [2, 3])
    np.testing.assert_allclose([train, test, clean], [[15, 15], [16, 16], [17, 17]])


def test_landscape_statistics_match_the_statistics_module() -> None:
    curves = np.array([[1.0, 2.0], [3.0, 5.0], [8.0, np.inf]])
    mean, deviation = mean_and_deviation(curves)
    assert mean[0] == pytest.approx(statistics.mean([1, 3, 8]))
    assert deviation[0] == pytest.approx(statistics.stdev([1, 3, 8]))
    assert np.isnan(mean[1])
    with pytest.raises(ValueError, match="alpha = 0"):
        centre(np.array([-1.0, 1.0]), curves)
