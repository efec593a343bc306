"""`saltflat study gap` from configs, runs and checkpoints of others to its table."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from commands import QUICK, run
from safetensors.torch import save_file
from small_study import HOW, PLAN, asked, tasks

from saltflat import models
from saltflat.lab import record
from saltflat.lab.config import BadInput, as_text, checked
from saltflat.lab.measures import MEASURES
from saltflat.lab.recipes import RECIPES
from saltflat.lab.study import gap, grid
from saltflat.lab.study.gap import Asked, of_preset, tabled
from saltflat.lab.study.models import Existing, Row, Task, in_words, rows
from saltflat.lab.study.table import Model, read_table
from saltflat.lab.study.workers import processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for recipe in ("at", "at-awp"):
        run("train", recipe, *QUICK, "--out", folder / recipe)
    return [folder / "at", folder / "at-awp"]


def test_the_small_grid_is_as_promised():
    configs = grid.trainings(grid.SMALL)
    assert len(configs) >= 40
    assert f"{len(configs)} models" in (Path(__file__).parent.parent / "README.md").read_text()
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


def test_the_presets_plan_fits_their_grid():
    """Every model has as many examples as are measured, or all of its own; and every measure is known."""
    for preset, plan in gap.PLANS.items():
        assert set(plan.again) <= set(plan.measures) <= set(MEASURES)
        assert plan.how.examples > 0
        assert grid.PRESETS[preset].floor > 0
    smallest = min(config.data.examples for config in grid.trainings(grid.SMALL).values())
    assert smallest < gap.SMALL.how.examples  # so that the next test is about something


def test_a_model_of_few_examples_is_measured_on_all(tmp_path):
    (task,) = tasks(tmp_path, rates=(0.05,))
    plan = replace(PLAN, how=replace(HOW, examples=1000), again=())
    found = rows(replace(task, plan=plan))
    (flatness,) = (tmp_path / "models" / task.name / "flatness").glob("last-*.json")
    assert json.loads(flatness.read_text())["n"] == 60
    assert [row.model.name for row in found] == ["at-0.05-last", "at-0.05-best"]


def test_recipes_join_by_name():
    joined = grid.trainings(grid.SMALL, ["cifar10-at-awp"])
    added = {name: config for name, config in joined.items() if name not in grid.trainings(grid.SMALL)}
    assert list(added) == ["cifar10-at-awp-seed0", "cifar10-at-awp-seed1", "cifar10-at-awp-seed2"]
    for config in added.values():
        assert config.awp == RECIPES["cifar10-at-awp"].awp
        assert config.data == grid.SMALL.base.data
    for names, why in (
        (["at-wap"], "expected names that"),
        (["at-awp"], "is in the grid already"),
        (["alp", "alp"], "expected each once, got 'alp' again"),
        (["cifar10-at"], "'cifar10-at' adds nothing"),  # the base's own method by another name
        (["fast-at-awp"], "'fast-at-awp' is more than that"),
        (["cifar10-at-official"], "'cifar10-at-official' is more than that"),
        (["rst"], "'rst' is more than that"),
    ):
        with pytest.raises(BadInput, match=rf"recipes: .*{why}"):
            grid.trainings(grid.SMALL, names)


NEIGHBOURS = [name for name in RECIPES if name.startswith("at-") and "swa" not in name and name != "at-awp"]


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_neighbour_joins_under_its_own_name(name):
    added = set(grid.trainings(grid.SMALL, [name])) - set(grid.trainings(grid.SMALL))
    assert added == {f"{name}-seed{seed}" for seed in range(3)}
    assert grid.trainings(grid.SMALL, [name])[f"{name}-seed0"].recipe == name


def test_a_row_holds_what_the_records_say(runs):
    task = Task("at", Existing(runs[0], ("last",)), PLAN)
    (found,) = rows(task)
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
    assert "gap" in in_words([found])
    assert rows(task) == [found]  # read again


def test_what_decides_nothing_is_no_axis():
    assert set(record.FREE) - set(grid.NOT_AN_AXIS) == {"model.initial"}  # which decides, but by its content
    assert not set(grid.axes(RECIPES["at"])) & set(grid.NOT_AN_AXIS)


def test_a_training_that_fails_is_rows_with_a_note(tmp_path):
    (task,) = tasks(tmp_path, rates=(1e16,))
    found = rows(task)
    assert [row.model.name for row in found] == ["at-1e+16-last", "at-1e+16-best"]
    for row in found:
        assert row.model.targets == {}
        assert "training failed: epoch 2: the gradient of 2 of 2 batches was not finite" in row.model.note
        assert row.model.note in in_words(found)


def test_axes_that_do_not_vary_are_left_out_of_the_table():
    axes = [{"seed": 0, "awp.gamma": gamma, "data.name": "digits", "model.mean": [0.3]} for gamma in (0.0, 0.1)]
    rows = [Row(Model(str(i), str(i), "at", each, {}, {}, {})) for i, each in enumerate(axes)]
    table = tabled(Asked("t", [], PLAN, 0.0), rows)
    assert [model.axes for model in table.models] == [{"seed": 0, "awp.gamma": 0.0}, {"seed": 0, "awp.gamma": 0.1}]


def test_an_axis_that_only_some_models_have_varies():
    rows = [Row(Model(str(i), str(i), "at", each, {}, {}, {})) for i, each in enumerate([{"seed": 0}, {"awp": True}])]
    assert [model.axes for model in tabled(Asked("t", [], PLAN, 0.0), rows).models] == [{"seed": 0}, {"awp": True}]


def test_a_study_of_runs_ends_with_its_page(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gap, "SMALL", PLAN)
    words = ("study", "gap", *runs, "--checkpoints", "best", "last", "--out", tmp_path / "study", "--workers", "1")
    run(*words)
    table = read_table(tmp_path / "study" / "table.json")
    assert [model.name for model in table.models] == ["at-best", "at-last", "at-awp-best", "at-awp-last"]
    assert [model.cluster for model in table.models] == ["at", "at", "at-awp", "at-awp"]
    assert [model.axes["checkpoint"] for model in table.models] == ["best", "last", "best", "last"]
    assert "Nothing can be said" in capsys.readouterr().out  # of two runs
    assert "at-awp-best" in (tmp_path / "study" / "gap.html").read_text()
    assert (tmp_path / "study" / "gap.csv").read_text().count("\n") == 5
    before = {path: path.read_bytes() for path in (tmp_path / "study").iterdir() if path.is_file()}
    run(*words, "--floor", "50")  # the same models, judged otherwise
    assert read_table(tmp_path / "study" / "table.json").models == table.models
    run(*words)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(SystemExit) as stop:
        run("study", "gap", *runs, "--out", tmp_path / "study")
    assert stop.value.code == 2
    assert "holds another study" in capsys.readouterr().err


def test_other_runs_of_the_same_names_are_another_study(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gap, "SMALL", PLAN)
    gap._claim(gap.of_runs(runs, ("last",), None, None), tmp_path / "study")
    shutil.copytree(runs[0].parent, tmp_path / "copies")
    others = gap.of_runs([tmp_path / "copies" / run.name for run in runs], ("last",), None, None)
    with pytest.raises(BadInput, match="holds another study"):
        gap.study(others, tmp_path / "study", partial(processes, 1))


def test_one_study_a_folder_at_a_time(tmp_path):
    lock = tmp_path / "study" / "study.lock"
    with record.alone(lock), pytest.raises(BadInput, match="another process is at work"):
        gap.study(asked(tmp_path / "study"), tmp_path / "study", partial(processes, 1))
    assert not lock.exists()
    lock.write_text("")  # of one that was killed
    with record.alone(lock):
        assert lock.exists()


def listed(folder, **entry):
    network = models.small_cnn(10, width=4)
    save_file(network.state_dict(), folder / "theirs.safetensors")
    fields = {
        "name": "theirs",
        "file": str(folder / "theirs.safetensors"),
        "network": "small-cnn-4",
        "data": "digits",
        "eps": "8/255",
    }
    (folder / "models.yaml").write_text(yaml.safe_dump([fields | entry]))
    return gap.of_files(folder / "models.yaml", folder / "study", None).tasks


def test_checkpoints_of_others_are_listed_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gap, "SMALL", PLAN)
    (task,) = listed(tmp_path, axes={"method": "trades", "seed": 3}, cluster="one")
    (found,) = rows(task)
    assert (found.model.name, found.model.cluster, found.model.method) == ("theirs", "one", "trades")
    assert found.model.axes == {"method": "trades", "seed": 3}
    assert (tmp_path / "study" / "models" / "theirs" / "gaps").is_dir()
    assert task.source.threat.eps == 8 / 255


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"colour": "red"}, "unexpected keyword argument"),
        ({"eps": "wide"}, "'wide' is not a number"),
        ({"eps": -0.1}, "greater than 0"),
        ({"eps": float("nan")}, "finite"),
        ({"step_size": -1}, "greater than 0"),
        ({"std": [0.0]}, "greater than 0"),
        ({"norm": "L1"}, "'Linf' or 'L2'"),
        ({"data": "npz"}, "'digits', 'cifar10'"),
        ({"name": ".."}, "match pattern"),
        ({"name": "a/b"}, "match pattern"),
        ({"axes": {"lr": {"a": 1}}}, "axes"),
        ({"axes": {"day": datetime.date(2000, 1, 1)}}, "axes"),
    ],
)
def test_a_listing_that_cannot_be_used_is_refused_in_one_line(tmp_path, entry, why):
    with pytest.raises(BadInput, match=r"listing: model 1 of .*models.yaml: ") as raised:
        listed(tmp_path, **entry)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "study").exists()


def test_a_model_of_others_that_cannot_be_used_is_found_before_any_work(tmp_path):
    (good,) = listed(tmp_path)
    good.source.check()
    for entry, why in (({"network": "small-cnn-5"}, "model: "), ({"mean": [0.1, 0.2]}, "model: ")):
        (task,) = listed(tmp_path, **entry)
        with pytest.raises(BadInput, match=why):
            task.source.check()


@pytest.mark.parametrize(
    ("text", "why"), [("a: b", "expected a list"), ("{", "listing: .*not YAML of plain values"), ("- [1]", "model 1")]
)
def test_a_file_that_is_no_listing_is_refused(tmp_path, text, why):
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(BadInput, match=why):
        gap.of_files(tmp_path / "models.yaml", tmp_path / "study", None)


def test_what_is_asked_is_checked_before_any_work(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def refused(*words, out=tmp_path / "study"):
        with pytest.raises(SystemExit) as stop:
            run("study", "gap", *words, "--out", out)
        assert stop.value.code == 2
        assert not (tmp_path / "study").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "preset: expected one of runs, a preset or a listing, got none" in refused()
    assert "got runs and preset" in refused(runs[0], "--preset", "small")
    assert "found none" in refused(*runs, "--checkpoints", "epoch-7")
    assert "expected a run folder" in refused(tmp_path / "nowhere", runs[0])
    assert "at least two models, got 1" in refused(runs[0])
    assert "expected different names, got 'at' twice" in refused(runs[0], runs[0])
    assert "checkpoints: expected each once" in refused(*runs, "--checkpoints", "last", "last")
    assert "recipes: expected none here" in refused(*runs, "--recipes", "at")
    assert "checkpoints: expected none here" in refused("--preset", "small", "--checkpoints", "best")
    assert "device: expected auto or one of cpu" in refused(*runs, "--device", "cuda:7", "--workers", "1")
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "checkpoints" / "last.safetensors").write_bytes(b"cut")
    assert "is not a whole safetensors file" in refused(runs[1], broken)
    assert "data.path" in refused("--preset", "paper")
    assert "data.path" in refused("--preset", "paper", "--data-path", tmp_path / "file")
    assert "out: expected a folder" in refused(*runs, out=tmp_path / "file")
    assert "out: expected a folder" in refused(*runs, out=tmp_path / "file" / "study")


def test_a_folder_that_is_a_run_of_another_config_is_not_written_into(tmp_path):
    (tmp_path / "models" / "at-seed0").mkdir(parents=True)
    other = replace(grid.SMALL.base, seed=9)
    record.write_text(tmp_path / "models" / "at-seed0" / "config.yaml", as_text(other))
    with pytest.raises(BadInput, match="at-seed0 is a run of another config"):
        of_preset("small", (), tmp_path, None, None)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_equal_numbers(tmp_path):
    """Killed twice, with different numbers of workers: table and findings are equal to the byte."""
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def started(name: str, workers: int) -> subprocess.Popen:
        words = [sys.executable, "-m", "small_study", str(tmp_path / name), str(workers)]
        return subprocess.Popen(words, env=here, stdout=subprocess.DEVNULL)

    def trained() -> int:
        return len(list((tmp_path / "cut").glob("models/*/checkpoints/last.safetensors")))

    assert started("whole", 2).wait() == 0
    for least in (1, 3):
        process = started("cut", 1)
        while trained() < least:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "table.json").exists()
        time.sleep(1.0)  # its worker notices
    assert trained() < 6
    assert started("cut", 2).wait() == 0
    for name in ("table.json", "findings.json", "gap.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
