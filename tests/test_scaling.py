"""What two processes take is what the model makes of one process, of sharing a machine, and of what is sent."""

import doctest
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # as for a script that is run from there

import scaling  # noqa: E402
import scaling_model  # noqa: E402
import tables  # noqa: E402
import training_step  # noqa: E402
from scaling_model import NETWORKS, Assumed, Link, Sent  # noqa: E402

from saltflat import models  # noqa: E402
from saltflat.lab import build, checkpoints  # noqa: E402
from saltflat.parallel import Alone  # noqa: E402

SMALL = training_step.Setting(network="small-resnet", width=4, batch_size=4, size=8, steps=2, threads=1)
KINDS = ("all-reduce", "gather", "scatter", "broadcast")
SOME = {kind: Sent(3, 1e6) for kind in KINDS}
ONE_LINK = dict.fromkeys(KINDS, Link(1e-3, 1e8))


def test_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(scaling_model)
    assert (failed, tried > 5) == (0, True)


# The model


@given(compute=st.floats(1e-3, 1e3), number=st.floats(0, 1e3), size=st.floats(0, 1e12))
def test_one_process_takes_what_it_computes(compute, number, size):
    sent = dict.fromkeys(KINDS, Sent(number, size))
    assert scaling_model.step_seconds(compute, sent, 1, ONE_LINK) == compute


@given(ranks=st.integers(1, 5000), kind=st.sampled_from(KINDS))
def test_more_processes_never_talk_less_and_send_at_most_twice_all(ranks, kind):
    sent = {kind: Sent(3, 1e6)}
    few, more = (scaling_model.communication(sent, n, ONE_LINK) for n in (ranks, ranks + 1))
    assert 0 <= few <= more
    assert scaling_model.times_sent(kind, ranks) <= (2 if kind == "all-reduce" else 1)


@given(ranks=st.integers(2, 5000))
def test_an_all_reduce_sends_what_a_scatter_and_a_gather_send(ranks):
    parts = [scaling_model.times_sent(kind, ranks) for kind in ("scatter", "gather")]
    assert scaling_model.times_sent("all-reduce", ranks) == pytest.approx(sum(parts))
    # by hand: each of R sends R - 1 pieces of 1 / R, twice
    assert scaling_model.times_sent("all-reduce", ranks) * ranks == pytest.approx(2 * (ranks - 1))


def test_a_step_grows_with_all_that_it_is_made_of():
    taken = scaling_model.step_seconds
    base = taken(1.0, SOME, 4, ONE_LINK)
    assert taken(2.0, SOME, 4, ONE_LINK) == pytest.approx(base + 1)
    assert taken(1.0, SOME, 4, ONE_LINK, sharing=1.5) == pytest.approx(base + 0.5)
    assert taken(1.0, SOME, 4, ONE_LINK, making=0.25) == pytest.approx(base + 0.25)
    # 2 + 1 + 1 + 1 times log2 4 messages of each of 3, and 1.5 + 0.75 + 0.75 + 1 times a million bytes
    assert base == pytest.approx(1 + 3 * 10 * 1e-3 + 4e6 / 1e8)


@given(
    latency=st.floats(0, 1e-2), bandwidth=st.floats(1e6, 1e12), kind=st.sampled_from(KINDS), ranks=st.integers(2, 99)
)
def test_a_link_is_found_again_from_what_it_took(latency, bandwidth, kind, ranks):
    size = 1e9
    took = scaling_model.communication({kind: Sent(1, size)}, ranks, {kind: Link(latency, bandwidth)})
    found = scaling_model.link_of(kind, ranks, size, took, latency)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert scaling_model.link_of(kind, ranks, size, 0.0, latency).bandwidth == math.inf


def test_awp_sends_a_gradient_more_unless_each_process_climbs_by_itself():
    both, own = (scaling_model.replicated(1e8, 1e3, ascents)["all-reduce"] for ascents in (1, 0))
    assert both == Sent(2 * own.number, 2 * own.bytes)
    shards = scaling_model.sharded(1e8, 1e3, parts=5, attack_steps=10)
    assert shards["gather"] == Sent(24 * 5, 24 * 1e8)
    assert shards["scatter"].bytes == 2e8


