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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from operator import getitem, setitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from saltflat.balls import WeightBall, Weights, alike, check_radius, copies, copy, expanded, norms
from saltflat.parallel import refuse_others, reshard

Closure = Callable[[], Tensor]
Parameters = Mapping[str, nn.Parameter]
Where = Callable[[str, nn.Parameter], bool]


def default(name: str, parameter: nn.Parameter) -> bool:
    """The tensors that AWP perturbs: more than one dimension (no bias, no norm layer's scale), and trained. The name is
    not looked at.
    """
    return parameter.ndim > 1 and parameter.requires_grad


def trained(name: str, parameter: nn.Parameter) -> bool:
    """All that is trained, biases and norm layers as well, whatever its name: what SAM and RandomWP perturb."""
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

    Raises: KeyError for a name that the model does not have; ValueError for a v of another shape than its w.

    >>> model = nn.Linear(2, 1)
    >>> with displaced(model, {"weight": torch.ones(1, 2)}):
    ...     inside = model.weight.detach().clone()
    >>> bool(torch.allclose(inside - model.weight, torch.ones(1, 2)))
    True
    """
    parameters = dict(model.named_parameters())
    parameters = {name: parameters[name] for name in displacement}
    _check_shapes("displacement", displacement, parameters)
    with given_back(parameters) as centre:
        place(parameters, centre, displacement)
        yield


@dataclass(eq=False, repr=False)
class Ascent:
    """What `perturbed`, or another climb, found.

    Attributes:
        value: the loss where the climb began, detached and on the device: at w, or at w + start. None if the climb
            asked for no loss: a gradient was handed in, or v was drawn. Without dimensions, in the loss's unit.
        skipped: how many tensors, summed over the climb's steps, stayed where they were: their gradient was zero or not
            finite (or their norm is zero). On the device: read it when metrics are written.

    Besides, `displacement`, {name: v} while the block runs. After it, that raises a RuntimeError.
    """

    value: Tensor | None
    skipped: Tensor
    _parameters: Parameters | None
    _centre: Weights

    @property
    def displacement(self) -> dict[str, Tensor]:
        """{name: v}, derived from the weights as they stand: valid inside the block only, RuntimeError after it."""
        if self._parameters is None:
            raise RuntimeError("displacement: valid inside the `with` block only; clone what you need there")
        return {name: parameter.detach() - self._centre[name] for name, parameter in self._parameters.items()}


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

    Yields: an `Ascent`. Tied weights are perturbed once; tensors that the loss does not reach, not at all. A loss that
    also reaches parameters outside of the model adds its gradient to theirs at every step: clear it inside the block,
    or give a module that holds them all and choose by `where`.

    Raises: ValueError for steps < 1, a given gradient with steps > 1, a `where` that chooses nothing, names that were
    not chosen, tensors of another shape than their weight, or a loss that reaches no chosen weight; TypeError for a
    loss that is no closure, or returns no scalar; RuntimeError (after w was given back) if a weight was changed inside
    the block without `step_inside=True`. A change through `p.data` cannot be seen, and is lost.

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
    given, closures = (loss, []) if isinstance(loss, Mapping) else ({}, as_closures(loss))
    if given and steps > 1:
        raise ValueError(f"steps: a gradient at hand allows one step, got {steps!r}")
    if step is not None and step_size is not None:
        raise ValueError(f"step_size: expected None beside a step of its own size, got {step_size!r}")
    size = ball.radius / steps if step_size is None else step_size
    check_radius(size, "step_size")
    parameters = chosen_weights(model, where)
    for argument, tensors in (("start", start or {}), ("loss", given)):
        if strange := [name for name in tensors if name not in parameters]:
            raise ValueError(f"{argument}: {strange[0]!r} is none of the {len(parameters)} weights that are perturbed")
        _check_shapes(argument, tensors, parameters)
    step = step or (ball if size == ball.radius else replace(ball, radius=size))
    with given_back(parameters) as centre:
        v, value, skipped = dict(start or {}), None, []
        del start
        if v:
            place(parameters, centre, v)
        for _ in range(steps):
            g, reached = climbing_gradient(model, closures, parameters) if closures else (given, None)
            value = reached if value is None else value
            if not g:
                raise ValueError(f"loss: reaches none of the {len(parameters)} weights that are perturbed")
            ahead = step.steepest(g, centre)
            away = v | {name: v[name] + s if name in v else s for name, s in ahead.items()}
            v = ahead if step is ball and not v else ball.project(away, centre)  # one step is a member already
            place(parameters, centre, v)
            skipped.append((norms([*ahead.values()], 1) == 0).sum())
        # While the block runs, one copy of the weights is kept; two if the optimiser steps inside.
        del v, g, ahead, away
        with held(parameters, centre, value, torch.stack(skipped).sum(), step_inside) as ascent:
            yield ascent


@contextmanager
def held(
    parameters: Parameters, centre: dict[str, Tensor], value: Tensor | None, skipped: Tensor, step_inside: bool
) -> Iterator[Ascent]:
    """The end of every climb, inside `given_back`: what the block that runs at w + v is told, and may do.

    Args:
        parameters, centre: {name: w + v}, the model's own tensors, and {name: w}, which `given_back` yielded.
        value, skipped: of the `Ascent`.
        step_inside: as in `perturbed`.
    """
    ascent = Ascent(value, skipped, parameters, centre)
    with _step_kept(parameters, centre) if step_inside else _no_step(parameters):
        try:
            yield ascent
        finally:
            ascent._parameters, ascent._centre = None, {}


@contextmanager
def given_back(parameters: Parameters) -> Iterator[dict[str, Tensor]]:
    """Yields the centre, a copy {name: w} of the parameters, and puts back whatever stands in it afterwards: w, to the
    bit.
    """
    centre = copies(parameters)
    with _finally(lambda: place(parameters, centre, {})):
        yield centre


@contextmanager
def _step_kept(parameters: Parameters, centre: dict[str, Tensor]) -> Iterator[None]:
    """What happens to w + v inside happens to the centre: w <- w + (what the step did), as in the official code."""
    before = [*copies(parameters).values()]
    try:
        yield
    finally:
        now = [parameter.detach() for parameter in parameters.values()]
        gone = torch._foreach_sub(before, now)
        for part, one, other in zip(gone, before, now, strict=True):
            part.masked_fill_(one == other, 0)  # inf - inf is NaN
        torch._foreach_sub_([centre[name] for name in parameters], gone)  # - 0.0 leaves -0.0, which + 0.0 would not


@contextmanager
def _no_step(parameters: Parameters) -> Iterator[None]:
    """Nothing may happen to w + v inside: it would be lost.

    Version counters tell of most changes, torch's hook of the fused optimisers' steps, which do not raise them.
    """
    versions = {name: parameter._version for name, parameter in parameters.items()}
    stepped: set[int] = set()

    def notice(optimizer: torch.optim.Optimizer, *_: object) -> None:
        stepped.update(id(parameter) for group in optimizer.param_groups for parameter in group["params"])

    hook = register_optimizer_step_post_hook(notice)
    try:
        yield
    finally:
        hook.remove()
    if changed := [name for name, p in parameters.items() if id(p) in stepped or p._version != versions[name]]:
        raise RuntimeError(
            f"weight {changed[0]!r} was changed inside `perturbed`, and lost: step after it, or pass step_inside=True"
        )


def climbing_gradient(
    model: nn.Module, closures: Sequence[Closure], parameters: Parameters
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient and the value of the (summed) loss at the weights as they stand.

    Args:
        model: its `.grad` and buffers are left as found.
        closures: () -> scalar each; one graph is alive at a time.
        parameters: {name: w}, of which the gradient is wanted.

    Returns: {name: g} for what the loss reaches, which the next backward may overwrite, and the sum.
    """
    with buffers_kept(model), _gradients_set_aside(model), torch.enable_grad():
        values = [_backward(closure) for closure in closures]
        found = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
        # Embeddings may give sparse gradients.
        return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}, torch.stack(values).sum()


