"""What befalls runs: kills at every write and at random, damage, full disks, numbers that are none, clocks that jump.

All that can be gone on from ends as if nothing had been, to the bit; all that cannot is refused in one line.
"""

import copy
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from faults import Run, differences, flipped, newest, server
from networks import equal_states, state

from saltflat import AT, PGD, Layerwise, Linf, double_perturbation_step
from saltflat.data import digits, stratified_subset, to_float
from saltflat.inputs import uniform
from saltflat.lab import build, checkpoints, evaluations, flatness, landscapes, subjects
from saltflat.lab.config import Attack, Awp, BadInput, Data, Evaluation, Model, Optimizer, Train
from saltflat.lab.measures import How
from saltflat.lab.report import read_run
from saltflat.models import small_resnet
from saltflat.random import seeded
from saltflat.schedules import constant
from saltflat.step import Step
from saltflat.train import ORDER, Diverged, Epoch, Plan, Stepped, fit

# At every step a state: a kill loses what is not yet written, and nothing else
PLAIN = Train(
    recipe="at-awp",
    threads=1,
    keep_every=1,
    checkpoint_minutes=1e-9,
    data=Data(examples=20, validation_examples=20),
    model=Model("mlp", width=6),
    attack=Attack(eps=0.15, step_size=0.05, steps=2),
    awp=Awp(gamma=0.01),
    optimizer=Optimizer(epochs=2, batch_size=10, learning_rate=0.05),
    evaluation=Evaluation(steps=1, examples=20),
)
# Steps that remember others, weights that are averaged, and draws in the midst of an epoch
REMEMBERING = replace(
    PLAIN,
    recipe="at-arwp",
    data=replace(PLAIN.data, rotation=15.0, mix="mixup"),
    awp=Awp("arwp", gamma=0.01, increase=10.0),
    optimizer=replace(PLAIN.optimizer, average=0.5),
)


def longer(config):
    """Three epochs of four steps, the last of which is of fewer images; a state after every few steps."""
    return replace(
        config,
        checkpoint_minutes=1e-4,
        data=replace(config.data, examples=38),
        optimizer=replace(config.optimizer, epochs=3),
    )


@pytest.fixture(scope="module")
def forking():
    with server() as started:
        yield started


@pytest.fixture(scope="module")
def whole(forking, tmp_path_factory):
    """config -> a run of it that nothing befell."""
    found = {}

    def trained(config):
        key = repr(config)
        if key not in found:
            found[key] = Run(forking, tmp_path_factory.mktemp("whole") / "run", config).finished()
        return found[key]

    return trained


# Kills


@pytest.mark.slow
@pytest.mark.parametrize(("config", "every", "kills"), [(PLAIN, 1, 50), (REMEMBERING, 4, 15)], ids=["awp", "arwp-ema"])
def test_killed_at_any_write_a_run_loses_what_came_after_the_last_and_ends_equal(
    forking, whole, tmp_path, config, every, kills
):
    """Before a write, within it, after it and after its rename, and after each file that is removed; `Run` counts the
    steps that are made again.
    """
    one, before = whole(config), forking.kills
    moments = dict(one.told())["moments"]
    for moment in range(1, moments + 1, every):
        killed = Run(forking, tmp_path / str(moment) / "run", config)
        killed.out.parent.mkdir()
        assert killed.child(killed_at=moment).code == -signal.SIGKILL
        killed.finished()
        assert differences(killed.out, one.out) == []
    assert forking.kills - before == len(range(1, moments + 1, every)) >= kills