@given(write=st.floats(0.1, 1e3), life=st.floats(1e4, 1e9))
def test_the_time_between_checkpoints_is_where_least_is_lost(write, life):
    best = scaling_model.between_checkpoints(write, life)

    def lost(every):
        return write / every + every / (2 * life)

    assert lost(best) <= min(lost(0.9 * best), lost(1.1 * best))


def test_a_checkpoint_has_the_bytes_that_are_told(tmp_path):
    setting = replace(SMALL, width=16)
    write = scaling.writing(setting, folder=str(tmp_path))
    write()
    (path,) = checkpoints.states(tmp_path)
    weights, buffers = scaling.bytes_of(setting)
    told = scaling_model.checkpoint_bytes(weights, buffers)
    # names, alignment and torch's index come on top, some hundred bytes a tensor
    tensors = len(training_step.network(setting).state_dict())
    assert told <= path.stat().st_size <= told + 3 * 1000 * tensors


COUNTED = {
    "PreActResNet-18": lambda: models.preact_resnet18(10),
    "WRN-34-10": lambda: models.wide_resnet(34, 10, 10),
    "WRN-70-16": lambda: models.wide_resnet(70, 16, 10),
}


@pytest.mark.parametrize("name", COUNTED)
def test_networks_of_the_plan_are_counted(name):
    from floor import flops, recorded
    from launches import Launches

    with torch.device("meta"):
        model = COUNTED[name]()
    of = NETWORKS[name]
    assert of.weights == sum(4 * p.numel() for p in model.parameters())
    assert of.buffers == sum(b.numel() * b.element_size() for b in model.buffers())
    assert of.parts == len(build.parts(model))
    image = torch.empty(1, 3, 32, 32, device="meta")
    model.eval()
    assert flops(recorded(lambda: model(image))) == of.flops
    kernels = []
    for mode in ("eval", "train"):
        model.train(mode == "train").requires_grad_(mode == "train")
        x = torch.empty(2, 3, 32, 32, device="meta", requires_grad=mode == "eval")
        with Launches() as launches:
            model(x).sum().backward()
        kernels.append(sum(launches.counts.values()))
    assert kernels == pytest.approx([of.kernels, of.kernels_outside], rel=0.05), "about: torch's versions differ"


def test_a_plan_names_all_that_it_assumes_and_has_a_row_for_each():
    words = scaling_model.in_words(Assumed())
    assert all(f"`{each.name}` " in words for each in fields(Assumed))
    parts = scaling_model.plan(Assumed())
    assert [len(rows) for _, _, rows in parts] == [12, 12, 3, 3]
    for _, head, rows in parts:
        assert {len(row) for row in rows} == {len(head)}
    faster = scaling_model.plan(replace(Assumed(), flops=1e15))
    assert faster[0] != parts[0]


def test_more_gpus_shorten_a_pass_and_lengthen_a_step():
    for of in NETWORKS.values():
        steps = [scaling_model.step(of, ranks, 128, Assumed()) for ranks in (1, 8, 64, 256, 1024)]
        assert steps[0].talking == 0
        assert [made.seconds for made in steps] == sorted(made.seconds for made in steps)
        passes = [scaling_model.pass_seconds(made, 1e6, Assumed()) for made in steps]
        assert passes == sorted(passes, reverse=True)


# What is measured


def turns(sharing=1.25, half=0.5, rounds=(1.0, 2.0)):
    """Seconds as the model has them, for rounds in which the machine was faster or slower."""
    over = {kind: Link(1e-3, 1e9) for kind in KINDS}
    seconds = {}
    for spread, kind, base in (("DDP", "", 1.0), ("FSDP2", ", FSDP2", 2.0)):
        seconds |= {f"1 process{kind}": base, f"1 process{kind}, half the rows": half * base}
        seconds[f"2 side by side{kind}"] = sharing * base
        talk = scaling_model.communication(SENT[spread], 2, over)
        for rows in ("", ", half the rows"):
            seconds[f"2 processes, {spread}{rows}"] = sharing * seconds[f"1 process{kind}{rows}"] + talk
    for kind in scaling.EXCHANGED:
        seconds[kind] = scaling_model.communication({kind: Sent(1, SIZE)}, 2, over)
    seconds["all-reduce of a number"] = 2e-3
    seconds |= {"1 process, 2 threads, twice the rows": 1.5, "checkpoint": 0.1}
    return {name: {"seconds": [each * of for of in rounds], "page_faults": [0.0] * 2} for name, each in seconds.items()}


