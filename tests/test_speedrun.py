"""The speed record says what its runs' files say, or in one line why it cannot; its script goes on where it was."""

import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import environment, metrics, write

from benchmarks import speedrun
from saltflat.lab import record
from saltflat.lab.config import Awp, as_text
from saltflat.lab.recipes import RECIPES

SCRIPT = Path(speedrun.__file__).with_name("speedrun.sh")
EPOCHS = 4
CIFAR = replace(
    RECIPES["speedrun-cifar10"],
    data=replace(RECIPES["speedrun-cifar10"].data, path=Path("data")),
    optimizer=replace(RECIPES["speedrun-cifar10"].optimizer, epochs=EPOCHS),
)


def evaluated(standing, n=10_000, precision="fp32", eps=8 / 255, **more):
    """The record of an evaluation that left so many shares standing, by attack."""
    attacks = [
        {"name": name, "description": f"{name}, described", "accuracy": share, "interval": [share - 0.01, share + 0.01]}
        for name, share in standing.items()
    ]
    settings = {"batch_size": 256, "seed": 0, "precision": precision, "weights": "moving average of w, decay 0.998"}
    return {
        "checkpoint": "last",
        "sha256": "0" * 16,
        "split": "test",
        "n": n,
        "settings": settings,
        "threat": {"norm": "Linf", "eps": eps, "step_size": 2 / 255},
        "attacks": attacks,
        "seconds": 60.0,
        "environment": environment(0),
        **more,
    }


