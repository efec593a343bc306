"""The adversarial speed record: how long trainings took, and how robust what they made is.

    python benchmarks/speedrun.py FOLDER
    python benchmarks/speedrun.py FOLDER --target pgd-20=0.50 --target standard=0.47

FOLDER holds runs of one config that differ in their seed, as `speedrun.sh` makes them. All is read from their own
files: the config, the machine, every epoch's metrics, and the evaluation of the last weights, which are the moving
average where training has one. Printed as Markdown, and written to FOLDER/record.json. Code 2 and one line on stderr,
where runs are unfinished, or are not repetitions of one thing.

Time of training is the sum over epochs of the seconds of their steps, with all that makes and moves batches, and with
compiling; and beside it, the same with the measurements after every epoch. Neither has the start of processes. A run
that was interrupted is counted whole: metrics have whole epochs only, one that was cut is made again, and the time lost
in it is not counted. Of machines, that which a run began on is known, and that on which it was evaluated.

Accuracies are on as many images as the table says. Where several evaluations are there, that of most images counts, and
among equal ones that which left fewest standing. A target that is given is of whatever task the runs are; that of
speedrun-cifar10 is stated for one task, and nothing is said about it by runs of another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from saltflat.lab import record
from saltflat.lab.checkpoints import digest
from saltflat.lab.config import BadInput, Train, as_text, shown
from saltflat.lab.recipes import RECIPES

ATTACKS = ("pgd-20", "standard")
ELSEWHERE = ("device", "threads", "data.path", "extra.path")
NEEDED = ("checkpoint", "sha256", "split", "n", "settings", "threat", "attacks", "seconds", "environment")


@dataclass(frozen=True)
class Target:
    """Accuracies under attacks that have to be reached, and the task on which they are stated, if they are of one."""

    accuracy: Mapping[str, float]
    task: Mapping[str, str] = field(default_factory=dict)


STATED = {
    "speedrun-cifar10": Target(
        {"pgd-20": 0.50, "standard": 0.47},
        {
            "data": "cifar10",
            "network": "preact-resnet18",
            "weight adversary": "awp",
            "threat": "Linf, eps 8/255",
            "test images": "10000",
        },
    )
}


@dataclass(frozen=True)
class Run:
    """A whole training, and the evaluations of its last weights by the asked attacks."""

    folder: Path
    config: Train
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]  # by what was asked, in words

    @property
    def seconds(self) -> float:
        return float(sum(line["seconds"] for line in self.metrics))

    @property
    def seconds_with_measurements(self) -> float:
        return self.seconds + float(sum(line["evaluation_seconds"] for line in self.metrics))


def read(folder: Path, attacks: Sequence[str]) -> Run:
    """BadInput if it isn't whole."""
    config, metrics = record.read_config(folder), record.read_metrics(folder)
    epochs = config.optimizer.epochs
    if [line["epoch"] for line in metrics] != list(range(1, epochs + 1)):
        raise BadInput(f"{folder}: expected metrics of {epochs} epochs, got {len(metrics)}; speedrun.sh goes on")
    for line in metrics:
        for name in ("seconds", "evaluation_seconds"):
            if not isinstance(line.get(name), float):
                raise BadInput(f"{folder}: epoch {line['epoch']}: expected {name}, got {line.get(name)!r}")
    environment = record.read_again(folder / "environment.json", ("torch", "device", "processor", "threads"))
    weights, evaluations = folder / "checkpoints" / "last.safetensors", {}
    for path in sorted((folder / "outcomes").glob("*.json")):
        of = record.read_again(path, NEEDED)
        asked = {each["name"]: each["description"] for each in of["attacks"]}
        of_last = of["checkpoint"] == "last" and of["split"] == "test" and set(attacks) <= asked.keys()
        if of_last and (not weights.is_file() or of["sha256"] == digest(weights)):
            evaluations[json.dumps([of["n"], of["threat"], of["settings"], asked], sort_keys=True)] = of
    return Run(folder, config, environment, metrics, evaluations)


