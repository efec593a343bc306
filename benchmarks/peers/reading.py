"""What was read in peers' code: `reading.toml`, checked against the code it is said to stand in.

    [peer."owner/name"]        title and licence
    [[fact]]                   peer, row (the capability), says (a cell of a table), and one of
        path, word             where: the first line of that file in which the word stands
        absent                 words that stand in no Python file of the repository, case and all

A fact whose word is not there any more, or whose absent words have come, is an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.probes import folder

FILE = Path(__file__).parent / "reading.toml"


@dataclass(frozen=True)
class Fact:
    """One cell of a table, and where it was read.

    Attributes:
        link: to the line at the commit that was read; to the repository, if something is absent.
        how: "read", or the words that were searched for in vain.
    """

    peer: str
    row: str
    says: str
    link: str
    how: str

    def as_record(self) -> dict[str, str]:
        """For JSON."""
        return dict(vars(self))


def peers() -> dict[str, dict[str, str]]:
    """Name -> title and licence, in the order of the tables."""
    found: dict[str, dict[str, str]] = tomllib.loads(FILE.read_text())["peer"]
    return found


def facts(sources: Path, root: Path, versions: Mapping[str, Mapping[str, str]]) -> Iterator[Fact]:
    """All of them, checked; ValueError names the first that is not so.

    Args:
        sources: the folder of the clones.
        root: this checkout, where facts of Saltflat stand.
        versions: name -> its "commit".
    """
    for given in tomllib.loads(FILE.read_text())["fact"]:
        peer = given["peer"]
        of = root if peer == "Saltflat" else folder(sources, peer)
        yield checked(given, of, versions[peer]["commit"])


def checked(given: Mapping[str, Any], of: Path, commit: str) -> Fact:
    """The fact with its link; ValueError if the code does not say so."""
    peer, what = given["peer"], f"{given['peer']}, {given['row']}"
    tree = f"https://github.com/{peer}/blob/{commit}/"
    if "absent" in given:
        for path in sorted((of / "src" if peer == "Saltflat" else of).rglob("*.py")):
            text = path.read_text(errors="replace")
            there = next((word for word in given["absent"] if word in text), None)
            if there is not None:
                raise ValueError(f"{what}: expected {there!r} in no file, found it in {path.relative_to(of)}")
        link = "src" if peer == "Saltflat" else f"https://github.com/{peer}/tree/{commit}"
        how = f"no {', '.join(given['absent'])} in any Python file"
    else:
        line = line_of(of / given["path"], given["word"])
        if line is None:
            raise ValueError(f"{what}: expected {given['word']!r} in {given['path']}")
        link, how = f"{tree}{given['path']}#L{line}", "read"
        if peer == "Saltflat":
            link = given["path"]  # from the project's folder
    return Fact(peer, given["row"], given["says"], link, how)


def line_of(path: Path, word: str) -> int | None:
    """The first line in which the word stands, counted from 1; None if there is none, or no such file."""
    if not path.is_file():
        return None
    lines = path.read_text(errors="replace").splitlines()
    return next((number for number, line in enumerate(lines, 1) if word in line), None)
