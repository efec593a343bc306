"""`saltflat study gap` from configs, runs and checkpoints of others to its table."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import QUICK, run
from safetensors.torch import save_file
from small_study import PLAN, tasks

from saltflat import models
from saltflat.lab import record
from saltflat.lab.config import BadInput, as_text, checked
from saltflat.lab.recipes import RECIPES
from saltflat.lab.study import gap, grid
from saltflat.lab.study.gap import Asked, of_files, of_preset, of_runs, tabled
from saltflat.lab.study.models import Existing, Row, Task, in_words, row
from saltflat.lab.study.table import Model, read_table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for recipe in ("at", "at-awp"):
        run("train", recipe, *QUICK, "--out", folder / recipe)
    return [folder / "at", folder / "at-awp"]


def test_the_small_grid_is_as_promised():
    configs = grid.trainings(grid.SMALL)
    assert len(configs) >= 40
    axes = [grid.axes(checked(config)) for config in configs.values()]
    assert len({json.dumps(each) for each in axes}) == len(configs)  # all different
    varied = {name for each in axes for name, value in each.items() if value != axes[0][name]}
    assert {"objective.name", "awp.gamma", "optimizer.learning_rate", "optimizer.schedule"} < varied
    assert {"optimizer.weight_decay", "data.examples", "optimizer.epochs"} < varied
    seeds = [config for config in configs.values() if config.seed == 2]
    assert len(seeds) == len(grid.SMALL.methods)
    assert all(config.threads == 1 for config in configs.values())


def test_every_axis_varies_alone():
    """What granulated statistics live on: for each axis, models that agree in all others."""
    axes = [grid.axes(config) for config in grid.trainings(grid.SMALL).values()]
    for axis in (*grid.SMALL.axes, "objective.name"):
        rest = [json.dumps({k: v for k, v in each.items() if k != axis}) for each in axes]
        assert any(rest.count(one) > 1 for one in rest), axis


def test_the_paper_s_grid_is_valid_and_has_early_stopping():
    configs = grid.trainings(grid.PAPER, data_path=Path("cifar-10-python.tar.gz"))
    assert len(configs) > 40
    assert all(checked(config) == config for config in configs.values())
    assert grid.PAPER.checkpoints == ("last", "best")


def test_recipes_join_by_name():
    joined = grid.trainings(grid.SMALL, ["cifar10-at-awp"])
    added = {name: config for name, config in joined.items() if name not in grid.trainings(grid.SMALL)}
    assert list(added) == ["cifar10-at-awp-seed0", "cifar10-at-awp-seed1", "cifar10-at-awp-seed2"]
    for config in added.values():
        assert config.awp == RECIPES["cifar10-at-awp"].awp
        assert config.data == grid.SMALL.base.data
    with pytest.raises(BadInput, match=r"recipes: .*'at-wap'"):
        grid.trainings(grid.SMALL, ["at-wap"])


def test_a_row_holds_what_the_records_say(runs):
    found = row(Task("at", "at", Existing(runs[0], "last"), PLAN))
    (gaps,) = (json.loads(path.read_text()) for path in (runs[0] / "gaps").iterdir())
    flatness = [json.loads(path.read_text()) for path in (runs[0] / "flatness").iterdir()]
    (once,) = [each for each in flatness if each["settings"]["seed"] == 0]
    values = {each["name"]: each for each in once["measures"]}
    assert found.model.targets["gap_loss"] == gaps["gap"]["loss"]
    assert found.model.targets["gap_accuracy"] == 100 * gaps["gap"]["accuracy"]
    assert found.model.controls["weight_norm"] == values["weight norm"]["value"]
    assert found.model.measures == {k: v["value"] for k, v in values.items() if k != "weight norm"}
    assert set(found.model.again) == {"average case", "average case, clean loss"}
    assert found.model.again["average case"] != found.model.measures["average case"]
    assert found.model.method == "at"
    assert found.model.axes["optimizer.epochs"] == 2
    assert "gap" in in_words(found)
    assert row(Task("at", "at", Existing(runs[0], "last"), PLAN)) == found  # read again


def test_a_training_that_fails_is_a_row_with_a_note(tmp_path):
    (task,) = tasks(tmp_path, rates=(1e30,))
    found = row(task)
    assert found.model.targets == {}
    assert "training failed: epoch 1: the training loss is not finite" in found.model.note
    assert in_words(found) == found.model.note


def test_axes_that_do_not_vary_are_left_out_of_the_table():
    axes = [{"seed": 0, "awp.gamma": gamma, "data.name": "digits", "model.mean": [0.3]} for gamma in (0.0, 0.1)]
    rows = [Row(Model(str(i), str(i), "at", each, {}, {}, {})) for i, each in enumerate(axes)]
    table = tabled(Asked("t", {}, PLAN, 0.0), rows)
    assert [model.axes for model in table.models] == [{"seed": 0, "awp.gamma": 0.0}, {"seed": 0, "awp.gamma": 0.1}]


def test_a_study_of_runs_ends_with_its_page(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gap, "SMALL", PLAN)
    run("study", "gap", *runs, "--checkpoints", "best", "last", "--out", tmp_path / "study", "--workers", "1")
    table = read_table(tmp_path / "study" / "table.json")
    assert [model.name for model in table.models] == ["at-best", "at-last", "at-awp-best", "at-awp-last"]
    assert [model.cluster for model in table.models] == ["at", "at", "at-awp", "at-awp"]
    assert "Nothing can be said" in capsys.readouterr().out  # of two runs
    assert "at-awp-best" in (tmp_path / "study" / "gap.html").read_text()
    assert (tmp_path / "study" / "gap.csv").read_text().count("\n") == 5
    with pytest.raises(SystemExit) as stop:
        run("study", "gap", *runs, "--out", tmp_path / "study")
    assert stop.value.code == 2
    assert "holds another study" in capsys.readouterr().err


def test_checkpoints_of_others_are_listed_in_a_file(tmp_path):
    network = models.small_cnn(10, width=4)
    save_file(network.state_dict(), tmp_path / "theirs.safetensors")
    (tmp_path / "factory.py").write_text(
        "from saltflat import models\n\ndef network(): return models.small_cnn(width=4)\n"
    )
    (tmp_path / "models.yaml").write_text(
        f"- {{name: theirs, file: {tmp_path}/theirs.safetensors, network: 'factory:network', data: digits, "
        "eps: 0.1, axes: {method: trades, seed: 3}}\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        asked = of_files(tmp_path / "models.yaml", PLAN, tmp_path / "study")
        found = row(asked.tasks["theirs"])
    finally:
        sys.path.remove(str(tmp_path))
    assert found.model.method == "trades"
    assert found.model.axes == {"method": "trades", "seed": 3}
    assert (tmp_path / "study" / "models" / "theirs" / "gaps").is_dir()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- [1]", "expected a list of models with named fields"),
        ("{", "cannot read"),
        ("- {name: a}", "expected a data, got none"),
        ("- {name: a, file: b, network: c, data: digits, eps: 1, colour: red}", "got 'colour'"),
        ("- {name: a, file: b, network: c, data: digits, eps: wide}", "'wide' is not a number"),
        ("- {name: a, file: b, network: c, data: digits, eps: 1}", "file: expected a checkpoint, got 'b'"),
        ("- {name: a, file: b, network: c, data: digits, eps: 1, norm: L1}", "norm: expected Linf or L2, got 'L1'"),
    ],
)
def test_a_listing_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, why):
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(BadInput, match=why):
        of_files(tmp_path / "models.yaml", PLAN, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_what_is_asked_is_checked_before_any_work(runs, tmp_path, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as stop:
            run("study", "gap", *words, "--out", tmp_path / "study")
        assert stop.value.code == 2
        assert not (tmp_path / "study").exists()
        return capsys.readouterr().err

    assert "preset: expected one of runs, a preset or a listing, got none" in refused()
    assert "got runs and preset" in refused(runs[0], "--preset", "small")
    assert "found none" in refused(*runs, "--checkpoints", "epoch-7")
    assert "expected a run folder" in refused(tmp_path / "nowhere", runs[0])
    assert "at least two models, got 1" in refused(runs[0])
    assert "recipes: go with a preset" in refused(*runs, "--recipes", "at")
    assert "data.path" in refused("--preset", "paper")


def test_a_folder_that_is_a_run_of_another_config_is_not_written_into(tmp_path):
    (tmp_path / "models" / "at-seed0").mkdir(parents=True)
    other = replace(grid.SMALL.base, seed=9)
    record.write_text(tmp_path / "models" / "at-seed0" / "config.yaml", as_text(other))
    with pytest.raises(BadInput, match="at-seed0 is a run of another config"):
        of_preset("small", (), tmp_path, None)


def test_existing_runs_of_one_name_are_told_apart(runs, tmp_path):
    with pytest.raises(BadInput, match="different names"):
        of_runs([runs[0], runs[0]], ("last",), PLAN, None)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_equal_numbers(tmp_path):
    """Killed twice, with different numbers of workers: table and findings are equal to the byte."""
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def started(name: str, workers: int) -> subprocess.Popen:
        words = [sys.executable, "-m", "small_study", str(tmp_path / name), str(workers)]
        return subprocess.Popen(words, env=here, stdout=subprocess.DEVNULL)

    assert started("whole", 2).wait() == 0
    for seconds in (6.0, 9.0):
        process = started("cut", 1)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1.0)
    assert started("cut", 2).wait() == 0
    for name in ("table.json", "findings.json", "gap.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
