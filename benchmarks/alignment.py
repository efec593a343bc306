"""How far the amortised ascent goes along AWP's own: cosines between the two, on checkpoints of runs.

    python benchmarks/alignment.py RUN ... --batches 8 --out alignment.json

For each run, batches of its training images as they are, of its own size, under its own attack: the cosine between
the displacements that AWP would make of the amortised gradient and of its own (`amortised.overall`), with the joint
gradient in the attack's mode and in that of training. Mean over batches, and their sample standard deviation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tables import around_mean

from saltflat.evaluation.suite import prepared
from saltflat.lab import build, record
from saltflat.lab.config import BadInput
from saltflat.lab.subjects import from_run
from saltflat.neighbours.amortised import alignment, overall
from saltflat.random import seeded

MODES = ("attack", "outer")


def cosines(run: Path, checkpoint: str, data_path: Path | None, batches: int, seed: int) -> dict[str, list[float]]:
    """By joint mode, one a batch."""
    of, config = from_run(run, checkpoint, "cpu", None, data_path), record.read_config(run)
    (images, labels), model = of.splits["train"], of.model.train()
    plan = build.plan(config, int(labels.max()) + 1)
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    order = torch.randperm(len(labels), generator=seeded(seed)).split(plan.batch_size)
    for number, rows in enumerate(order[:batches]):
        x, y = prepared(images[rows], model), labels[rows]
        for mode in MODES:
            cosine = alignment(
                model, x, y, objective=plan.objective(0), attack=plan.attack(0), attack_mode=config.attack.mode,
                joint_mode=mode, generator=seeded(seed, number),
            )  # fmt: skip
            found[mode].append(float(overall(model, cosine)))
    return found


def shown(found: dict[str, dict[str, list[float]]]) -> str:
    """A row a run."""
    rows = ["run                            attack's mode      training's mode"]
    for name, by_mode in found.items():
        cells = [f"{around_mean(values):13}" for values in by_mode.values()]
        rows.append(f"{name:28} {'      '.join(cells)}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--data-path", type=Path, default=None)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    if given.batches < 1:
        raise SystemExit(f"batches: expected an integer >= 1, got {given.batches}")
    found: dict[str, Any] = {}
    for run in given.runs:
        try:
            found[run.name] = cosines(run, given.checkpoint, given.data_path, given.batches, given.seed)
        except BadInput as error:
            raise SystemExit(str(error)) from None
        print(shown({run.name: found[run.name]}).splitlines()[-1], flush=True)
    if given.out is not None:
        asked = {"checkpoint": given.checkpoint, "batches": given.batches, "seed": given.seed}
        environment = record.environment("cpu", torch.get_num_threads(), None)
        found = {"what": "cosines of ascents", **asked, "cosines": found, "environment": environment}
        record.write_json(given.out, found)


if __name__ == "__main__":
    main()
