"""The study behind `saltflat study claims`: does AWP do what its paper says? The arms of a preset, each with several
seeds, trained, measured and held against each other.

    OUT/runs/ARM-seedN/        the run folders
    OUT/results/ARM-seedN.json all that was found of a run, which alone is enough to go on from: who has the results
                               of finished runs need not train them again
    OUT/logs/ARM-seedN.log     what the workers printed
    OUT/claims.html            the page

Whatever is finished is kept, and what was interrupted goes on, a training from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saltflat.lab import record, trainings
from saltflat.lab.config import BadInput, Train, checked
from saltflat.lab.console import say
from saltflat.lab.evaluations import How as Attacked
from saltflat.lab.evaluations import evaluation
from saltflat.lab.flatness import flatness
from saltflat.lab.gaps import robust_gap
from saltflat.lab.landscapes import line
from saltflat.lab.study import claims_page
from saltflat.lab.study.arms import Arm, Plan
from saltflat.lab.study.claims_results import grouped, read_results
from saltflat.lab.study.table import plain
from saltflat.lab.study.workers import Engine, side_by_side
from saltflat.lab.subjects import from_run
from saltflat.lab.threat import columns, trained_against

CHECKPOINTS = ("best", "last")


@dataclass(frozen=True)
class Entry:
    """A run to be made, what is measured of it, and the file that says what was found."""

    arm: Arm
    config: Train
    plan: Plan
    folder: Path
    result: Path


def entries(runs: Mapping[str, tuple[Arm, Train]], plan: Plan, out: Path) -> dict[str, Entry]:
    """By name. BadInput for configs that cannot be, and for attacks that are none."""
    found = {}
    for name, (arm, config) in runs.items():
        found[name] = Entry(arm, checked(config), plan, out / "runs" / name, out / "results" / f"{name}.json")
        columns(plan.attacks, trained_against(config.attack))
    return found


def study(asked: Mapping[str, Entry], title: str, out: Path, engine: Engine) -> None:
    """Train, measure, and write the page. All that can be seen to be wrong is found before anything is written."""
    began = time.perf_counter()
    record.check_folder("out", out)
    missing = {name: entry for name, entry in asked.items() if _found(entry) is None}
    trainings.check_free({entry.folder: entry.config for entry in missing.values()})
    for config in {repr((entry.config.data, entry.config.extra)): entry.config for entry in missing.values()}.values():
        trainings.check(config)
    with engine() as executor, record.alone(out / "study.lock"):
        (out / "results").mkdir(parents=True, exist_ok=True)
        side_by_side(_made, missing, executor, out / "logs", in_words)
        order = list(dict.fromkeys(entry.arm.name for entry in asked.values()))
        path = claims_page.write(grouped(read_results(out / "results"), order), title, out)
    say(f"{len(asked)} runs in {time.perf_counter() - began:.0f} s; open {path} in a browser")


def asked_of(entry: Entry) -> str:
    """A digest of what decides a run's result: its config, and what is measured of it."""
    decides = {"config": record.deciding(asdict(entry.config)), "plan": asdict(entry.plan)}
    return record.digest(plain(decides))


def _found(entry: Entry) -> dict[str, Any] | None:
    """A result that is there; BadInput if it is of another question."""
    if not entry.result.is_file():
        return None
    found = record.read_again(entry.result, ("asked", "arm", "seed"))
    if found["asked"] != asked_of(entry):
        raise BadInput(f"out: {entry.result} is of other settings; choose another folder, or delete the file")
    return found


def _made(entry: Entry) -> dict[str, Any]:
    """Train, measure the best checkpoint and the last, and write down what was found.

    A training whose loss leaves the numbers is a result, too: it has a note, and nothing was measured.
    """
    found = {
        "asked": asked_of(entry),
        "arm": entry.arm.name,
        "question": entry.arm.question,
        "against": entry.arm.against,
        "seed": entry.config.seed,
        "config": record.deciding(asdict(entry.config)),
        "plan": asdict(entry.plan),
    }
    try:
        trainings.made(entry.config, entry.folder)
        found |= {"note": "", **_measured(entry)}
    except FloatingPointError as error:
        found |= {"note": f"training failed: {error}"}
    found["environment"] = json.loads((entry.folder / "environment.json").read_text())
    written = plain(found)
    record.write_json(entry.result, written)
    return found


def _measured(entry: Entry) -> dict[str, Any]:
    epochs = [json.loads(text) for text in (entry.folder / "metrics.jsonl").read_text().splitlines()]
    best = max(epoch["epoch"] for epoch in epochs if epoch["best"])
    found: dict[str, Any] = {"epochs": [_epoch(epoch) for epoch in epochs]}
    plan = entry.plan
    for checkpoint in CHECKPOINTS:
        of = from_run(entry.folder, checkpoint, entry.config.device)
        attacked = evaluation(of, plan.attacks, "test", plan.examples, Attacked())
        found[checkpoint] = {
            "epoch": best if checkpoint == "best" else epochs[-1]["epoch"],
            "gap": _some(robust_gap(of, plan.gap), ("train", "test", "gap", "longer", "settings")),
            "attacks": {"n": attacked["n"], "rows": attacked["attacks"], "flags": attacked["flags"]},
        }
    found["flatness"] = _some(flatness(of, plan.measures, plan.how), ("split", "n", "settings", "measures"))
    lines = line(of, plan.alphas, plan.directions, plan.slices)
    found["landscape"] = _some(lines, ("split", "n", "settings", "alphas", "curves", "gaps"))
    return found


def _epoch(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What learning curves show of a line of metrics.jsonl."""
    sides = {side: _some(metrics[side], ("robust_accuracy", "clean_accuracy")) for side in ("train", "test")}
    return _some(metrics, ("epoch", "learning_rate", "dropped", "best", "seconds")) | sides


def _some(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def in_words(found: Mapping[str, Any]) -> str:
    """For a line while the study runs."""
    if found["note"]:
        return str(found["note"])
    best, last = (100 * found[checkpoint]["gap"]["test"]["robust_accuracy"] for checkpoint in CHECKPOINTS)
    gap = 100 * found["last"]["gap"]["gap"]["accuracy"]
    return f"robust test {best:.1f} % at best, {last:.1f} % at last; gap {gap:.1f} points"