@pytest.mark.slow
@pytest.mark.parametrize("config", [longer(PLAIN), longer(REMEMBERING)], ids=["awp", "arwp-ema"])
def test_killed_at_random_and_again_while_it_goes_on_a_run_ends_equal(forking, whole, tmp_path, config):
    one, draws, before = whole(config), random.Random(7), forking.kills
    took = Run(forking, tmp_path / "run", config).child().seconds
    for number in range(6):
        killed = Run(forking, tmp_path / str(number) / "run", config)
        killed.out.parent.mkdir()
        for share in ((number + draws.random()) / 6, draws.random() / 2, draws.random() / 2):
            if killed.child(after=share * took).code == 0:
                break
        killed.finished()
        assert differences(killed.out, one.out) == []
    assert forking.kills - before >= 6


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which file is flushed is asked of /proc")
def test_what_gets_its_name_is_on_the_disk_before_and_the_name_is_after(tmp_path, monkeypatch):
    """Of a power cut, kills tell nothing: this is what must not be out of order."""
    done, fsync = [], os.fsync

    def flushed(handle):
        done.append(("flushed", Path(f"/proc/self/fd/{handle}").resolve()))
        fsync(handle)

    def noted(method):
        def named(path, target):
            done.append(("named", path, Path(target)))
            return method(path, target)

        return named

    monkeypatch.setattr(os, "fsync", flushed)
    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, noted(getattr(Path, name)))
    run("train", "at", *WORDS, "--optimizer.epochs", "1", "--out", tmp_path / "run")
    named = [number for number, (what, *_) in enumerate(done) if what == "named"]
    assert len(named) >= 3 + 1 + 2 + 1  # of the folder's files, the folder, weights, a state
    for number in named:
        _, before, after = done[number]
        assert ("flushed", before) in done[:number]
        assert ("flushed", after.parent) in done[number:]
    assert ("flushed", tmp_path / "run" / "metrics.jsonl") in done


# Whole commands


WORDS = [
    "--threads", "1", "--data.examples", "38", "--data.validation-examples", "20", "--model.name", "mlp",
    "--model.width", "6", "--attack.steps", "2", "--optimizer.epochs", "30", "--optimizer.batch-size", "10",
    "--evaluation.examples", "20", "--evaluation.steps", "1", "--checkpoint-minutes", "1e-3",
]  # fmt: skip


def command(out, processes=1):
    """saltflat train ... --go-on, which may be typed again and again; one thread each, in a group of its own."""
    words = [sys.executable, "-m", "saltflat"]
    if processes > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*words, "train", "at-awp", *WORDS, "--out", str(out), "--go-on"],
        stdout=pipe, stderr=pipe, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(out, process, step):
    while newest(out) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
def test_a_command_that_is_killed_as_it_starts_and_at_work_ends_equal_when_it_is_typed_again(tmp_path, capsys):
    out, draws = tmp_path / "run", random.Random(3)
    for step in (None, 1, 40, 80):
        process = command(out)
        if step is not None:
            wait_for_step(out, process, step)
        time.sleep(draws.random() / (2 if step is None else 20))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for _ in range(2):  # what is finished is left alone
        process = command(out)
        told = process.communicate(timeout=60)
        assert (process.returncode, told[1]) == (0, "")
    assert told[0] == f"{out} is finished: 30 epochs.\n"
    run("train", "at-awp", *WORDS, "--out", tmp_path / "whole")
    assert differences(out, tmp_path / "whole") == []


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "saltflat" in line]


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_job_down_with_one_line_and_two_go_on_to_equal_bits(tmp_path):
    process = command(tmp_path / "whole", processes=2)
    told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    process = command(tmp_path / "run", processes=2)
    wait_for_step(tmp_path / "run", process, 50)
    began = time.monotonic()
    os.kill(children(process.pid)[1], signal.SIGKILL)
    told = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert len(re.findall("^saltflat: ", told[1], re.MULTILINE)) == 1
    assert re.search("^saltflat: rank 0 of 2: .*\n", told[1], re.MULTILINE)
    process = command(tmp_path / "run", processes=2)
    told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert differences(tmp_path / "run", tmp_path / "whole") == []


# Damage


