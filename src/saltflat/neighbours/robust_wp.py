"""RobustWP: perturb the weights by the examples whose loss is small, and by them alone.

    D_0 = 0,  v_0 = 0
    D_{k+1} = D_k + grad_w (1/N) sum_i [l_i(w + v_k) < c] l_i(w + v_k)
    v_{k+1} = gamma ‖w‖ D_{k+1} / ‖D_{k+1}‖                              k = 0 ... steps - 1

l_i is the loss of example i, [.] is 1 or 0 (the loss stationary condition, looked at anew in every step), N counts all
examples, and the norms are those of all perturbed tensors together. Gradients are added as they are; only their sum is
normalised, so v lies on the sphere in every step, unless no example has ever been below c: then it is 0. A gradient
that is not finite is left out of the sum, tensor by tensor.

Three parts that go together with others as well: `below` (a loss), `accumulated` (a climb), and `Global(gamma,
relative=True)` (a ball). With c = inf, one step and `Layerwise`, this is AWP.

Source: Yu, Han, Gong, Shen, Ge, Du, Liu, "Robust Weight Perturbation for Adversarial Training", IJCAI 2022, arXiv
2205.14826.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec

import torch
from torch import Tensor, nn

from saltflat.balls import Global, WeightBall, Weights
from saltflat.weights import (
    Ascent,
    Closure,
    Where,
    as_closures,
    chosen_weights,
    climbing_gradient,
    default,
    given_back,
    held,
    place,
)

Arguments = ParamSpec("Arguments")


def robust_wp(
    model: nn.Module, losses: Closure, gamma: float = 0.01, *, c: float = 1.7, steps: int = 10, where: Where = default
) -> AbstractContextManager[Ascent]:
    """RobustWP with the published settings: w + v inside the block, w to the bit afterwards, as `perturbed`.

    Args:
        losses: () -> (N,), the loss of every example, such as `lambda: ce(model(x_adv), y)`.
        gamma: ‖v‖ relative to ‖w‖ (0.01 for AT, 0.005 for TRADES).
        c: in nats (1.7 for CIFAR-10 and SVHN, 4.0 for CIFAR-100).
        steps: forwards and backwards of the climb.

    >>> from saltflat.objectives import ce
    >>> model, x, y = nn.Linear(4, 2), torch.rand(8, 4), torch.arange(8) % 2
    >>> with robust_wp(model, lambda: ce(model(x), y)):
    ...     ce(model(x), y).mean().backward()
    """
    return accumulated(model, below(losses, c), Global(gamma, relative=True), steps=steps, where=where)


def below(losses: Callable[Arguments, Tensor], c: float) -> Callable[Arguments, Tensor]:
    """(1/N) sum_i [l_i < c] l_i, a function of whatever l is one of: of nothing, or of a batch (`objective.each`).

    >>> float(below(lambda: torch.tensor([1.0, 2.0, 9.0, 5.0]), c=4.0)())
    0.75
    """
    if math.isnan(c):
        raise ValueError(f"c: expected a number, got {c!r}")

    def mean(*args: Arguments.args, **named: Arguments.kwargs) -> Tensor:
        each = losses(*args, **named)
        if each.ndim != 1:
            raise ValueError(f"losses: expected one per example, (N,), got shape {tuple(each.shape)}")
        return torch.where(each < c, each, 0).mean()

    return mean


@contextmanager
def accumulated(
    model: nn.Module,
    loss: Closure | Sequence[Closure],
    ball: WeightBall,
    *,
    steps: int = 1,
    step_size: float | None = None,
    start: Weights | None = None,
    where: Where = default,
    step_inside: bool = False,
) -> Iterator[Ascent]:
    """A climb that is called like `perturbed`: v is the ball's steepest member for the sum of all gradients so far.
    `skipped` counts the tensors for which all gradients together were 0.

    Raises: as `perturbed`; ValueError for a `step_size`, which would cancel, and for a `start`.
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    if step_size is not None:
        raise ValueError(f"step_size: gradients are added as they are, expected None, got {step_size!r}")
    if start:
        raise ValueError(
            f"start: the sum of gradients begins at 0 (no alternations), expected none, got {len(start)} tensors"
        )
    closures, parameters = as_closures(loss), chosen_weights(model, where)
    with given_back(parameters) as centre:
        total: dict[str, Tensor] = {}
        value = None
        for _ in range(steps):
            g, reached = climbing_gradient(model, closures, parameters)
            if not g:
                raise ValueError(f"loss: reaches none of the {len(parameters)} weights that are perturbed")
            value = reached if value is None else value
            # A copy, too: under DDP a gradient may be a view of a bucket that the next backward fills.
            found = {name: torch.where(part.isfinite().all(), part, 0) for name, part in g.items()}
            total |= {name: total[name] + part if name in total else part for name, part in found.items()}
            v = ball.steepest(total, centre)
            place(parameters, centre, v)
        skipped = torch.stack([(part == 0).all() for part in v.values()]).sum()  # by all gradients together
        del total, g, found, v
        with held(parameters, centre, value, skipped, step_inside) as ascent:
            yield ascent
