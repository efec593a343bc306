"""`saltflat study process`: which epochs are looked at, and what is found of them."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
from commands import QUICK, run

from saltflat.lab import record
from saltflat.lab.config import BadInput, Optimizer, Train
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.landscapes import How as Slice
from saltflat.lab.measures import How
from saltflat.lab.study import process
from saltflat.lab.study.process import Plan
from saltflat.lab.study.workers import processes
from saltflat.lab.trainings import drops, kept_epochs

PLAN = Plan(
    0.5,
    3,
    1,
    Slice(examples=20, steps=2, batch_size=20),
    GapHow(20, 20, 2, 5),
    How(examples=20, batch_size=20, steps=2, draws=2, directions=1),
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--optimizer.epochs", "8", "--keep-every", "3", "--out", folder)
    return folder


@pytest.mark.parametrize(
    ("schedule", "expected"), [("piecewise", [4, 6]), ("constant", []), ("cosine", []), ("cyclic", [])]
)
def test_drops_are_those_of_the_piecewise_schedule(schedule, expected):
    assert drops(Train(optimizer=Optimizer(epochs=8, schedule=schedule))) == expected


def test_epochs_that_are_kept_are_first_regular_and_both_sides_of_drops():
    config = Train(keep_every=3, optimizer=Optimizer(epochs=8))
    assert kept_epochs(config) == {1, 3, 6, 4, 5, 7}
    assert kept_epochs(replace(config, keep_every=0)) == set()


def test_all_kept_epochs_are_looked_at_once_with_their_roles(kept):
    config, epochs = record.read_config(kept), record.read_metrics(kept)
    names = process._looked_at(kept, epochs)
    best = max(line["epoch"] for line in epochs if line["best"])
    assert list(names) == sorted({1, 3, 4, 5, 6, 7, 8, best})
    roles = {epoch: process._role(config, epochs, epoch) for epoch in names}
    assert roles[1] == ""
    assert "before a drop of the rate" in roles[4]
    assert "after a drop of the rate" in roles[5]
    assert "last" in roles[8]
    assert "best on validation" in roles[best]
    assert all((kept / "checkpoints" / f"{name}.safetensors").is_file() for name in names.values())


def test_what_is_found_is_what_the_records_say_and_is_read_again(kept, tmp_path):
    process.study(kept, PLAN, tmp_path, partial(processes, 1), None, "auto")
    found = json.loads((tmp_path / "process.json").read_text())
    gaps = {each["checkpoint"]: each for each in map(json.loads, (p.read_text() for p in (kept / "gaps").iterdir()))}
    lines = {
        each["checkpoint"]: each
        for each in map(json.loads, (p.read_text() for p in (kept / "landscapes").glob("*.json")))
    }
    for point in found["points"]:
        assert point["gap"] == gaps[point["checkpoint"]]["gap"]
        assert point["curves"] == [curve["robust_loss"] for curve in lines[point["checkpoint"]]["curves"]]
        assert {"average case", "landscape area", "weight norm"} < {row["name"] for row in point["measures"]}
    assert [line["epoch"] for line in found["trajectory"]] == list(range(1, 9))
    assert found["drops"] == [4, 6]
    stamps = {path: path.stat().st_mtime_ns for path in (kept / "gaps").iterdir()}
    process.study(kept, PLAN, tmp_path, partial(processes, 1), None, "auto")
    assert json.loads((tmp_path / "process.json").read_text()) == found
    assert {path: path.stat().st_mtime_ns for path in (kept / "gaps").iterdir()} == stamps


def test_what_the_run_lacks_is_said_before_any_work(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns("gaps", "landscapes", "flatness"))
    lines = record.read_metrics(kept)
    del lines[2]["learning_rate"]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadInput, match="expected learning_rate in every line"):
        process.study(tmp_path / "run", PLAN, tmp_path / "out", partial(processes, 1), None, "auto")
    assert not (tmp_path / "run" / "gaps").exists()


def test_a_run_without_kept_epochs_is_refused_in_one_line(tmp_path, capsys):
    run("train", "at", *QUICK, "--out", tmp_path / "run")
    with pytest.raises(BadInput, match=r"several epochs in .* \(train with --keep-every N\), got best, last"):
        process.study(tmp_path / "run", PLAN, tmp_path, partial(processes, 1), None, "auto")
    with pytest.raises(SystemExit) as stop:
        run("study", "process", tmp_path / "run", "--points", "4")
    assert stop.value.code == 2
    assert "points: expected an odd number >= 3, and at most 9999, got 4" in capsys.readouterr().err
