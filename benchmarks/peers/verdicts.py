"""AutoAttack's standard version, Linf, by each implementation, on the same small network and images, seed 0.

Which images stay right is what is compared, not only how many.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.stand_ins import mocked
from benchmarks.peers.training import script

EPS, N = 0.1, 48


def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, adversarially trained for a little on the bundled digits, and images of the test set."""
    import saltflat as ours
    from saltflat.data.digits import digits

    splits = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    x, y = splits.train.images / 255, splits.train.labels
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    attack = ours.PGD(ours.Linf(EPS), EPS / 2, 3)
    for epoch in range(8):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            ours.double_perturbation_step(
                model, x[rows], y[rows], objective=ours.AT(), attack=attack, ball=None, optimizer=optimizer,
                generator=torch.Generator().manual_seed(epoch),
            )  # fmt: skip
    model.eval()
    return model, splits.test.images[:N] / 255, splits.test.labels[:N]


def fra31(source: Path) -> Tensor:
    """The published one."""
    with script(source):
        found = importlib.import_module("autoattack")
    model, x, y = subject()
    adversary = found.AutoAttack(model, norm="Linf", eps=EPS, version="standard", seed=0, device="cpu", verbose=False)
    return _right(model, adversary.run_standard_evaluation(x, y, bs=N), y)


def pyautoattack() -> Tensor:
    """The package on PyPI."""
    found = importlib.import_module("pyautoattack")
    model, x, y = subject()
    _, answers = found.AutoAttack(model, norm="Linf", eps=EPS, seed=0, version="standard").run_standard_evaluation(
        x, y, batch_size=N
    )
    return answers == y


def torchattacks(source: Path) -> Tensor:
    """That of torchattacks."""
    with mocked("torchvision", "requests"), script(source):
        found = importlib.import_module("torchattacks")
    model, x, y = subject()
    return _right(
        model, found.AutoAttack(model, norm="Linf", eps=EPS, version="standard", n_classes=10, seed=0)(x, y), y
    )


def saltflat() -> Tensor:
    """Ours."""
    from saltflat import Linf
    from saltflat.evaluation.suite import evaluate, standard

    model, x, y = subject()
    *_, last = evaluate(model, x, y, [standard(Linf(EPS))], batch_size=N, seed=0)
    return last.verdicts["standard"].robust()


def _right(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x_adv).argmax(dim=1) == y
