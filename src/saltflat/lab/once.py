"""What processes that work together do once: the first looks, keeps others out and writes; all know of it, and fail
with it.

    torchrun --nproc-per-node 2 -m saltflat train | evaluate | landscape | flatness ...

Without torchrun there is one process, which does it all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from saltflat import parallel
from saltflat.lab import build, record
from saltflat.lab.config import BadInput

# In measurements, whoever has no batch left waits for those of others, which may be hours long; a process that dies is
# noticed at once
PATIENCE = timedelta(days=7)


@contextmanager
def together(device: str, timeout: timedelta = PATIENCE) -> Iterator[None]:
    """The processes that torchrun started work together inside: on CPUs, or each on the GPU of its local rank.

    Args:
        device: as a command is told it; BadInput for one GPU of them all.
        timeout: how long one waits for the others.
    """
    if not parallel.launched():
        yield
        return
    if device.startswith("cuda:"):
        raise BadInput(f"device: expected auto, cpu or cuda, since each process takes a GPU of its own, got {device!r}")
    with parallel.together(build.device_type(device), timeout=timeout):
        yield


def already(path: Path, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    """A finding that is there, as `record.read_again` reads it; None if it is not."""
    return parallel.first(lambda: record.read_again(path, needed) if path.is_file() else None)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """`record.alone`, for all processes of this job; folders that it makes go again if nothing is written there."""
    made: list[Path] = []

    def enter() -> None:
        made.extend(folder for folder in lock.parents if not folder.exists())
        held.enter_context(record.alone(lock))

    with ExitStack() as held:
        held.callback(_remove_empty, made)
        parallel.first(enter)
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """The innermost first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
