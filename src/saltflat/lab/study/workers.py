"""Many models side by side, each trained once and kept: by processes here, or wherever an executor takes them.

A worker leaves everything in the model's folder: what is finished there is read, what was interrupted goes on. So a
study may be killed at any moment, and called again. Numbers do not depend on how many workers there are, or on who does
what: a process has one model at a time, on one thread, and a model's draws are its own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

from saltflat.lab.config import BadInput, Interrupted
from saltflat.lab.console import progress, say
from saltflat.lab.signals import told_to_stop

Given = TypeVar("Given")
Result = TypeVar("Result")
ResultSeen = TypeVar("ResultSeen", covariant=True)
HEARTBEAT = 0.2  # seconds between two looks: of the study whether there are results, of a worker whether it has a study


class Awaited(Protocol[ResultSeen]):
    """A result that comes: a future of `concurrent.futures`, or a job that has as much of one."""

    def done(self) -> bool: ...
    def result(self) -> ResultSeen: ...
    def cancel(self) -> object: ...


class Executor(Protocol):
    """Who takes work: an executor of `concurrent.futures`, or whatever submits as one does, to other processes."""

    def submit(self, work: Callable[..., Result], /, *given: Any) -> Awaited[Result]: ...


Engine = Callable[[], AbstractContextManager[Executor]]


def side_by_side(
    work: Callable[[Given], Result],
    given: Mapping[str, Given],
    executor: Executor,
    logs: Path,
    said: Callable[[Result], str],
) -> dict[str, Result]:
    """work(given) for each, by name, in the order of `given`; what workers print goes to LOGS/NAME.log.

    Whatever one of them raises is raised here, and so is Ctrl-C, and Interrupted when SIGTERM or SIGUSR1 arrives; what
    has not begun is cancelled then. Nothing that is finished is lost. OSError if a worker is gone, or does not see the
    study's folder.
    """
    found: dict[str, Result] = {}
    futures: dict[str, Awaited[Outcome[Result]]] = {}
    if given:
        say(f"{len(given)} to be done, side by side; what they print meanwhile is in {logs}")
    with _marked(logs) as home, progress() as bar, told_to_stop() as told:
        task = bar.add_task("study", total=len(given))
        try:
            for name, each in given.items():
                with _one_line_if_gone(name):
                    futures[name] = executor.submit(_worked, work, each, home, name)
            while len(found) < len(given):
                if told:  # before a worker is missed that was told as well
                    raise Interrupted
                for name in [name for name, future in futures.items() if name not in found and future.done()]:
                    with _one_line_if_gone(name):
                        outcome = futures[name].result()
                    found[name] = outcome.unwrapped()
                    bar.advance(task)
                    say(f"{len(found):3}/{len(given)}  {name}: {said(found[name])}")
                time.sleep(HEARTBEAT if len(found) < len(given) else 0.0)
        except BaseException as error:
            for future in futures.values():
                future.cancel()
            if isinstance(error, KeyboardInterrupt | Interrupted):
                say(f"{'told to stop' if told else 'interrupted'}; the same command goes on from what is there")
            raise
    return {name: found[name] for name in given}


@contextlib.contextmanager
def _one_line_if_gone(name: str) -> Iterator[None]:
    """What work raises comes as an outcome; what is raised beside that is of the executor, whatever its type."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".partition(". ")[0].split())[:200].rstrip(":")
        raise OSError(
            f"a worker ended without a word at {name} ({why}), perhaps for want of memory; what is finished is kept, "
            "and the same command goes on"
        ) from None


# Processes here


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """So many processes, which are gone when the block is left by an exception, whatever they are at."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (os.getpid(),))
    try:
        yield pool
    except BaseException:
        for process in dict(pool._processes or {}).values():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(study: int) -> None:
    """In each process, first: Ctrl-C is the study's business, and without the study there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == study:
            time.sleep(HEARTBEAT)
        os._exit(1)  # whoever goes on with the study must find nobody at work on the same folders

    threading.Thread(target=watch, daemon=True).start()


# In a worker, wherever it is


@dataclass(frozen=True)
class Home:
    """Where a study is at work.

    folder: its current one, which is its workers' as well. logs: of its models. word: what stands in the mark there,
    by which a worker knows that it sees the same files.
    """

    folder: Path
    logs: Path
    word: str

    @property
    def mark(self) -> Path:
        return self.logs / ".study"


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What work gave, or what it raised."""

    given: Result | None
    raised: Exception | None = None

    def unwrapped(self) -> Result:
        if self.raised is not None:
            raise self.raised
        return cast(Result, self.given)


_OWN: dict[str, int] = {}  # words of the studies of this process, whose number tells it from its forks
_ONE = threading.Lock()  # torch's global state, the current folder and standard output are a process's, not a thread's


@contextlib.contextmanager
def _marked(logs: Path) -> Iterator[Home]:
    """What workers are told of a study, whose mark is there as long as the block."""
    home = Home(Path.cwd(), logs.absolute(), secrets.token_hex(8))
    home.logs.mkdir(parents=True, exist_ok=True)
    home.mark.write_text(home.word)
    _OWN[home.word] = os.getpid()
    try:
        yield home
    finally:
        del _OWN[home.word]
        home.mark.unlink(missing_ok=True)


def _worked(work: Callable[[Given], Result], given: Given, home: Home, name: str) -> Outcome[Result]:
    try:
        if _OWN.get(home.word) == os.getpid():
            raise BadInput("executor: expected one that works in other processes, got threads of this one")
        if home.word in _OWN:  # torch's threads are not in it, and a lock of one of the others' may be held for ever
            raise BadInput(
                'executor: expected processes that begin anew, as with get_context("spawn"), got a fork of this one'
            )
        with _ONE, _at(home), _one_thread(), open(home.logs / f"{name}.log", "a") as log:
            with contextlib.redirect_stdout(log):
                return Outcome(work(given))
    except Exception as error:
        error.add_note(f"in a worker, at {name}:\n{traceback.format_exc()}")  # a traceback itself does not pickle
        return Outcome(None, error)


@contextlib.contextmanager
def _at(home: Home) -> Iterator[None]:
    """In the study's folder, from which relative paths are seen, and modules of a person's own."""
    if not home.folder.is_dir() or not home.mark.is_file() or home.mark.read_text() != home.word:
        raise OSError(
            f"a worker on {platform.node()} does not see {home.logs.parent} as the study does: put the study where all "
            "workers find it under one path"
        )
    with contextlib.chdir(home.folder):
        sys.path.insert(0, "")
        try:
            yield
        finally:
            sys.path.remove("")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
