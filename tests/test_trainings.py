"""Trainings that are told to stop, that are asked for again, and whose folders are damaged, shared or read-only."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import QUICK, run
from safetensors.torch import load_file

from saltflat.lab import build, checkpoints, record, trainings
from saltflat.lab.signals import SIGNALS
from saltflat.train import Stepped

RECIPE = ("train", "at-awp", *QUICK, "--optimizer.average", "0.9")
STEPS = 4  # two an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(*RECIPE, "--out", folder)
    return folder


def numbers(folder):
    """What a run is about: weights to the byte, metrics but for times."""
    weights = {path.name: path.read_bytes() for path in (folder / "checkpoints").glob("*.safetensors")}
    return weights, [
        {name: value for name, value in line.items() if "seconds" not in name} for line in record.read_metrics(folder)
    ]


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def stopped(monkeypatch, folder, at, name="SIGTERM", words=RECIPE):
    """A training in this process, told to stop in step `at`; it ends with exit code 75."""
    whole_fit = trainings.fit

    def fit(*given, **named):
        for event in whole_fit(*given, **named):
            if isinstance(event, Stepped) and event.step == at:
                os.kill(os.getpid(), getattr(signal, name))
            yield event

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "fit", fit)
        with pytest.raises(SystemExit) as stop:
            run(*words, "--out", folder)
    assert stop.value.code == 75


def steps(folder):
    return [int(path.name.split("-")[1]) for path in checkpoints.states(folder / "checkpoints")]


@pytest.mark.parametrize(("at", "name"), [(1, "SIGTERM"), (2, "SIGUSR1"), (3, "SIGTERM"), (4, "SIGUSR1")])
def test_a_signal_saves_the_step_and_leaves_with_a_code_of_its_own(at, name, whole, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    folder = tmp_path / "run"
    stopped(monkeypatch, folder, at, name)
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before
    printed = capsys.readouterr()
    assert f"told to stop, and saved at step {at}; go on with: saltflat train --resume {folder}" in printed.out
    assert printed.err == ""
    assert steps(folder)[0] == at
    assert not (folder / "training.lock").exists()
    run("train", "--resume", folder)
    assert numbers(folder) == numbers(whole)
    assert steps(folder) == [STEPS, 3 if at == 3 else 2]


def test_a_run_that_is_stopped_again_and_again_ends_equal(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()  # a job's script may have made it
    stopped(monkeypatch, folder, 1, words=(*RECIPE, "--go-on"))
    for at in (2, 3, 4):
        stopped(monkeypatch, folder, at, words=(*RECIPE, "--go-on"))
        assert steps(folder)[0] == at
    run(*RECIPE, "--go-on", "--out", folder)
    assert numbers(folder) == numbers(whole)


def test_one_command_begins_goes_on_and_is_finished(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    stopped(monkeypatch, folder, 3, words=(*RECIPE, "--go-on"))
    capsys.readouterr()
    run(*RECIPE, "--go-on", "--out", folder)
    assert "epoch 1/2" not in capsys.readouterr().out  # it goes on within the second
    assert numbers(folder) == numbers(whole)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for _ in range(2):
        run(*RECIPE, "--go-on", "--out", folder)
        assert f"{folder} is finished: 2 epochs." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    words = refused(capsys, *RECIPE, "--go-on", "--seed", "1", "--out", folder)
    assert f"out: {folder} is a run of another config" in words
    words = refused(capsys, *RECIPE, "--out", folder)
    assert "out: expected a folder that does not exist yet" in words


@pytest.mark.parametrize(("minutes", "saved"), [("1e-9", [1, 2, 2, 3, 4, 4]), ("0", [2, 4]), ("15", [2, 4])])
def test_checkpoints_come_as_often_as_asked_and_after_every_epoch(minutes, saved, whole, tmp_path, monkeypatch):
    found, save = [], checkpoints.save_state

    def counted(folder, state):
        found.append(state["step"])
        return save(folder, state)

    monkeypatch.setattr(checkpoints, "save_state", counted)
    run(*RECIPE, "--checkpoint-minutes", minutes, "--out", tmp_path / "run")
    assert found == saved
    assert numbers(tmp_path / "run") == numbers(whole)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run that was left at step 3, with states of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("left") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, folder, 3)
    assert steps(folder) == [3, 2]
    return folder


@pytest.fixture
def copy(left, tmp_path):
    return shutil.copytree(left, tmp_path / "run")


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one(whole, copy, capsys):
    newest, _ = checkpoints.states(copy / "checkpoints")
    flip(newest)
    run("train", "--resume", copy)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{newest} is damaged: set aside as damaged-{newest.name}; what was saved before it is tried next"
    )
    assert numbers(copy) == numbers(whole)
    assert (copy / "checkpoints" / f"damaged-{newest.name}").is_file()


def test_a_run_with_no_checkpoint_that_is_whole_is_refused_and_left_as_it_is(copy, capsys):
    for path in checkpoints.states(copy / "checkpoints"):
        flip(path)
    kept = {path: path.read_bytes() for path in (*copy.glob("checkpoints/*.safetensors"), copy / "metrics.jsonl")}
    for words in (("train", "--resume", copy), (*RECIPE, "--go-on", "--out", copy)):
        assert f"run: {copy} has no checkpoint" in refused(capsys, *words)
        assert {path: path.read_bytes() for path in kept} == kept


def test_a_run_goes_on_with_the_images_that_it_began_with(copy, capsys, monkeypatch):
    other = build.sets

    def shuffled(config):
        found = other(config)
        found.train.images[0, 0, 0, 0] += 1
        return found

    monkeypatch.setattr(build, "sets", shuffled)
    assert f"data.path: {copy} began with other images" in refused(capsys, "train", "--resume", copy)


def test_what_decides_no_numbers_may_differ_where_one_command_goes_on(copy, capsys):
    run(*RECIPE, "--checkpoint-minutes", "5", "--keep-every", "7", "--threads", "1", "--go-on", "--out", copy)
    assert "2/2" in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(whole, copy):
    """Of its first epoch, the metrics may be there, whole or not."""
    line = (copy / "metrics.jsonl").read_text()
    for content in (None, "", line, line[:40], "{" + line):
        folder = shutil.copytree(copy, copy.with_name("again"))
        for path in checkpoints.states(folder / "checkpoints"):
            path.unlink()
        (folder / "metrics.jsonl").unlink() if content is None else (folder / "metrics.jsonl").write_text(content)
        run("train", "--resume", folder)
        assert numbers(folder) == numbers(whole)
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "gone", "a line more", "a line twice"])
def test_metrics_are_made_anew_from_the_checkpoint(how, whole, copy, capsys):
    path = copy / "metrics.jsonl"
    content = path.read_bytes()
    damaged = {
        "flipped": content[:20] + b"9" + content[21:],
        "cut": content[:30],
        "emptied": b"",
        "gone": None,
        "a line more": content + b'{"epoch": 2, "loss": 0.0}\n',
        "a line twice": content + content,
    }[how]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    run("train", "--resume", copy)
    assert numbers(copy) == numbers(whole)
    finished = path.read_bytes()
    capsys.readouterr()
    path.unlink() if damaged is None else path.write_bytes(damaged)
    run("train", "--resume", copy)  # it is finished
    assert path.read_bytes() == finished
    assert capsys.readouterr().out.splitlines() == [
        f"{path} is damaged: made anew", f"{copy} is finished: 2 epochs."
    ]  # fmt: skip


def test_weights_to_begin_with_that_were_damaged_are_refused(whole, tmp_path, capsys):
    path = shutil.copy(whole / "checkpoints" / "last.safetensors", tmp_path / "w.safetensors")
    flip(path, 0.9)
    words = refused(capsys, "train", "at", *QUICK, "--model.initial", path, "--out", tmp_path / "run")
    assert f"{path} is damaged: its numbers are not those that were written" in words
    assert not (tmp_path / "run").exists()


def test_weights_to_begin_with_are_kept_even_if_a_kill_came_before(whole, tmp_path):
    begin = whole / "checkpoints" / "last.safetensors"
    run("train", "at", *QUICK, "--model.initial", begin, "--out", tmp_path / "run")
    expected = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run("train", "--resume", tmp_path / "run")
    assert numbers(tmp_path / "run") == expected
    kept = load_file(tmp_path / "run" / "checkpoints" / "initial.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_file(begin).items())


def test_damaged_weights_are_not_measured(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    flip(folder / "checkpoints" / "best.safetensors", 0.9)
    words = refused(capsys, "evaluate", folder, "--examples", "20", "--attacks", "clean")
    assert "best.safetensors is damaged: its numbers are not those that were written" in words


def test_two_trainings_do_not_write_into_one_folder(copy, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with record.alone(copy / "training.lock"):
        for words in (("train", "--resume", copy), (*RECIPE, "--go-on", "--out", copy)):
            assert f"another process is at work in {str(copy)!r}" in refused(capsys, *words)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_in_is_refused(error, copy, capsys, monkeypatch):
    """Root may write anywhere, so that the refusal is made up here."""
    really = os.open

    def only_read(path, flags, *more, **named):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(copy)):
            raise OSError(error, os.strerror(error), str(path))
        return really(path, flags, *more, **named)

    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "open", only_read)
    line = refused(capsys, "train", "--resume", copy)
    assert line == f"saltflat: run: cannot write in {str(copy)!r}: {os.strerror(error)}"
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys, monkeypatch):
    really = os.mkdir

    def only_read(path, *more, **named):
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", only_read)
    line = refused(capsys, *RECIPE, "--out", tmp_path / "run")
    assert f"out: cannot make '{tmp_path / 'run'}': {os.strerror(errno.EROFS)}" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_in_one_line_and_a_run_goes_on_from_what_was_saved_before(
    whole, tmp_path, capsys, monkeypatch
):
    folder, save = tmp_path / "run", checkpoints.save_state

    def full(to, state):
        if state["step"] == 3:
            monkeypatch.setattr(os, "fsync", no_space)
        return save(to, state)

    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_state", full)
        with pytest.raises(SystemExit) as stop:
            run(*RECIPE, "--checkpoint-minutes", "1e-9", "--out", folder)
    monkeypatch.undo()
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saltflat: ")
    assert "No space left on device" in line
    assert steps(folder)[0] == 2
    assert not list(folder.rglob("*.new"))
    run("train", "--resume", folder)
    assert numbers(folder) == numbers(whole)


def test_a_training_that_diverges_keeps_the_batch(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "at", *QUICK, "--optimizer.learning-rate", "1e16", "--out", tmp_path / "run")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saltflat: epoch 2: the gradient of 2 of 2 batches was not finite")
    path = tmp_path / "run" / "dropped-batch.npz"
    assert line.endswith(f"; the last one dropped is in {path}")
    kept = np.load(path)
    assert kept["x"].shape[1:] == (1, 8, 8)
    assert len(kept["x"]) == len(kept["y"]) > 0
    assert np.isfinite(kept["x"]).all()
    assert steps(tmp_path / "run") == [2]  # of the epoch before


def test_a_training_whose_weights_diverge_has_no_batch_to_keep(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "at", *QUICK, "--optimizer.learning-rate", "1e30", "--out", tmp_path / "run")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saltflat: epoch 1: conv1.weight is not finite; a lower learning rate")
    assert "dropped" not in line
    assert not (tmp_path / "run" / "dropped-batch.npz").exists()
    assert not steps(tmp_path / "run")


def test_what_is_written_once_is_sealed(whole):
    for name in ("environment.json", "evaluation.json"):
        assert "seal" in json.loads((whole / name).read_text())
        assert "seal" not in record.read_again(whole / name)
    assert (whole / "config.yaml").read_text().startswith(record.DECIDES)
    assert all('"seal": ' in line for line in (whole / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_signals_of_a_cluster_from_outside(tmp_path, capsys):
    """SIGTERM, then SIGUSR1, to a process of its own; while it is at work, nobody else gets in."""
    words = [*RECIPE, "--optimizer.epochs", "30", "--data.examples", "200"]
    run(*words, "--out", tmp_path / "whole")
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "saltflat", *words, "--go-on", "--out", str(folder)]
    for number, epochs in ((signal.SIGTERM, 1), (signal.SIGUSR1, 6)):
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        while record.count_metrics(folder) < epochs:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        assert "another process is at work in" in refused(capsys, "train", "--resume", folder)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75
        assert "told to stop, and saved at step" in out
        assert err == ""
    run("train", "--resume", folder)
    assert numbers(folder) == numbers(tmp_path / "whole")


def test_last_weights_of_a_finished_run_are_made_anew(whole, capsys, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    last = folder / "checkpoints" / "last.safetensors"
    for damage in (lambda: flip(last), last.unlink):
        damage()
        run("train", "--resume", folder)
        assert f"{last} is damaged: made anew" in capsys.readouterr().out
        assert last.read_bytes() == (whole / "checkpoints" / "last.safetensors").read_bytes()
