"""The two forms of AWP that are known from Kaggle, each under a name of its own: they are not the paper's.

    Kaggle AWP    v_l = clamp( step ‖w_l‖ g_l / ‖g_l‖,  -eps |w_l|, eps |w_l| )
    fast AWP      v_l = clamp( step ‖w_l‖ m_l / ‖m_l‖,  -eps |w_l|, eps |w_l| ),  m the optimiser's momentum

A step that is steepest in `Layerwise(step)`, projected on `Box(eps)`. With a step of 1 and an eps of 1e-4, practically
all numbers lie at +-eps |w|, and a weight of 0 stays there. Fast AWP saves the ascent's forward and backward, but looks
where gradients have been going, not where this batch's goes. Both step down at w, after the weights are back.

Deviation: tensors are chosen by `where`, more than one dimension by default; the notebooks take whatever has "weight"
in its name, norm layers' scales among them.

Sources: wht1996, https://www.kaggle.com/code/wht1996/feedback-nn-train; junkoda,
https://www.kaggle.com/code/junkoda/fast-awp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.balls import Box, Layerwise, WeightBall, Weights
from saltflat.weights import Ascent, Closure, Where, chosen_weights, default, given_back, held, perturbed

AVERAGES = ("exp_avg", "momentum_buffer")  # what torch's Adam family and its SGD call them


def kaggle_awp(
    model: nn.Module,
    loss: Closure | Sequence[Closure] | Weights,
    *,
    step_size: float = 1.0,
    eps: float = 1e-4,
    where: Where = default,
) -> AbstractContextManager[Ascent]:
    """w + v inside the block, w to the bit afterwards, as `perturbed`.

    Args:
        loss: () -> scalar; or, as on Kaggle, the gradient {name: p.grad} of a backward that was made anyway.
        step_size: the step, relative to each layer's norm ("adv_lr").
        eps: the box, relative to each weight ("adv_eps").

    >>> model, x = nn.Linear(4, 2), torch.rand(8, 4)
    >>> with kaggle_awp(model, lambda: model(x).square().mean()):
    ...     model(x).square().mean().backward()
    """
    return perturbed(model, loss, Box(eps), step=Layerwise(step_size), where=where)


def fast_awp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step_size: float = 1e-3,
    eps: float = 1e-3,
    where: Where = default,
) -> AbstractContextManager[Ascent]:
    """w + v inside the block, w to the bit afterwards; before the optimiser's first step, v is 0.

    Args:
        optimizer: over the model's parameters, of the Adam family (its first moment is taken, as on Kaggle), or SGD
            with momentum.
        step_size, eps: as in `kaggle_awp`.

    >>> model, x = nn.Linear(4, 2), torch.rand(8, 4)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> with fast_awp(model, optimizer):
    ...     model(x).square().mean().backward()
    >>> optimizer.step()
    """
    return along_momentum(model, None, Box(eps), optimizer=optimizer, step=Layerwise(step_size), where=where)


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer, *, where: Where = default) -> dict[str, Tensor]:
    """{name: the optimiser's moving average of gradients}, for the tensors that have one by now.

    Raises: ValueError for an optimiser that keeps none.
    """
    without = any(group.get("momentum") == 0 for group in optimizer.param_groups)
    found = {}
    for name, parameter in chosen_weights(model, where).items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        average = next((state[key] for key in AVERAGES if state.get(key) is not None), None)
        if average is None and (state or without):
            raise ValueError(
                f"optimizer: expected one with momentum ({' or '.join(AVERAGES)}), got {type(optimizer).__name__}"
            )
        if average is not None:
            found[name] = average
    return found


@contextmanager
def along_momentum(
    model: nn.Module,
    loss: Closure | Sequence[Closure] | None,
    ball: WeightBall,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int = 1,
    step_size: float | None = None,
    step: WeightBall | None = None,
    start: Weights | None = None,
    where: Where = default,
    step_inside: bool = False,
) -> Iterator[Ascent]:
    """A climb that is called like `perturbed`: one step along the optimiser's momentum; the loss is not looked at.

    Raises: as `perturbed` and `momentum`; ValueError for more than one step.
    """
    if steps != 1:
        raise ValueError(f"steps: a momentum at hand allows one step, got {steps!r}")
    direction = momentum(model, optimizer, where=where)
    if direction:
        climb = perturbed(
            model, direction, ball, step_size=step_size, step=step,
            start=start, where=where, step_inside=step_inside,
        )  # fmt: skip
        with climb as ascent:
            yield ascent
    else:
        parameters = chosen_weights(model, where)
        still = next(iter(parameters.values())).new_full((), len(parameters), dtype=torch.int64)
        with given_back(parameters) as centre, held(parameters, centre, None, still, step_inside) as ascent:
            yield ascent
