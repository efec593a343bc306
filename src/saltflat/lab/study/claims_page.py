"""The page of the study of the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saltflat.lab.study.claims_results import Result


def write(results: Sequence[Result], title: str, out: Path) -> Path:
    return out / "claims.html"
