"""How long it takes until something happens: from the start of a process to the end of its first step of training.

    python benchmarks/first_step.py --out first-step.json

New processes of every kind take turns, after a round that does not count and fills the disk's cache; what Python itself
needs is among them. The parts of a first step are told by the process, in the order in which they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairs import around, spread, table

from saltflat.lab import record

FIRST_STEP = """
import json, sys, time
began, parts = time.perf_counter(), {}

def done(part):
    global began
    parts[part], began = time.perf_counter() - began, time.perf_counter()

import torch
torch.set_num_threads(int(sys.argv[1]))
done("import torch")
from saltflat import AT, PGD, Layerwise, Linf, double_perturbation_step, models
done("import saltflat")
model = models.preact_resnet18().train().to(memory_format=torch.channels_last)
done("network")
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
x, y = torch.rand(int(sys.argv[2]), 3, 32, 32), torch.randint(10, (int(sys.argv[2]),))
done("optimizer, batch")
for part in ("first step", "second step"):
    double_perturbation_step(model, x, y, objective=AT(), attack=PGD(Linf(8 / 255), 2 / 255, 10), ball=Layerwise(5e-3),
                             optimizer=optimizer)
    done(part)
print(json.dumps(parts))
"""
UNTIL = "until the first step is done"


def commands(threads: int, batch_size: int) -> dict[str, list[str]]:
    """What is started, by name."""
    python = [sys.executable]
    return {
        "python": [*python, "-c", "pass"],
        "import saltflat": [*python, "-c", "import saltflat"],
        "import torch": [*python, "-c", "import torch"],
        "saltflat --help": [*python, "-m", "saltflat", "--help"],
        UNTIL: [*python, "-c", FIRST_STEP, str(threads), str(batch_size)],
    }


def seconds(command: Sequence[str], threads: int) -> tuple[float, str]:
    """Wall time of a process, and what it printed."""
    began = time.perf_counter()
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    return time.perf_counter() - began, output


def shown(summary: Mapping[str, Any]) -> str:
    return table(["", "seconds"], [[name, around(of, ".3f")] for name, of in summary.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        for name, command in commands(given.threads, given.batch_size).items():
            took, output = seconds(command, given.threads)
            print(f"{f'round {number}' if number else 'warm-up':8} {name:32} {took:8.3f} s", flush=True)
            if number == 0:
                continue
            parts = json.loads(output) if name == UNTIL else {}
            if parts:
                took -= parts["second step"]
            for part, value in {name: took, **{f"  {part}": value for part, value in parts.items()}}.items():
                found.setdefault(part, []).append(value)
    summary = {name: spread(values) for name, values in found.items()}
    print(shown(summary))
    if given.out is not None:
        asked = {"what": "seconds to a first step", "batch_size": given.batch_size, "rounds": given.rounds}
        environment = record.environment("cpu", given.threads, None)
        kept = {"seconds": found, "summary": summary, "environment": environment}
        record.write_json(given.out, {**asked, **kept})


if __name__ == "__main__":
    main()