@pytest.fixture(scope="module")
def stopped(forking, whole, tmp_path_factory):
    """A run that was told to stop in the midst of its second epoch, and one of the same config that was not."""
    initial = whole(longer(PLAIN)).out / "checkpoints" / "last.safetensors"
    config = replace(longer(REMEMBERING), checkpoint_minutes=1e-9, model=replace(PLAIN.model, initial=initial))
    found = Run(forking, tmp_path_factory.mktemp("stopped") / "run", config)
    ended = found.child(told_at=6)
    assert (ended.code, newest(found.out)) == (75, 6), ended
    assert "told to stop, and saved at step 6; go on with: saltflat train --resume" in ended.out
    return found, whole(config)


def damages(content, draws):
    """The same file, cut or with a bit that is another."""
    ends = [0, *sorted(draws.randrange(1, len(content)) for _ in range(2))]
    bits = [draws.randrange(8 * len(content)) for _ in range(3)]
    return [*(content[:end] for end in ends), *(flipped(content, bit) for bit in bits)]


def contents(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def refused(ended, before, out):
    """In one line, without a change of anything."""
    return ended.code == 2 and re.fullmatch("saltflat: .*\n", ended.err) and contents(out) == before


@pytest.mark.slow
def test_what_is_damaged_is_made_anew_or_refused_and_never_trained_on(forking, stopped, tmp_path):
    one, other = stopped
    draws, repaired = random.Random(11), 0
    files = sorted(path.relative_to(one.out) for path in one.out.rglob("*") if path.is_file())
    names = {path.name.split("-")[0] for path in files}
    assert {"config.yaml", "environment.json", "evaluation.json", "metrics.jsonl", "resume"} <= names
    assert {"initial.safetensors", "best.safetensors", "last.safetensors", "epoch"} <= names
    for file in files:
        for number, content in enumerate(damages((one.out / file).read_bytes(), draws)):
            (tmp_path / f"{file.name}-{number}").mkdir()
            damaged = one.copied(tmp_path / f"{file.name}-{number}" / "run")
            (damaged.out / file).write_bytes(content)
            before = contents(damaged.out)
            ended = damaged.child(resumed=True)
            what = (str(file), number, ended)
            if refused(ended, before, damaged.out):
                assert file.name == "config.yaml", what
                continue
            assert (ended.code, ended.err) == (0, ""), what
            assert ("is damaged: set aside as damaged-" in ended.out) == file.name.startswith("resume-6"), what
            found = differences(damaged.out, other.out)
            assert set(found) <= {str(file)}, (*what, found)
            if found and file.suffix == ".safetensors":
                with pytest.raises(BadInput, match="checkpoint: "):
                    read(damaged.out, file.stem)
            elif found:
                assert file.name in ("config.yaml", "evaluation.json"), what
            repaired += not found
    assert repaired > len(files)


def read(out, name):
    subject = subjects.from_run(out, "best" if name == "initial" else name, "cpu")
    return subject.initial() if name == "initial" else subject


@pytest.mark.slow
def test_a_run_all_of_whose_states_are_damaged_is_refused(stopped, tmp_path):
    one, _ = stopped
    damaged = one.copied(tmp_path / "run")
    for path in [*damaged.out.glob("checkpoints/resume-*.pt"), damaged.out / "metrics.jsonl"]:
        path.write_bytes(flipped(path.read_bytes(), 4000))
    ended = damaged.server.ask(
        tmp_path / "said", None, {"config": "", "out": str(damaged.out), "events": str(tmp_path / "e"), "resumed": True}
    )
    assert ended.code == 2
    assert re.fullmatch(f"saltflat: run: {damaged.out} has no checkpoint that is whole to go on from; .*\n", ended.err)
    assert read(damaged.out, "best")


@pytest.mark.slow
def test_findings_that_are_damaged_are_refused_and_stand_on_no_page(whole, tmp_path):
    out = whole(PLAIN).copied(tmp_path / "run").out
    subject, draws = subjects.from_run(out, "best", "cpu"), random.Random(5)
    few = How("test", 20, draws=1, climbs=1, restarts=0, directions=1, steps=1)
    found = {
        "outcomes": lambda: evaluations.evaluation(subject, ["clean", "pgd-2"], "test", 20, evaluations.How()),
        "landscapes": lambda: landscapes.line(subject, [-1.0, 0.0, 1.0], 1, landscapes.How("test", 20, 1)),
        "flatness": lambda: flatness.flatness(subject, ["average"], few),
    }
    for find in found.values():
        find()
    whole_findings = {kind: find() for kind, find in found.items()}  # as they are read again
    before, page = contents(out), read_run(out)
    for kind, find in found.items():
        for path in sorted((out / kind).iterdir()):
            content = path.read_bytes()
            for damaged in damages(content, draws):
                path.write_bytes(damaged)
                if path.suffix == ".json":
                    check_page(read_run(out), page, f"A damaged file was skipped: {kind}/{path.name}")
                told = ""
                try:
                    assert find() == whole_findings[kind]
                except BadInput as error:
                    told = str(error)
                assert "\n" not in told
                path.write_bytes(content)
                assert contents(out) == before


def check_page(found, page, note):
    """All that the page shows is as it was, or left out and told of."""
    parts = ("environment", "evaluation", "epochs", "outcomes", "lines", "planes", "flatness")
    for part in parts:
        shown, there = ({repr(one) for one in _rows(getattr(of, part))} for of in (found, page))
        assert shown <= there
        assert shown == there or note in found.notes


def _rows(part):
    """Without a seal whose own name is damaged, beside fields that are whole."""
    seal = re.compile("[0-9a-f]{8}")
    return [row for row in part.items() if not seal.fullmatch(row[1])] if isinstance(part, dict) else part


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("environment.json", "environment.json: the machine and versions are unknown"),
        ("evaluation.json", "evaluation.json: the attack at each epoch is not stated"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("config.yaml", ""),
    ],
)
def test_what_is_damaged_of_a_run_stands_on_no_page(whole, tmp_path, name, note):
    out = whole(PLAIN).copied(tmp_path / "run").out
    page, draws, content, refusals = read_run(out), random.Random(2), (out / name).read_bytes(), []
    for damaged in [one for _ in range(5) for one in damages(content, draws)]:
        (out / name).write_bytes(damaged)
        try:
            found = read_run(out)
        except BadInput as error:
            refusals.append(str(error))
            continue
        check_page(found, page, next((told for told in found.notes if note in told), "nothing was told"))
        assert name != "config.yaml" or (found.label, found.seed) == (page.label, page.seed)
    assert bool(refusals) == (name == "config.yaml")
    assert "\n" not in "".join(refusals)


