"""`saltflat evaluate | landscape | flatness` by several processes: what they find and write is what one finds."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QUICK, run
from networks import convolutional
from rich.progress import Progress

from saltflat import Linf, parallel
from saltflat.evaluation import suite
from saltflat.lab import evaluations, flatness, gaps, landscapes, measures, once, points, record
from saltflat.lab.config import BadInput
from saltflat.lab.subjects import Subject
from saltflat.lab.threat import Threat

# Ranks that are threads: what they tell each other is pickled, and waits for all. Each has a network of its own.


class Ranks:
    def __init__(self, n):
        self.here, self.told, self.barrier = threading.local(), [None] * n, threading.Barrier(n, timeout=60)

    def everyones(self, value):
        self.told[self.here.rank] = pickle.dumps(value)
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return [pickle.loads(each) for each in found]

    def first(self, make):
        told = None, None
        if self.here.rank == 0:
            try:
                told = make(), None
            except Exception as error:
                told = None, error
        found, failed = self.everyones(told)[0]
        if failed is not None:
            raise failed
        return found


@pytest.fixture
def among(monkeypatch):
    """(n, work) -> what work(rank) gave or raised on each of n ranks."""

    def ranks(n, work):
        of, found = Ranks(n), [None] * n

        def one(rank):
            of.here.rank = rank
            torch.set_num_threads(1)  # of this thread
            try:
                found[rank] = work(rank)
            except BaseException as error:
                found[rank] = error
                if not isinstance(error, Exception):
                    of.barrier.abort()  # as the death of a process ends what waits for it

        with monkeypatch.context() as patch:
            patch.setattr(parallel, "_talk", ["threads"])
            patch.setattr(parallel, "rank", lambda: of.here.rank)
            patch.setattr(parallel, "ranks", lambda: n)
            patch.setattr(parallel, "everyones", of.everyones)
            patch.setattr(parallel, "first", of.first)
            for job in (evaluations, points, flatness):  # one terminal has one bar
                patch.setattr(job, "progress", lambda: Progress(disable=True))
            threads = [threading.Thread(target=one, args=(rank,)) for rank in range(n)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return found

    return ranks


def subject(folder):
    """Of a network, each time another of the same weights, on 23 images."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (23, 3, 6, 6), dtype=torch.uint8, generator=draws)
    model = convolutional().eval()
    weights = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=weights))
    y = model(x.double() / 255).argmax(1)
    y[:4] = (y[:4] + 1) % 3
    initial = {name: torch.zeros_like(w) for name, w in model.state_dict().items()}
    splits = {"test": (x, y), "train": (x, y)}
    return Subject(folder, "last", "0123", "w", model, splits, Threat("Linf", 0.05, 0.02), initial=lambda: initial)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


UNEQUAL = ("seconds", "environment", "seal", "outcomes")


def told(found):
    """Without what a clock or a place says."""
    if isinstance(found, dict):
        return {name: told(value) for name, value in found.items() if name not in UNEQUAL}
    return [told(part) for part in found] if isinstance(found, list | tuple) else found


def alike(folder, other):
    """All that is written is equal, but for times."""
    assert files(folder) == files(other)
    for name in files(folder):
        if name.endswith(".json"):
            one, two = (json.loads((where / name).read_text()) for where in (folder, other))
            assert told(one) == told(two)
        elif name.endswith(".npz"):
            with np.load(folder / name) as one, np.load(other / name) as two:
                assert sorted(one.files) == sorted(two.files)
                for array in one.files:
                    if array == "reached":  # column, stage, batches, cost, milliseconds
                        assert np.array_equal(one[array][:4], two[array][:4])
                    else:
                        assert np.array_equal(one[array], two[array], equal_nan=True), (name, array)


JOBS = {
    "evaluate": lambda of: evaluations.evaluation(
        of, ("clean", "cw-2", "cw-5x2"), "test", 0, evaluations.How(batch_size=4, seed=5)
    ),
    "line": lambda of: landscapes.line(of, landscapes.symmetric(0.5, 7), 2, landscapes.How(steps=2, batch_size=8)),
    "plane": lambda of: landscapes.plane(
        of,
        landscapes.symmetric(0.5, 3),
        landscapes.symmetric(0.5, 3),
        landscapes.How(steps=2, batch_size=8, direction="adversarial", frozen=True),
    ),
    "flatness": lambda of: flatness.flatness(
        of, tuple(measures.MEASURES), measures.How(batch_size=8, steps=1, draws=2, climbs=1, directions=1, probes=6)
    ),
    "gap": lambda of: gaps.robust_gap(of, gaps.How(steps=2, batch_size=4)),
}


