"""The weight adversary: climb at w, hold w + v, give w back.

    v_0 = start (0),    v_{k+1} = P( v_k + s(eta, grad L(w + v_k)) ),    k = 0 ... steps - 1

L is a closure, the training loss as a function of the weights; P and s(eta, g) are the projection and the steepest
step of a weight ball, whose norms ‖w_l‖ are always taken at the centre w. With `Layerwise(gamma)` and one step, v_l =
gamma ‖w_l‖ g_l / ‖g_l‖, the usual form of AWP.

What comes back is w itself, to the bit, however the block is left: a copy is put back, nothing is added and then
subtracted (which drifts), and no parameter gets other storage. Buffers (BatchNorm's running statistics, spectral
norm's vectors, counters) stand after the climb as they did before, so they only see the forwards that the caller
makes; `.grad` is as the caller left it.

Source: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv 2004.05884,
Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from saltflat.balls import WeightBall, Weights

Closure = Callable[[], Tensor]
Where = Callable[[str, nn.Parameter], bool]


def default(name: str, parameter: nn.Parameter) -> bool:
    """The tensors that AWP perturbs: more than one dimension (no bias, no norm layer's scale), and trained."""
    return parameter.ndim > 1 and parameter.requires_grad


def trained(name: str, parameter: nn.Parameter) -> bool:
    """All that is trained, biases and norm layers as well: what SAM and RandomWP perturb."""
    return parameter.requires_grad


def gradient(model: nn.Module, loss: Closure | Sequence[Closure], *, where: Where = default) -> dict[str, Tensor]:
    """The gradient of `loss` with respect to the chosen weights, as {name: g}; tensors that the loss does not reach
    are left out.

    Args:
        model: its `named_parameters` are looked at, a tied weight once.
        loss: () -> scalar; or a sequence of such closures (micro-batches), whose gradients are added, one graph alive
            at a time.
        where: (name, parameter) -> bool, which tensors; the default takes trained ones of more than one dimension.

    The gradient comes from `.backward()`, so that it is averaged over ranks under DistributedDataParallel. The model's
    `.grad` and buffers are left as they were found; hooks on its parameters do fire, and a loss that also reaches
    other modules leaves its gradient there.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> gradient(model, lambda: model(torch.tensor([[3.0, 4.0]])).sum())["weight"]
    tensor([[3., 4.]])
    """
    found, _ = climbing_gradient(model, as_closures(loss), chosen_weights(model, where))
    return {name: g.clone() for name, g in found.items()}  # under DDP they may be views of what the next backward fills


@contextmanager
def displaced(model: nn.Module, displacement: Weights) -> Iterator[None]:
    """Holds w + v inside the block, and gives w back, to the bit.

    Args:
        displacement: {name: v}, by the names of `model.named_parameters()`.

    Raises: KeyError for a name that the model does not have.

    >>> model = nn.Linear(2, 1)
    >>> with displaced(model, {"weight": torch.ones(1, 2)}):
    ...     inside = model.weight.detach().clone()
    >>> bool(torch.allclose(inside - model.weight, torch.ones(1, 2)))
    True
    """
    parameters = dict(model.named_parameters())
    parameters = {name: parameters[name] for name in displacement}
    with given_back(parameters) as centre:
        place(parameters, centre, displacement)
        yield


class Ascent:
    """What `perturbed`, or another climb, found.

    Attributes:
        value: the loss where the climb began, detached and on the device: at w, or at w + start. None if the climb
            asked for no loss: a gradient was handed in, or v was drawn.
        skipped: how many tensors, summed over the climb's steps, stayed where they were: their gradient was zero or not
            finite (or their norm is zero). On the device: read it when metrics are written.
    """

    def __init__(
        self, value: Tensor | None, skipped: Tensor, parameters: Mapping[str, nn.Parameter], centre: Weights
    ) -> None:
        self.value, self.skipped = value, skipped
        self._parameters: Mapping[str, nn.Parameter] | None = parameters
        self._centre = centre

    @property
    def displacement(self) -> dict[str, Tensor]:
        """{name: v}, derived from the weights as they stand: valid inside the block only."""
        if self._parameters is None:
            raise RuntimeError("displacement: valid inside the `with` block only; clone what you need there")
        return {name: parameter.detach() - self._centre[name] for name, parameter in self._parameters.items()}

    def _close(self) -> None:
        self._parameters, self._centre = None, {}


@contextmanager
def perturbed(
    model: nn.Module,
    loss: Closure | Sequence[Closure] | Weights,
    ball: WeightBall,
    *,
    steps: int = 1,
    step_size: float | None = None,
    step: WeightBall | None = None,
    start: Weights | None = None,
    where: Where = default,
    step_inside: bool = False,
) -> Iterator[Ascent]:
    """Climb from w, hold w + v inside the block, give w back.

    Args:
        model: any module; its mode is not touched.
        loss: () -> scalar, with x_adv fixed before; a sequence of such closures (micro-batches: their sum is climbed);
            or {name: g}, a gradient at hand.
        ball: `Layerwise(gamma)`, or any weight ball.
        steps: K2, gradient evaluations; each is projected.
        step_size: in the unit of the ball's radius; default radius / steps.
        step: steps that are steepest in another ball, of its radius, instead: `Layerwise(eta)` while `ball` is a `Box`.
        start: {name: v} to go on from, else 0.
        where: (name, parameter) -> bool, which tensors are perturbed.
        step_inside: False, the optimiser steps after the block, at w: w - lr (grad L(w + v) + weight decay w). True,
            it steps inside, at w + v, and v is taken off afterwards: weight decay then acts on w + v, as in the
            official code.

    Yields: an `Ascent`. Tied weights are perturbed once; tensors that the loss does not reach, not at all.

    Raises: ValueError for steps < 1, a given gradient with steps > 1, a `where` that chooses nothing, names that were
    not chosen, or a loss that reaches no chosen weight; TypeError for a loss that is no closure, or returns no scalar;
    RuntimeError (after w was given back) if a weight was changed inside the block without `step_inside=True`. A change
    through `p.data` cannot be seen, and is lost.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> from saltflat import Layerwise
    >>> with perturbed(model, lambda: model(torch.tensor([[1.0, 0.0]])).sum(), Layerwise(0.5)) as ascent:
    ...     print(model.weight.data, ascent.value)
    tensor([[5.1213, 3.0000]]) tensor(3.)
    >>> model.weight.data
    tensor([[3., 3.]])
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    if isinstance(loss, Mapping) and steps > 1:
        raise ValueError(f"steps: a gradient at hand allows one step, got {steps!r}")
    if step is not None and step_size is not None:
        raise ValueError(f"step_size: expected None beside a step of its own size, got {step_size!r}")
    if step_size is not None and not 0 <= step_size < math.inf:
        raise ValueError(f"step_size: expected a finite number >= 0, got {step_size!r}")
    closures = [] if isinstance(loss, Mapping) else as_closures(loss)
    parameters = chosen_weights(model, where)
    for given, tensors in (("start", start or {}), ("loss", loss if isinstance(loss, Mapping) else {})):
        if strange := [name for name in tensors if name not in parameters]:
            raise ValueError(f"{given}: {strange[0]!r} is none of the {len(parameters)} weights that are perturbed")
    if step is None:
        step = replace(ball, radius=ball.radius / steps if step_size is None else step_size)
    with given_back(parameters) as centre:
        v, value, skipped = dict(start or {}), None, []
        del start
        place(parameters, centre, v)
        for _ in range(steps):
            if isinstance(loss, Mapping):
                g = dict(loss)
            else:
                g, reached = climbing_gradient(model, closures, parameters)
                value = reached if value is None else value
            if not g:
                raise ValueError(f"loss: reaches none of the {len(parameters)} weights that are perturbed")
            ahead = step.steepest(g, centre)
            v = ball.project(v | {name: v[name] + s if name in v else s for name, s in ahead.items()}, centre)
            place(parameters, centre, v)
            skipped += [(s == 0).all() for s in ahead.values()]
        del v, g, ahead  # while the block runs, one copy of the weights is kept; two if the optimiser steps inside
        with held(parameters, centre, value, torch.stack(skipped).sum(), step_inside) as ascent:
            yield ascent


@contextmanager
def held(
    parameters: Mapping[str, nn.Parameter],
    centre: dict[str, Tensor],
    value: Tensor | None,
    skipped: Tensor,
    step_inside: bool,
) -> Iterator[Ascent]:
    """The end of every climb, inside `given_back`: what the block that runs at w + v is told, and may do."""
    ascent = Ascent(value, skipped, parameters, centre)
    with _step_kept(parameters, centre) if step_inside else _no_step(parameters):
        try:
            yield ascent
        finally:
            ascent._close()


@contextmanager
def given_back(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Yields the centre, and puts back whatever stands in it afterwards: w, to the bit."""
    centre = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield centre
    finally:
        _surely(lambda: place(parameters, centre))


@contextmanager
def _step_kept(parameters: Mapping[str, nn.Parameter], centre: dict[str, Tensor]) -> Iterator[None]:
    """What happens to w + v inside happens to the centre: w <- w + (what the step did), as in the official code."""
    held = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, before in held.items():
            now, w = parameters[name].detach(), centre[name]
            centre[name] = torch.where(now == before, w, w + (now - before))  # where: -0.0 + 0.0 is another bit


@contextmanager
def _no_step(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Nothing may happen to w + v inside: it would be lost.

    Version counters tell of most changes, torch's hook of the fused optimisers' steps, which do not raise them.
    """
    versions = {name: parameter._version for name, parameter in parameters.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    changed: list[str] = []

    def notice(optimizer: torch.optim.Optimizer, *_: object) -> None:
        given = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        changed.extend(names[identity] for identity in given if identity in names)

    hook = register_optimizer_step_post_hook(notice)
    try:
        yield
    finally:
        hook.remove()
    changed += [name for name, version in versions.items() if parameters[name]._version != version]
    if changed:
        raise RuntimeError(
            f"weight {changed[0]!r} was changed inside `perturbed`, and the change is lost: "
            "call optimizer.step() after the block, or pass step_inside=True"
        )


def climbing_gradient(
    model: nn.Module, closures: Sequence[Closure], parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient and the value of the (summed) loss at the weights as they stand."""
    with buffers_kept(model), _gradients_set_aside(model), torch.enable_grad():
        values = [_backward(closure) for closure in closures]
        found = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
        # Embeddings may give sparse gradients.
        dense = {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}
        return dense, torch.stack(values).sum()


def as_closures(loss: Any) -> list[Closure]:
    """One closure or several, as a list; TypeError for anything else."""
    closures: list[Any] = list(loss) if isinstance(loss, Sequence) else [loss]
    if not closures or not all(callable(closure) for closure in closures):
        raise TypeError(
            f"loss: expected a closure such as `lambda: ...`, or a sequence of them, got {type(loss).__name__}"
        )
    return closures


def _backward(closure: Closure) -> Tensor:
    value = closure()
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected the closure to return a tensor without dimensions, got {got}")
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """`.grad` is None inside, and afterwards the tensor that it was, with the content that it had.

    The content is cloned, not only the reference kept: under DistributedDataParallel a `.grad` may be a view of a
    bucket that the next backward fills.
    """
    kept = [
        (parameter, parameter.grad, None if parameter.grad is None else parameter.grad.clone())
        for parameter in model.parameters()
    ]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, grad, content in kept:
            parameter.grad = grad if grad is None or content is None else grad.copy_(content)

    try:
        for parameter, _, _ in kept:
            parameter.grad = None
        yield
    finally:
        _surely(put_back)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever the forwards inside do to buffers is undone, whoever owns them.

    All are written back: BatchNorm's kernels change the running statistics without raising their version counters.
    """
    kept = [
        (module._buffers, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]

    @torch.no_grad()
    def put_back() -> None:
        for buffers, name, buffer, content in kept:
            buffers[name] = buffer if buffer is None or content is None else buffer.copy_(content)

    try:
        yield
    finally:
        _surely(put_back)


def chosen_weights(model: nn.Module, where: Where) -> dict[str, nn.Parameter]:
    """The parameters that `where` takes, by name; ValueError if there are none."""
    parameters = dict(model.named_parameters())
    chosen = {name: parameter for name, parameter in parameters.items() if where(name, parameter)}
    if not chosen:
        raise ValueError(f"where: chose none of the model's {len(parameters)} parameters")
    return chosen


@torch.no_grad()
def place(parameters: Mapping[str, nn.Parameter], centre: Weights, displacement: Weights | None = None) -> None:
    """w + v, for the names in v; or w."""
    for name in centre if displacement is None else displacement:
        parameters[name].copy_(centre[name] if displacement is None else centre[name] + displacement[name])
    torch.clear_autocast_cache()  # or an autocast around the block would go on with copies of the weights as they were


def _surely(put_back: Callable[[], None]) -> None:
    """Whoever presses Ctrl-C while things are being put back waits until they are."""
    try:
        put_back()
    except KeyboardInterrupt:
        put_back()
        raise