SIZE = 4e7
SENT = {
    "DDP": scaling_model.replicated(SIZE, 1e3),
    "FSDP2": scaling_model.sharded(SIZE, 1e3, parts=6, attack_steps=10),
}


def test_predictions_are_exact_where_the_machine_is_as_the_model_has_it():
    summary = scaling.judged(scaling.entries(SMALL, "folder"), turns(), SENT, SIZE)
    for spread in SENT:
        for rows in ("", ", half the rows"):
            of = summary[f"2 processes, {spread}{rows}"]
            assert [of["over_predicted"][each] for each in ("min", "max")] == pytest.approx([1, 1])
            assert sum(of["parts"].values()) == pytest.approx(of["seconds"]["median"])
    assert summary["2 processes, DDP"]["parts"]["sharing"] == pytest.approx(1.5 * 0.25)
    assert summary["1 process"]["rows_a_second"]["median"] == 1
    assert summary["1 process, half the rows"]["rows_a_second"]["median"] == 1
    assert summary["2 side by side"]["rows_a_second"]["median"] == pytest.approx(2 / 1.25)
    assert summary["1 process, 2 threads, twice the rows"]["rows_a_second"]["median"] == pytest.approx(2 / 1.5)


def test_what_takes_no_part_is_no_part_of_a_prediction():
    few = scaling.chosen(scaling.entries(SMALL, "folder"), ["2 processes, DDP"])
    assert [entry.contender.name for entry in few] == ["1 process", "2 processes, DDP"]
    kept = {name: of for name, of in turns().items() if name in ("1 process", "2 processes, DDP")}
    summary = scaling.judged(few, kept, SENT, SIZE)
    assert "predicted" not in summary["2 processes, DDP"]
    assert summary["2 processes, DDP"]["rows_a_second"]["median"] < 2


def test_a_record_becomes_tables(tmp_path):
    everybody = scaling.entries(SMALL, "folder")
    summary = scaling.judged(everybody, turns(), SENT, SIZE)
    machine = {"cuda": None, "threads": 1, "processor": "some CPU", "torch": "2.13.0", "device": "cpu"}
    sizes = {"weights": SIZE, "buffers": 1e3, **dict.fromkeys(("all-reduce", "gather", "scatter", "checkpoint"), SIZE)}
    sent = {name: {kind: each._asdict() for kind, each in of.items()} for name, of in SENT.items()}
    content = {"setting": vars(SMALL), "rounds": 2, "summary": summary, "sent": sent, "bytes": sizes}
    (tmp_path / "scaling.json").write_text(json.dumps({**content, "environment": machine}))
    text = tables.compared(tmp_path)
    assert "| 2 side by side | 4 | 1.875 (1.250 to 2.500) | 1.60 (1.60 to 1.60) |" in text
    assert "| 2 processes, DDP | 4 | " in text
    assert "| 1.500 | 0.375 | " in text
    assert "| checkpoint | 40.0 | 150.0 (100.0 to 200.0) | 267 |" in text
    assert scaling.shown(summary, SENT, {"all-reduce": SIZE}).count("\n") > 20
    for block in text.split("\n\n")[1::2]:
        assert len({line.count("|") for line in block.splitlines()}) == 1, "as many cells in every line"


