"""The download behind `saltflat download`: published files into a folder, with a bar; what broke off goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path

from saltflat.data.download import SOURCES, Source, fetch
from saltflat.lab.config import BadInput
from saltflat.lab.console import progress, say
from saltflat.lab.record import check_folder


def download(name: str, out: Path) -> None:
    """All files of one data set, each whole and with its published checksum."""
    if name not in SOURCES:
        raise BadInput(f"name: expected one of {', '.join(SOURCES)}, got {name!r}")
    check_folder("out", out)
    try:
        for source in SOURCES[name]:
            say(f"{source.name}: {_fetched(source, out)}")
    finally:
        with contextlib.suppress(OSError):  # a folder that something is in stays
            out.rmdir()


def _fetched(source: Source, out: Path) -> Path:
    with progress() as bar:
        task = bar.add_task(source.name, total=None)

        def seen(done: int, total: int | None) -> None:
            bar.update(task, completed=done // 1024, total=None if total is None else total // 1024)

        try:
            return fetch(source, out, progress=seen)
        except (ValueError, BlockingIOError) as error:  # a checksum that is wrong, or another call at work
            raise BadInput(f"out: {error}") from None
