"""Images a second that batches are made at, alone; and how many a step of training takes.

    python benchmarks/data_pipeline.py --out data-pipeline.json

A batch is made as `saltflat.train.fit` makes it: rows of a uint8 tensor that lies on the device, augmented, divided by
255, mixed. Every way of making one and the step itself take turns, and a ratio is of turns of one round:

    share = seconds that a batch takes to make / seconds that a step of AT-AWP takes for as many images
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import training_step
from pairs import Contender, around, compare, ratios, seconds_of, spread, table
from torch import Tensor
from training_step import Setting, finished, ours

from saltflat.data.augment import crop_flip, rotate
from saltflat.data.images import to_float
from saltflat.data.mix import cutmix, mixup, smoothed
from saltflat.lab import memory, record

Augment = Callable[[Tensor, torch.Generator], Tensor]
Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
EXAMPLES = 50_000
STEP = "a step of AT-AWP"


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    return crop_flip(images, generator=generator)


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    return rotate(cropped(images, generator), degrees=15, generator=generator)


WAYS: dict[str, tuple[Augment | None, Mix | None]] = {
    "rows, to float": (None, None),
    "crop, flip": (cropped, None),
    "crop, flip, rotate": (turned, None),
    "crop, flip, mixup": (cropped, partial(mixup, alpha=1.0)),
    "crop, flip, cutmix": (cropped, partial(cutmix, alpha=1.0)),
}


def batches(setting: Setting, *, way: str, number: int) -> Callable[[], Any]:
    """Makes that many batches in a call."""
    memory.keep()
    torch.set_num_threads(setting.threads)
    augment, mix = WAYS[way]
    device = torch.device(setting.device)
    generator = torch.Generator(device).manual_seed(setting.seed)
    images = torch.randint(256, (EXAMPLES, 3, setting.size, setting.size), dtype=torch.uint8).to(device)
    labels = torch.randint(setting.classes, (EXAMPLES,)).to(device)
    order = torch.randperm(EXAMPLES).to(device).split(setting.batch_size)

    def step() -> None:
        for i in range(number):
            rows = order[i % len(order)]
            chosen, y = images[rows], labels[rows]
            x = to_float(chosen if augment is None else augment(chosen, generator))
            if mix is not None:
                mix(x, smoothed(y, setting.classes, 0.0), generator=generator)

    return finished(step, setting.device)


def judged(seconds: Mapping[str, list[float]], batch_size: int) -> dict[str, Any]:
    """Images a second, and the share of a step."""
    shares = ratios(seconds, STEP)
    return {
        name: {
            "seconds": spread(values),
            "images_per_second": spread([batch_size / each for each in values]),
            "share_of_step": shares[name],
        }
        for name, values in seconds.items()
    }


def shown(summary: Mapping[str, Any]) -> str:
    rows = [
        [name, around(of["images_per_second"], ".0f"), "" if name == STEP else around(of["share_of_step"], ".3%")]
        for name, of in summary.items()
    ]
    return table(["", "images a second", "of a step's time"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_step.common(parser)
    parser.add_argument("--batches", type=int, default=100, help="in a turn")
    given = parser.parse_args()
    setting = training_step.setting_of(given)
    entered = [
        Contender(way, partial(batches, way=way, number=given.batches), setting, steps=given.batches) for way in WAYS
    ]
    entered.append(Contender(STEP, ours, setting))
    began = time.perf_counter()
    turns = compare(entered, rounds=given.rounds, warm_up=given.warm_up, say=partial(print, flush=True))
    summary = judged(seconds_of(turns), setting.batch_size)
    print(f"{shown(summary)}\n{time.perf_counter() - began:.0f} s")
    if given.out is not None:
        asked = {"what": "images a second", "setting": asdict(setting), "examples": EXAMPLES, "batches": given.batches}
        kept = {**asked, "rounds": given.rounds, "turns": turns, "summary": summary}
        record.write_json(given.out, {**kept, "environment": training_step.environment(given)})


if __name__ == "__main__":
    main()
