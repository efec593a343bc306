"""What the training logs in the official repository of AWP show, run by run: the reference for the shape of what our
records show, and never in one column with it.

    git clone https://github.com/csdongxian/AWP
    python -m benchmarks.official_logs AWP records/2026-11-26_official-logs

A line of those logs is an epoch: robust test accuracy is that of PGD-20 on the whole test set, in eval mode, at w. Its
training columns are at w + v, in train mode, and on augmented images, so that no gap can be read from them. Best is
the highest robust test accuracy, chosen on the test set itself, and so biased upwards; ours is chosen on validation.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/csdongxian/AWP"
COMMIT = "a7acf5d842fccf1bbb4b91644352ce157d370a26"
SETTINGS = ("model", "norm", "epsilon", "pgd_alpha", "attack_iters", "attack_iters_test", "epochs", "batch_size",
            "lr_max", "awp_size", "seed")  # fmt: skip
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
NORMS = {"linf": "L-inf", "l2": "L2"}
NUMBER = re.compile(r"^\[[^]]*\] - (\d+)((?:\s+[\d.]+){11})\s*$")


def read(path: Path) -> dict[str, Any]:
    """One log: its settings as printed, best, last, and the mean of the last five epochs, in percent."""
    text = path.read_text()
    epochs = [row for line in text.splitlines() if (row := epoch(line)) is not None]
    best = max(epochs, key=lambda row: row["robust"])
    printed = dict(re.findall(r"(\w+)=('[^']*'|[^,)]+)", text.partition("Namespace(")[2].partition("\n")[0]))
    data, _, norm = path.parts[-3].partition("_")
    network, _, method = path.parts[-2].rpartition("_")
    return {
        "log": "/".join(path.parts[-5:]),
        "data": DATA[data],
        "norm": NORMS[norm],
        "network": {"preactresnet18": "PreActResNet-18", "wrn34": "WideResNet-34-10"}[network],
        "method": {"awp": "AT-AWP", "standard": "AT"}[method],
        "settings": {name: printed[name].strip("'") for name in SETTINGS if name in printed},
        "epochs": len(epochs),
        "best": best,
        "last": epochs[-1],
        "last_five": statistics.fmean(row["robust"] for row in epochs[-5:]),
        "seconds": statistics.median(row["seconds"] for row in epochs),
    }


def epoch(line: str) -> dict[str, float] | None:
    """A line of numbers, or None: epoch, training seconds, and clean and robust test accuracy in percent.

    >>> epoch("[2020/05/11 17:44:04] - 0 308.4 100.7 0.1 4.3 0.03 4.5 0.01 4.1 0.0677 4.2 0.0603")
    {'epoch': 0, 'seconds': 308.4, 'clean': 6.77, 'robust': 6.03}
    """
    if (found := NUMBER.match(line)) is None:
        return None
    values = [float(word) for word in found[2].split()]
    return {
        "epoch": int(found[1]),
        "seconds": values[0],
        "clean": round(100 * values[8], 2),
        "robust": round(100 * values[10], 2),
    }


def markdown(path: Path) -> str:
    """The table: without AWP and with it, side by side."""
    of = json.loads(path.read_text())
    lines = [
        "**The official training logs: PGD-20 on the whole test set, one run each**",
        "",
        "| data | threat | network | | best (%) | last (%) | last five, mean (%) | drop (points) | clean, last (%) |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in of["runs"]:
        best, last = run["best"], run["last"]
        numbers = (last["robust"], run["last_five"], best["robust"] - last["robust"], last["clean"])
        cells = [run["data"], run["norm"], run["network"], run["method"]]
        cells += [f"{best['robust']:.2f} (epoch {best['epoch']})", *(f"{number:.2f}" for number in numbers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Read from `AT_AWP/logs` of [csdongxian/AWP]({of['repository']}/tree/{of['commit']}/AT_AWP/logs) at "
            f"{of['commit'][:7]}. One seed each; best is chosen on the test set, epochs count from 0. The log of the "
            "WideResNet without AWP is of an older script that names no number of steps for its test attack.",
        ]
    )


def main(checkout: Path, out: Path) -> None:
    at = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    if at.strip() != COMMIT:
        sys.exit(f"expected {checkout} at {COMMIT}, got {at.strip()}")
    logs = sorted(checkout.glob("AT_AWP/logs/*/*/output.log"))
    runs = [read(path) for path in logs]
    runs.sort(key=lambda run: (run["data"], run["norm"] != "L-inf", run["network"], run["method"] != "AT"))
    out.mkdir(parents=True, exist_ok=True)
    found = {"repository": REPOSITORY, "commit": COMMIT, "runs": runs}
    (out / "logs.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
