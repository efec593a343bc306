"""PGD as a search: every iterate is looked at, and the whole ascent is begun again from another start.

    x'_k as in `saltflat.inputs`, k = 0 ... steps, for each of the restarts

Deviation: the published PGD-20 looks at x'_20 alone. Here an example is fooled at the first iterate that fools it, so
that accuracy is never higher, and whoever is fooled costs no further step. In an L2 ball with a box, the last iterate
is looked at once more, stretched to the ball's surface.

Sources: Madry et al., arXiv 1706.06083; with `loss=margin` the CW attack of robustness tables: Carlini and Wagner's
loss (arXiv 1608.04644) under PGD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saltflat.balls import InputBall
from saltflat.evaluation.search import Logits, Search, Trial, keep, rows_of, stretched, value_and_gradient
from saltflat.inputs import PGD
from saltflat.objectives import ce
from saltflat.random import Generator


@dataclass(frozen=True)
class Restarted:
    """Maximise loss(logits, y) by `pgd`, `restarts` times.

    Args:
        pgd: ball, step size, steps and start; `FGSM(ball)` is one, too.
        loss: (logits, y) -> (N,): `ce`, or `margin` (CW).
        restarts: ascents; each draws a start of its own.

    An ascent costs `steps` forwards and input gradients, and one forward (two in an L2 ball with a box).

    >>> from saltflat import Linf
    >>> from saltflat.evaluation import find
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> find(Restarted(PGD(Linf(0.1), 0.025, 10), restarts=2), model, x, y).fooled
    tensor([ True, False])
    """

    pgd: PGD
    loss: Callable[[Tensor, Tensor], Tensor] = ce
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise ValueError(f"restarts: expected an integer >= 1, got {self.restarts!r}")

    @property
    def ball(self) -> InputBall:
        return self.pgd.ball

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, *, generator: Generator = None) -> Search:
        ball, step = self.ball, replace(self.ball, radius=self.pgd.step_size)
        for _ in range(self.restarts):
            v = self.pgd.start(ball, x, generator)
            for _ in range(self.pgd.steps):
                z, _, gradient = value_and_gradient(logits, self.loss, x + v, (y,))
                kept = yield Trial(x + v, z)
                generator = generator if kept is None else rows_of(generator, kept)
                x, y, v, gradient = keep((x, y, v, gradient), kept)
                v = ball.project(v + step.steepest(gradient, x), x)
            with torch.no_grad():
                z = logits(x + v)
            kept = yield Trial(x + v, z)
            generator = generator if kept is None else rows_of(generator, kept)
            x, y, v = keep((x, y, v), kept)
            kept = yield from stretched(ball, logits, x, x + v)
            generator = generator if kept is None else rows_of(generator, kept)
            x, y = keep((x, y), kept)
