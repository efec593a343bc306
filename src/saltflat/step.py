"""One step of training against both adversaries: Algorithm 1 of the AWP paper.

    min_w  max_{v in V}  (1/n) sum_i  max_{x'_i in B(x_i)}  l(f_{w+v}(x'_i), y_i)

    repeat A times:   x' <- K1 steps of ascent in the input ball, at w + v
                      v  <- K2 steps of ascent in the weight ball, at x'
    w <- w - eta g,   g = grad_w of the loss at w + v

and its neighbours, which climb in another ball, in another way (`climb`), on another loss (`climbed`), or descend by
(1 - share) grad_w at w + share grad_w at w + v. A batch walks through the file's one public function from top to
bottom. Source: Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saltflat.balls import Weights, alike, bits, copies, expanded, norms, own
from saltflat.inputs import InputAdversary
from saltflat.objectives import Objective
from saltflat.parallel import everywhere
from saltflat.random import Generator
from saltflat.weights import Ascent, Where, displaced, perturbed

Mode = Literal["eval", "train"]
Climb = Callable[..., AbstractContextManager[Ascent]]  # a function that is called like `perturbed`
AttackOn = Callable[[nn.Module], Callable[[Any], Tensor]]  # what an attack climbs on, made of the model


def itself(model: nn.Module) -> Callable[[Any], Tensor]:
    """What an attack climbs on, unless it is told otherwise: the model."""
    return model


class Radius(Protocol):
    """What a step needs to know of a weight ball, or of a distribution around the weights: the rest is its climb's."""

    @property
    def radius(self) -> float: ...


@dataclass(frozen=True)
class Step:
    """What one step found. Tensors stay on the device: reading one is the caller's decision to wait.

    Attributes:
        loss: at w, before the step (the same as `perturbed_loss` with `ball=None`, and where nobody asked for it: the
            climb was on another loss, or on none, and share is 1).
        perturbed_loss: at w + v.
        x_adv: the attacked batch.
        skipped: how many weight tensors, summed over all ascent steps, had no finite, non-zero gradient.
        dropped: 1 if the batch's gradient was not finite, and was taken for 0; else 0.
    """

    loss: Tensor
    perturbed_loss: Tensor
    x_adv: Any
    skipped: Tensor
    dropped: Tensor


