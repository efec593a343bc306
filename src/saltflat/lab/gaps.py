"""The robust generalisation gap of a network, measured as it has to be: at w, in eval mode, without augmentation, by
one attack on both sides.

    gap in loss      = rho_test - rho_train                 nats
    gap in accuracy  = accuracy_train - accuracy_test       of 1, under attack

Training logs are no substitute: those of AWP hold train accuracy at w + v, in train mode, on augmented images.

gaps/NAME.json   both sides, their difference, and how much a longer attack would change

Errors are standard errors over examples, as if those of training were a sample, too. Processes that torchrun started
take batches in turn, and find what one finds, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltflat import parallel
from saltflat.evaluation import Outcomes, answers, attacked, collect
from saltflat.evaluation.suite import prepared
from saltflat.lab import once, record
from saltflat.lab.precision import exact
from saltflat.lab.subjects import Subject, identity, place, up_to
from saltflat.lean import leaner

LONGER = 5  # times as many steps, for the check that the attack is long enough


@dataclass(frozen=True)
class How:
    """How a gap is measured.

    train_examples, test_examples: stratified; 0 takes all, and so do more than there are.
    """

    train_examples: int = 1000
    test_examples: int = 1000
    steps: int = 20
    checked_examples: int = 128
    batch_size: int = 256
    seed: int = 0


@exact()
def robust_gap(of: Subject, how: How) -> dict[str, Any]:
    """Measured and written down; what was asked before, of the same weights, is read."""
    sides = {"train": how.train_examples, "test": how.test_examples}
    parts = {split: _part(of, split, examples) for split, examples in sides.items()}
    asked = {
        **identity(of, *(tensor for pair in parts.values() for tensor in pair)),
        "n": {split: len(y) for split, (_, y) in parts.items()},
        "settings": {
            "attack": f"{of.threat.pgd_in_words(how.steps)}, starts per example",
            "mode": "eval",
            "weights": of.weights,
            "augmentation": "none",
            "checked_examples": how.checked_examples,
            "seed": how.seed,
            "batch_size": how.batch_size,
        },
    }
    path = place(of, "gaps", "both", asked)
    if there := once.already(path, ("n", "settings", "train", "test", "gap", "longer")):
        return there
    with once.alone(path.with_suffix(".lock")):
        return _found(of, asked, parts, how, path)


def _found(
    of: Subject, asked: dict[str, Any], parts: dict[str, tuple[Tensor, Tensor]], how: How, path: Path
) -> dict[str, Any]:
    train, test = ({"n": len(y)} | _measured(of, x, y, how) for x, y in parts.values())
    found = {
        **asked,
        "train": train,
        "test": test,
        "gap": {
            "loss": test["robust_loss"] - train["robust_loss"],
            "accuracy": train["robust_accuracy"] - test["robust_accuracy"],
            "loss_error": math.hypot(train["robust_loss_error"], test["robust_loss_error"]),
            "accuracy_error": math.hypot(train["robust_accuracy_error"], test["robust_accuracy_error"]),
        },
        "longer": _longer(of, *parts["test"], how),
    }
    found = {name: _plain(value) for name, value in found.items()}
    parallel.first(lambda: record.write_json(path, found))
    return found


def _plain(found: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _part(of: Subject, split: str, examples: int) -> tuple[Tensor, Tensor]:
    x, y, _ = up_to(of, split, examples)
    x = prepared(x, of.model)
    return x, y.to(x.device)


def _measured(of: Subject, x: Tensor, y: Tensor, how: How) -> dict[str, float]:
    robust, clean = _outcomes(of, x, y, how.steps, how), _outcomes(of, x, y, 0, how)
    n = len(y)
    return {
        "clean_accuracy": clean.accuracy,
        "clean_loss": clean.mean_loss,
        "robust_accuracy": robust.accuracy,
        "robust_loss": robust.mean_loss,
        "robust_accuracy_error": math.sqrt(robust.accuracy * (1 - robust.accuracy) / n),
        "robust_loss_error": robust.loss.double().std().item() / math.sqrt(n) if n > 1 else 0.0,
    }


def _outcomes(of: Subject, x: Tensor, y: Tensor, steps: int, how: How) -> Outcomes:
    attack, attack_on = of.threat.pgd(steps) if steps else None, leaner()

    def answered(rows: Tensor) -> Outcomes:
        x_adv = attacked(of.model, x[rows], y[rows], attack, attack_on=attack_on, seed=how.seed, ids=rows)
        return answers(of.model, x_adv, y[rows])

    return collect(parallel.shared_out(torch.split(torch.arange(len(x)), how.batch_size), answered))


def _longer(of: Subject, x: Tensor, y: Tensor, how: How) -> dict[str, float]:
    """How much more loss an attack of several times the steps finds, on some examples."""
    x, y = x[: how.checked_examples], y[: how.checked_examples]
    short, long = (_outcomes(of, x, y, steps, how).mean_loss for steps in (how.steps, LONGER * how.steps))
    return {"steps": LONGER * how.steps, "n": len(y), "loss": long, "loss_of_the_attack": short}
