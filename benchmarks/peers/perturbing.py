"""What each peer's weight perturbation is, and what it leaves behind.

A climb is made by (source, model, twin) and called with a batch; inside its block the model stands at w + v, as the
peer puts it there, and it yields {name: v}; afterwards the peer has taken v away again, and no optimiser has stepped.
The closed form that all are held against is v_l = gamma ‖w_l‖ g_l / ‖g_l‖, the paper's with one step of ascent.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.stand_ins import images, network
from benchmarks.peers.training import GAMMA, art_trainer, mair_trainer, script

Displacement = dict[str, Tensor]
Climb = Callable[[Tensor, Tensor], AbstractContextManager[Displacement]]
Made = Callable[[Path, nn.Module, nn.Module], Climb]

PROXY_RATE = 0.01  # the official script's, for AT
CYCLES = 200


def official(source: Path, model: nn.Module, twin: nn.Module, *, rate: float = PROXY_RATE) -> Climb:
    """The class that the scripts use, with a proxy."""
    with script(source / "AT_AWP"):
        found = importlib.import_module("utils_awp")
    adversary = found.AdvWeightPerturb(model, twin, torch.optim.SGD(twin.parameters(), rate), GAMMA)

    @contextmanager
    def climb(x: Tensor, y: Tensor) -> Iterator[Displacement]:
        of_norm = adversary.calc_awp(x, y)
        adversary.perturb(of_norm)
        yield {name: GAMMA * d for name, d in of_norm.items()}
        adversary.restore(of_norm)

    return climb


def official_small_rate(source: Path, model: nn.Module, twin: nn.Module) -> Climb:
    """The same where gradients are 1/10,000 as large: what the proxy's step is, rate times gradient, is all that
    matters.
    """
    return official(source, model, twin, rate=1e-4 * PROXY_RATE)


def official_without_proxy(source: Path, model: nn.Module, twin: nn.Module) -> Climb:
    """The class in `awp.py`, which no script uses."""
    with script(source / "AT_AWP"):
        found = importlib.import_module("awp")
    adversary = found.AdvWeightPerturb(model, eta=GAMMA)

    @contextmanager
    def climb(x: Tensor, y: Tensor) -> Iterator[Displacement]:
        adversary.perturb(x, y)
        yield {name: v.detach() for (name, _), v in zip(model.named_parameters(), adversary.diff, strict=True)}
        adversary.restore()

    return climb


def mair(source: Path, model: nn.Module, twin: nn.Module) -> Climb:
    """Its minimizer, around an optimiser whose rate is 0."""
    trainer, _ = mair_trainer(source, model, "AT", f"AWP(rho={GAMMA})")
    for group in trainer.optimizer.param_groups:
        group.update(lr=0.0)
    minimizer = trainer.minimizer

    @contextmanager
    def climb(x: Tensor, y: Tensor) -> Iterator[Displacement]:
        F.cross_entropy(trainer.rmodel(x), y).backward()
        minimizer.ascent_step()
        yield {name: minimizer.state[p]["eps"].clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # of the second backward, of which nothing is wanted here
        minimizer.descent_step()

    return climb


def art(source: Path, model: nn.Module, twin: nn.Module) -> Climb:
    """The two methods of its trainer."""
    trainer = art_trainer(source, model, twin, "PGD", 0)

    @contextmanager
    def climb(x: Tensor, y: Tensor) -> Iterator[Displacement]:
        of_norm = trainer._weight_perturbation(x, x, y)
        trainer._modify_classifier(trainer.classifier, list(of_norm), of_norm, op="add")
        yield {name: GAMMA * d for name, d in of_norm.items()}
        trainer._modify_classifier(trainer.classifier, list(of_norm), of_norm, op="subtract")

    return climb


def saltflat(source: Path, model: nn.Module, twin: nn.Module) -> Climb:
    """Ours."""
    import saltflat as ours

    @contextmanager
    def climb(x: Tensor, y: Tensor) -> Iterator[Displacement]:
        with ours.perturbed(model, lambda: F.cross_entropy(model(x), y), ours.Layerwise(GAMMA)) as ascent:
            yield ascent.displacement

    return climb


CLIMBS: dict[str, dict[str, Made]] = {
    "csdongxian/AWP": {
        "utils_awp.py": official,
        "utils_awp.py, gradients 1e-4 as large": official_small_rate,
        "awp.py": official_without_proxy,
    },
    "Harry24k/MAIR": {"AWP": mair},
    "Trusted-AI/adversarial-robustness-toolbox": {"AdversarialTrainerAWPPyTorch": art},
    "Saltflat": {"perturbed": saltflat},
}


def closed_form(model: nn.Module, gradients: Displacement) -> Displacement:
    """v_l of the tensors that have more than one dimension, in float64.

    >>> model = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> closed_form(model, {"weight": torch.tensor([[-3.0]])})
    {'weight': tensor([[-0.0100]], dtype=torch.float64)}
    """
    weights = {name: p.detach().double() for name, p in model.named_parameters() if p.ndim > 1}
    slopes = {name: gradients[name].double() for name in weights}
    return {name: GAMMA * w.norm() * slopes[name] / slopes[name].norm() for name, w in weights.items()}


def measured(source: Path, make: Made) -> dict[str, Any]:
    """Everything about one climb, on networks of its own.

    Returns a mapping: "tensors", how many are moved, and "one-dimensional", how many of them are biases or belong to
    norm layers; "error", the largest ‖v_l - v*_l‖ / ‖v*_l‖ over the tensors of the closed form; "smallest" and "largest
    size", ‖v_l‖ / (gamma ‖w_l‖) over them; "statistics", updates of BatchNorm's running statistics by the climb;
    "drift", the largest change of a weight over `CYCLES` times, and "weights that drifted", the share of those moved;
    "not finite", the share of weights that are not finite after one batch with a NaN in it; "parallel to g", whether
    the whole of v is one multiple of the whole gradient.
    """
    x, y = images(16)
    model, twin = network(0).train(), network(1).train()
    climb = make(source, model, twin)
    gradients = _gradients(model, x, y)
    expected = closed_form(model, gradients)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    updates = _updates(model)
    with climb(x, y) as v:
        found = {name: d.detach().double().clone() for name, d in v.items() if d.detach().abs().sum() > 0}
    after = _updates(model)
    sizes = [float(found[name].norm() / (GAMMA * before[name].norm())) for name in expected]
    return {
        "tensors": len(found),
        "one-dimensional": sum(d.ndim < 2 for d in found.values()),
        "error": max(float((found[name] - d).norm() / d.norm()) for name, d in expected.items()),
        "smallest size": min(sizes),
        "largest size": max(sizes),
        "parallel to g": _parallel(found, gradients),
        "statistics": after - updates,
        **_left_behind(make(source, model := network(0).train(), network(1).train()), model),
        "not finite": _poisoned(make(source, model := network(0).train(), network(1).train()), model),
    }


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> Displacement:
    """Of the loss, as the model computes them; it is left as it is."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    return {name: p.grad.double() for name, p in twin.named_parameters() if p.grad is not None}


