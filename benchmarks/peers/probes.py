"""Every measurement by name: "what: peer: which" -> a function of the folder that holds the repositories.

    python -m benchmarks.peers.probes SOURCES "steps: csdongxian/AWP: AT-AWP"

prints one line of JSON. Each is run in a process of its own, since peers' modules have the same names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import breakage, curvature, directions, perturbing, training, verdicts
from benchmarks.peers.counting import observed, the_same
from benchmarks.peers.stand_ins import images, network

Probe = Callable[[Path], Any]


def folder(sources: Path, peer: str) -> Path:
    """Where a peer's repository lies: owner+name."""
    return sources / peer.replace("/", "+")


def steps(sources: Path, peer: str, method: str) -> dict[str, float]:
    """What a step of training does."""
    model, twin = network(0), network(1)
    x, y = images(4 * training.BATCH)
    torch.manual_seed(0)
    with observed(model, training.BATCH) as seen:
        training.TRAINERS[peer][method](folder(sources, peer), model, twin, x, y)
    return the_same(seen)


def _on(peer: str, measure: Callable[[Path], Any]) -> Probe:
    return lambda sources: measure(folder(sources, peer))


def _verdicts(peer: str, measure: Callable[[Path], torch.Tensor]) -> Probe:
    return lambda sources: "".join("1" if right else "0" for right in measure(folder(sources, peer)).tolist())


def probes() -> dict[str, Probe]:
    """All of them."""
    found: dict[str, Probe] = {}
    for peer, methods in training.TRAINERS.items():
        for method in methods:
            found[f"steps: {peer}: {method}"] = partial(steps, peer=peer, method=method)
    for peer, climbs in perturbing.CLIMBS.items():
        for name, make in climbs.items():
            found[f"climbs: {peer}: {name}"] = _on(peer, partial(perturbing.measured, make=make))
    for peer, attempts in breakage.ATTEMPTS.items():
        for name, attempt in attempts.items():
            found[f"attempts: {peer}: {name}"] = _on(peer, partial(breakage.outcome, attempt))
    for peer, methods in training.TRAINERS.items():
        for method in ("TRADES", "MART"):
            if method in methods:
                sure = partial(breakage.poisoned_by_confidence, peer, method)
                found[f"confidence: {peer}: {method}"] = _on(peer, sure)
    for peer, name, measure in (
        ("amirgholami/PyHessian", "repository", curvature.pyhessian),
        ("amirgholami/PyHessian", "0.1 on PyPI", lambda _: curvature.pyhessian(None)),
        ("f-dangel/curvlinops", "repository", curvature.curvlinops),
        ("Saltflat", "landscape", lambda _: curvature.saltflat()),
    ):
        found[f"curvature: {peer}: {name}"] = _on(peer, measure)
    for peer, name, measure in (
        ("tomgoldstein/loss-landscape", "create_random_direction", directions.loss_landscape),
        ("marcellodebernardi/loss-landscapes", "filter_normalize_", directions.loss_landscapes),
        ("Saltflat", "random_direction", lambda _: directions.saltflat()),
    ):
        found[f"directions: {peer}: {name}"] = _on(peer, measure)
    for peer, name, answers in (
        ("fra31/auto-attack", "AutoAttack", verdicts.fra31),
        ("fra31/auto-attack", "pyautoattack 0.2.0", lambda _: verdicts.pyautoattack()),
        ("Harry24k/adversarial-attacks-pytorch", "AutoAttack", verdicts.torchattacks),
        ("Saltflat", "standard", lambda _: verdicts.saltflat()),
    ):
        found[f"verdicts: {peer}: {name}"] = _verdicts(peer, answers)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(probes()[sys.argv[2]](Path(sys.argv[1]))))
