"""Commands in processes of their own: killed, interrupted, diverged, and the whole demo."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import QUICK, run

from saltflat.lab import record
from saltflat.lab.recipes import RECIPES


def wait_for_epochs(folder: Path, epochs: int, process: subprocess.Popen) -> None:
    while len(record.read_metrics(folder)) < epochs:
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_equal_bits(tmp_path):
    more = [
        "--optimizer.epochs",
        "8",
        "--optimizer.average",
        "0.9",
        "--data.examples",
        "200",
        "--model.name",
        "small-resnet",
    ]
    command = [sys.executable, "-m", "saltflat", "train"]
    subprocess.run(
        [*command, "at-awp", *QUICK, *more, "--out", str(tmp_path / "whole")], check=True, capture_output=True
    )
    process = subprocess.Popen(
        [*command, "at-awp", *QUICK, *more, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL
    )
    for epochs, delay in ((1, 0.0), (3, 0.07), (6, 0.03)):
        wait_for_epochs(tmp_path / "killed", epochs, process)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process = subprocess.Popen([*command, "--resume", str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    assert process.wait() == 0
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "killed/checkpoints" / name).read_bytes() == (
            tmp_path / "whole/checkpoints" / name
        ).read_bytes()
    one, other = (
        [
            {key: value for key, value in line.items() if "seconds" not in key}
            for line in record.read_metrics(tmp_path / name)
        ]
        for name in ("killed", "whole")
    )
    assert one == other


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "saltflat",
        "train",
        "at",
        *QUICK,
        "--optimizer.epochs",
        "200",
        "--out",
        str(tmp_path / "run"),
    ]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would their children

    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)
    wait_for_epochs(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; go on with: saltflat train --resume" in out
    assert err == ""


@pytest.mark.slow
def test_a_diverged_run_ends_with_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "saltflat",
        "train",
        "at",
        *QUICK,
        "--optimizer.learning-rate",
        "1e16",
        "--out",
        str(tmp_path / "run"),
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("saltflat: epoch 2: the gradient of 2 of 2 batches was not finite")
    assert found.stderr.count("\n") == 1
    assert (tmp_path / "run" / "dropped-batch.npz").is_file()


@pytest.mark.slow
def test_the_demo_makes_its_page_and_keeps_what_is_finished(tmp_path, monkeypatch):
    for name in ("at", "at-awp"):
        recipe = RECIPES[name]
        small = replace(recipe, optimizer=replace(recipe.optimizer, epochs=2), data=replace(recipe.data, examples=100))
        monkeypatch.setitem(RECIPES, name, small)
    run("demo", "--seeds", 1, "--out", tmp_path / "demo")
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "at-awp" in page
    assert "an anecdote" in page
    weights = (tmp_path / "demo" / "at-seed0" / "checkpoints" / "last.safetensors").stat().st_mtime_ns
    run("demo", "--seeds", 1, "--out", tmp_path / "demo")
    assert (tmp_path / "demo" / "at-seed0" / "checkpoints" / "last.safetensors").stat().st_mtime_ns == weights
