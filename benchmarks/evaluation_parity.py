"""Is the number the same? Robust accuracy under AutoAttack's standard version, here and in pyautoattack, by seed.

    python benchmarks/evaluation_parity.py RUN --examples 200 --seeds 5 --out parity.json

Both attack the same examples with full budgets; each seed is that of everything either of them draws. A seed that is on
record already is not run again, so that an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer import standard as by_peer
from torch import Tensor

from saltflat.evaluation.suite import evaluate, prepared, standard
from saltflat.lab import record
from saltflat.lab.config import number, shown
from saltflat.lab.subjects import chosen, from_run, with_threat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--data-path", type=Path, default=None)
    parser.add_argument("--eps", type=number, default=None)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    of = with_threat(from_run(given.run, given.checkpoint, "cpu", None, given.data_path), None, given.eps, None)
    images, y, rows = chosen(of, "test", given.examples)
    x, threat = prepared(images, of.model), of.threat

    def peer(seed: int) -> Tensor:
        return by_peer(of.model, x, y, threat.norm, threat.eps, batch_size=given.batch_size, seed=seed)

    def ours(seed: int, dtype: torch.dtype | None) -> Tensor:
        columns = [standard(threat.ball)]
        *_, last = evaluate(of.model, x, y, columns, batch_size=given.batch_size, seed=seed, ids=rows, dtype=dtype)
        return last.verdicts["standard"].robust()

    contenders: dict[str, Callable[[int], Tensor]] = {
        "pyautoattack": peer,
        "saltflat fp32": lambda seed: ours(seed, None),
        "saltflat bf16": lambda seed: ours(seed, torch.bfloat16),
    }
    asked = {
        "what": "robust accuracy under AutoAttack standard, full budgets",
        "run": given.run.name,
        "sha256": of.sha256,
        "norm": threat.norm,
        "eps": shown(threat.eps),
        "n": len(y),
        "batch_size": given.batch_size,
    }
    robust: dict[str, dict[str, str]] = {name: {} for name in contenders}
    if given.out.is_file():
        before = json.loads(given.out.read_text())
        if {name: before.get(name) for name in asked} != asked:
            raise SystemExit(f"out: {given.out} is of another question; expected a new file")
        robust = before["robust"]
    for seed in range(given.seeds):
        for name, verdicts in contenders.items():
            if str(seed) in robust[name]:
                continue
            began = time.perf_counter()
            found = verdicts(seed)
            robust[name][str(seed)] = "".join("1" if right else "0" for right in found.tolist())
            seconds = time.perf_counter() - began
            print(f"seed {seed}  {name:13}  {int(found.sum())} of {len(y)} robust  {seconds:6.1f} s", flush=True)
            record.write_json(given.out, {**asked, "robust": robust, **_summary(robust, len(y))})
    final = {**asked, "robust": robust, **_summary(robust, len(y))}
    record.write_json(given.out, {**final, "environment": record.environment("cpu", torch.get_num_threads(), None)})
    for name, words in final["compared"].items():
        print(
            f"{name}: {words['difference_in_points']:+.2f} points, {words['verdicts_that_agree']:.2%} of verdicts agree"
        )


def _summary(robust: dict[str, dict[str, str]], n: int) -> dict[str, Any]:
    """Mean and spread over seeds, in percent, and how ours differs from theirs at equal seeds."""
    accuracies = {
        name: [100 * verdicts.count("1") / n for verdicts in by_seed.values()] for name, by_seed in robust.items()
    }
    spread = {name: statistics.stdev(values) for name, values in accuracies.items() if len(values) > 1}
    theirs = robust["pyautoattack"]
    compared = {}
    for name, by_seed in robust.items():
        both = sorted(by_seed.keys() & theirs.keys())
        if name == "pyautoattack" or not both:
            continue
        alike = [a == b for seed in both for a, b in zip(by_seed[seed], theirs[seed], strict=True)]
        ahead = [100 * (by_seed[seed].count("1") - theirs[seed].count("1")) / n for seed in both]
        compared[name] = {
            "seeds": len(both),
            "difference_in_points": statistics.mean(ahead),
            "verdicts_that_agree": statistics.mean(alike),
        }
    means = {name: statistics.mean(values) for name, values in accuracies.items() if values}
    return {"accuracy": accuracies, "mean": means, "standard_deviation": spread, "compared": compared}


if __name__ == "__main__":
    main()
