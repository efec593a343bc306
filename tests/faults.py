"""What can befall a run, for tests: children that train, forked from a process that has imported torch, which are
killed, told to stop, or find the disk full, at moments that are chosen.

A moment is a place before, within or after a write, a rename or a removal of one of the run's files: a child counts
them, so that every one of them can be named.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from saltflat.lab import build, checkpoints, cli, record, trainings
from saltflat.lab.config import Train, as_text, from_text
from saltflat.train import Stepped

# What a child does


class Disk:
    """All writes, renames and removals of a process that are made by Python's names; a write is made in halves.

    killed_at: the moment at which the process kills itself. full_from: the number of the write from which on only the
    first half of anything fits.
    """

    def __init__(self, killed_at: int | None = None, full_from: int | None = None) -> None:
        self.killed_at, self.full_from = killed_at, full_from
        self.moments = self.writes = 0

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, file, content: bytes) -> None:
        self.writes += 1
        self.moment()
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        self.moment()
        if self.full_from is not None and self.writes >= self.full_from:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(content[half:])

    def taken(self) -> None:
        """From here on, this process' files are written here."""

        def write_bytes(path, content):
            with open(path, "wb") as file:
                self.write(file, bytes(content))

        def around(method):
            def called(path, *given, **named):
                self.moment()
                found = method(path, *given, **named)
                self.moment()
                return found

            return called

        def unlink(path, missing_ok=False, of=Path.unlink):
            if path.exists():
                of(path)
                self.moment()

        Path.write_bytes = write_bytes
        Path.write_text = lambda path, text: write_bytes(path, text.encode())
        Path.replace, Path.rename, Path.unlink = around(Path.replace), around(Path.rename), unlink
        record.open = partial(Appended, self)


class Appended:
    """A file that is open for more lines."""

    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        assert mode == "a"
        self.disk, self.file = disk, open(path, "ab")  # noqa: SIM115 (closed by `__exit__`)
        self.flush, self.fileno = self.file.flush, self.file.fileno

    def write(self, text: str) -> None:
        self.disk.write(self.file, text.encode())

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


@dataclass(frozen=True)
class Poisoned:
    """An objective whose loss is not a number from a step of this process on."""

    objective: object
    done: list
    after: int

    def inner(self, model, x, y):
        return self.objective.inner(model, x, y)

    def outer(self, model, x, x_adv, y):
        return self.objective.outer(model, x, x_adv, y) * (torch.nan if len(self.done) >= self.after else 1.0)


def child(config, out, events, resumed=False, killed_at=None, full_from=None, told_at=None, largest=None, clock=None,
          poisoned_after=None):  # fmt: skip
    """A training, or the rest of one, as the command would run it; returns its exit code.

    events: a file that gets a line for every step that is done, and for every state that is saved. told_at: the step
    after which it is told to stop. largest: bytes that a file can have. clock: the seed of a clock that jumps.
    poisoned_after: so many steps, losses are not numbers.
    """
    log, done = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND), []
    disk = Disk(killed_at, full_from)
    fit, save = trainings.fit, checkpoints.save_state

    def fitted(*given, **named):
        for event in fit(*given, **named):
            if isinstance(event, Stepped):
                done.append(event.step)
                os.write(log, f"step {event.step}\n".encode())
                if event.step == told_at:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield event

    def saved(folder, state):
        path = save(folder, state)
        os.write(log, f"saved {state['step']}\n".encode())
        if clock is not None:
            os.utime(path, (jumping.uniform(0, 2e9),) * 2)
        return path

    trainings.fit, checkpoints.save_state = fitted, saved
    if clock is not None:
        jumping = random.Random(clock)
        time.time = lambda: jumping.uniform(0, 2e9)
    if poisoned_after is not None:
        objective = build.objective
        build.objective = lambda config: Poisoned(objective(config), done, poisoned_after)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    disk.taken()
    work = partial(trainings.resume, Path(out)) if resumed else partial(trainings.made, from_text(config), Path(out))
    cli.parsed = lambda words: work
    os.write(log, b"begun\n")
    try:
        cli.main(["train"])
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        os.write(log, f"moments {disk.moments}\nwrites {disk.writes}\n".encode())