@pytest.mark.parametrize(
    ("job", "ranks"),
    [("evaluate", 2), ("evaluate", 3), ("line", 2), ("line", 3), ("plane", 2), ("flatness", 3), ("gap", 2)],
)
def test_ranks_find_and_write_what_one_process_does(tmp_path, among, job, ranks):
    alone = JOBS[job](subject(tmp_path / "one"))
    found = among(ranks, lambda rank: JOBS[job](subject(tmp_path / "many")))
    assert [told(each) for each in found] == [told(alone)] * ranks
    alike(tmp_path / "one", tmp_path / "many")
    again = among(ranks, lambda rank: JOBS[job](subject(tmp_path / "many")))
    assert [told(each) for each in again] == [told(alone)] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_batches_go_round_and_are_cut_as_one_process_cuts_them(among, ranks, monkeypatch):
    of, seen = subject(None), []
    x, y = of.splits["test"]
    find = suite.find

    def seeing(attack, logits, images, labels, **named):
        seen.append(len(images))
        return find(attack, logits, images, labels, **named)

    monkeypatch.setattr(suite, "find", seeing)
    first, second = suite.pgd(Linf(0.05), 2, 0.02), suite.apgd_ce(Linf(0.02), 3)
    columns = [first, suite.chained("both", [second, first])]
    alone = list(suite.evaluate(of.model, x, y, columns, batch_size=4))
    sizes, seen[:] = sorted(seen), []

    def all_of_them(rank):
        return list(suite.evaluate(subject(None).model, x, y, columns, batch_size=4, shared=True))

    shared = among(ranks, all_of_them)
    assert sorted(seen) == sizes
    stages = {(done.column, done.stage) for done in alone}
    rounds = [-(-sum((done.column, done.stage) == stage for done in alone) // ranks) for stage in stages]
    for dones in shared:
        assert len(dones) == sum(rounds)
        last = dones[-1]
        assert (last.spent, last.left, last.batches) == (alone[-1].spent, 0, alone[-1].batches)
        for name, verdicts in last.verdicts.items():
            assert all(torch.equal(getattr(verdicts, part), getattr(alone[-1].verdicts[name], part)) for part in PARTS)


PARTS = ("by", "iteration", "margin")


class Stop(BaseException):
    """What a kill is: nothing catches it."""


def stopping(monkeypatch, job, after):
    """The job's work ends in a Stop on the rank that would do one piece more than so many in all."""
    left, lock = [after], threading.Lock()

    def counted(work):
        def once_more(*arguments, **named):
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    raise Stop
            return work(*arguments, **named)

        return once_more

    if job == "evaluate":
        monkeypatch.setattr(suite, "find", counted(suite.find))
    elif job == "flatness":
        monkeypatch.setattr(flatness, "_rows", counted(flatness._rows))
    else:
        make = landscapes._measure
        monkeypatch.setattr(landscapes, "_measure", lambda shown: counted(make(shown)))


@pytest.mark.parametrize(
    ("job", "after", "before", "then"),
    [
        ("evaluate", 4, 2, 3),
        ("evaluate", 6, 2, 1),
        ("evaluate", 7, 1, 2),
        ("evaluate", 7, 3, 3),
        ("line", 5, 2, 3),
        ("line", 5, 3, 1),
        ("plane", 4, 2, 2),
        ("flatness", 4, 2, 1),
        ("flatness", 3, 1, 2),
    ],
)
def test_any_number_of_ranks_goes_on_from_what_another_left(
    tmp_path, among, monkeypatch, capsys, job, after, before, then
):
    JOBS[job](subject(tmp_path / "one"))
    with monkeypatch.context() as patch:
        stopping(patch, job, after)
        stopped = among(before, lambda rank: JOBS[job](subject(tmp_path / "many")))
    assert any(isinstance(each, Stop) for each in stopped)
    assert [name for name in files(tmp_path / "many") if name.endswith(".part")]
    assert not [name for name in files(tmp_path / "many") if name.endswith(".json")]
    capsys.readouterr()
    among(then, lambda rank: JOBS[job](subject(tmp_path / "many")))
    assert "goes on after" in capsys.readouterr().out
    alike(tmp_path / "one", tmp_path / "many")


def test_what_fails_on_one_rank_is_raised_on_all_and_what_is_done_is_kept(tmp_path, among, monkeypatch):
    measured, lock, left = landscapes._measure, threading.Lock(), [5]

    def failing(shown):
        real = measured(shown)

        def once_more():
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    raise ValueError("too hot")
            return real()

        return once_more

    monkeypatch.setattr(landscapes, "_measure", failing)
    found = among(2, lambda rank: JOBS["line"](subject(tmp_path)))
    assert [str(each) for each in found] == ["too hot"] * 2
    (part,) = files(tmp_path)
    assert np.load(tmp_path / part)["done"].sum() == 4


def test_what_is_asked_twice_at_once_is_refused_on_all_ranks(tmp_path, among):
    of = subject(tmp_path)
    line = JOBS["line"]
    line(of)
    (path,) = (tmp_path / "landscapes").glob("*.json")
    path.unlink()
    with record.alone(path.with_suffix(".lock")):
        found = among(2, lambda rank: line(subject(tmp_path)))
    assert all(isinstance(each, BadInput) and "another process is at work" in str(each) for each in found)
    assert not path.exists()


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="each process takes a GPU of its own, got 'cuda:1'"), once.together("cuda:1"):
        pass


# The command line, by torchrun

WORDS = {
    "evaluate": ["--examples", "120", "--batch-size", "16", "--attacks", "clean", "pgd-5", "apgd-ce+square"],
    "landscape": ["--points", "5", "--directions", "2", "--examples", "40", "--steps", "2", "--batch-size", "16"],
    "flatness": [
        "--measures", "average", "worst", "tolerance", "slices", "norms", "--examples", "40", "--batch-size", "16",
        "--steps", "2", "--draws", "2", "--climbs", "2", "--directions", "1",
    ],
}  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saltflat"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def ours(self):
        return [line for line in self.err.splitlines() if line.startswith("saltflat: ")]


def quietly():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def by_two(*words):
    ended = subprocess.run(
        [*TORCHRUN, *map(str, words)], capture_output=True, text=True, env=quietly(), timeout=120, check=False
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    torch.set_num_threads(1)
    run("train", "at", *QUICK, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def alone(trained):
    """The run, measured by one process."""
    shutil.copytree(trained, trained.parent / "alone" / "run")
    for command, words in WORDS.items():
        run(command, trained.parent / "alone" / "run", *words)
    return trained.parent / "alone" / "run"


def fresh(trained, name):
    return shutil.copytree(trained, trained.parent / name / "run")


FOUND = {"evaluate": "outcomes", "landscape": "landscapes", "flatness": "flatness"}


def descendants(pid):
    """Of a process; torchrun gives each of its own a session, which a signal to its group does not reach."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = [], [pid]
    while more:
        found, more = found + more, [child for child, parent in parents.items() if parent in more]
    return found


def killed(folder, *words):
    """The same, but all processes are killed at once when some work is on disk, and some is not."""
    job = subprocess.Popen(
        [*TORCHRUN, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quietly()
    )
    end = time.monotonic() + 60
    while not list(folder.glob("*.part")) and job.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    for pid in descendants(job.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["landscape", "flatness"])
def test_two_processes_of_torchrun_write_what_one_does(trained, alone, command):
    folder = fresh(trained, f"two-{command}")
    ended = by_two(command, folder, *WORDS[command])
    assert ended.code == 0, ended.err
    assert ended.ours == []
    assert ended.out.count(f"{folder}: ") == 1  # one table, or one line, of one process
    alike(alone / FOUND[command], folder / FOUND[command])


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_as_two_and_as_one(trained, alone, capsys):
    folder, words = fresh(trained, "killed"), WORDS["evaluate"]
    killed(folder / "outcomes", "evaluate", folder, *words)
    assert list((folder / "outcomes").glob("*.part"))
    assert not list((folder / "outcomes").glob("*.json"))
    other = shutil.copytree(folder, trained.parent / "killed-then-one" / "run")
    ended = by_two("evaluate", folder, *words)
    assert ended.code == 0, ended.err
    assert ended.ours == []
    assert ended.out.count("goes on after") == 1
    alike(alone / "outcomes", folder / "outcomes")
    capsys.readouterr()
    run("evaluate", other, *words)
    assert "goes on after" in capsys.readouterr().out
    alike(alone / "outcomes", other / "outcomes")


@pytest.mark.slow
def test_bad_input_to_two_processes_is_one_line_of_ours(trained):
    folder = fresh(trained, "bad")
    before = files(folder)
    ended = by_two("evaluate", folder, "--attacks", "fgms")
    assert ended.code != 0
    assert len(ended.ours) == 1
    assert ended.ours[0].startswith("saltflat: attacks: ")
    assert "saltflat/lab" not in ended.err  # torchrun has a traceback of its own
    assert ended.out == ""
    assert files(folder) == before
