"""How much faster: contenders that take turns, each in a process of its own, or in several.

A contender is a plain function, setting -> step. Its process sets up once, with its own allocator, threads and
environment, as people would run it alone; then it takes a turn whenever it is told to: A B C A B C ..., after rounds of
warm-up. Only one works at a time, the others wait. So whatever the machine does meanwhile hits all alike, and

    ratio of A to B = median over rounds of  seconds of A / seconds of B  in the same round

is what a report should look at; seconds alone are what this machine took today.

The processes of one contender work at the same time, and its turn lasts until the last of them is done. Each finds who
it is in its environment, as torchrun would have set it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

Make = Callable[[Any], Callable[[], Any]]


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Args:
        name: in tables.
        make: setting -> step; found in its process by its name, so no lambda or inner function.
        setting: handed to it.
        steps: how many steps one call of what it makes takes.
        environment: variables that its process starts with, besides this one's.
        processes: that work at the same time.
    """

    name: str
    make: Make
    setting: Any
    steps: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1


class Turn(NamedTuple):
    """`seconds` a step, and minor page faults a step."""

    seconds: float
    page_faults: float


class Worker(NamedTuple):
    """A contender that has set up, which took so many seconds."""

    set_up: float
    turn: Callable[[int], Turn]
    peak: Callable[[], dict[str, float]]


def compare(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warm_up: int = 1,
    calls: int = 1,
    in_process: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """What everybody's turns took, by name.

    Args:
        rounds: turns of everybody that count, after `warm_up` that do not.
        calls: of `step` in a turn.
        in_process: all in this process, for debugging; memory and page faults are then nobody's own. Of several
            processes, only one is there.
        say: told of every turn.

    Returns: {name: {"seconds": of a step, by round, "page_faults": the same, "set_up_seconds": once,
        "peak_bytes": of memory, of all its processes, "peak_gpu_bytes": if it used a GPU}}.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders: expected different names, got {names!r}")
    if rounds < 1:
        raise ValueError(f"rounds: expected an integer >= 1, got {rounds!r}")
    working = _in_this_process if in_process else _in_its_own_processes
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contender in contenders:
            workers[contender.name] = worker = stack.enter_context(working(contender))
            say(f"set up   {contender.name:32} {worker.set_up:9.3f} s")
        turns: dict[str, list[Turn]] = {name: [] for name in names}
        for number in range(-warm_up, rounds):
            for name, worker in workers.items():
                turn = worker.turn(calls)
                say(f"{f'round {number + 1}' if number >= 0 else 'warm-up':8} {name:32} {turn.seconds:9.3f} s a step")
                if number >= 0:
                    turns[name].append(turn)
        return {
            name: {
                "seconds": [turn.seconds for turn in turns[name]],
                "page_faults": [turn.page_faults for turn in turns[name]],
                "set_up_seconds": worker.set_up,
                **worker.peak(),
            }
            for name, worker in workers.items()
        }


def seconds_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """{name: seconds by round} of what `compare` returns."""
    return {name: list(of["seconds"]) for name, of in found.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and number.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0, 'n': 3}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """Everybody's time over the reference's, round by round.

    >>> ratios({"a": [2.0, 6.0, 9.0], "b": [1.0, 2.0, 9.0]}, "b")["a"]["median"]
    2.0
    """
    theirs = seconds[reference]
    return {
        name: spread([ours / other for ours, other in zip(own, theirs, strict=True)]) for name, own in seconds.items()
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one to the left, the others to the right.

    >>> print(table(["name", "s"], [["a", "10.0"]]))
    name     s
    a     10.0
    """
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(columns))
        for columns in (zip(line, widths, strict=True) for line in [head, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def around(of: Mapping[str, float] | None, form: str = ".2f") -> str:
    """A spread in words: the median, and the smallest to the largest.

    >>> around({"median": 2.0, "min": 1.0, "max": 3.0, "n": 3})
    '2.00 (1.00 to 3.00)'
    """
    return "" if of is None else f"{of['median']:{form}} ({of['min']:{form}} to {of['max']:{form}})"


def _turn(step: Callable[[], Any], calls: int, steps: int) -> Turn:
    faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(calls):
        step()
    seconds = time.perf_counter() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Turn(seconds / (calls * steps), faults / (calls * steps))


def peak() -> dict[str, float]:
    """The most memory that this process has held so far."""
    found = {"peak_bytes": float(_resident())}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def _resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def _in_this_process(contender: Contender) -> Iterator[Worker]:
    began = time.perf_counter()
    with _variables(contender.environment):
        step = contender.make(contender.setting)
        yield Worker(time.perf_counter() - began, lambda calls: _turn(step, calls, contender.steps), peak)


@contextmanager
def _in_its_own_processes(contender: Contender) -> Iterator[Worker]:
    start = multiprocessing.get_context("spawn")  # not a copy of this process with what it has in memory
    pipes: list[Connection] = []
    processes: list[Any] = []
    for who in ranks_of(contender.processes):
        pipe, theirs = start.Pipe()
        process = start.Process(target=_work, args=(theirs, contender), daemon=True)
        with _variables({**contender.environment, **who}):
            process.start()
        theirs.close()
        pipes.append(pipe)
        processes.append(process)

    def ask(word: str, *details: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((word, *details))
        return answers()

    def answers() -> list[Any]:
        found: dict[Connection, Any] = {}
        while len(found) < len(pipes):  # whoever failed says so first, while the others may wait for it in vain
            for pipe in wait([pipe for pipe in pipes if pipe not in found]):
                assert isinstance(pipe, Connection)
                found[pipe] = answer(pipe)
        return [found[pipe] for pipe in pipes]

    def answer(pipe: Connection) -> Any:
        try:
            failed, found = pipe.recv()
        except EOFError:
            process = processes[pipes.index(pipe)]
            process.join()
            raise RuntimeError(f"{contender.name}: its process ended ({process.exitcode})") from None
        if failed:
            raise RuntimeError(f"{contender.name}: {found}")
        return found

    def turn(calls: int) -> Turn:
        found: list[Turn] = ask("turn", calls)
        return Turn(max(of.seconds for of in found), statistics.mean(of.page_faults for of in found))

    def peaks() -> dict[str, float]:
        found = ask("peak")
        return {name: sum(of[name] for of in found) for name in found[0]}

    try:
        yield Worker(max(answers()), turn, peaks)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
                process.join()


def ranks_of(processes: int) -> list[dict[str, str]]:
    """What torchrun would set for each."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [{**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _work(pipe: Connection, contender: Contender) -> None:
    """A contender's process, until nobody listens any more."""
    try:
        began = time.perf_counter()
        step = contender.make(contender.setting)
        pipe.send((False, time.perf_counter() - began))
        while True:
            word, *details = pipe.recv()
            pipe.send((False, peak() if word == "peak" else _turn(step, *details, contender.steps)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # at once: there is nothing to tidy up
    except Exception:
        pipe.send((True, traceback.format_exc()))


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
