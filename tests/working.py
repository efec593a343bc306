"""Work for workers: functions that another process can be told of."""

import os
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch


def squared(n: int) -> int:
    print(f"squaring {n}")
    return n * n


def threads(_: int) -> tuple[int, int]:
    return torch.get_num_threads(), os.getpid()


def refused(n: int) -> int:
    if n == 1:
        raise ValueError(f"n: expected anything but 1, got {n}")
    time.sleep(60)
    return n


def killed(n: int) -> int:
    os.kill(os.getpid(), 9)
    return n


def telling(_: int) -> None:
    """Tells the study to stop, and goes on."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def marked(folder: Path) -> None:
    """Leaves a mark every so often, for as long as it lives."""
    while True:
        (folder / "mark").write_text(str(time.time()))
        time.sleep(0.02)


def killed_but_first(n: int) -> int:
    """Whoever comes second waits until the first is done, and dies."""
    done = Path("first.done")
    if n == 0:
        print("finished")
        done.touch()
        return n
    while not done.exists():
        time.sleep(0.02)
    time.sleep(1.0)
    os.kill(os.getpid(), 9)
    return n


def surroundings(_: object) -> tuple[str, int, str]:
    return os.getcwd(), torch.get_num_threads(), sys.path[0]


class Jobs:
    """Submits as submitit does: what comes back is no future, and the executor no context manager."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"))

    def submit(self, work, *given):
        return Job(self.pool.submit(work, *given))


class Job:
    def __init__(self, future: Future) -> None:
        self.done, self.result, self.cancel = future.done, future.result, future.cancel


def jobs() -> Jobs:
    return Jobs()
