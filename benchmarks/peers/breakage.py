"""What of peers' code fails with today's torch and NumPy, and how; and what overflows.

An attempt is a function of the repository's folder that does what a user would. Its outcome is "runs", or the kind and
the first line of what it raised.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.peers.stand_ins import images, mocked, network, without_cuda
from benchmarks.peers.training import BATCH, TRAINERS, art_trainer, mair_trainer, script

Attempt = Callable[[Path], object]


class _Reached(Exception):
    """An attempt got as far as it was to get."""


def outcome(attempt: Attempt, source: Path) -> str:
    """In words, without addresses and without marks for terminals.

    >>> outcome(lambda source: None, Path()), outcome(lambda source: {}["a"], Path())
    ('runs', "KeyError: 'a'")
    """
    try:
        attempt(source)
    except Exception as problem:
        said = str(problem).strip().splitlines() or [""]
        told = re.sub(r" at 0x[0-9a-f]+|\x1b\[\d*m", "", said[0]).strip()
        return f"{type(problem).__name__}: {told}"
    return "runs"


def official_without_awp(source: Path) -> None:
    """`--awp-gamma 0`, the script's way to train without AWP."""
    with without_cuda(), mocked("torchvision"), script(source / "AT_AWP", "--awp-gamma", "0"):
        found = importlib.import_module("train_cifar10")
        with patch.object(found, "cifar10", side_effect=_Reached), suppress(_Reached):
            found.main()


def official_trades(source: Path) -> None:
    """The script for TRADES as it is, with the accuracy that it logs."""
    arguments = ("--epochs", "1", "--batch-size", str(BATCH))
    with without_cuda(), mocked("torchvision", "progress", "matplotlib"), script(source / "trades_AWP", *arguments):
        sys.modules["torchvision.datasets"].CIFAR10 = lambda **_: TensorDataset(*images(8))  # type: ignore[attr-defined]
        found = importlib.import_module("train_trades_cifar")
        with patch.object(found.models, "WideResNet34", lambda num_classes: network()):
            found.main()


def art_with_a_schedule(source: Path) -> None:
    """`fit` with a schedule of torch's."""
    model, twin = network(0), network(1)
    trainer = art_trainer(source, model, twin, "PGD", 0)
    x, y = images(BATCH)
    schedule = torch.optim.lr_scheduler.StepLR(trainer.classifier.optimizer, 1)
    trainer.fit(x.numpy(), y.numpy(), batch_size=BATCH, nb_epochs=1, scheduler=schedule)


def mair_load(source: Path) -> None:
    """`load_dict` of what `save_dict` has written."""
    trainer, _ = mair_trainer(source, network(), "AT", None)
    trainer.rm.initialize(record_type=None, save_path=None, best_option=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_dict(folder)
        trainer.load_dict(f"{folder}/last.pth")


def loss_landscapes_plane(source: Path) -> None:
    """A filter-normalised plane around a network that was just made, whose BatchNorm biases are 0."""
    with script(source):
        found = importlib.import_module("loss_landscapes")
        metrics = importlib.import_module("loss_landscapes.metrics")
    found.random_plane(network(), metrics.Loss(nn.CrossEntropyLoss(), *images(4)), 0.1, 3, "filter")


ATTEMPTS: dict[str, dict[str, Attempt]] = {
    "csdongxian/AWP": {
        "train_cifar10.py with --awp-gamma 0": official_without_awp,
        "train_trades_cifar.py": official_trades,
    },
    "Trusted-AI/adversarial-robustness-toolbox": {"fit(scheduler=StepLR)": art_with_a_schedule},
    "Harry24k/MAIR": {"load_dict of its own checkpoint": mair_load},
    "marcellodebernardi/loss-landscapes": {"random_plane of a new network with BatchNorm": loss_landscapes_plane},
}


def poisoned_by_confidence(peer: str, method: str, source: Path) -> float:
    """The share of weights that are not finite after an epoch in which some probabilities underflow to 0 in fp32, as
    they do for a network that is very sure: logits 10,000 times as large.
    """
    model, twin = network(0), network(1)
    last = model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(1e4)
    TRAINERS[peer][method](source, model, twin, *images(2 * BATCH))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float((~weights.isfinite()).float().mean())