def collected(folder: Path, target: Target | None) -> dict[str, Any]:
    """The record; BadInput if the folder holds none."""
    paths = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not paths:
        raise BadInput(f"{folder}: expected a folder of run folders")
    wanted = ATTACKS if target is None else tuple(target.accuracy)
    runs = sorted((read(path, wanted) for path in paths), key=lambda run: run.config.seed)
    _check_alike(runs)
    asked = _asked(runs, wanted)
    config, evaluations = runs[0].config, [run.evaluations[asked] for run in runs]
    target = target or STATED.get(config.recipe)
    departures = [] if target is None else _departures(target, config, evaluations[0])
    rows = [_row(*each, target, departures) for each in zip(runs, evaluations, strict=True)]
    kept = ("n", "split", "threat", "settings")
    columns = {
        "seconds": [row["seconds"] for row in rows],
        "seconds_with_measurements": [row["seconds_with_measurements"] for row in rows],
        **{name: [row["accuracy"][name] for row in rows] for name in rows[0]["accuracy"]},
    }
    return {
        "what": "time of training to a robust accuracy",
        "recipe": config.recipe,
        "config": _tree(config),
        "changed": _changed(config),
        "environment": runs[0].environment,
        "evaluation": {
            **{name: evaluations[0][name] for name in kept},
            "attacks": {each["name"]: each["description"] for each in evaluations[0]["attacks"]},
        },
        "target": None if target is None else {"accuracy": dict(target.accuracy), "task": dict(target.task)},
        "departures": departures,
        "runs": rows,
        "summary": {name: _spread(values) for name, values in columns.items()},
    }


def _check_alike(runs: Sequence[Run]) -> None:
    """BadInput unless all are one config at different seeds, trained on one kind of machine."""
    first, seeds = runs[0], [run.config.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"{first.folder.parent}: expected a seed of its own for every run, got {seeds}")
    for run in runs[1:]:
        for one, other in ((_flat(_tree(first.config)), _flat(_tree(run.config))), (_machine(first), _machine(run))):
            for name in one:
                if one[name] != other[name]:
                    raise BadInput(
                        f"{name}: expected the same in all runs, got {one[name]!r} in {first.folder} and "
                        f"{other[name]!r} in {run.folder}"
                    )


def _tree(config: Train) -> dict[str, Any]:
    """The config without its seed, as it stands in a file."""
    tree: dict[str, Any] = yaml.safe_load(as_text(config))
    del tree["seed"]
    return tree


def _changed(config: Train) -> dict[str, Any]:
    """Fields that are not as in the recipe of that name, but for where and on what it runs."""
    if config.recipe not in RECIPES:
        return {}
    recipe = _flat(_tree(RECIPES[config.recipe]))
    fields = _flat(_tree(config)).items()
    return {name: value for name, value in fields if value != recipe[name] and name not in ELSEWHERE}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> _flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _machine(run: Run) -> dict[str, Any]:
    """What seconds depend on; a GPU's host may be another."""
    names = ["saltflat", "torch", "cuda", "device", "precision"]
    if run.environment.get("cuda") is None:
        names += ["processor", "threads"]
    return {name: run.environment.get(name) for name in names}


def _asked(runs: Sequence[Run], attacks: Sequence[str]) -> str:
    """The evaluation that counts, of those that all runs have."""
    common = set.intersection(*(set(run.evaluations) for run in runs))
    if not common:
        words = " and ".join(attacks)
        raise BadInput(f"{runs[0].folder.parent}: the last weights of all runs have no common evaluation by {words}")

    def order(asked: str) -> tuple[int, float, str]:
        of = [run.evaluations[asked] for run in runs]
        standing = sum(each["accuracy"] for one in of for each in one["attacks"] if each["name"] in attacks)
        return -of[0]["n"], standing, asked

    return min(common, key=order)


def _departures(target: Target, config: Train, evaluation: Mapping[str, Any]) -> list[str]:
    """In which respects this is another task than the target's."""
    threat = evaluation["threat"]
    task = {
        "data": config.data.name,
        "network": config.model.name,
        "weight adversary": config.awp.method if config.awp.gamma > 0 else "none",
        "threat": f"{threat['norm']}, eps {shown(threat['eps'])}",
        "test images": str(evaluation["n"]),
    }
    return [f"{name} {task[name]} instead of {wanted}" for name, wanted in target.task.items() if task[name] != wanted]


