"""Adversarial examples to look at: the first images that an attack fooled, as they are and as it changed them.

examples/NAME.json    beside outcomes/NAME.json: which image, its class, what it is taken for, and by which attack;
                      `clean` and `attacked`: base64 of little-endian float32, (C, H, W), in [0, 1]

An evaluation keeps verdicts and no images. But what an attack draws depends on (seed, attack, example) and on nothing
else, so that the stage that a verdict names finds the same example again. What it does not find, since another batch
rounds otherwise, is left out: every image that is kept was seen to fool the network.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltflat.evaluation.search import find
from saltflat.evaluation.suite import SLACK, Column, Stage, Verdicts, prepared
from saltflat.lab import record
from saltflat.lab.subjects import Subject
from saltflat.lean.network import lean
from saltflat.random import PerExample, derived_seed

KEPT = 8
MOST = 2**20  # pixels in one file: of large images fewer are kept


def keep(
    path: Path,
    about: Mapping[str, Any],
    of: Subject,
    columns: Sequence[Column],
    verdicts: Mapping[str, Verdicts],
    data: tuple[Tensor, Tensor, Tensor],
    *,
    seed: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the first examples that some attack fooled; nothing where there are none, or where x are no images.

    Args:
        path: the file; what was there is replaced.
        about: fields that it begins with.
        of: the network that was evaluated.
        columns, verdicts: what was evaluated; the first column that fooled an example counts.
        data: x (N, C, H, W), y (N,), and which of the split they are (N,).
        seed, dtype: of the evaluation.
    """
    x, _, rows = data
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return
    first = _first_stages(columns, verdicts)
    most = max(1, min(KEPT, MOST // x[0].numel()))
    chosen = sorted(first, key=lambda index: int(rows[index]))[:most]
    found: dict[int, dict[str, Any]] = {}
    for column, stage in dict.fromkeys(first[index] for index in chosen):
        alike = torch.tensor([index for index in chosen if first[index] == (column, stage)])
        found |= _again(of, column, stage, data, alike, seed, dtype)
    if found:
        shape = list(x.shape[1:])
        record.write_json(
            path, {**about, "shape": shape, "examples": [found[index] for index in chosen if index in found]}
        )


def _first_stages(columns: Sequence[Column], verdicts: Mapping[str, Verdicts]) -> dict[int, tuple[Column, Stage]]:
    """By example: the stage that fooled it, of the first column in which one did."""
    first: dict[int, tuple[Column, Stage]] = {}
    for column in columns:
        for index, by in enumerate(verdicts[column.name].by.tolist()):
            if by > 0:
                first.setdefault(index, (column, column.stages[by - 1]))
    return first


def _again(
    of: Subject,
    column: Column,
    stage: Stage,
    data: tuple[Tensor, Tensor, Tensor],
    chosen: Tensor,
    seed: int,
    dtype: torch.dtype | None,
) -> dict[int, dict[str, Any]]:
    """By example: what the stage makes of it, where it fools the network once more."""
    x, y, rows = data
    clean = prepared(x[chosen.to(x.device)], of.model)
    labels = y[chosen.to(y.device)].to(clean.device)
    reduced = None if stage.precise else dtype
    made = find(
        stage.attack,
        lean(of.model, reduced),
        clean,
        labels,
        exact=of.model,
        slack=SLACK[reduced] if reduced else 0.0,
        generator=PerExample(derived_seed(seed, stage.stream), rows.cpu()[chosen].to(clean.device)),
    )
    with torch.no_grad():
        taken_for = of.model(made.x_adv).argmax(1)
    name = column.name if column.name == stage.name else f"{column.name}: {stage.name}"
    return {
        index: {
            "example": int(rows[index]),
            "label": int(labels[place]),
            "predicted": int(taken_for[place]),
            "attack": name,
            "clean": _encoded(clean[place]),
            "attacked": _encoded(made.x_adv[place]),
        }
        for place, index in enumerate(chosen.tolist())
        if made.fooled[place]
    }


def _encoded(image: Tensor) -> str:
    return base64.b64encode(image.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()