def double_perturbation_step(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    ball: Radius | None,
    optimizer: torch.optim.Optimizer,
    climb: Climb = perturbed,
    climbed: Callable[[nn.Module, Any, Any, Tensor], Tensor] | None = None,
    share: float = 1.0,
    attack_mode: Mode = "eval",
    attack_on: AttackOn = itself,
    steps: int = 1,
    step_size: float | None = None,
    alternations: int = 1,
    step_inside: bool = False,
    where: Where | None = None,
    generator: Generator = None,
) -> Step:
    """Attack x, climb in w, step down.

    Args:
        model: in the mode to train in; that is its mode in every forward but the attack's.
        x, y: a batch. With `attack=None`, x may be whatever the model takes.
        objective: `AT()`, `TRADES(6.0)`, `MART(6.0)`, or any pair of `inner` and `outer`.
        attack: the input adversary, `PGD(...)` (K1 is its `steps`), or None to leave x alone.
        ball: the weight adversary's, `Layerwise(gamma)`; None or radius 0 skips the ascent.
        optimizer: stepped once; its gradients and the model's are cleared first and left for inspection. What it trains
            besides the model, such as a scale in the objective, is not perturbed, and has the gradient at w + v.
        climb: what finds v: `perturbed`, or a function that is called like it (`saltflat.neighbours`), with whatever it
            needs besides bound to it: `partial(drawn, generator=generator)`.
        climbed: (model, x, x_adv, y) -> scalar, what it is asked to maximise; default `objective.outer`.
        share: of the gradient at w + v in the descent, WT-AWP's lambda; the rest is the gradient at w. 0 skips the
            ascent. Below 1, one forward and backward more, also where the climb has been at w: dropout draws anew.
        attack_mode: "eval", the attack sees running BatchNorm statistics and changes none; "train", batch statistics,
            and its forwards update the running ones, as in the official AT code.
        attack_on: makes what the attack climbs on of the model, as it stands at the beginning of every attack: in its
            mode, and at its weights, w + v from the second of A attacks on. Something that gives the logits, or nearly,
            and can be differentiated in x; by default the model itself. In attack mode "train", running statistics see
            what it does to the model's. `saltflat.lean.leaner()` is for CPUs and attack mode "eval"; elsewhere it gives
            the model itself, and nothing is gained.
        steps, step_size: K2 and eta_2 of the weight ascent, as in `perturbed`.
        alternations: A; each goes on from where both adversaries stand.
        step_inside: the optimiser steps at w + v, as in `perturbed`.
        where: which weights are perturbed, as in `perturbed`; None leaves it to the climb.
        generator: what the attack's start is drawn from.

    A batch whose gradient is not finite is dropped, without waiting for the device: the optimiser steps with a gradient
    of 0 (momentum and weight decay go on), and buffers stand as they did before the batch.

    Changes the weights, the optimiser's state, `.grad`, the generator, and the buffers as the outer forwards do; modes
    come back as they were.

    Raises: ValueError for fewer alternations than one, more than one without a weight adversary, a share outside of [0,
    1], and one below 1 with `step_inside`; and what the attack and the climb raise.

    Costs for AT with K2 = A = 1: K1 forwards and input gradients, then 2 forwards and weight gradients.

    >>> from saltflat import AT, PGD, Layerwise, Linf
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = double_perturbation_step(model, torch.rand(8, 4), torch.arange(8) % 2, objective=AT(),
    ...                                 attack=PGD(Linf(0.1), 0.025, 10), ball=Layerwise(5e-3), optimizer=optimizer)
    >>> bool(step.perturbed_loss > step.loss)
    True
    """
    if alternations < 1:
        raise ValueError(f"alternations: expected an integer >= 1, got {alternations!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share!r}")
    if share < 1 and step_inside:
        raise ValueError(f"share: expected 1 with step_inside, since the rest is taken at w, got {share!r}")
    ball = ball if ball is not None and ball.radius > 0 and share > 0 else None
    if ball is None and alternations > 1:
        raise ValueError(f"alternations: expected 1 without a weight adversary, got {alternations!r}")
    climb = climb if where is None else partial(climb, where=where)
    drop = dropping(model, optimizer)
    cleared(model, optimizer)

    def attacked(v: Weights, x_adv: Any) -> Any:
        if attack is None:
            return x
        with in_mode(model, attack_mode), displaced(model, v):
            return attack(objective.inner(attack_on(model), x, y), x, start=x_adv, generator=generator)

    def loss() -> Tensor:
        return objective.outer(model, x, x_adv, y)

    height = fixing(beside(model, optimizer), lambda: (climbed or objective.outer)(model, x, x_adv, y))
    x_adv = attacked({}, None)
    if ball is None:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        dropped = drop()
        optimizer.step()
        return Step(value.detach(), value.detach(), x_adv, torch.zeros_like(dropped), dropped)

    v: Weights = {}
    climbs: list[Ascent] = []
    for _ in range(alternations - 1):
        with climb(model, height, ball, steps=steps, step_size=step_size, start=v) as ascent:
            v = ascent.displacement
        climbs.append(ascent)
        x_adv = attacked(v, x_adv)

    with climb(model, height, ball, steps=steps, step_size=step_size, start=v, step_inside=step_inside) as ascent:
        v = {}  # the weights stand at w + v; no copy of v is kept
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if step_inside:
            dropped = drop()
            optimizer.step()
    if not step_inside:
        if share < 1:
            given = [*model.parameters(), *beside(model, optimizer)]
            torch._foreach_mul_([p.grad for p in given if p.grad is not None], share)
            rest = loss()
            ((1 - share) * rest).backward()  # type: ignore[no-untyped-call]
        dropped = drop()
        optimizer.step()
    climbs.append(ascent)
    at_w = [done.value for done in climbs if climbed is None] + ([rest.detach()] if share < 1 else [])
    first = next((found for found in at_w if found is not None), value.detach())
    return Step(first, value.detach(), x_adv, torch.stack([done.skipped for done in climbs]).sum(), dropped)