def _row(run: Run, evaluation: Mapping[str, Any], target: Target | None, departures: Sequence[str]) -> dict[str, Any]:
    accuracy = {each["name"]: each["accuracy"] for each in evaluation["attacks"]}
    missed = {} if target is None else {name: at for name, at in target.accuracy.items() if accuracy[name] < at}
    return {
        "run": run.folder.name,
        "seed": run.config.seed,
        "epochs": len(run.metrics),
        "seconds": run.seconds,
        "seconds_with_measurements": run.seconds_with_measurements,
        "accuracy": accuracy,
        "interval": {each["name"]: each["interval"] for each in evaluation["attacks"]},
        "missed": sorted(missed),
        "met": None if target is None or departures else not missed,
        "evaluation_seconds": evaluation["seconds"],
        "environment": run.environment,
        "evaluation_environment": evaluation["environment"],
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """
    >>> _spread([1.0, 3.0])
    {'mean': 2.0, 'standard_deviation': 1.4142135623730951, 'n': 2}
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "n": len(values)}


def markdown(of: Mapping[str, Any]) -> str:
    """The record for people: what it is, a row a run, and whether the target was met."""
    names, summary = list(of["runs"][0]["accuracy"]), of["summary"]
    head = ["seed", "training, s", "with measurements, s", *(f"{name}, %" for name in names), "target"]
    rows = [
        [
            str(row["seed"]),
            f"{row['seconds']:.1f}",
            f"{row['seconds_with_measurements']:.1f}",
            *(f"{100 * row['accuracy'][name]:.2f}" for name in names),
            {True: "met", False: f"missed: {', '.join(row['missed'])}", None: ""}[row["met"]],
        ]
        for row in of["runs"]
    ]
    times = [_around(summary[name], 1) for name in ("seconds", "seconds_with_measurements")]
    rows.append([_runs(len(rows)), *times, *(_around(summary[name], 2, 100) for name in names), ""])
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"], *rows]
    return "\n\n".join([_about(of), "\n".join(f"| {' | '.join(line)} |" for line in lines), _verdict(of)])


def _about(of: Mapping[str, Any]) -> str:
    machine, evaluation = of["environment"], of["evaluation"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = f"{threads} of {machine['processor']}" if machine.get("cuda") is None else machine["device"]
    threat, settings = evaluation["threat"], evaluation["settings"]
    changed = "".join(f", {name} {value}" for name, value in of["changed"].items())
    return (
        f"{of['recipe']}{changed}: {of['runs'][0]['epochs']} epochs, {machine.get('precision', 'precision unknown')}, "
        f"on {where}, torch {machine['torch']}. Accuracy on {evaluation['n']} test images, {threat['norm']}, eps "
        f"{shown(threat['eps'])}, attacks in {settings['precision']}; weights: {settings['weights']}. "
        f"Mean{'' if len(of['runs']) == 1 else ' ± sample standard deviation'} over seeds."
    )


def _verdict(of: Mapping[str, Any]) -> str:
    """Whether the target was met, and nothing kinder."""
    if of["target"] is None:
        return "No target was stated, so none was met or missed."
    wanted = ", ".join(f"{name} at least {at:.2%}" for name, at in of["target"]["accuracy"].items())
    if of["departures"]:
        return f"Nothing is said about the target ({wanted}): this is another task, {'; '.join(of['departures'])}."
    met, runs = [row["seed"] for row in of["runs"] if row["met"]], len(of["runs"])
    if len(met) == runs:
        return f"The target ({wanted}) was met by {'the only run' if runs == 1 else f'all {runs} runs'}."
    by = f"met by {len(met)} of {runs} runs" if met else f"not met by {'the only run' if runs == 1 else 'any run'}"
    return f"The target ({wanted}) was {by}: the times above are no times to it."


def _runs(n: int) -> str:
    return "n = 1 run" if n == 1 else f"n = {n} runs"


def _around(of: Mapping[str, Any], digits: int, unit: float = 1) -> str:
    mean, deviation = of["mean"], of["standard_deviation"]
    return f"{unit * mean:.{digits}f}" + ("" if deviation is None else f" ± {unit * deviation:.{digits}f}")


def stated(words: Sequence[str]) -> Target | None:
    """A target as typed.

    >>> stated(["pgd-20=0.5"]).accuracy
    {'pgd-20': 0.5}
    """
    accuracy: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            accuracy[name] = float(value)
        except ValueError:
            accuracy[name] = -1.0
        if not name or not 0 <= accuracy[name] <= 1:
            raise BadInput(f"target: expected ATTACK=ACCURACY with an accuracy from 0 to 1, got {word!r}")
    return Target(accuracy) if accuracy else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append", default=[], metavar="ATTACK=ACCURACY")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    try:
        of = collected(given.folder, stated(given.target))
    except BadInput as error:
        print(f"speedrun: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    record.write_json(given.out or given.folder / "record.json", of)
    print(markdown(of))


if __name__ == "__main__":
    main()
