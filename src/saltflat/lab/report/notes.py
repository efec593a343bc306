"""Notes: what is missing, damaged or not comparable, each thing once, with the runs that it concerns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saltflat.lab.report.groups import Group, measured, runs_of
from saltflat.lab.report.notation import counted
from saltflat.lab.report.runs import Run

# Facts that should be equal in all runs that are compared, and what to say if they aren't.
SHARED_EVALUATION = {
    "attack": "The epochs were measured with different attacks",
    "mode": "The epochs were measured in different modes",
}
SHARED_ENVIRONMENT = {
    "git.commit": "The runs come from different commits",
    "torch": "The runs come from different versions of torch",
    "processor": "The runs come from different processors",
    "device": "The runs come from different devices",
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
    if not run.epochs:
        return _uncommitted(run)
    planned = [int(text) for key, text in run.config.items() if key.rpartition(".")[2] == "epochs" and text.isdigit()]
    skipped = sum(epoch.skipped or 0 for epoch in run.epochs)
    losses = [loss for epoch in run.epochs for loss in (epoch.train.robust_loss, epoch.test.robust_loss)]
    remarks = []
    if run not in group.finished:
        remarks.append(
            f"Stopped after epoch {run.reached} of {group.last_epoch}: drawn as thin lines and left out of all means"
        )
    elif len(planned) == 1 and run.reached < planned[0]:
        remarks.append(f"Stopped after epoch {run.reached} of {planned[0]}")
    if not run.best:
        remarks.append("No epoch was chosen on a validation split: there is no best")
    if not all(map(math.isfinite, losses)):
        remarks.append("A robust loss is not finite")
    if skipped:
        tensors = counted(skipped, "weight tensor")
        remarks.append(f"{tensors} had no usable ascent gradient and stayed unperturbed for a step")
    return remarks + _uncommitted(run)


def _uncommitted(run: Run) -> list[str]:
    return ["The working tree had uncommitted changes"] if run.environment.get("git.dirty") == "yes" else []


def _comparability(groups: Sequence[Group], given: int) -> list[str]:
    runs = runs_of(groups)
    ends = {group.name: group.last_epoch for group in measured(groups)}
    remarks = []
    if given > len(runs):
        left_out = counted(given - len(runs), "run")
        remarks.append(f"{left_out} of equal configuration and seed left out: the first given counts")
    if len(set(ends.values())) > 1:
        listed = ", ".join(f"{name} at epoch {end}" for name, end in ends.items())
        remarks.append(f"The groups end at different epochs: {listed}")
    for facts, texts in (
        ([run.evaluation for run in runs], SHARED_EVALUATION),
        ([run.environment for run in runs], SHARED_ENVIRONMENT),
    ):
        remarks += [text for key, text in texts.items() if len({fact[key] for fact in facts if key in fact}) > 1]
    return remarks