# Full disks


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on_ends_the_run_with_one_line_and_it_goes_on_with_space(
    forking, whole, tmp_path
):
    one = whole(PLAIN)
    for write in range(1, dict(one.told())["writes"] + 1):
        full = Run(forking, tmp_path / str(write) / "run", PLAIN)
        full.out.parent.mkdir()
        ended = full.child(full_from=write)
        check_stopped(full, ended, "No space left on device")
        full.finished()
        assert differences(full.out, one.out) == []


def check_stopped(full, ended, why):
    """With one line, and nothing half there: what was saved last is whole."""
    assert re.fullmatch(f"saltflat: .*{why}.*\n", ended.err), ended
    assert ended.code == (1 if full.out.exists() else 2), ended
    assert [path for path in full.out.rglob("*") if path.name.startswith(".")] == []
    for path in full.out.glob("checkpoints/resume-*.pt"):
        assert checkpoints.digest(path) in path.name
    for path in full.out.glob("checkpoints/*.safetensors"):
        checkpoints.whole_weights(path)


@pytest.mark.slow
def test_files_that_cannot_grow_end_the_run_with_one_line_and_it_goes_on_when_they_can(forking, whole, tmp_path):
    """By a limit of the system's: of what a state needs, of weights, of metrics."""
    one, why = whole(PLAIN), set()
    for largest in (16000, 2000, 1300, 300):
        full = Run(forking, tmp_path / str(largest) / "run", PLAIN)
        full.out.parent.mkdir()
        ended = full.child(largest=largest)
        check_stopped(full, ended, "File too large")
        why.add(newest(full.out))
        full.finished()
        assert differences(full.out, one.out) == []
    assert len(why) >= 1


