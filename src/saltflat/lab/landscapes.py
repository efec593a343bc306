"""The measurement behind `saltflat landscape`: attacks made afresh along directions in weight space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from saltflat.data import Images
from saltflat.evaluation import collect, outcomes_by_batch
from saltflat.lab import record
from saltflat.lab.console import progress
from saltflat.lab.subjects import Subject, chosen, place
from saltflat.landscape import along, random_direction


def landscape(
    of: Subject,
    alphas: Sequence[float],
    directions: int,
    split: str,
    examples: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """g(alpha) = rho(w + alpha d), attacked afresh at every alpha, along random filter-normalised directions.

    Written into the run folder; what was asked before, of the same weights, is read and not computed again.
    """
    x, y, _ = chosen(of, split, examples)
    images, attack = Images(x, y, int(y.max()) + 1, split), of.threat.pgd(steps)
    asked = {
        "checkpoint": of.checkpoint,
        "sha256": of.sha256,
        "split": split,
        "n": len(images),
        "alphas": list(alphas),
        "settings": {
            "direction": "random, filter-normalised, no biases and norm layers",
            "attack": f"{of.threat.pgd_in_words(steps)}, made afresh at each alpha, starts per example",
            "batch_norm": "eval mode",
            "seed": seed,
            "batch_size": batch_size,
        },
    }
    path = place(of, "landscapes", split, {**asked, "directions": directions})
    if path.is_file():
        return record.read_again(path)

    def measure() -> tuple[float, float, float]:
        robust = collect(outcomes_by_batch(of.model, images, attack, batch_size=batch_size, seed=seed))
        clean = collect(outcomes_by_batch(of.model, images, None, batch_size=batch_size))
        return robust.mean_loss, robust.accuracy, clean.mean_loss

    curves = []
    with progress() as bar:
        task = bar.add_task(f"landscape of {of.folder.absolute().name}", total=directions * len(alphas))
        for direction_seed in range(seed, seed + directions):
            points = []
            for _, point in along(of.model, random_direction(of.model, direction_seed), alphas, measure):
                points.append(point)
                bar.advance(task)
            robust_loss, robust_accuracy, clean_loss = map(list, zip(*points, strict=True))
            curves.append(
                {
                    "direction_seed": direction_seed,
                    "robust_loss": robust_loss,
                    "robust_accuracy": robust_accuracy,
                    "clean_loss": clean_loss,
                }
            )
    found = {**asked, "curves": curves}
    record.write_json(path, found)
    return found


def rise(found: dict[str, Any]) -> str:
    """A landscape in one line: g(0), and how far the mean curve rises to its ends."""
    alphas, mean = found["alphas"], np.mean([curve["robust_loss"] for curve in found["curves"]], axis=0)
    g0 = mean[alphas.index(0.0)]
    return (
        f"g(0) = {g0:.3f} nats, rises by {mean[0] - g0:.3f} at alpha = {alphas[0]:g} and by {mean[-1] - g0:.3f} at "
        f"{alphas[-1]:g}; directions: {len(found['curves'])}"
    )