def serve() -> None:
    """Forks a child for every line that comes in, kills it when asked to, and answers how it ended."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], 0.1)  # torch imports much when the first optimiser is made
    record._git = lambda: None  # which takes longer than the training
    for line in sys.stdin:
        print(json.dumps(_ended(json.loads(line))), flush=True)


def _ended(asked):
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{asked['said']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = child(**asked["given"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = began + (60.0 if asked["after"] is None else asked["after"])
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            found = os.waitpid(pid, 0)
            break
        time.sleep(0.0005)
    return {"code": os.waitstatus_to_exitcode(found[1]), "seconds": time.monotonic() - began}


# What tests ask for


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it said on both streams."""

    code: int
    seconds: float
    out: str
    err: str


class Server:
    """The process that forks; counts the kills."""

    def __init__(self) -> None:
        self.kills = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, said: Path, after: float | None, given: dict) -> Ended:
        asked = {"said": str(said), "after": after, "given": given}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        self.kills += found["code"] == -signal.SIGKILL
        streams = {name: Path(f"{said}.{name}") for name in ("out", "err")}  # not there, if it was killed before
        return Ended(**found, **{name: path.read_text() if path.exists() else "" for name, path in streams.items()})


@contextmanager
def server():
    started = Server()
    try:
        yield started
    finally:
        started.process.stdin.close()
        started.process.stdout.close()
        started.process.wait(60)


class Run:
    """A training in a folder, by one child after the other; held, at each, to going on from what was saved last."""

    def __init__(self, server: Server, out: Path, config: Train) -> None:
        self.server, self.out, self.config = server, out, config
        self.events = out.with_name(f"{out.name}.events")

    def child(self, after: float | None = None, **fault) -> Ended:
        given = {"config": as_text(self.config), "out": str(self.out), "events": str(self.events), **fault}
        before, earlier = newest(self.out), self.told()
        ended = self.server.ask(self.out.with_name(f"{self.out.name}.said"), after, given)
        saved = [number for what, number in earlier if what == "saved"]
        steps = [number for what, number in self.told()[len(earlier) :] if what == "step"]
        assert before >= max(saved, default=0)  # what was saved is still there
        assert steps == list(range(before + 1, before + 1 + len(steps)))
        return ended

    def told(self) -> list[tuple[str, int]]:
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return [(what, int(number)) for what, _, number in (line.partition(" ") for line in lines) if number]

    def finished(self, **fault) -> "Run":
        ended = self.child(**fault)
        assert (ended.code, ended.err) == (0, ""), ended
        return self

    def copied(self, out: Path) -> "Run":
        """The same in another folder, with nothing told of what went before."""
        shutil.copytree(self.out, out)
        return Run(self.server, out, self.config)


def newest(out: Path) -> int:
    """The step of the newest state that is whole, by its name; 0 without one."""
    states = [path for path in (out / "checkpoints").glob("resume-*.pt") if _is_whole(path)]
    return max((int(path.name.split("-")[1]) for path in states), default=0)


def _is_whole(path: Path) -> bool:
    try:
        return checkpoints.digest(path) in path.name
    except FileNotFoundError:  # the run has just removed it
        return False


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs differ in, to the bit, but for times; and what is there that should not be."""
    found = [str(path) for of in (one, other) for path in (of, of.parent) for path in path.rglob(".*.new")]
    found += [str(path) for of in (one, other) for path in of.rglob("*.lock")]
    names = [sorted(path.name for path in of.glob("checkpoints/*.safetensors")) for of in (one, other)]
    found += ["names of weights"] * (names[0] != names[1])
    plain = [*(f"checkpoints/{name}" for name in names[0]), "evaluation.json", "config.yaml"]
    found += [name for name in plain if (one / name).read_bytes() != (other / name).read_bytes()]
    found += ["metrics.jsonl"] * (metrics(one) != metrics(other))
    found += ["state"] * (not alike(*(_state(of) for of in (one, other))))
    return found


def metrics(out: Path) -> list[dict]:
    return [_timeless(line) for line in record.read_metrics(out)]


def _timeless(line: dict) -> dict:
    return {name: value for name, value in line.items() if "seconds" not in name and name != "seal"}


def _state(out: Path) -> dict:
    _, state = checkpoints.newest_whole(out / "checkpoints", print)
    state["metrics"] = [_timeless(json.loads(line)) for line in state["metrics"]]
    assert state["within"] is None
    return state


def alike(one, other) -> bool:
    """To the bit, of tensors in what JSON has."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


if __name__ == "__main__":
    serve()
