"""Searching for adversarial examples: the frame that every attack of an evaluation runs in.

    an attack proposes x'_0, x'_1, ... with the logits z_t = f_w(x'_t);   example i is fooled at the first t with

        argmax exact(P(x'_t,i)) != y_i,    P: into the ball and the box, in float64

An attack is a generator: it yields a `Trial` of all rows that are still in the search, and is sent the indices of the
rows that go on, or None when all do. `find` runs it and decides: no attack is believed. Whatever looks fooled is put
into the ball and the box exactly, and the classifier is asked once more, in full precision; only then the row leaves
the search. After a refusal it is asked again when the attack sees a larger margin. So attacks are free to run in half
precision, and nobody computes for an example that is already fooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Generator as Coroutine
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor

from saltflat.balls import L2, InputBall, Linf
from saltflat.evaluation.accuracy import right
from saltflat.evaluation.stretch import stretch
from saltflat.inputs import check_inputs
from saltflat.objectives import margin
from saltflat.random import Generator, PerExample

Logits = Callable[[Tensor], Tensor]


class Trial(NamedTuple):
    """Where an attack stands.

    Attributes:
        x_adv: (M, ...), one per row in the search.
        logits: (M, C), the attack's, in whatever precision it runs.
        inside: (M,) bool, which rows lie in the ball; None says all do.
    """

    x_adv: Tensor
    logits: Tensor
    inside: Tensor | None = None


MOVED = 1e-6  # in numbers of x, by which a trial lay outside of the ball: what it claimed says nothing of those inside

Search = Coroutine[Trial, Tensor | None, None]


class Attack(Protocol):
    """A frozen dataclass with the ball it searches, which is called to begin a search."""

    @property
    def ball(self) -> InputBall: ...
    def __call__(self, logits: Logits, x: Tensor, y: Tensor, *, generator: Generator = None) -> Search: ...


@dataclass(frozen=True)
class Found:
    """What became of each example of a batch.

    Attributes:
        x_adv: (N, ...) in the ball and the box; x itself where nothing was found.
        fooled: (N,) bool, misclassified at x_adv in full precision.
        iteration: (N,) int64, how many trials came before the one that fooled it; -1 where none did.
        margin: (N,) max_{k != y} z_k - z_y: at x_adv where fooled, else the largest that the attack saw. Of what was
            decided in full precision, that value counts; claims no larger than a refused one do not.
    """

    x_adv: Tensor
    fooled: Tensor
    iteration: Tensor
    margin: Tensor


def find(
    attack: Attack,
    logits: Logits,
    x: Tensor,
    y: Tensor,
    *,
    exact: Logits | None = None,
    slack: float = 0.0,
    generator: Generator = None,
) -> Found:
    """Attack a batch until every example is fooled or the attack has spent its budget.

    Args:
        attack: one of this package, or any function of that form.
        logits: x' (M, ...) -> (M, C), what the attack climbs on; may run in half precision. A network in eval mode.
        x: (N, ...) inside the ball's box.
        y: (N,) int64 classes.
        exact: x' -> logits, what decides; default `logits`.
        slack: what half precision may get wrong, relative to the largest logit: rows whose margin lies above
            -slack * max |z| are looked at by `exact`, too; a row that it refused, when its margin exceeds that one.
        generator: `PerExample` makes draws independent of batch and order.

    Changes nothing but the generator; no gradient is computed with respect to weights.

    Raises: ValueError for an x of integers, or, on CPUs and in full precision, outside of the ball's box.

    >>> from saltflat import Linf
    >>> from saltflat.evaluation import APGD
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> find(APGD(Linf(0.1)), model, x, y).fooled
    tensor([ True, False])
    """
    if not (x.is_floating_point() and x.dtype.itemsize < 4):  # half precision may have rounded x out of the box
        check_inputs(attack.ball, x)
    decide, count, x = exact or logits, len(x), x.detach()
    rows = torch.arange(count, device=x.device)
    x_adv, fooled = x.clone(), torch.zeros(count, dtype=torch.bool, device=x.device)
    iteration = torch.full_like(rows, -1)
    largest = torch.full((count,), -math.inf, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    refused = largest.clone()
    search, kept, tried = attack(logits, x, y, generator=generator), None, 0
    while len(rows) > 0:
        try:
            trial = search.send(kept)
        except StopIteration:
            break
        kept, z, own = None, trial.logits.detach(), y[rows]
        value = margin(z, own).to(largest.dtype)
        if trial.inside is not None:
            value = torch.where(trial.inside, value, -math.inf)
        threshold = -slack * z.abs().amax(1) if slack else 0.0
        claimed = ~(value < threshold)  # NaN, too: half precision overflows
        known = value <= refused[rows]
        looks = (claimed & ~known).nonzero()[:, 0]
        value = torch.where(claimed & known, -math.inf, value)
        if len(looks) > 0:
            at = rows[looks]
            point = feasible(attack.ball, trial.x_adv[looks].detach(), x[at])
            with torch.no_grad():
                answer = decide(point)
            sure = ~right(answer, y[at])
            moved = (point.double() - trial.x_adv[looks].double()).abs().flatten(1).amax(1) > MOVED
            refused[at] = torch.where(moved, refused[at], torch.fmax(refused[at], value[looks]))
            value[looks] = margin(answer, y[at]).to(value.dtype)
            won = at[sure]
            x_adv[won], fooled[won], iteration[won] = point[sure], True, tried
            largest[won] = value[looks[sure]]
            if len(won) > 0:
                going_on = torch.ones(len(rows), dtype=torch.bool, device=x.device)
                going_on[looks[sure]] = False
                kept = going_on.nonzero()[:, 0]
                rows, value = rows[kept], value[kept]
        largest[rows] = torch.maximum(largest[rows], value)
        tried += 1
    search.close()
    return Found(x_adv, fooled, iteration, largest)


def feasible(ball: InputBall, x_adv: Tensor, x: Tensor) -> Tensor:
    """x_adv put into the ball and the box of its dtype: L-inf within [fl(x - eps), fl(x + eps)], L2 and L1 within
    eps (1 + 1e-6) as measured in float64, the box exactly. In L2 and L1 numbers that were rounded outwards go back by a
    step of the dtype, which in half precision costs a tenth of the radius and more where there are many.
    """
    v = x_adv.double() - x.double()  # not rounded, so that members stay where they are
    v = ball.project(torch.where(v.isfinite(), v, 0), x.double())
    point = (x.double() + v).to(x.dtype)
    if not isinstance(ball, Linf):  # a sum over many numbers that were rounded up would leave the ball
        point = torch.where((point.double() - x.double()).abs() > v.abs(), point.nextafter(x), point)
    return point if ball.box is None else point.clamp(*ball.box)


def rows_of(generator: Generator, kept: Tensor) -> Generator:
    """The generator for the rows that go on: a part of a `PerExample`, any other as it is."""
    return generator.rows(kept) if isinstance(generator, PerExample) else generator


def column(values: Tensor, like: Tensor) -> Tensor:
    """(M,) -> (M, 1, ...), to be multiplied with rows of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def value_and_gradient(
    logits: Logits, loss: Callable[..., Tensor], x_adv: Tensor, labels: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss per row, and its gradient with respect to x_adv; none with respect to weights.

    Of logits in half precision, the gradient of a row is divided by the power of two next to max_k |d loss / d z_k|.
    """
    with torch.enable_grad():
        leaf = x_adv.detach().requires_grad_()
        z = logits(leaf)
        raised = z.detach().to(torch.promote_types(z.dtype, torch.float32)).requires_grad_()
        f = loss(raised, *labels)
        if not z.requires_grad:  # the network cuts the graph: no direction is better than another
            return z.detach(), f.detach(), torch.zeros_like(leaf)
        (slope,) = torch.autograd.grad(f.sum(), raised)
        if z.dtype != raised.dtype:  # half precision would lose small ones; only the direction matters
            exponent = slope.abs().amax(1, keepdim=True).frexp().exponent - 1  # powers of two round nothing
            slope = slope.ldexp(-exponent.clamp(min=-120))
        (gradient,) = torch.autograd.grad(z, leaf, slope.to(z.dtype), materialize_grads=True)
    return z.detach(), f.detach(), gradient


def stretched(
    ball: InputBall, logits: Logits, x: Tensor, x_adv: Tensor
) -> Coroutine[Trial, Tensor | None, Tensor | None]:
    """A last trial, where a box cuts an L2 ball: x_adv - x stretched to the ball's surface. Ascents that scale to the
    radius and then clamp to the box, as usual, end inside of the ball. Costs one forward.
    """
    if not is_cut(ball):
        return None
    point = x + stretch(ball, x_adv - x, x)
    with torch.no_grad():
        z = logits(point)
    return (yield Trial(point, z))


def is_cut(ball: InputBall) -> TypeGuard[L2]:
    """An L2 ball, by a box."""
    return isinstance(ball, L2) and ball.box is not None


Rows = TypeVar("Rows", bound=tuple[Tensor, ...])


def keep(state: Rows, kept: Tensor | None) -> Rows:
    """A tuple of tensors, or a NamedTuple of them, for the rows that go on."""
    if kept is None:
        return state
    rows = [tensor[kept] for tensor in state]
    return type(state)(*rows) if hasattr(state, "_fields") else type(state)(rows)
