"""Verdicts on disk: an npz file of one row per example, which grows with every batch and can be gone on from.

label (N,)   example (N,): which of the split   reached (5,): column, stage, batches, spent, milliseconds
COLUMN_by, COLUMN_iteration, COLUMN_margin (N,), for each column; see `saltflat.evaluation.suite.Verdicts`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saltflat.data.arrays import npz
from saltflat.evaluation.suite import Done, Verdicts
from saltflat.lab import record
from saltflat.lab.config import BadInput

PARTS = ("by", "iteration", "margin")


@dataclass(frozen=True)
class Kept:
    """What a file holds: how far the evaluation was, and the seconds that it had taken."""

    done: Done
    seconds: float


def write(path: Path, kept: Kept, labels: Tensor, examples: Tensor) -> None:
    """The whole file, or the one that was there before."""
    done = kept.done
    reached = [done.column, done.stage, done.batches, done.spent, round(1000 * kept.seconds)]
    arrays = {"label": labels.numpy(), "example": examples.numpy(), "reached": np.array(reached)}
    for name, of in done.verdicts.items():
        arrays |= {f"{name}_{part}": getattr(of, part).numpy() for part in PARTS}
    with record.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read(path: Path, columns: Sequence[str], labels: Tensor) -> Kept:
    """What `write` wrote of these columns and examples. BadInput, in one line, if it is cut, or another's."""
    names = ["label", "reached", *(f"{column}_{part}" for column in columns for part in PARTS)]
    try:
        found = dict(zip(names, npz(path, names), strict=True))
    except ValueError as error:
        raise BadInput(f"outcomes: {error}; delete it to begin anew") from None
    alike = all(found[name].shape == labels.shape for name in names if name != "reached")
    if not alike or found["reached"].shape != (5,) or not np.array_equal(found["label"], labels.numpy()):
        raise BadInput(f"outcomes: {path} is of other examples; delete it to begin anew")
    column, stage, batches, spent, milliseconds = (int(number) for number in found["reached"].tolist())
    verdicts = {name: Verdicts(*(torch.from_numpy(found[f"{name}_{part}"]) for part in PARTS)) for name in columns}
    return Kept(Done(verdicts, column, stage, batches, 0, spent, 0), milliseconds / 1000)