def run(folder, seed, seconds=10.0, pgd=0.51, standard=0.48, config=CIFAR, machine=None, **of_evaluation):
    """A run whose every epoch took so many seconds, and a tenth of that for its measurements."""
    (folder / "outcomes").mkdir(parents=True)
    (folder / "config.yaml").write_text(as_text(replace(config, seed=seed)))
    write(folder / "environment.json", environment(seed) | {"precision": "bf16"} | (machine or {}))
    lines = [
        metrics(number, EPOCHS, 20.0, 45.0, np.random.default_rng(seed))
        | {"seconds": seconds, "evaluation_seconds": seconds / 10}
        for number in range(1, EPOCHS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    standing = {"clean": 0.8, "pgd-20": pgd, "standard": standard}
    write(folder / "outcomes" / "last-test-1.json", evaluated(standing, **of_evaluation))
    return folder


def three(folder, **options):
    """Seeds 0, 1 and 2, of 10, 20 and 30 seconds an epoch."""
    return [run(folder / f"seed-{seed}", seed, 10.0 * (seed + 1), **options) for seed in range(3)]


def words(capsys, *arguments):
    """What is printed, and the record that is written."""
    speedrun.main([str(word) for word in arguments])
    return capsys.readouterr().out, json.loads((Path(arguments[0]) / "record.json").read_text())


def test_times_are_sums_over_epochs_and_have_mean_and_sample_standard_deviation(tmp_path, capsys):
    three(tmp_path)
    out, found = words(capsys, tmp_path)
    assert [row["seed"] for row in found["runs"]] == [0, 1, 2]
    assert [row["seconds"] for row in found["runs"]] == [40, 80, 120]
    assert [row["seconds_with_measurements"] for row in found["runs"]] == pytest.approx([44, 88, 132])
    assert found["summary"]["seconds"] == {"mean": 80, "standard_deviation": 40, "n": 3}
    assert found["summary"]["standard"] == {"mean": pytest.approx(0.48), "standard_deviation": 0, "n": 3}
    assert "| 1 | 80.0 | 88.0 | 80.00 | 51.00 | 48.00 | met |" in out
    assert "| n = 3 runs | 80.0 ± 40.0 | 88.0 ± 44.0 | 80.00 ± 0.00 | 51.00 ± 0.00 | 48.00 ± 0.00 |  |" in out
    assert "optimizer.epochs 4: 4 epochs, bf16, on 2 threads of a processor, torch 2.13.0." in out
    assert "on 10000 test images, Linf, eps 8/255, attacks in fp32; weights: moving average of w" in out
    assert found["changed"] == {"optimizer.epochs": 4}
    assert found["evaluation"]["n"] == 10_000
    assert found["environment"]["precision"] == "bf16"
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, "as many cells in every line"


def test_one_run_has_no_spread(tmp_path, capsys):
    run(tmp_path / "seed-0", 0)
    out, found = words(capsys, tmp_path)
    assert found["summary"]["seconds"] == {"mean": 40, "standard_deviation": None, "n": 1}
    assert "| n = 1 run | 40.0 | 44.0 |" in out
    assert "was met by the only run." in out


def test_a_target_is_met_only_by_runs_that_reach_all_of_it(tmp_path, capsys):
    three(tmp_path)
    out, _ = words(capsys, tmp_path)
    assert "The target (pgd-20 at least 50.00%, standard at least 47.00%) was met by all 3 runs." in out
    run(tmp_path / "seed-3", 3, standard=0.4699)
    out, found = words(capsys, tmp_path)
    assert [row["met"] for row in found["runs"]] == [True, True, True, False]
    assert "| missed: standard |" in out
    assert "was met by 3 of 4 runs: the times above are no times to it." in out
    out, found = words(capsys, tmp_path, "--target", "standard=0.9")
    assert [row["missed"] for row in found["runs"]] == [["standard"]] * 4
    assert "(standard at least 90.00%) was not met by any run: the times above are no times to it." in out


def test_nothing_is_said_about_a_target_by_runs_of_another_task(tmp_path, capsys):
    other = replace(CIFAR, data=replace(CIFAR.data, name="parquet"), awp=Awp())
    three(tmp_path, config=other, n=500, eps=2 / 255)
    out, found = words(capsys, tmp_path)
    assert [row["met"] for row in found["runs"]] == [None] * 3
    assert (
        "another task, data parquet instead of cifar10; weight adversary none instead of awp; "
        "threat Linf, eps 2/255 instead of Linf, eps 8/255; test images 500 instead of 10000." in out
    )
    out, _ = words(capsys, tmp_path, "--target", "pgd-20=0.5")
    assert "The target (pgd-20 at least 50.00%) was met by all 3 runs." in out


def test_a_recipe_without_a_target_has_none(tmp_path, capsys):
    digits = RECIPES["speedrun-digits"]
    three(tmp_path, config=replace(digits, optimizer=replace(digits.optimizer, epochs=EPOCHS)))
    out, found = words(capsys, tmp_path)
    assert found["target"] is None
    assert "No target was stated" in out


def test_of_several_evaluations_the_largest_counts_and_of_equal_ones_the_strongest(tmp_path, capsys):
    for folder in three(tmp_path, n=1000):
        for number, (n, standard, precision) in enumerate([(500, 0.1, "fp32"), (1000, 0.45, "bf16")], 2):
            of = evaluated({"clean": 0.8, "pgd-20": 0.51, "standard": standard}, n, precision)
            write(folder / "outcomes" / f"last-test-{number}.json", of)
        of = evaluated({"clean": 0.8, "pgd-20": 0.1}, 10_000)  # no AutoAttack
        write(folder / "outcomes" / "last-test-4.json", of)
        of = evaluated({"pgd-20": 0.1, "standard": 0.1}, 10_000, checkpoint="best")
        write(folder / "outcomes" / "best-test-5.json", of)
    _, found = words(capsys, tmp_path)
    assert (found["evaluation"]["n"], found["evaluation"]["settings"]["precision"]) == (1000, "bf16")
    assert found["summary"]["standard"]["mean"] == pytest.approx(0.45)
    _, found = words(capsys, tmp_path, "--target", "pgd-20=0.05")
    assert found["summary"].keys() == {"seconds", "seconds_with_measurements", "clean", "pgd-20"}


def other_config(folder):
    path = folder / "seed-1" / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.3", "learning_rate: 0.25"))


def same_seed(folder):
    path = folder / "seed-1" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 1", "seed: 0"))


def other_torch(folder):
    write(folder / "seed-2" / "environment.json", environment(2) | {"precision": "bf16", "torch": "2.6.0"})


def cut(folder):
    path = folder / "seed-1" / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])


