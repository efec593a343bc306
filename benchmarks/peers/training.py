"""An epoch of training by each peer's own code, on a network that is handed to it.

A trainer is called as (source, model, twin, x, y): `source` is the folder of the peer's repository, `twin` a network
like `model` for those who need a second one, and the images are taken in batches of `BATCH`. All attack in K1 = 10
steps of 2/255 within 8/255; the scripts' own defaults hold for the rest.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.stand_ins import CLASSES, mocked, without_cuda

BATCH, STEPS, EPS, ALPHA, GAMMA, BETA = 4, 10, 8 / 255, 2 / 255, 0.005, 6.0
NEVER = 1000  # a warm-up that does not end: no weight is perturbed

Train = Callable[[Path, nn.Module, nn.Module, Tensor, Tensor], None]


def batches(x: Tensor, y: Tensor) -> DataLoader[Any]:
    """In order."""
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """As all scripts have it."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)


@contextmanager
def script(folder: Path, *arguments: str) -> Iterator[Path]:
    """As if a script in `folder` were called with these arguments, from an empty folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as empty, patch.object(sys, "argv", ["script", *arguments]):
        sys.path.insert(0, str(folder))
        os.chdir(empty)
        try:
            yield Path(empty)
        finally:
            os.chdir(before)
            sys.path.remove(str(folder))


def official_at(source: Path, model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, *, warmup: int = 0) -> None:
    """The script for CIFAR-10, from its first line to its last, with a test set of one image."""
    arguments = ("--epochs", "1", "--batch-size", str(BATCH), "--lr-max", "0.01", "--awp-warmup", str(warmup))
    with without_cuda(), mocked("torchvision"), script(source / "AT_AWP", *arguments):
        found = importlib.import_module("train_cifar10")
        networks = iter([model, twin])
        as_bytes = (255 * x).round().byte().permute(0, 2, 3, 1).numpy()
        train, test = ({"data": as_bytes[:n], "labels": y[:n].tolist()} for n in (len(x), 1))
        with (
            patch.object(found, "PreActResNet18", lambda: next(networks)),
            patch.object(found, "cifar10", lambda _: {"train": train, "test": test}),
        ):
            found.main()


def official_trades(source: Path, model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, *, warmup: int = 0) -> None:
    """The script for TRADES, likewise, less its accuracies, of which one fails on this torch (see `breakage`)."""
    arguments = ("--epochs", "1", "--batch-size", str(BATCH), "--lr", "0.01", "--awp-warmup", str(warmup))
    data = TensorDataset(x, y)
    with without_cuda(), mocked("torchvision", "progress", "matplotlib"), script(source / "trades_AWP", *arguments):
        sys.modules["torchvision.datasets"].CIFAR10 = lambda **_: data  # type: ignore[attr-defined]
        found = importlib.import_module("train_trades_cifar")
        networks = iter([model, twin])
        with (
            patch.object(found.models, "WideResNet34", lambda num_classes: next(networks)),
            patch.object(found, "accuracy", lambda *_, **__: (torch.zeros(1), torch.zeros(1))),
            patch.object(found, "test", lambda *_: (0.0, 0.0)),
        ):
            found.main()


def mair(
    source: Path, model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, *, method: str, minimizer: str | None
) -> None:
    """`fit` of its trainers, as the README calls it."""
    trainer, _ = mair_trainer(source, model, method, minimizer)
    trainer.fit(batches(x, y), n_epochs=1, record_type=None, save_type=None)


def mair_trainer(source: Path, model: nn.Module, method: str, minimizer: str | None) -> tuple[Any, Any]:
    """A trainer, set up, and the module."""
    with mocked("torchvision", "PIL", "matplotlib", "pandas", "requests"), script(source):
        found = importlib.import_module("mair")
    extra = {} if method == "AT" else {"beta": BETA}
    wrapped = found.RobModel(model, n_classes=CLASSES)
    trainer = getattr(found, method)(wrapped, eps=EPS, alpha=ALPHA, steps=STEPS, **extra)
    trainer.setup(optimizer="SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)", minimizer=minimizer)
    return trainer, found


def art(
    source: Path, model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, *, mode: str = "PGD", warmup: int = 0
) -> None:
    """`fit` of its trainer for AWP, with its PGD."""
    art_trainer(source, model, twin, mode, warmup).fit(x.numpy(), y.numpy(), batch_size=BATCH, nb_epochs=1)


def art_trainer(source: Path, model: nn.Module, twin: nn.Module, mode: str, warmup: int) -> Any:
    """Two classifiers, an attack, and the trainer of them."""
    with script(source):
        attacks, classifiers, trainers = (
            importlib.import_module(f"art.{name}")
            for name in ("attacks.evasion", "estimators.classification", "defences.trainer")
        )

    def classifier(of: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return classifiers.PyTorchClassifier(
            of, nn.CrossEntropyLoss(), (3, 32, 32), CLASSES, optimizer, clip_values=(0.0, 1.0), device_type="cpu"
        )

    trained = classifier(model, sgd(model))
    attack = attacks.ProjectedGradientDescentPyTorch(
        trained, eps=EPS, eps_step=ALPHA, max_iter=STEPS, num_random_init=1, batch_size=BATCH, verbose=False
    )
    proxy = classifier(twin, torch.optim.SGD(twin.parameters(), 0.01))
    return trainers.AdversarialTrainerAWPPyTorch(
        trained, proxy, attack, mode=mode, gamma=GAMMA, beta=BETA, warmup=warmup
    )


def loss_function(
    source: Path, model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, *, module: str, name: str, **extra: Any
) -> None:
    """The published loss of TRADES, MART, or RST, and a step on it, which is all that their scripts do with a batch."""
    with without_cuda(), script(source):
        loss = getattr(importlib.import_module(module), name)
        optimizer = sgd(model)
        for part, labels in batches(x, y):
            found = loss(
                model, part, labels, optimizer, step_size=ALPHA, epsilon=EPS, perturb_steps=STEPS, beta=BETA, **extra
            )
            (found[0] if isinstance(found, tuple) else found).backward()
            optimizer.step()


def saltflat(
    source: Path,
    model: nn.Module,
    twin: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: str,
    awp: bool,
    attack_mode: Any = "eval",
) -> None:
    """Ours: the step of the library, without the lean network of its command line."""
    import saltflat as ours

    attack = ours.PGD(ours.Linf(EPS), ALPHA, STEPS)
    chosen = ours.AT() if objective == "AT" else getattr(ours, objective)(BETA)
    optimizer = sgd(model)
    for part, labels in batches(x, y):
        ours.double_perturbation_step(
            model, part, labels, objective=chosen, attack=attack, ball=ours.Layerwise(GAMMA) if awp else None,
            optimizer=optimizer, attack_mode=attack_mode,
        )  # fmt: skip


AWP = f"AWP(rho={GAMMA})"
TRAINERS: dict[str, dict[str, Train]] = {
    "csdongxian/AWP": {
        "AT": partial(official_at, warmup=NEVER),
        "AT-AWP": official_at,
        "TRADES": partial(official_trades, warmup=NEVER),
        "TRADES-AWP": official_trades,
    },
    "Harry24k/MAIR": {
        f"{method}{suffix}": partial(mair, method=method, minimizer=minimizer)
        for method in ("AT", "TRADES", "MART")
        for suffix, minimizer in (("", None), ("-AWP", AWP))
    },
    "Trusted-AI/adversarial-robustness-toolbox": {
        "AT": partial(art, warmup=NEVER),
        "AT-AWP": art,
        "TRADES": partial(art, mode="TRADES", warmup=NEVER),
        "TRADES-AWP": partial(art, mode="TRADES"),
    },
    "yaodongyu/TRADES": {"TRADES": partial(loss_function, module="trades", name="trades_loss")},
    "YisenWang/MART": {"MART": partial(loss_function, module="mart", name="mart_loss")},
    "yaircarmon/semisup-adv": {"TRADES": partial(loss_function, module="losses", name="trades_loss", distance="l_inf")},
    "Saltflat": {
        f"{objective}{'-AWP' if awp else ''}": partial(saltflat, objective=objective, awp=awp)
        for objective in ("AT", "TRADES", "MART")
        for awp in (False, True)
    },
}
