"""The input adversary: maximise f(x') over a ball around x, by projected steepest ascent.

    x'_0 = x + start,    x'_{k+1} = x + P( x'_k - x + s(eta, grad f(x'_k)) ),    k = 0 ... steps - 1

P is the ball's projection, s(eta, g) its steepest step of size eta (eta sign g for Linf, eta g / ‖g‖ for L2). It knows
no model and no label: f is a function of x' alone, one value per example, and only its gradient with respect to x' is
computed.

Sources: Goodfellow, Shlens, Szegedy, arXiv 1412.6572 (FGSM); Madry et al., arXiv 1706.06083 (PGD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from saltflat.balls import L1, InputBall
from saltflat.objectives import Value
from saltflat.random import Generator, normal

Start = Callable[[InputBall, Tensor, Generator], Tensor]


class InputAdversary(Protocol):
    """What a training step needs to know of an attack: `PGD`, or any function that is called like one."""

    def __call__(self, f: Value, x: Tensor, *, start: Tensor | None = None, generator: Generator = None) -> Tensor: ...


def zero(ball: InputBall, x: Tensor, generator: Generator = None) -> Tensor:
    """Start at x (N, ...) itself; draws nothing from the generator, whatever the ball."""
    return torch.zeros_like(x)


def uniform(ball: InputBall, x: Tensor, generator: Generator = None) -> Tensor:
    """Start at a uniform draw from the ball around x (N, ...), and in its box; advances the generator."""
    return ball.sample(x, generator)


def gaussian(std: float) -> Start:
    """Start at x + std * N(0, 1), std in pixel units, as TRADES does with std = 1e-3: not projected, so the first
    gradient may be taken a hair outside the box.
    """
    return lambda ball, x, generator: std * normal(x, generator)


@dataclass(frozen=True)
class PGD:
    """Projected steepest ascent in `ball`.

    Args:
        ball: an input ball, such as `Linf(8 / 255)`; but not `L1`, whose steepest steps change one pixel each.
        step_size: in the ball's unit (2 / 255).
        steps: gradient evaluations; x_adv is the last iterate.
        start: a function (ball, x, generator) -> displacement: `uniform`, `zero` or `gaussian(std)`.

    Raises: ValueError for the ball L1, for fewer steps than one, and for a step size that is negative or not finite.

    >>> from saltflat import AT, L2
    >>> model = torch.nn.Linear(4, 2)
    >>> x, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    >>> attack = PGD(L2(0.1), step_size=0.05, steps=4)
    >>> x_adv = attack(AT().inner(model, x, y), x)
    >>> bool(((x_adv - x).norm(dim=1) <= 0.1 + 1e-6).all()), model.weight.grad is None
    (True, True)
    """

    ball: InputBall
    step_size: float
    steps: int
    start: Start = uniform

    def __post_init__(self) -> None:
        if isinstance(self.ball, L1):
            raise ValueError("ball: one-pixel steps make PGD in L1 a sham; use saltflat.evaluation.SparseAPGD")
        if self.steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {self.steps!r}")
        if not 0 <= self.step_size < float("inf"):
            raise ValueError(f"step_size: expected a finite number >= 0, got {self.step_size!r}")

    def __call__(self, f: Value, x: Tensor, *, start: Tensor | None = None, generator: Generator = None) -> Tensor:
        """Attack the batch x.

        Args:
            f: x' (N, ...) -> (N,), what is maximised; `objective.inner(model, x, y)`.
            x: (N, ...), the centres, inside the ball's box: images in [0, 1], normalised inside the model. That is
                checked on the CPU only; a GPU would have to wait for it.
            start: x' itself, used as it is given, to go on from; else `self.start` draws it.
            generator: what the start is drawn from.

        Returns: x_adv (N, ...), detached, in the ball and in the box. Changes nothing but the generator, and buffers
            if f's model is in train mode.
        """
        check_inputs(self.ball, x)
        x = x.detach()
        v = self.start(self.ball, x, generator) if start is None else start.detach() - x
        x_adv = x + v if start is None else start.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(f(x_adv.requires_grad_()).sum(), x_adv)
            v = self.ahead(gradient, v, x)
            x_adv = x + v
        return x_adv

    def ahead(self, gradient: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """One step, P(v + s(eta, g)): the next displacement from x, after v. All are (N, ...); nothing is changed.

        >>> from saltflat import Linf
        >>> x, v, gradient = torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.tensor([[3.0, -0.1]])
        >>> PGD(Linf(0.25), step_size=0.125, steps=1).ahead(gradient, v, x)
        tensor([[ 0.1250, -0.1250]])
        """
        return self.ball.project(v + replace(self.ball, radius=self.step_size).steepest(gradient, x), x)


def check_inputs(ball: InputBall, x: Tensor) -> None:
    """ValueError for a batch x (N, ...) of integers, or one outside the ball's box, which is checked on CPUs only."""
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating point numbers, got {x.dtype}")
    if x.device.type == "cpu" and ball.box is not None and x.numel() > 0:
        low, high = x.detach().aminmax()  # NaN if any is
        if low < ball.box[0] or high > ball.box[1]:
            raise ValueError(f"x: expected numbers in the ball's box {ball.box}, got {low:g} to {high:g}")


def FGSM(ball: InputBall) -> PGD:
    """The fast gradient sign method: one step of the ball's radius from x itself.

    >>> from saltflat import Linf
    >>> FGSM(Linf(8 / 255)).steps
    1
    """
    return PGD(ball, step_size=ball.radius, steps=1, start=zero)
