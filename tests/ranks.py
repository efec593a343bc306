"""Work that processes do together, for tests: started once, and what each found is read afterwards."""

import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch

from saltflat import parallel


def _rank(rank, ranks, folder, work, seconds):
    """One of them: what `work` gives is left in a file of its own."""
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": ranks}
    with parallel.together(timeout=timedelta(seconds=seconds), **options):
        found = work(Path(folder))
    torch.save(found, f"{folder}/{rank}.pt")


def started(work, folder, ranks=2, seconds=120, target=_rank):
    """The processes; `work` is a function of a module, of the folder in which it may leave files."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=target, args=(rank, ranks, str(folder), work, seconds)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def found(work, folder, ranks=2):
    """What `work` found on every rank."""
    processes = started(work, folder, ranks)
    try:
        for process in processes:
            process.join(200)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


def gone():
    """The process that asks is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    """The process that asks stops, and answers nobody."""
    os.kill(os.getpid(), signal.SIGSTOP)