# Numbers that are none


IMAGES = digits().train
TRAIN, FEW = (IMAGES.subset(stratified_subset(IMAGES.labels, n, 0)) for n in (100, 20))
ATTACK = PGD(Linf(0.15), 0.05, 2)
PLAN = Plan(
    epochs=2, batch_size=20, learning_rate=constant(0.05), seed=3, measure=ATTACK,
    objective=lambda t: AT(), attack=lambda t: ATTACK, ball=lambda t: Layerwise(0.01),
)  # fmt: skip


class NoLoss(AT):
    def outer(self, model, x, x_adv, y):
        return super().outer(model, x, x_adv, y) * torch.nan


class NoGradient(AT):
    """A finite loss, whose gradient is infinity times zero."""

    def outer(self, model, x, x_adv, y):
        return super().outer(model, x, x_adv, y) + (0 * next(model.parameters())).abs().sum().sqrt()


def no_pixels(f, x, *, start=None, generator=None):
    return ATTACK(f, x, start=start, generator=generator) * torch.nan


def without_gradient(model, x, y, *, optimizer, generator, **_):
    """What a step is whose batch is dropped: the attack's draw, momentum and weight decay."""
    uniform(ATTACK.ball, x, generator)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    zero = torch.zeros((), dtype=torch.int64)
    return Step(torch.tensor(0.0), torch.tensor(0.0), x, zero, zero + 1)


def training(befalls=None, steps=(), hook=None):
    """A training in which something befalls some steps; the network, and the metrics of its epochs."""
    torch.manual_seed(0)
    model, counted = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1), itertools.count(1)

    def step(*given, **named):
        if next(counted) not in steps:
            return double_perturbation_step(*given, **named)
        return befalls(*given, **named)

    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    found = []
    for event in fit(model, TRAIN, {"test": FEW}, replace(PLAN, step=step), sgd):
        if isinstance(event, Stepped) and hook is not None:
            hook(event.step, model)
        if isinstance(event, Epoch):
            found.append({name: of for name, of in event.metrics.items() if name not in ("skipped",)})
    return model, [{name: of for name, of in line.items() if "seconds" not in name} for line in found]


BEFALLS = {
    "loss": partial(double_perturbation_step, objective=NoLoss()),
    "gradient": partial(double_perturbation_step, objective=NoGradient()),
    "x_adv": partial(double_perturbation_step, attack=no_pixels),
}


@pytest.mark.parametrize("where", BEFALLS)
def test_a_batch_without_numbers_is_skipped_counted_and_else_as_if_its_gradient_were_zero(where):
    def befalls(*given, **named):
        return BEFALLS[where](*given, **{**named, **BEFALLS[where].keywords})

    steps = (2, 5, 7)
    model, found = training(befalls, steps)
    other, expected = training(without_gradient, steps)
    assert [line["dropped"] for line in found] == [2, 1]
    assert found == expected
    assert equal_states(state(model), state(other))
    assert not equal_states(state(model), state(training()[0]))


def first_is_none(kind):
    """In the midst of the first epoch, the first number of the first such tensor of the network becomes none."""

    def hook(step, model):
        if step == 2:
            name = next(name for name in model.state_dict() if name.endswith(kind))
            dict([*model.named_parameters(), *model.named_buffers()])[name].data.view(-1)[0] = torch.nan

    return hook


