"""Adversarial logit pairing: the logits of an image and of its attack shall not only both be right, but alike.

    inner  CE(z', y)
    outer  mean_i (CE(z_i, y_i) + CE(z'_i, y_i)) / 2 + beta mean_ik (z_ik - z'_ik)^2

Deviation: x and x' are two forwards, of which BatchNorm sees one after the other, where the authors' code has one; and
the attack is on the label, where theirs may aim at the least likely class.

Source: Kannan, Kurakin, Goodfellow, "Adversarial Logit Pairing", arXiv 1803.06373. What it gains does not withstand
stronger attacks (Engstrom, Ilyas, Athalye, arXiv 1807.10272): evaluate it with AutoAttack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saltflat.objectives import Value, ce, check_beta, raised


@dataclass(frozen=True)
class ALP:
    """Adversarial logit pairing: cross-entropy of clean and attacked images, half and half, plus beta times the mean
    squared difference of their logits.

    `outer` runs the model on x, then on x_adv.

    Args:
        beta: weight of the difference; in nats per squared logit.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return lambda x_adv: ce(model(x_adv), y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.each(model, x, x_adv, y).mean()

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        clean, attacked = raised(model(x)), raised(model(x_adv))
        return (ce(clean, y) + ce(attacked, y)) / 2 + self.beta * (clean - attacked).square().mean(1)
