"""How much memory a step needs at its peak, beyond adversarial training alone: counted, and measured.

    python benchmarks/memory.py --out memory.json
    python benchmarks/memory.py --batch-size 8 --out memory-small-batch.json
    python benchmarks/memory.py --device cuda --out memory-gpu.json

The unit is a copy of the weights that are perturbed. That AWP needs one of them more than AT, and the step inside two,
holds where a step's maps are larger than a few copies of the weights: then both have their peak when those of the
training pass are alive, beside w or v. For batches so small that maps weigh less (`--batch-size 8`), the peak is where
v is found, and what is there for a moment, gradient and displacement, weighs more.

Counted is every tensor that is alive at once while the network,
its optimiser and two steps are made, operation by operation (`alive`). Measured is, on a CPU, the most memory that a
process which does nothing else has held, and on a GPU the most that torch has handed out there; the former is also what
an allocator keeps, and moves by a few percent from run to run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import training_step
from alive import Alive
from pairs import Contender, compare, spread, table
from training_step import Setting, network, official, ours

from saltflat.lab import record
from saltflat.weights import default

STEPS = 2  # the first of them makes gradients and momentum


def contenders(setting: Setting) -> list[Contender]:
    """The first is what the others are compared with. All attack in eval mode, in fp32: the network itself, or, as
    recipes do on CPUs, the lean one, whose packed weights are there while the attack runs.
    """
    take = partial(ours, attack_on_itself=True)
    plain = setting.objective.upper()
    made = {
        plain: partial(take, awp=False),
        f"{plain}-AWP, step after": take,
        f"{plain}-AWP, step inside": partial(take, step_inside=True),
        f"{plain}-AWP, amortised": partial(take, amortised=True),
        f"{plain}, lean attack": partial(ours, awp=False),
        f"{plain}-AWP, step after, lean attack": ours,
        "official": partial(official, attack_mode="eval"),
    }
    return [Contender(name, make, setting) for name, make in made.items()]


def perturbed_bytes(setting: Setting) -> int:
    """Of the weights that are perturbed."""
    chosen = (p for name, p in network(setting).named_parameters() if default(name, p))
    return sum(p.numel() * p.element_size() for p in chosen)


def counted(contender: Contender) -> int:
    """Bytes of tensors alive at the peak of its life."""
    with Alive() as alive:
        step = contender.make(contender.setting)
        for _ in range(STEPS):
            step()
    return alive.peak


def measured(contender: Contender, rounds: int) -> list[float]:
    """Bytes at the peak of one process after the other."""
    found = []
    for _ in range(rounds):
        (of,) = compare([contender], rounds=1, warm_up=STEPS - 1, say=lambda line: None).values()
        found.append(of.get("peak_gpu_bytes", of["peak_bytes"]))
    return found


def copies(of: Mapping[str, Any], unit: int) -> dict[str, dict[str, Any]]:
    """Bytes beyond the first, in copies; measured ones in the order of rounds.

    >>> copies({"a": {"counted": 10, "measured": [20.0]}, "b": {"counted": 14, "measured": [21.0]}}, 4)["b"]["counted"]
    1.0
    """
    first = next(iter(of.values()))
    found = {}
    for name, bytes_ in of.items():
        pairs = zip(bytes_["measured"], first["measured"], strict=True)
        found[name] = {
            "counted": (bytes_["counted"] - first["counted"]) / unit,
            "measured": spread([(own - others) / unit for own, others in pairs]),
        }
    return found


def shown(found: Mapping[str, Any], over: Mapping[str, Any]) -> str:
    rows = []
    for name, of in found.items():
        most, beyond = spread(of["measured"])["median"] / 2**20, over[name]["measured"]
        between = f"{beyond['median']:+.2f} ({beyond['min']:+.2f} to {beyond['max']:+.2f})"
        rows.append([name, f"{of['counted'] / 2**20:.1f}", f"{over[name]['counted']:+.3f}", f"{most:.1f}", between])
    return table(["", "counted, MiB", "copies over AT", "measured, MiB", "copies over AT"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_step.common(parser, rounds=5)
    given = parser.parse_args()
    setting = training_step.setting_of(given)
    everybody, unit = contenders(setting), perturbed_bytes(setting)
    found: dict[str, Any] = {}
    for contender in everybody:
        found[contender.name] = {"counted": counted(contender), "measured": []}
        print(f"counted  {contender.name:32} {found[contender.name]['counted'] / 2**20:9.1f} MiB", flush=True)
    for number in range(given.rounds):
        for contender in everybody:
            found[contender.name]["measured"] += measured(contender, 1)
            latest = found[contender.name]["measured"][-1] / 2**20
            print(f"round {number + 1}  {contender.name:32} {latest:9.1f} MiB", flush=True)
    over = copies(found, unit)
    print(f"One copy of the perturbed weights: {unit / 2**20:.1f} MiB\n{shown(found, over)}")
    if given.out is not None:
        asked = {"what": "memory of a training step at its peak", "setting": asdict(setting), "rounds": given.rounds}
        kept = {**asked, "copy_bytes": unit, "bytes": found, "copies_over_at": over}
        record.write_json(given.out, {**kept, "environment": training_step.environment(given)})


if __name__ == "__main__":
    main()
