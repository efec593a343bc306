"""What cheaper ways of perturbing weights cost or keep: arms of runs with the same seeds, beside the exact one.

    python benchmarks/arms.py FOLDER --reference exact --out arms.json

FOLDER holds run folders ARM-seedN, evaluated and measured (`saltflat evaluate`, `saltflat flatness`). For every
quantity: mean and sample standard deviation over seeds, and the same of the differences to the reference, seed by seed.
Robust accuracies and gaps are those of the last epoch, at w. Runs of an arm that differ in more than their seeds, and
runs that were not computed in one precision or not measured alike, are refused. How long steps took says little where
runs shared a machine: `training_step.py` measures that.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import arms_beside

from saltflat.lab import record
from saltflat.lab.config import BadInput
from saltflat.lab.report.runs import Flatness, Outcome, Run, read_run
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
    """Runs by arm, in the order of names; BadInput for a folder that is no run."""
    found: dict[str, list[Run]] = {}
    for path in sorted(folder.iterdir()):
        named = re.fullmatch(r"(.+)-seed(\d+)", path.name)
        if named is not None:
            found.setdefault(named[1], []).append(read_run(path))
    return found


def mixture(by_arm: Mapping[str, Sequence[Run]]) -> str | None:
    """Why runs cannot be compared, in a line; None if they can. Those of an arm have to differ in their seeds alone,
    and to be computed in one precision; all have to be measured in the same way, on as many images.
    """
    for arm, runs in by_arm.items():
        fields = [field for field in differing([run.config for run in runs]) if field != "seed"]
        if fields:
            return f"{arm}: expected runs that differ in their seeds alone, got several {', '.join(fields)}"
        if len({run.seed for run in runs}) != len(runs):
            return f"{arm}: expected one run a seed, got seeds {', '.join(str(run.seed) for run in runs)}"
        if len(precisions := {run.environment.get("precision", "unknown") for run in runs}) > 1:
            return f"{arm}: expected one precision, got {' and '.join(sorted(precisions))}"
    everybody = [run for runs in by_arm.values() for run in runs]
    seen = {run: measured_by(run) for run in everybody}
    for what in dict.fromkeys(key for found in seen.values() for key in found):
        ways = {found[what] for found in seen.values() if what in found}
        if len(ways) > 1:
            return f"{what}: expected the same of all runs, got {' and '.join(sorted(ways))}"
    return None


def measured_by(run: Run) -> dict[str, str]:
    """How what is compared was measured, in words; only what is on record."""
    found = {f"evaluation.{key}": value for key, value in run.evaluation.items()}
    for epoch in run.epochs[-1:]:
        found |= {"last epoch": str(epoch.number), "images": f"{epoch.train.n} of train, {epoch.test.n} of test"}
    for one in run.outcomes:
        if one.checkpoint == "last":
            asked = {f"{attack.name}, last": in_words(one, attack.description) for attack in one.attacks}
            found |= {name: how for name, how in asked.items() if name not in found}
    for flat in run.flatness:
        if flat.checkpoint == "last":
            asked = {f"{measure.name}, last": in_words(flat, measure.settings) for measure in flat.measures}
            found |= {name: how for name, how in asked.items() if name not in found}
    return found


def in_words(of: Outcome | Flatness, how: str) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in sorted(of.settings.items()))
    return "; ".join(part for part in (f"{of.n} of {of.split}", how, settings) if part)


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
    try:
        by_arm = arms(given.folder)
    except (BadInput, OSError) as error:
        raise SystemExit(f"folder: {error}") from None
    if given.reference not in by_arm:
        raise SystemExit(f"reference: expected one of {', '.join(by_arm) or 'no arms'}, got {given.reference!r}")
    if (why := mixture(by_arm)) is not None:
        raise SystemExit(why)
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