def _parallel(v: Displacement, gradients: Displacement) -> bool:
    """One ratio ‖v_l‖ / ‖g_l‖ for all tensors that are moved, to 1 %; biases before a BatchNorm, whose gradient is
    nothing but rounding, are left out.
    """
    slopes = {name: float(gradients[name].norm()) for name in v}
    ratios = [float(v[name].norm()) / slope for name, slope in slopes.items() if slope > 1e-5 * max(slopes.values())]
    return max(ratios) / min(ratios) < 1.01


def _updates(model: nn.Module) -> int:
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.num_batches_tracked is not None
    return int(norm.num_batches_tracked)


def _left_behind(climb: Climb, model: nn.Module) -> dict[str, float]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: set[str] = set()
    for cycle in range(CYCLES):
        with climb(*images(8, seed=cycle)) as v:
            moved |= {name for name, d in v.items() if d.detach().abs().sum() > 0}
    now = dict(model.named_parameters())
    drifts = torch.cat([(now[name].detach() - before[name]).abs().flatten() for name in sorted(moved)])
    return {"drift": float(drifts.max()), "weights that drifted": float((drifts > 0).float().mean())}


def _poisoned(climb: Climb, model: nn.Module) -> float:
    x, y = images(8)
    x[0, 0, 0, 0] = torch.nan
    with climb(x, y):
        pass
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float((~weights.isfinite()).float().mean())
