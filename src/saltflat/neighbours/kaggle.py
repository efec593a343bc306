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
from saltflat.weights import Ascent, Closure, Where, chosen_weights, default, perturbed

AVERAGES = ("exp_avg", "momentum_buffer")  # what torch's Adam family and its SGD call them


def kaggle_awp(
    model: nn.Module,
    loss: Closure | Sequence[Closure] | Weights,
    *,
    step_size: float = 1.0,
    eps: float = 1e-4,
    steps: int = 1,
    where: Where = default,
) -> AbstractContextManager[Ascent]:
    """w + v inside the block, w to the bit afterwards, as `perturbed`.

    Args:
        loss: () -> scalar; or, as on Kaggle, the gradient {name: p.grad} of a backward that was made anyway.
        step_size: the step, relative to each layer's norm ("adv_lr").
        eps: the box, relative to each weight ("adv_eps"). In bf16 1e-4 is less than rounding, and refused: keep weights
            in fp32, under autocast.
        steps: of the climb ("adv_step").

    >>> model, x = nn.Linear(4, 2), torch.rand(8, 4)
    >>> with kaggle_awp(model, lambda: model(x).square().mean()):
    ...     model(x).square().mean().backward()
    """
    _check_moves(model, where, eps)
    return perturbed(model, loss, Box(eps), steps=steps, step=Layerwise(step_size), where=where)


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
    _check_moves(model, where, eps)
    return along_momentum(model, None, Box(eps), optimizer=optimizer, step=Layerwise(step_size), where=where)


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer, *, where: Where = default) -> dict[str, Tensor]:
    """{name: the optimiser's moving average of gradients}, 0 before its first step. With the weight decay of SGD or of
    Adam it is of gradients that have the decay in them; AdamW keeps the two apart, as the notebook has it.

    Raises: ValueError for an optimiser that keeps none.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in chosen_weights(model, where).items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        average = next((state[key] for key in AVERAGES if state.get(key) is not None), None)
        if average is None and (state or groups.get(id(parameter), {}).get("momentum") == 0):
            raise ValueError(
                f"optimizer: expected one with momentum ({' or '.join(AVERAGES)}), got {type(optimizer).__name__}"
            )
        found[name] = torch.zeros_like(parameter) if average is None else average
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
    with perturbed(
        model, direction, ball, step_size=step_size, step=step, start=start, where=where, step_inside=step_inside
    ) as ascent:
        yield ascent


def _check_moves(model: nn.Module, where: Where, eps: float) -> None:
    """ValueError where w + eps w is w again, by rounding."""
    for name, parameter in chosen_weights(model, where).items():
        if 0 < eps < torch.finfo(parameter.dtype).eps / 2:
            raise ValueError(f"eps: moves no weight of {parameter.dtype} ({name!r}); keep weights in fp32, got {eps!r}")
