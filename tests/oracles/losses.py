"""Losses from their definitions in decimal arithmetic, and gradients from differences.

Independent because no tensor arithmetic is involved: 200 decimal digits let softmax, log and 1 − p be written as they
stand in the formula, without the shifts and fused functions that a floating-point version needs.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import torch
from torch import Tensor

Row = Sequence[float] | Tensor
"""One example's logits (or target probabilities)."""

_DIGITS = 200


def finite_difference_gradient(function: Callable[[Tensor], Tensor | float], x: Tensor, h: float = 1e-6) -> Tensor:
    """∂function/∂x_j ≈ (function(x + h·e_j) − function(x − h·e_j)) / 2h for each j, in float64; shape of `x`.

    Independent: values of the function alone, two per coordinate, no autograd.
    """
    centre = x.detach().to(torch.float64)
    gradient = torch.zeros(centre.numel(), dtype=torch.float64)
    for j in range(centre.numel()):
        ahead, behind = centre.flatten().clone(), centre.flatten().clone()
        ahead[j] += h
        behind[j] -= h
        rise = float(function(ahead.reshape(centre.shape))) - float(function(behind.reshape(centre.shape)))
        gradient[j] = rise / (2 * h)
    return gradient.reshape(centre.shape)


def _decimals(row: Row) -> list[Decimal]:
    """The row's numbers, exactly."""
    return [Decimal(float(number)) for number in row]


def _softmax(row: Row) -> list[Decimal]:
    """p_k = exp(z_k) / Σ_j exp(z_j)."""
    powers = [z.exp() for z in _decimals(row)]
    total = sum(powers, Decimal(0))
    return [power / total for power in powers]


def _kl(p: list[Decimal], q: list[Decimal]) -> Decimal:
    """Σ_k p_k·(ln p_k − ln q_k)."""
    return sum((a * (a.ln() - b.ln()) for a, b in zip(p, q, strict=True)), Decimal(0))


def cross_entropy(logits_row: Row, target_row_or_int: Row | int) -> float:
    """−Σ_k t_k·ln p_k, where t is the given row of probabilities, or 1 at the given class and 0 elsewhere.

    Independent: softmax, then ln, in decimals.
    """
    target = target_row_or_int
    with localcontext() as context:
        context.prec = _DIGITS
        p = _softmax(logits_row)
        if isinstance(target, int) or (isinstance(target, Tensor) and target.ndim == 0):
            return float(-p[int(target)].ln())
        return float(-sum((t * a.ln() for t, a in zip(_decimals(target), p, strict=True)), Decimal(0)))


def kl(p_logits_row: Row, q_logits_row: Row) -> float:
    """KL(p ‖ q) = Σ_k p_k·(ln p_k − ln q_k), p and q the softmax of the two rows.

    Independent: from probabilities in decimals.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        return float(_kl(_softmax(p_logits_row), _softmax(q_logits_row)))


def mart(
    clean_logits: Sequence[Row] | Tensor, adv_logits: Sequence[Row] | Tensor, y: Sequence[int] | Tensor, beta: float
) -> float:
    """(1/N) Σ_i [−ln q_y − ln(1 − max_{k≠y} q_k)] + β·(1/N) Σ_i KL(p ‖ q)·(1 − p_y), p clean and q adversarial.

    No small constant is added anywhere. Independent: from probabilities in decimals, example by example, so 1 − q_k
    is exact to far beyond float64 even where q_k is close to 1.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        boosted, weighted = Decimal(0), Decimal(0)
        for clean_row, adv_row, label in zip(clean_logits, adv_logits, y, strict=True):
            p, q, c = _softmax(clean_row), _softmax(adv_row), int(label)
            rival = max(q[k] for k in range(len(q)) if k != c)
            boosted += -q[c].ln() - (1 - rival).ln()
            weighted += _kl(p, q) * (1 - p[c])
        return float((boosted + Decimal(float(beta)) * weighted) / len(y))


def cw_margin(logits: Row, y: int) -> float:
    """max_{k≠y} z_k − z_y: positive where the example is misclassified.

    Independent: a python loop over the other classes.
    """
    z = [float(number) for number in logits]
    return max(z[k] for k in range(len(z)) if k != y) - z[y]