def _check_shapes(argument: str, tensors: Weights, parameters: Parameters) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (shape := parameters[name].shape):
            raise ValueError(f"{argument}: expected {tuple(shape)} for {name!r}, got {tuple(tensor.shape)}")


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

    The content is copied, not only the reference kept: under DistributedDataParallel a `.grad` may be a view of a
    bucket that the next backward fills.
    """
    with _kept([(parameter, "grad") for parameter in model.parameters()], getattr, setattr):
        for parameter in model.parameters():
            parameter.grad = None
        yield


def buffers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Whatever the forwards inside do to buffers of the model is undone, whichever module owns them.

    All are written back: BatchNorm's kernels change the running statistics without raising their version counters.
    """
    return _kept([(module._buffers, name) for module in model.modules() for name in module._buffers], getitem, setitem)


@contextmanager
def _kept(names: Sequence[tuple[Any, str]], get: Callable[..., Any], put: Callable[..., Any]) -> Iterator[None]:
    """After the block they are the tensors that they were, or None, with the content that they had."""
    found = [(owner, name, get(owner, name)) for owner, name in names]
    tensors = dict(enumerate(tensor for _, _, tensor in found if tensor is not None and not expanded(tensor)))
    contents = copies(tensors)

    def put_back() -> None:
        for owner, name, tensor in found:
            put(owner, name, tensor)
        copy(tensors.values(), contents.values())

    with _finally(put_back):
        yield


def chosen_weights(model: nn.Module, where: Where) -> dict[str, nn.Parameter]:
    """The parameters of the model that `where` takes, {name: w}; ValueError if there are none, or if layers cannot be
    told apart (`refuse_others`).
    """
    refuse_others(model)
    reshard(model)
    parameters = dict(model.named_parameters())
    chosen = {name: parameter for name, parameter in parameters.items() if where(name, parameter)}
    if not chosen:
        raise ValueError(f"where: chose none of the model's {len(parameters)} parameters")
    return chosen


@torch.no_grad()
def place(parameters: Parameters, centre: Weights, displacement: Weights) -> None:
    """The parameters become w + v, w the centre and v the displacement {name: v}; w where v has no name."""
    copy(parameters.values(), [centre[name] for name in parameters])
    for weights, v in alike([parameters[name] for name in displacement], displacement.values()):
        torch._foreach_add_(weights, v)
    torch.clear_autocast_cache()  # or an autocast around the block would go on with copies of the weights as they were


@contextmanager
def _finally(put_back: Callable[[], None]) -> Iterator[None]:
    """Puts things back after the block. Whoever presses Ctrl-C in the meantime waits until they are."""
    try:
        yield
    finally:
        try:
            put_back()
        except KeyboardInterrupt:
            put_back()
            raise