def test_weights_without_numbers_stop_training_with_the_batch():
    with pytest.raises(Diverged, match="epoch 1: the gradient of 3 of 5 batches was not finite") as caught:
        training(hook=first_is_none("weight"))
    rows = torch.randperm(len(TRAIN), generator=seeded(PLAN.seed, 1, ORDER))[80:100]
    assert torch.equal(caught.value.batch["x"], to_float(TRAIN.images[rows]))
    assert torch.equal(caught.value.batch["y"], TRAIN.labels[rows])


@pytest.mark.parametrize("kind", ["running_mean", "running_var"])
def test_running_statistics_without_numbers_stop_training_before_it_is_measured(kind):
    """Training in train mode does not see them, and attacks would stand still for the rest of it."""
    with pytest.raises(Diverged, match=rf"epoch 1: .*{kind} is not finite") as caught:
        training(hook=first_is_none(kind))
    assert caught.value.batch == {}


def test_a_training_that_goes_on_into_a_failing_epoch_names_no_batch_that_was_not_dropped():
    torch.manual_seed(0)
    model = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1)
    start = copy.deepcopy(model)
    bad = replace(PLAN, step=partial(dropped_first, 3, itertools.count(1)))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    for event in fit(model, TRAIN, {}, bad, sgd):
        if isinstance(event, Stepped) and event.step == 3:
            kept = copy.deepcopy(event.state())
            break
    sgd = torch.optim.SGD(start.parameters(), lr=1.0)
    with pytest.raises(Diverged, match="3 of 5") as caught:
        list(fit(start, TRAIN, {}, PLAN, sgd, state=kept))
    assert caught.value.batch == {}


def dropped_first(n, counted, *given, **named):
    befalls = {"objective": NoLoss()} if next(counted) <= n else {}
    return double_perturbation_step(*given, **{**named, **befalls})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in a row", "half an epoch"])
def test_a_run_whose_losses_are_no_numbers_stops_with_its_batch_beside_it(forking, tmp_path, kind):
    # A state of every step, however fast it was: the last of them has what was dropped.
    config = replace(longer(PLAIN), checkpoint_minutes=PLAIN.checkpoint_minutes)
    if kind == "in a row":
        config = replace(
            config, data=replace(PLAIN.data, examples=250), optimizer=replace(PLAIN.optimizer, batch_size=2)
        )
    failing = Run(forking, tmp_path / "run", config)
    ended = failing.child(poisoned_after=5)
    expected, last = {
        "in a row": (r"epoch 1: the gradients of 100 batches in a row were not finite", 105),
        "half an epoch": (r"epoch 2: the gradient of 3 of 4 batches was not finite", 7),
    }[kind]
    assert ended.code == 1
    kept = failing.out / "dropped-batch.npz"
    assert re.fullmatch(f"saltflat: {expected}; .*; the last one dropped is in {kept}\n", ended.err), ended
    train = build.sets(config).train
    batches = math.ceil(len(train) / config.optimizer.batch_size)
    order = torch.randperm(len(train), generator=seeded(config.seed, 1 + (last - 1) // batches, ORDER))
    rows = torch.split(order, config.optimizer.batch_size)[(last - 1) % batches]
    with np.load(kept) as batch:
        assert np.array_equal(batch["x"], to_float(train.images[rows]).numpy())
        assert np.array_equal(batch["y"], train.labels[rows].numpy())
    if kind == "half an epoch":  # what was dropped stays dropped, and the batch where it is
        content = kept.read_bytes()
        ended = failing.child()
        assert (ended.code, kept.read_bytes()) == (1, content)
        assert re.fullmatch(f"saltflat: {expected}; .*\n", ended.err)


# Clocks


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing_but_dates(forking, whole, tmp_path):
    """Dates of files as well, by which states of one step are told apart."""
    one = whole(PLAIN)
    for seed in range(3):
        jumping = Run(forking, tmp_path / str(seed), PLAIN)
        jumping.child(clock=seed, killed_at=20 + 13 * seed)
        jumping.finished(clock=seed + 10)
        assert differences(jumping.out, one.out) == []
