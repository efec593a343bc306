"""How a step's time grows with the steps of both adversaries, width, batch and image size: slopes of log-log lines.

    python benchmarks/growth.py --out growth.json
    python benchmarks/growth.py --quick

    slope = sum (log a - mean) (log t - mean) / sum (log a - mean)^2,   a the argument, t the seconds of a step

of a small residual network, on one thread, one argument at a time. 1 is a time in proportion, 2 in proportion to the
square. Beside it stands the slope of the operations that the step's convolutions need: what time has to follow for
large networks. Values of an argument take turns, all in this process; every round gives a slope, and its spread is that
over rounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from floor import flops, recorded
from pairs import Contender, around, compare, seconds_of, spread, table
from training_step import Setting, ours

from saltflat.lab import record

VALUES = {
    "steps": (2, 4, 8, 16),
    "ascent_steps": (1, 2, 4, 8),
    "width": (16, 32, 64, 128),
    "batch_size": (16, 32, 64, 128),
    "size": (16, 32, 64, 128),
}
QUICK = {
    "steps": (1, 2, 4),
    "ascent_steps": (1, 2, 4),
    "width": (8, 16, 32),
    "batch_size": (4, 8, 16),
    "size": (8, 16, 32),
}
WORDS = {
    "steps": "attack steps K1",
    "ascent_steps": "weight ascent steps K2",
    "width": "width",
    "batch_size": "batch",
    "size": "image side",
}


def slope(arguments: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line through (log argument, log value).

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    a, t = ([math.log(value) for value in of] for of in (arguments, values))
    middle, level = sum(a) / len(a), sum(t) / len(t)
    return sum((x - middle) * (y - level) for x, y in zip(a, t, strict=True)) / sum((x - middle) ** 2 for x in a)


def grown(setting: Setting, argument: str, values: Sequence[int], rounds: int, warm_up: int) -> dict[str, Any]:
    """Seconds by value and round, the slope of every round, and that of the convolutions' operations."""
    settings = {str(value): replace(setting, **{argument: value}) for value in values}
    make = partial(ours, attack_on_itself=True)
    entered = [Contender(name, make, of) for name, of in settings.items()]
    say = lambda line: print(f"{WORDS[argument]:22} {line}", flush=True)
    seconds = seconds_of(compare(entered, rounds=rounds, warm_up=warm_up, in_process=True, say=say))
    work = [flops(recorded(make(of))) for of in settings.values()]
    slopes = [slope(values, [of[number] for of in seconds.values()]) for number in range(rounds)]
    return {
        "values": list(values),
        "seconds": seconds,
        "slope": spread(slopes),
        "slopes": slopes,
        "flops": work,
        "slope_of_flops": slope(values, work),
    }


def shown(found: Mapping[str, Any]) -> str:
    rows = []
    for argument, of in found.items():
        medians = [spread(values)["median"] for values in of["seconds"].values()]
        took = " ".join(f"{1e3 * each:.0f}" for each in medians)
        values = " ".join(str(value) for value in of["values"])
        rows.append([WORDS[argument], values, took, around(of["slope"]), f"{of['slope_of_flops']:.2f}"])
    return table(["", "values", "ms a step", "slope", "of the convolutions' flops"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--quick", action="store_true", help="smaller networks, in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    small = Setting(network="small-resnet", threads=given.threads)
    setting = replace(small, width=8, batch_size=8, steps=2) if given.quick else replace(small, width=32, steps=4)
    tried = QUICK if given.quick else VALUES
    found = {name: grown(setting, name, tried[name], given.rounds, given.warm_up) for name in given.only}
    print(shown(found))
    if given.out is not None:
        asked = {"what": "growth of a step's time", "setting": asdict(setting), "rounds": given.rounds}
        environment = record.environment("cpu", given.threads, None)
        record.write_json(given.out, {**asked, "growth": found, "environment": environment})


if __name__ == "__main__":
    main()