def beside(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the optimizer trains besides the model, such as a scale in the objective."""
    own = {*model.parameters()}
    return [p for group in optimizer.param_groups for p in group["params"] if p not in own]


def cleared(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sets all gradients of the model and the optimizer to None: those of what another one trains would add up."""
    optimizer.zero_grad()
    model.zero_grad()


def fixing(parameters: Iterable[nn.Parameter], of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`of`, in which these parameters are constants: a climb is in the model's weights, and leaves no gradient in
    others, where the descent's would be added to it. What it gives is a scalar, or of shape (N,), as `of` does.

    >>> w, scale = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    >>> fixing([scale], lambda: w * scale)().backward()
    >>> w.grad, scale.grad
    (tensor(1.), None)
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    def fixed(*given: Any) -> Tensor:
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            return of(*given)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    return fixed


def dropping(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """To be called before a batch's forwards; what comes back, after its backwards: if any gradient of the model or the
    optimizer is not finite, all are set to 0 and the buffers to what they held, on the device. It returns whether that
    happened, 0 or 1.

    >>> model = nn.Linear(2, 1)
    >>> drop = dropping(model, torch.optim.SGD(model.parameters()))
    >>> (model(torch.ones(1, 2)) * torch.inf).sum().backward()
    >>> drop(), model.weight.grad
    (tensor(1), tensor([[0., 0.]]))
    """
    undo = undoing(model)

    @torch.no_grad()
    def drop() -> Tensor:
        given = [*model.parameters(), *beside(model, optimizer)]
        gradients = [p.grad._values() if p.grad.is_sparse else p.grad for p in given if p.grad is not None]
        finite = norms(own(gradients) or [torch.zeros(1)], math.inf).isfinite().all()
        bad = ~everywhere(finite, given)
        for (found,) in alike(own(gradients)):
            torch._foreach_mul_(numbers := bits(found), (~bad).to(numbers[0]))
        undo(bad)
        return bad.long()

    return drop


def undoing(model: nn.Module) -> Callable[[Tensor], None]:
    """Takes the model's buffers as they are; what comes back puts them back, if it is given a true tensor, on the
    device.
    """
    found = {name: buffer for name, buffer in model.named_buffers() if not is_lazy(buffer)}
    kept = copies({name: buffer for name, buffer in found.items() if not expanded(buffer)})

    @torch.no_grad()
    def undo(condition: Tensor) -> None:
        # a cache that grew stays as it is
        now = {name: new for name, new in model.named_buffers() if name in kept and new.shape == kept[name].shape}
        for buffers, before in alike(own(now.values()), own(kept[name].to(new) for name, new in now.items())):
            numbers = bits(buffers)  # now + condition * (before - now), which is exact in integers, wrapped or not
            back = [*torch._foreach_sub(bits(before), numbers)]
            torch._foreach_mul_(back, condition.to(back[0]))
            torch._foreach_copy_(numbers, torch._foreach_add(numbers, back))

    return undo


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The whole model in "eval" or "train" mode inside the block; every module has its own mode back afterwards, by its
    own `train`, which may do more than set a flag. ValueError for any other mode.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with in_mode(model, "eval"):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode: expected 'eval' or 'train', got {mode!r}")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(mode == "train")
        yield
    finally:
        for module, training in modes:  # from the model down, since each takes what is below it along
            if module.training != training:
                module.train(training)
