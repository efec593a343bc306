"""Notes: what is missing, damaged or not comparable, each thing once, with the runs that it concerns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saltflat.lab.report.notation import counted
from saltflat.lab.report.runs import Run
from saltflat.lab.report.statistics import Group, measured, runs_of

# Facts that should be equal in all runs that are compared, and what to say if they aren't.
SHARED_EVALUATION = {
    "attack": "The epochs were measured with different attacks",
    "mode": "The epochs were measured in different modes",
    "weights": "The epochs were measured at different kinds of weights",
}
SHARED_ENVIRONMENT = {
    "git.commit": "The runs come from different commits",
    "torch": "The runs come from different versions of torch",
    "processor": "The runs come from different processors",
    "device": "The runs come from different devices",
    "precision": "The runs were trained in different precisions",
    "threads": "The runs come from different numbers of threads",
}


@dataclass(frozen=True)
class Note:
    """A remark and the runs that it concerns."""

    text: str
    where: str


def notes(groups: Sequence[Group], given: int) -> list[Note]:
    """The remarks on single runs, then those on the comparison; `given` counts the runs before any was left out."""
    concerned: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            for text in dict.fromkeys((*run.notes, *_remarks(group, run))):
                concerned.setdefault(text, []).append(f"{group.name}, seed {run.seed}")
    n = len(runs_of(groups))
    everywhere = "every run" if n > 1 else "this run"
    listed = [Note(text, everywhere if len(names) == n else "; ".join(names)) for text, names in concerned.items()]
    return listed + [Note(text, "the comparison") for text in _comparability(groups, given)]


def _remarks(group: Group, run: Run) -> list[str]:
    unfinished = bool(run.epochs) and run not in group.finished
    skipped = sum(epoch.skipped or 0 for epoch in run.epochs)
    dropped = sum(epoch.dropped or 0 for epoch in run.epochs)
    fallen = ", ".join(str(epoch.number) for epoch in run.epochs if epoch.collapsed)
    losses = [loss for epoch in run.epochs for loss in (epoch.train.robust_loss, epoch.test.robust_loss)]
    end = f"Stopped after epoch {run.reached} of"
    attacked = any(one.name != "clean" for outcome in run.outcomes for one in outcome.attacks)
    tensors = counted(skipped, "weight tensor")
    remarks = {
        f"{end} {group.last_epoch}: drawn as thin lines and left out of all means": unfinished,
        f"{end} {run.planned}": 0 < run.reached < run.planned and not unfinished,
        "No epoch was chosen on a validation split: there is no best": run.epochs and not run.best,
        "A robust loss is not finite": not all(map(math.isfinite, losses)),
        f"{tensors} stayed unperturbed for a step: no usable gradient, or nothing to climb": skipped,
        f"{counted(dropped, 'batch', 'batches')} dropped, whose gradients were not finite": dropped,
        f"Robust accuracy on the training subset fell by more than 20 points in epoch {fallen}": fallen,
        "No adversarial example is on record: none was kept, or no attack succeeded": attacked and not run.examples,
        "The working tree had uncommitted changes": run.environment.get("git.dirty") == "yes",
    }
    return [text for text, holds in remarks.items() if holds]


def _comparability(groups: Sequence[Group], given: int) -> list[str]:
    runs = runs_of(groups)
    left_out = counted(given - len(runs), "run")
    ends = [(group.name, group.last_epoch) for group in measured(groups)]
    listed = ", ".join(f"{name} at epoch {end}" for name, end in ends)
    remarks = {
        f"{left_out} of equal configuration and seed left out: the first given counts": given > len(runs),
        f"The groups end at different epochs: {listed}": len({end for _, end in ends}) > 1,
    }
    for key, text in SHARED_EVALUATION.items():
        remarks[text] = len({run.evaluation[key] for run in runs if key in run.evaluation}) > 1
    for key, text in SHARED_ENVIRONMENT.items():
        remarks[text] = len({run.environment[key] for run in runs if key in run.environment}) > 1
    return [text for text, holds in remarks.items() if holds]
