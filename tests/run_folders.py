"""Run folders made up for tests, without training anything, and the page that they make."""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from saltflat.lab.report import read_run, write_report
from saltflat.lab.report.notation import UNBROKEN
from saltflat.lab.report.statistics import Group, grouped

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)> $x_ & _'


def synthetic_run(
    folder: Path,
    *,
    recipe: str = "at",
    seed: int = 0,
    epochs: int = 6,
    gap: float = 20.0,
    robust: float = 45.0,
    landscape: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """A run folder whose last epoch has exactly this gap (points) and robust test accuracy (percent)."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng([seed, len(recipe)])
    fields = asked_for(recipe, seed, epochs) | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    write(folder / "environment.json", environment(seed))
    write(folder / "evaluation.json", {"attack": "PGD-10, L-inf, eps 8/255, step 2/255, uniform start", "mode": "eval"})
    lines = [metrics(number, epochs, gap, robust, draws) for number in range(1, epochs + 1)]
    best = max(range(epochs), key=lambda index: lines[index]["validation"]["robust_accuracy"])
    for index, line in enumerate(lines):
        line["best"] = index in (0, best)  # the first epoch always beats those before it
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "outcomes" / "best.json", outcome("best", robust + 1))
    write(folder / "outcomes" / "last.json", outcome("last", robust))
    write(folder / "examples" / "last.json", examples_record(seed))
    if landscape:
        write(folder / "landscapes" / "last.json", landscape_record(gap, draws))
    return folder


def write(path: Path, record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def asked_for(recipe: str, seed: int, epochs: int) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "seed": seed,
        "device": "auto",
        "threads": 0,
        "data": {"name": "digits", "path": None, "examples": 1000, "augment": "none"},
        "model": {"name": "small-cnn", "width": 24, "normalise": False},
        "objective": {"name": "at", "beta": 6.0},
        "attack": {"norm": "Linf", "eps": "8/255", "step_size": "2/255", "steps": 10, "start": "uniform"},
        "awp": {"gamma": 0.0, "warmup": 0},
        "optimizer": {"epochs": epochs, "batch_size": 50, "learning_rate": 0.1},
        "evaluation": {"steps": 10, "examples": 2000},
    }


def environment(seed: int) -> dict[str, Any]:
    return {
        "python": "3.12.1",
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "saltflat": "0.1.0",
        "platform": "Linux",
        "processor": "a processor",
        "cores": 2,
        "threads": 2,
        "device": "cpu",
        "git": {"commit": "0123abc", "dirty": False},
        "started": f"2026-01-0{seed + 1}T12:00:00+00:00",
    }


def metrics(number: int, epochs: int, gap: float, robust: float, draws: np.random.Generator) -> dict[str, Any]:
    progress = number / epochs
    noise = 0.0 if number == epochs else draws.normal(scale=0.4)
    test = robust - 18 * math.exp(-6 * progress) * (progress < 1) + gap * 0.1 * (1 - progress) + noise
    train = test + gap * progress

    def split(n: int, accuracy: float) -> dict[str, Any]:
        return {
            "n": n,
            "clean_accuracy": (accuracy + 31) / 100,
            "clean_loss": 1.1 - accuracy / 100,
            "robust_accuracy": accuracy / 100,
            "robust_loss": 2.2 - accuracy / 60,
        }

    return {
        "epoch": number,
        "step": 40 * number,
        "learning_rate": 0.1,
        "gamma": 0.005,
        "loss": 2.0 - progress,
        "perturbed_loss": 2.1 - progress,
        "skipped": 0,
        "train": split(1000, train),
        "validation": split(500, test),
        "test": split(2000, test),
        "gap": {"accuracy": (train - test) / 100, "loss": (train - test) / 60},
        "seconds": 12.0 + draws.uniform(),
        "evaluation_seconds": 3.0,
        "best": False,
    }


def outcome(checkpoint: str, robust: float) -> dict[str, Any]:
    drops = {"clean": -31.0, "fgsm": -6.0, "pgd-20": 0.0, "cw-20": 1.5}
    attacks = [
        {
            "name": name,
            "description": f"{name}, described exactly",
            "accuracy": (robust - drop) / 100,
            "interval": [(robust - drop - 2) / 100, (robust - drop + 2) / 100],
        }
        for name, drop in drops.items()
    ]
    return {"checkpoint": checkpoint, "split": "test", "n": 2000, "attacks": attacks, "settings": {"eps": "8/255"}}


def examples_record(seed: int = 0, *, shape: tuple[int, int, int] = (3, 6, 5), eps: float = 8 / 255) -> dict[str, Any]:
    """Two images of noise, each moved by eps in every pixel, up or down, within [0, 1]."""
    draws = np.random.default_rng(seed)

    def encoded(image: Any) -> str:
        return base64.b64encode(np.asarray(image, "<f4").tobytes()).decode()

    examples = []
    for number in (3, 7):
        clean = draws.integers(0, 256, shape) / 255
        attacked = np.clip(clean + eps * draws.choice([-1, 1], shape), 0, 1)
        about = {"example": number, "label": number % 3, "predicted": 9, "attack": "pgd-20"}
        examples.append(about | {"clean": encoded(clean), "attacked": encoded(attacked)})
    place = {"checkpoint": "last", "split": "test", "n": 2000, "threat": "Linf, eps 8/255"}
    return place | {"shape": list(shape), "examples": examples}


def landscape_record(curvature: float, draws: np.random.Generator, points: int = 11) -> dict[str, Any]:
    alphas = np.linspace(-1, 1, points)
    curves = [
        {
            "direction_seed": index,
            "robust_loss": list(1.4 + curvature / 10 * (1 + 0.1 * draws.normal()) * alphas**2),
            "robust_accuracy": list(0.4 - 0.1 * alphas**2),
            "clean_loss": list(0.8 + alphas**2),
        }
        for index in range(4)
    ]
    settings = {
        "direction": "random, filter-normalised",
        "attack": "PGD-10, made afresh at each alpha",
        "batch_norm": "eval mode",
    }
    return {
        "checkpoint": "last",
        "split": "test",
        "n": 500,
        "alphas": list(alphas),
        "curves": curves,
        "settings": settings,
    }


def plane_record(curvature: float, *, points: int = 7, gaps: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
    """A bowl of this curvature in nats; `gaps` are places (row, column) at which nothing could be measured."""
    alphas, betas = np.linspace(-1, 1, points), np.linspace(-0.5, 0.5, points)
    squares = alphas[:, None] ** 2 + betas[None, :] ** 2
    values = {
        "robust_loss": (1.4 + curvature / 10 * squares).tolist(),
        "robust_accuracy": (0.4 - 0.1 * squares).tolist(),
        "clean_loss": (0.8 + squares).tolist(),
    }
    for i, j in gaps:
        for grid in values.values():
            grid[i][j] = None
    return {
        "checkpoint": "last",
        "sha256": "0" * 64,
        "split": "test",
        "n": 500,
        "kind": "plane",
        "alphas": alphas.tolist(),
        "betas": betas.tolist(),
        "settings": {
            "direction": "two random directions, the second made orthogonal to the first",
            "normalisation": "by filter, no biases and norm layers",
            "attack": "PGD-10, made afresh at each point",
            "batch_norm": "eval mode",
            "seed": 0,
            "batch_size": 500,
        },
        **values,
        "gaps": [{"alpha": alphas[i], "beta": betas[j], "why": "the loss is not finite"} for i, j in gaps],
    }


def flatness_record(value: float, **settings: Any) -> dict[str, Any]:
    """Four measures: the second could not be taken, the third is a maximum, the fourth was partly measured."""
    return {
        "checkpoint": "last",
        "sha256": "0" * 64,
        "split": "test",
        "n": 500,
        "settings": {"attack": "PGD-20, 1 start", "batch_norm": "eval mode", "seed": 0} | settings,
        "measures": [
            {
                "name": "average case, ball",
                "value": value,
                "standard_error": 0.0123,
                "unit": "nats",
                "settings": "10 draws, gamma 0.01 for every layer",
                "seconds": 1.25,
            },
            {
                "name": "largest Hessian eigenvalue",
                "value": None,
                "standard_error": None,
                "unit": "nats / weight²",
                "settings": "Lanczos, 36 products, the error is the residual; examples attacked once, at w",
                "seconds": 9.0,
                "note": "not a number; not converged to 1e-3",
            },
            {
                "name": "worst case, alternating",
                "value": 2 * value,
                "standard_error": None,
                "unit": "nats",
                "settings": "‖v_l‖ ≤ 0.01 ‖w_l‖, max over v for each batch of 128, attacked afresh before each step",
                "seconds": 4.0,
                "starts": [2 * value, value],
                "note": "",
            },
            {
                "name": "landscape half-width",
                "value": 0.75,
                "standard_error": 0.125,
                "unit": "of ‖w‖",
                "settings": "first rise by 0.5 nats, at most 1",
                "seconds": 4.0,
                "starts": [],
                "note": "along 2 of 3 directions it is not reached by 1",
            },
        ],
    }


def with_plane(folder: Path, curvature: float = 10, *, gaps: Sequence[tuple[int, int]] = (), **options: Any) -> Path:
    """A run folder that has a plane and measures of flatness as well."""
    synthetic_run(folder, **options)
    write(folder / "landscapes" / "plane.json", plane_record(curvature, gaps=gaps))
    write(folder / "flatness" / "last.json", flatness_record(curvature))
    return folder


def two_groups(folder: Path, first: Sequence[float], second: Sequence[float], **options: Any) -> list[Path]:
    """Runs of `at` and `at-awp`, one per gap (points), at seeds 0, 1, 2, …"""
    return [
        synthetic_run(folder / f"{recipe}-{seed}", recipe=recipe, seed=seed, gap=gap, **options)
        for recipe, gaps in (("at", first), ("at-awp", second))
        for seed, gap in enumerate(gaps)
    ]


def hostile_runs(folder: Path) -> list[Path]:
    """Every text that a record can carry is hostile."""
    folders = []
    for seed in (0, 1):
        one = synthetic_run(folder / str(seed), recipe=HOSTILE, seed=seed, config={HOSTILE: {HOSTILE: [HOSTILE]}})
        write(one / "environment.json", {HOSTILE: HOSTILE, "processor": HOSTILE + "\ud800\x00"})
        write(one / "evaluation.json", {"attack": HOSTILE, "mode": HOSTILE})
        attacks = [{"name": HOSTILE, "description": HOSTILE, "accuracy": 0.5, "interval": [0.4, 0.6]}]
        settings = {"settings": {HOSTILE: HOSTILE}}
        place = {"checkpoint": HOSTILE, "split": HOSTILE, "n": 9}
        write(one / "outcomes" / "last.json", place | settings | {"attacks": attacks})
        fooled = examples_record(seed) | place | {"threat": HOSTILE}
        fooled["examples"] = [entry | {"attack": HOSTILE} for entry in fooled["examples"]]
        write(one / "examples" / "last.json", fooled)
        record = landscape_record(10, np.random.default_rng(0))
        write(one / "landscapes" / "last.json", record | place | settings)
        grid = plane_record(10, gaps=[(0, 0)]) | place | {"settings": {HOSTILE: HOSTILE, "attack": HOSTILE}}
        write(one / "landscapes" / "plane.json", grid | {"gaps": [{"alpha": -1.0, "beta": -0.5, "why": HOSTILE}]})
        measures = [{"name": HOSTILE, "value": 1.0, "unit": HOSTILE, "settings": HOSTILE, "note": HOSTILE}]
        write(one / "flatness" / "last.json", place | settings | {"measures": measures})
        folders.append(one)
    return folders


def groups_in(folders: Iterable[Path]) -> list[Group]:
    return grouped([read_run(folder) for folder in folders])


def page(folders: Sequence[Path]) -> str:
    path = folders[0].parent / "report.html"
    write_report(folders, path)
    return path.read_text(encoding="utf-8")


class Parsed(HTMLParser):
    """Tags, attributes, visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


def plain(text: str) -> str:
    return text.replace(UNBROKEN, " ")
