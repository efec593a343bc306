"""Work for workers: functions that another process can be told of."""

import os
import time
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


def marked(folder: Path) -> None:
    """Leaves a mark every so often, for as long as it lives."""
    while True:
        (folder / "mark").write_text(str(time.time()))
        time.sleep(0.02)
