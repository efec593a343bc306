"""Random directions for pictures of the loss, as peers normalise them: is every filter of d as long as that of w?"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.stand_ins import mocked, network
from benchmarks.peers.training import script

Fact = dict[str, Any]


def held(model: nn.Module, d: list[Tensor]) -> Fact:
    """The largest relative error of a filter's norm, over tensors of more than one dimension, and whether biases and
    norm layers have a component.
    """
    errors, others = [], 0.0
    for w, direction in zip(model.parameters(), d, strict=True):
        if w.ndim > 1:
            lengths, wanted = (t.detach().double().flatten(1).norm(dim=1) for t in (direction, w))
            errors.append(float(((lengths - wanted) / wanted).abs().max()))
        else:
            others += float(direction.abs().sum())
    return {"error": max(errors), "biases and norm layers move": others > 0}


def loss_landscape(source: Path) -> Fact:
    """`create_random_direction` with its defaults."""
    with mocked("h5py", "torchvision"), script(source):
        found = importlib.import_module("net_plotter")
    model = network()
    torch.manual_seed(0)
    return held(model, found.create_random_direction(model))


def loss_landscapes(source: Path) -> Fact:
    """The normalisation of the package of a similar name, as its planes use it. It divides by the size of whatever it
    meets, so the network's biases, where they are 0, are moved a little first.
    """
    with script(source):
        found = importlib.import_module("loss_landscapes.model_interface.model_parameters")
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.01)
    torch.manual_seed(0)
    centre = found.ModelParameters([p.detach() for p in model.parameters()])
    direction = found.rand_n_like(centre)
    direction.filter_normalize_(centre)
    return held(model, direction.parameters)


def saltflat() -> Fact:
    """Ours."""
    from saltflat.landscape import random_direction

    model = network()
    d = random_direction(model, seed=0)
    return held(model, [d.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()])
