"""What cheaper ways of perturbing weights cost or keep: arms of runs with the same seeds, beside the exact one.

    python benchmarks/arms.py FOLDER --reference exact --out arms.json

FOLDER holds run folders ARM-seedN, evaluated and measured (`saltflat evaluate`, `saltflat flatness`). For every
quantity: mean and sample standard deviation over seeds, and the same of the differences to the reference, seed by seed.
Robust accuracies and gaps are those of the last epoch, at w. How long steps took says little where runs shared a
machine: `training_step.py` measures that.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import arms_beside

from saltflat.lab import record
from saltflat.lab.report.runs import Run, read_run
from saltflat.lab.report.statistics import at, differing, last, over_seeds, paired

Quantity = Callable[[Run], float | None]


def attacked(name: str) -> Quantity:
    """Percent of the test set that stays right under this attack, on the last checkpoint."""

    def found(run: Run) -> float | None:
        of = [one for outcome in run.outcomes if outcome.checkpoint == "last" for one in outcome.attacks]
        return next((100 * one.accuracy for one in of if one.name == name), None)

    return found


def flatness(name: str) -> Quantity:
    """A measure of the last checkpoint."""

    def found(run: Run) -> float | None:
        of = [one for flat in run.flatness if flat.checkpoint == "last" for one in flat.measures]
        return next((one.value for one in of if one.name == name), None)

    return found


def quantities(runs: Sequence[Run]) -> dict[str, Quantity]:
    """By name, with their units."""
    attacks = dict.fromkeys(one.name for run in runs for outcome in run.outcomes for one in outcome.attacks)
    measures = {one.name: one.unit for run in runs for flat in run.flatness for one in flat.measures}
    return {
        **{f"{name}, test, %": attacked(name) for name in attacks},
        "gap, points": at(last, lambda epoch: epoch.gap),
        "gap, nats": at(last, lambda epoch: epoch.loss_gap),
        **{f"{name}, {unit}": flatness(name) for name, unit in measures.items()},
    }


def arms(folder: Path) -> dict[str, list[Run]]:
    """Runs by arm, in the order of names."""
    found: dict[str, list[Run]] = {}
    for path in sorted(folder.iterdir()):
        named = re.fullmatch(r"(.+)-seed(\d+)", path.name)
        if named is not None:
            found.setdefault(named[1], []).append(read_run(path))
    return found


def summary(by_arm: Mapping[str, Sequence[Run]], reference: str) -> dict[str, Any]:
    """{arm: {"n", "settings": where it differs from others, "values" and "differences": {quantity: by seed}}}."""
    everybody = [run for runs in by_arm.values() for run in runs]
    fields = [field for field in differing([run.config for run in everybody]) if field != "seed"]
    asked = quantities(everybody)
    spreads = {
        arm: {name: over_seeds(runs, quantity) for name, quantity in asked.items()} for arm, runs in by_arm.items()
    }
    return {
        arm: {
            "n": len(runs),
            "settings": {field: runs[0].config.get(field, "") for field in fields},
            "values": {name: spread.by_seed for name, spread in spreads[arm].items()},
            "differences": {
                name: paired(spreads[reference][name], spread).by_seed for name, spread in spreads[arm].items()
            },
        }
        for arm, runs in by_arm.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", default="exact")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    by_arm = arms(given.folder)
    if given.reference not in by_arm:
        raise SystemExit(f"reference: expected one of {', '.join(by_arm) or 'no arms'}, got {given.reference!r}")
    found = summary(by_arm, given.reference)
    print(arms_beside(found, given.reference))
    if given.out is not None:
        first = next(iter(by_arm.values()))[0]
        common = {key: value for key, value in first.config.items() if key not in found[given.reference]["settings"]}
        record.write_json(
            given.out,
            {
                "what": "arms of runs",
                "reference": given.reference,
                "config": common,
                "environment": dict(first.environment),
                "evaluation": dict(first.evaluation),
                "arms": found,
            },
        )


if __name__ == "__main__":
    main()
