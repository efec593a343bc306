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

import time
from collections.abc import Callable, Mapping, Sequence
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
from saltflat.lab.study.claims_results import Result, grouped, read_results
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


def entry(arm: Arm, config: Train, plan: Plan, out: Path) -> Entry:
    """BadInput for a config that cannot be, and for attacks that are none."""
    config = checked(config)
    columns(plan.attacks, trained_against(config.attack))
    name = f"{arm.name}-seed{config.seed}"
    return Entry(arm, config, plan, out / "runs" / name, out / "results" / f"{name}.json")


def study(
    asked: Mapping[str, Entry], expected: Callable[[str, int], Entry | None], title: str, out: Path, engine: Engine
) -> None:
    """Train, measure, and write the page, which shows what was found before as well.

    All that can be seen to be wrong is found before anything is written. `expected`: what an arm by name, and a seed,
    would be asked now, so that a page never shows together what was asked otherwise; None for no arm of the preset.
    """
    began = time.perf_counter()
    record.check_folder("out", out)
    for result in read_results(out / "results"):
        _check_same(out, result, expected(result.arm, result.seed))
    missing = {name: entry for name, entry in asked.items() if not entry.result.is_file()}
    trainings.check_free({entry.folder: entry.config for entry in missing.values()})
    for config in {repr((entry.config.data, entry.config.extra)): entry.config for entry in missing.values()}.values():
        trainings.check(config)
    with engine() as executor, record.alone(out / "study.lock"):
        (out / "results").mkdir(parents=True, exist_ok=True)
        side_by_side(_made, missing, executor, out / "logs", in_words)
        order = list(dict.fromkeys(entry.arm.name for entry in asked.values()))
        path = claims_page.write(grouped(read_results(out / "results"), order), title, out)
    say(f"{len(asked)} runs in {time.perf_counter() - began:.0f} s; open {path} in a browser")


def _check_same(out: Path, there: Result, entry: Entry | None) -> None:
    """BadInput for a result that is of another question: of no arm of this preset, or of other settings. What its
    version did not know yet counts as having today's default.
    """
    where = f"out: {out / 'results'} holds {there.arm}, seed {there.seed},"
    if entry is None:
        raise BadInput(f"{where} which is no arm of this preset; choose another folder")
    ours = {"config": record.deciding(asdict(entry.config)), "plan": asdict(entry.plan)}
    usual = {"config": record.deciding(asdict(Train())), "plan": asdict(entry.plan)}
    wanted, found = _leaves(plain(ours)), _leaves(plain(usual)) | _leaves({"config": there.config, "plan": there.plan})
    if apart := [name for name in wanted if found.get(name) != wanted[name]]:
        raise BadInput(f"{where} of other settings (see {apart[0]}); choose another folder, or delete the file")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _made(entry: Entry) -> dict[str, Any]:
    """Train, measure the best checkpoint and the last, and write down what was found.

    A training whose loss leaves the numbers is a result, too: it has a note, and nothing was measured.
    """
    found = {
        "arm": entry.arm.name,
        "question": entry.arm.question,
        "against": entry.arm.against,
        "seed": entry.config.seed,
        "config": record.deciding(asdict(entry.config)),
        "plan": asdict(entry.plan),
    }
    try:
        trainings.made(entry.config, entry.folder)
        found["note"] = ""
    except FloatingPointError as error:
        found["note"] = f"training failed: {error}"
    if not found["note"]:
        found |= _measured(entry)
    found["environment"] = record.read_again(entry.folder / "environment.json")
    record.write_json(entry.result, plain(found))
    return found


def _measured(entry: Entry) -> dict[str, Any]:
    epochs = record.read_metrics(entry.folder)
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
