"""What a person sees while a job runs: lines, a bar with an ETA, and where the page is. Does not import torch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from saltflat.lab.config import BadInput, escaped
from saltflat.lab.record import check_folder

FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, the one that speaks
CONSOLE = Console(highlight=False, markup=False, emoji=False, quiet=not FIRST)  # paths may hold brackets and colons


def say(line: str) -> None:
    """A line, however long, or several; whatever names are in it, nothing moves the cursor."""
    CONSOLE.print("\n".join(map(escaped, line.split("\n"))), soft_wrap=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar with an ETA, where there is a terminal; lines printed meanwhile stand above it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=CONSOLE, transient=True) as bar:
        yield bar


def page_of(runs: Sequence[Path], out: Path | None) -> Path:
    """Where the page about these runs goes; BadInput if it cannot go there."""
    path = out or (runs[0].absolute() if len(runs) == 1 else runs[0].absolute().parent) / "report.html"
    if path.is_dir():
        raise BadInput(f"out: expected a file, got the folder {str(path)!r}")
    if path.exists() and not _is_a_page(path):
        raise BadInput(f"out: expected a new file, or a page of before, got {str(path)!r}")
    check_folder("out", path.parent)
    return path


def _is_a_page(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096)
    return not start or b"Saltflat</title>" in start


def report(runs: Sequence[Path], out: Path | None) -> Path:
    """One page about the runs; returns where it is."""
    from saltflat.lab.report import write_report  # matplotlib takes a while

    # `runs/*` catches pages, and logs
    runs = [run for run in runs if not run.is_file() and (run.name != "logs" or (run / "config.yaml").exists())]
    if not runs:
        raise BadInput("runs: expected at least one run folder, got none")
    path = page_of(runs, out)
    write_report(list(runs), path)
    say(f"report: {path}")
    return path
