"""Many models side by side: one process a worker, one thread a process, each model trained once and kept.

A worker leaves everything in the model's folder: what is finished there is read, what was interrupted goes on. So a
study may be killed at any moment, and called again. Numbers do not depend on how many workers there are, or on who does
what: a process computes on one thread, and a model's draws are its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from saltflat.lab.console import progress, say

Given = TypeVar("Given")
Result = TypeVar("Result")
HEARTBEAT = 0.2  # seconds between two looks whether the study is still there


def side_by_side(
    work: Callable[[Given], Result],
    given: Mapping[str, Given],
    workers: int,
    logs: Path,
    said: Callable[[Result], str],
) -> dict[str, Result]:
    """work(given) for each, by name, in the order of `given`; what workers print goes to LOGS/NAME.log.

    Whatever one of them raises stops the others, and is raised here; so does Ctrl-C. Nothing that is finished is lost.
    """
    logs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Result] = {}
    with _pool(workers) as pool, progress() as bar:
        task = bar.add_task("study", total=len(given))
        futures = {pool.submit(_logged, work, each, logs / f"{name}.log"): name for name, each in given.items()}
        waiting: set[Future[Result]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                name = futures[future]
                found[name] = future.result()
                bar.advance(task)
                say(f"{len(found):3}/{len(given)}  {name}: {said(found[name])}")
            bar.refresh()
    return {name: found[name] for name in given}


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are gone when the block is left, whatever they are at."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool:
        raise OSError("a worker ended without a word, perhaps for want of memory; the same command goes on") from None
    except BaseException:
        for process in dict(pool._processes or {}).values():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(study: int) -> None:
    """In each worker, first: one thread; Ctrl-C is the study's business; without the study there is nothing to do."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == study:
            time.sleep(HEARTBEAT)
        os._exit(1)  # whoever goes on with the study must find nobody at work on the same folders

    threading.Thread(target=watch, daemon=True).start()


def _logged(work: Callable[[Given], Result], given: Given, log: Path) -> Result:
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        return work(given)