RECORDS = sorted((ROOT / "records").glob("*_scaling/scaling*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_model_reproduces_what_was_measured(path):
    """Two processes with replicas take what is predicted from one process, within what both vary by. (What shards take
    is a guess, and the page says so.)
    """
    summary = json.loads(path.read_text())["summary"]
    told = {name: of for name, of in summary.items() if "predicted" in of}
    assert len(told) == 4
    for name, of in told.items():
        if "FSDP2" in name:
            continue
        measured, predicted = of["seconds"], of["predicted"]
        assert predicted["min"] <= measured["max"], name
        assert measured["min"] <= predicted["max"], name


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small benchmark from its command to its file; two threads are left out, which wait for each other badly where
    cores are busy.
    """
    folder = tmp_path_factory.mktemp("scaling")
    names = ["1 process", "2 side by side", "2 processes, DDP", "all-reduce*", "checkpoint"]
    words = ["--network", "small-resnet", "--width", "4", "--batch-size", "4", "--size", "8", "--steps", "2"]
    words += ["--rounds", "2", "--warm-up", "1", "--out", str(folder / "scaling.json"), "--folder", str(folder)]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scaling.py"), *words, "--contenders", *names],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run, folder


@pytest.mark.slow
def test_the_benchmark_runs_from_its_command_to_its_tables(measured):
    run, folder = measured
    assert "rows a second" in run.stdout
    assert "Warning" not in run.stderr
    assert [path.name for path in folder.iterdir()] == ["scaling.json"], "checkpoints are gone"
    found = json.loads((folder / "scaling.json").read_text())
    summary = found["summary"]
    assert len(found["turns"]["2 processes, DDP"]["seconds"]) == 2
    assert found["environment"]["torch"]
    assert summary["2 processes, DDP"]["predicted"]["n"] == 2
    assert "**One training on two processes**" in tables.compared(folder)
    weights, buffers = scaling.bytes_of(SMALL)
    assert found["bytes"]["checkpoint"] > scaling_model.checkpoint_bytes(weights, buffers)


@pytest.mark.slow
def test_what_a_step_sends_is_what_the_model_has(measured):
    sent = json.loads((measured[1] / "scaling.json").read_text())["sent"]
    weights, buffers = scaling.bytes_of(SMALL)
    parts = len(build.parts(training_step.network(SMALL)))
    told = scaling_model.replicated(weights, buffers)
    assert sent["DDP"] == {kind: of._asdict() for kind, of in told.items()}
    told = scaling_model.sharded(weights, buffers, parts, SMALL.steps)
    small = sent["FSDP2"].pop("all-reduce")
    assert sent["FSDP2"] == {kind: of._asdict() for kind, of in told.items()}
    assert small["bytes"] < weights / 10, "norms"


def test_alone_is_a_spread_that_sends_nothing():
    with scaling.counting() as found:
        scaling.stepping(SMALL)()
    assert found == {}
    assert scaling.SPREADS["alone"] is Alone


SRUN = """#!/usr/bin/env bash
# Two tasks, told apart as Slurm tells them apart; signals go on to both, and the highest exit code comes back
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
    wait $task; found=$?
    while kill -0 $task 2> /dev/null; do wait $task; found=$?; done
    (( found > code )) && code=$found
done
exit ${code:-0}
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""


@pytest.mark.slow
def test_the_script_for_slurm_saves_and_is_put_back_into_the_queue(tmp_path):
    (script,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL | re.MULTILINE)
    words = (
        "at-awp --data.examples 100 --optimizer.batch-size 20 --evaluation.examples 50 --evaluation.steps 1 --threads 1"
    )
    asked = script.replace("cifar10-at-awp --data.path /shared/cifar-10-python.tar.gz", words)
    asked = asked.replace("/shared/runs", str(tmp_path)).replace("29500", str(free_port()))
    assert asked.count(str(tmp_path)) == asked.count(words) == 1
    (tmp_path / "job.sh").write_text(asked)
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    names = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here"}
    metrics, kept = tmp_path / "many" / "metrics.jsonl", tmp_path / "many" / "checkpoints"

    def told_when(condition):
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=names, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 100
        while not condition():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=100)
        assert job.returncode == 75, said
        return said

    assert "2 processes x 10" in told_when(metrics.exists)
    before = newest(kept)
    assert before > 0
    told_when(lambda: newest(kept) > before)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def newest(folder):
    """The step that the last checkpoint is of."""
    return max(int(path.name.split("-")[1]) for path in checkpoints.states(folder))
