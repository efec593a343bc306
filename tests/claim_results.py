"""Results of the study of the paper's claims, made up: equal arguments give equal numbers."""

import json
from dataclasses import asdict
from pathlib import Path

from saltflat.lab import record
from saltflat.lab.study.arms import SMALL, config
from saltflat.lab.study.table import plain

ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def made_up(arm, seed, robust=(0.30, 0.25), train=0.45, flat=0.4, note="", accuracy=0.2):
    """A result as `claims` writes it. robust: on test, of the best and of the last checkpoint."""
    found = {
        "arm": arm.name,
        "question": arm.question,
        "against": arm.against,
        "seed": seed,
        "config": record.deciding(asdict(config(SMALL.base, arm, seed, Path("extra.npz")))),
        "plan": asdict(SMALL.plan),
        "environment": {"torch": "2.0", "processor": "made up"},
        "note": note,
    }
    if note:
        return plain(found)
    found["epochs"] = [
        {
            "epoch": epoch, "learning_rate": 0.1, "dropped": 0, "best": epoch == 2, "seconds": 1.0,
            "train": {"robust_accuracy": 0.1 * epoch, "clean_accuracy": 0.5},
            "test": {"robust_accuracy": 0.08 * epoch, "clean_accuracy": 0.4},
        }
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    for checkpoint, value in zip(("best", "last"), robust, strict=True):
        sides = {"train": train, "test": value}
        found[checkpoint] = {
            "epoch": 2 if checkpoint == "best" else 3,
            "gap": {
                **{
                    side: {"n": 100, "clean_accuracy": 0.6, "robust_accuracy": of, "robust_loss": 1.0}
                    for side, of in sides.items()
                },
                "gap": {"accuracy": train - value, "loss": 0.5},
                "settings": {"attack": "PGD-20, made up"},
            },
            "attacks": {
                "n": 50,
                "rows": [{"name": "clean", "accuracy": 0.6}, {"name": "fast", "accuracy": accuracy}],
                "flags": [],
            },
        }
    found["flatness"] = {"measures": [{"name": "average case", "value": flat, "standard_error": 0.01}]}
    found["landscape"] = {
        "split": "test",
        "n": 50,
        "settings": {"attack": "PGD-10, made up"},
        "alphas": ALPHAS,
        "curves": [{"direction_seed": 0, "robust_loss": [1 + flat * alpha**2 for alpha in ALPHAS]}],
        "gaps": [],
    }
    return plain(found)


def write(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    for found in results:
        record.write_json(folder / f"{found['arm']}-seed{found['seed']}.json".replace("/", "_"), found)


def changed(found, **fields):
    return {**json.loads(json.dumps(found)), **fields}


def everything():
    """All arms of the small preset, three seeds each, AWP with a smaller gap in most."""
    results = []
    for place, arm in enumerate(SMALL.arms):
        awp = arm.changes.get("awp.gamma", 0.0)
        for seed in range(3):
            shift = 0.01 * seed + 0.001 * place
            last = 0.24 + 0.05 * (awp > 0) + shift * (1 - seed)
            results.append(
                made_up(arm, seed, (0.30 + shift, last), 0.5 - 8 * awp + shift, 0.5 - 10 * awp + shift, accuracy=last)
            )
    return results
