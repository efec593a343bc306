"""Two processes write the run that one would, up to rounding, and to the bit the one that they would anyway."""

import io
import json
import os
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from ranks import found
from safetensors.torch import load_file

from saltflat.data import digits
from saltflat.lab import checkpoints, trainings
from saltflat.lab.config import (
    Attack,
    Awp,
    BadInput,
    Compute,
    Data,
    Evaluation,
    Interrupted,
    Model,
    Objective,
    Optimizer,
    Train,
)
from saltflat.train import Stepped

pytestmark = pytest.mark.slow

BASE = Train(
    data=Data(examples=64, validation_examples=20),
    model=Model("small-cnn", width=4),
    attack=Attack(eps=0.15, step_size=0.05, steps=2),
    awp=Awp(gamma=0.01),
    optimizer=Optimizer(epochs=2, batch_size=20, learning_rate=0.05),
    evaluation=Evaluation(steps=2, examples=31, batch_size=16),
    device="cpu",
    threads=1,
)
CASES = {  # 64 examples in batches of 20 leave one of 4, in batches of 21 one of 1, which is less than two processes
    "plain": {},
    "TRADES, uneven, average": {
        "objective": Objective("trades"),
        "optimizer": replace(BASE.optimizer, batch_size=21, average=0.9),
    },
    "mixup, rotation, accumulated": {
        "data": replace(BASE.data, mix="mixup", rotation=10.0),
        "optimizer": replace(BASE.optimizer, accumulate=2),
    },
    "random-wp": {"awp": Awp("random-wp", gamma=0.01)},
    "arwp": {"awp": Awp("arwp", gamma=0.01)},
    "sharded": {"compute": Compute(spread="fsdp")},
    "sharded SAM, SWA": {
        "compute": Compute(spread="fsdp"),
        "awp": Awp("sam", gamma=0.05),
        "optimizer": replace(BASE.optimizer, swa_from=0.4),
    },
}  # fmt: skip


def config(name):
    return replace(BASE, recipe=name, **CASES[name])


def folder_of(name):
    return name.replace(" ", "-").replace(",", "")


def shards(folder):
    """The digits in tar files."""
    for split, images in (("train", digits().train), ("test", digits().test)):
        for part in range(2):
            with tarfile.open(folder / f"{split}-{part}.tar", "w") as tar:
                for row in range(part, 200, 2):
                    png = io.BytesIO()
                    Image.fromarray(images.images[row, 0].numpy()).save(png, "png")
                    label = str(int(images.labels[row])).encode()
                    for end, content in (("png", png.getvalue()), ("cls", label)):
                        member = tarfile.TarInfo(f"{row:04}.{end}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def stored(folder):
    data = Data("shards", path=folder, stored=True, examples=60, validation_examples=20)
    return replace(BASE, recipe="stored", data=data)


def stop_after(steps, monkeypatch):
    """What a signal would do, after so many steps."""
    real = trainings.fit

    def fit(*arguments, **named):
        for event in real(*arguments, **named):
            if isinstance(event, Stepped) and event.step == steps:
                os.kill(os.getpid(), 15)
            yield event

    monkeypatch.setattr(trainings, "fit", fit)


def begun(config, out, steps):
    """A run that is told to stop after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(steps, patch)
        with pytest.raises(Interrupted):
            trainings.train(config, out)


def on_two(folder):
    """All runs of two processes; each finds itself in the group that `ranks.found` made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saltflat.parallel.launched", lambda: False)
        for name in CASES:
            trainings.train(config(name), folder / "two" / folder_of(name))
        trainings.train(
            replace(stored(folder), data=replace(stored(folder).data, workers=1)), folder / "two" / "stored"
        )
        begun(BASE, folder / "stopped", 6)
        trainings.resume(folder / "stopped")
        begun(BASE, folder / "left", 5)
        trainings.resume(folder / "handed-over")  # by one process
        refused = []
        for wrong in (
            replace(BASE, awp=replace(BASE.awp, amortised=True)),
            replace(BASE, optimizer=replace(BASE.optimizer, batch_size=1)),
            replace(stored(folder), data=replace(stored(folder).data, mix="mixup")),
        ):
            with pytest.raises(BadInput) as error:
                trainings.train(wrong, folder / "refused")
            refused.append(str(error.value))
    return refused


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    shards(folder)
    begun(BASE, folder / "handed-over", 3)
    refused = found(on_two, folder)
    for name in CASES:
        trainings.train(config(name), folder / "one" / folder_of(name))
    trainings.train(stored(folder), folder / "one" / "stored")
    begun(stored(folder), folder / "stored-stopped", 4)
    trainings.resume(folder / "stored-stopped")
    trainings.resume(folder / "left")
    torch.set_num_threads(threads)
    return folder, refused


def weights(run, name="last"):
    return torch.cat(
        [
            tensor.double().flatten()
            for _, tensor in sorted(load_file(run / "checkpoints" / f"{name}.safetensors").items())
        ]
    )


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "evaluation_seconds", "seal")} for line in lines]


def numbers(tree):
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    return [number for value in tree for number in numbers(value)] if isinstance(tree, list) else [float(tree)]


@pytest.mark.parametrize("name", [*map(folder_of, CASES), "stored"])
def test_two_processes_write_the_run_of_one(runs, name):
    folder, _ = runs
    assert (weights(folder / "two" / name) - weights(folder / "one" / name)).abs().max() < 1e-5
    two, one = numbers(metrics(folder / "two" / name)), numbers(metrics(folder / "one" / name))
    assert len(two) == len(one)
    assert max(abs(x - y) for x, y in zip(two, one, strict=True)) < 0.04  # an example of 31 on the other side, at most


@pytest.mark.parametrize(("stopped", "whole"), [("stopped", "two/plain"), ("stored-stopped", "one/stored")])
def test_a_run_that_was_told_to_stop_ends_with_the_bits_of_one_that_was_not(runs, stopped, whole):
    folder, _ = runs
    for name in ("last", "best"):
        assert torch.equal(weights(folder / stopped, name), weights(folder / whole, name))
    assert metrics(folder / stopped) == metrics(folder / whole)


@pytest.mark.parametrize("name", ["left", "handed-over"])
def test_another_number_of_processes_goes_on_up_to_rounding(runs, name):
    folder, _ = runs
    assert (weights(folder / name) - weights(folder / "one" / "plain")).abs().max() < 1e-5
    assert len(metrics(folder / name)) == 2


def test_one_process_writes(runs):
    folder, _ = runs
    written = {path.name for path in (folder / "two" / "plain").iterdir()}
    assert written == {"checkpoints", "config.yaml", "environment.json", "evaluation.json", "metrics.jsonl"}
    assert len(checkpoints.states(folder / "two" / "plain" / "checkpoints")) == 2
    assert json.loads((folder / "two" / "plain" / "environment.json").read_text())["processes"] == 2


def test_what_many_processes_cannot_do_is_refused_on_all_before_anything_is_written(runs):
    folder, refused = runs
    assert refused[0] == refused[1]
    for message, start in zip(refused[0], ("awp.amortised: ", "optimizer.batch_size: ", "data.mix: "), strict=True):
        assert message.startswith(start)
        assert "2 processes" in message
    assert not (folder / "refused").exists()