def without_seconds(folder):
    path = folder / "seed-1" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"seconds": 20.0', '"seconds": null'))


def other_weights(folder):
    path = folder / "seed-1" / "checkpoints" / "last.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"others")


def unevaluated(folder):
    (folder / "seed-2" / "outcomes" / "last-test-1.json").unlink()


def evaluated_otherwise(folder):
    of = evaluated({"clean": 0.8, "pgd-20": 0.5, "standard": 0.5}, precision="bf16")
    write(folder / "seed-2" / "outcomes" / "last-test-1.json", of)


def damaged(folder):
    path = folder / "seed-0" / "outcomes" / "last-test-1.json"
    path.write_text(path.read_text()[:50])


def no_runs(folder):
    for path in folder.glob("*/config.yaml"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (other_config, "optimizer.learning_rate: expected the same in all runs, got 0.3 in"),
        (same_seed, "expected a seed of its own for every run, got [0, 0, 2]"),
        (other_torch, "torch: expected the same in all runs, got '2.13.0' in"),
        (cut, "seed-1: expected metrics of 4 epochs, got 3"),
        (without_seconds, "seed-1: epoch 1: expected seconds, got None"),
        (other_weights, "the last weights of all runs have no common evaluation by pgd-20 and standard"),
        (unevaluated, "the last weights of all runs have no common evaluation by pgd-20 and standard"),
        (evaluated_otherwise, "the last weights of all runs have no common evaluation by pgd-20 and standard"),
        (damaged, "last-test-1.json is not a whole file"),
        (no_runs, "expected a folder of run folders"),
    ],
)
def test_runs_that_are_no_repetitions_are_refused_in_one_line(tmp_path, capsys, spoil, line):
    three(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        speedrun.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith("speedrun: ")
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("word", ["pgd-20", "pgd-20=half", "pgd-20=50", "=0.5", "pgd-20=nan"])
def test_a_target_is_an_attack_and_a_share(tmp_path, capsys, word):
    with pytest.raises(SystemExit, match=r"^2$"):
        speedrun.main([str(tmp_path), "--target", word])
    assert capsys.readouterr().err.startswith("speedrun: target: expected ATTACK=ACCURACY")


def test_on_a_gpu_its_host_may_be_another(tmp_path, capsys):
    for seed, host in enumerate(("one", "other")):
        run(tmp_path / f"{seed}", seed, machine={"cuda": "12.8", "device": "some GPU", "processor": host})
    out, _ = words(capsys, tmp_path)
    assert "bf16, on some GPU, torch 2.13.0." in out


def test_the_stated_target_is_of_the_recipe():
    target, config = speedrun.STATED["speedrun-cifar10"], RECIPES["speedrun-cifar10"]
    assert target.accuracy == {"pgd-20": 0.5, "standard": 0.47}
    assert speedrun._departures(target, config, evaluated({})) == []


def test_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(speedrun)
    assert tried > 0
    assert failed == 0


def script(*arguments, python, **variables):
    """The script, as a shell runs it."""
    words = ["bash", str(SCRIPT), *(str(word) for word in arguments)]
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def stand_in(folder, train="exit 0"):
    """A Python that notes what it is asked for, and makes a run's folder in place of training."""
    path = folder / "python"
    path.write_text(
        f"""#!/usr/bin/env bash
        echo "$*" >>{folder}/asked
        [[ "$3" != train ]] || {{ [[ "$4" == --resume ]] || mkdir -p "$8"; {train}; }}
        """
    )
    path.chmod(0o755)
    return path


def asked(folder):
    return [line.removeprefix("-m saltflat ") for line in (folder / "asked").read_text().splitlines()]


def test_the_script_trains_all_then_evaluates_all_then_makes_the_record(tmp_path):
    python, out = stand_in(tmp_path), tmp_path / "record"
    options = ("--threads", "1")
    first = script(out, "speedrun-digits", 2, 60, *options, python=python, EVALUATE="--examples 20 --padded")
    assert (first.returncode, first.stderr) == (0, "")
    evaluations = [
        f"evaluate {out}/seed-{seed} --checkpoint last --attacks clean pgd-20 standard --examples 20 --padded"
        for seed in range(2)
    ]
    final = [f"{SCRIPT.with_name('speedrun.py')} {out}"]
    trainings = [f"train speedrun-digits --seed {seed} --out {out}/seed-{seed} --threads 1" for seed in range(2)]
    assert asked(tmp_path) == [*trainings, *evaluations, *final]
    (tmp_path / "asked").unlink()
    again = script(out, "speedrun-digits", 2, 60, *options, python=python, EVALUATE="--examples 20 --padded")
    assert again.returncode == 0
    assert asked(tmp_path) == [*(f"train --resume {out}/seed-{seed}" for seed in range(2)), *evaluations, *final]


def test_the_script_ends_with_75_when_its_time_is_over_and_with_the_code_of_what_failed(tmp_path):
    python = stand_in(
        tmp_path, train=f"trap 'echo told >>{tmp_path}/asked; kill $!; exit 130' INT; sleep 30 & wait; exit 9"
    )
    over = script(tmp_path / "record", "at", 2, 1, python=python, SECONDS="1000")
    assert over.returncode == 75
    assert re.fullmatch(r"speedrun: not done after \d s; the same call goes on\n", over.stdout)
    assert asked(tmp_path) == [f"train at --seed 0 --out {tmp_path}/record/seed-0", "told"]
    failed = script(tmp_path / "record", "at", 2, 60, python=stand_in(tmp_path, train="exit 3"))
    assert failed.returncode == 3


def test_the_script_refuses_in_one_line(tmp_path):
    python = stand_in(tmp_path)
    assert script(tmp_path / "record", "at", 1, 60, "--threads", "1", python=python).returncode == 0
    for arguments, line in (
        ((), "expected FOLDER"),
        ((tmp_path / "other", "at", "two"), "RUNS: expected a whole number >= 1, got 'two'"),
        ((tmp_path / "other", "at", 1, "0"), "SECONDS: expected a whole number >= 1, got '0'"),
        (
            (tmp_path / "record", "at", 1, 60),
            "was begun with 'saltflat train at --threads 1 ', got 'saltflat train at '",
        ),
        ((tmp_path / "record", "at", 1, 60, "--threads", "2"), "choose another folder"),
    ):
        found = script(*arguments, python=python)
        assert found.returncode == 2
        assert found.stderr.startswith("speedrun: ")
        assert line in found.stderr
        assert found.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_record_in_pieces_is_that_of_runs_that_were_not_cut(tmp_path):
    out, epochs = tmp_path / "record", 150
    options = [
        "--threads", "1", "--data.examples", "100", "--data.validation-examples", "20", "--model.width", "4",
        "--optimizer.epochs", str(epochs), "--evaluation.examples", "20", "--evaluation.steps", "1",
    ]  # fmt: skip

    def piece(seconds):
        return script(out, "speedrun-digits", 1, seconds, *options, python=sys.executable, EVALUATE="--examples 10")

    def done(folder):
        return len(record.read_metrics(folder))

    for seconds in range(2, 40):  # the first that gets beyond the start has less than a second left
        assert piece(seconds).returncode == 75
        if done(out / "seed-0"):
            break
    assert 0 < done(out / "seed-0") < epochs
    last = piece(570)
    assert (last.returncode, last.stderr) == (0, "")
    assert "n = 1 run" in last.stdout

    found = json.loads((out / "record.json").read_text())
    assert [(row["seed"], row["epochs"]) for row in found["runs"]] == [(0, epochs)]
    assert found["summary"]["standard"]["n"] == 1
    assert found["evaluation"]["n"] == 10
    assert found["evaluation"]["settings"]["weights"] == "moving average of w, decay 0.95"

    whole = [sys.executable, "-m", "saltflat", "train", "speedrun-digits", *options, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    one, other = (
        [{name: value for name, value in line.items() if "seconds" not in name} for line in record.read_metrics(folder)]
        for folder in (out / "seed-0", tmp_path / "whole")
    )
    assert one == other

    before = (out / "record.json").read_bytes()
    assert piece(570).returncode == 0
    assert (out / "record.json").read_bytes() == before
