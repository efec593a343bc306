"""What training minimises, and what the two adversaries maximise, as pairs of functions.

    inner(model, x, y)          gives f: x' -> (N,), the value per example that the input adversary maximises
    outer(model, x, x_adv, y)   gives the scalar that training minimises and the weight adversary maximises

With z = model(x), z' = model(x'), p = softmax(z), p' = softmax(z'), y the labels, means over the batch:

    Natural    inner  CE(z', y)
               outer  mean CE(z, y)
    AT         inner  CE(z', y)
               outer  mean CE(z', y)
    TRADES     inner  KL(p ‖ p')
               outer  mean CE(z, y) + beta mean KL(p ‖ p')
    MART       inner  CE(z', y)
               outer  mean BCE(z', y) + beta mean KL(p ‖ p') (1 - p_y)
                      BCE(z', y) = CE(z', y) - log(1 - max_{k != y} p'_k)

Every `outer` here is the mean over the batch of `each(model, x, x_adv, y)`, one value per example, which is what a loss
that looks at examples one by one (RobustWP's) asks for; an objective of your own needs it for that alone.

Sources: Madry et al., arXiv 1706.06083 (AT); Zhang et al., arXiv 1901.08573 (TRADES); Wang et al., ICLR 2020 (MART).

Only TRADES' `inner` freezes the clean logits; `outer` differentiates through everything, MART's weight (1 - p_y)
included. All is computed from log-probabilities, so nothing is clamped and every value and gradient is finite for
logits of +-1e4, also in bf16 (which is raised to fp32 first).

Labels y are (N,) int64, or (N, C) probabilities (mixup, CutMix, label smoothing); MART and `margin` need the former.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Value = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """The pair of functions above. `x` and `x_adv` are whatever the model takes (a tensor for the input adversary's
    sake).
    """

    def inner(self, model: Any, x: Tensor, y: Tensor) -> Value: ...
    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor: ...


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per example: -sum_k y_k log p_k, in nats.

    Args:
        logits: (N, C).
        y: (N,) int64 classes, or (N, C) probabilities.

    Returns: (N,).

    >>> ce(torch.zeros(1, 4), torch.tensor([2]))
    tensor([1.3863])
    """
    return F.cross_entropy(raised(logits), y if y.ndim == 1 else y.to(raised(logits).dtype), reduction="none")


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence per example, KL(p ‖ q) = sum_k p_k (log p_k - log q_k), in nats.

    Args:
        p_logits, q_logits: (N, C), of which p and q are the softmax.

    Returns: (N,).

    The gradient flows through both arguments. It is finite at p_k = 0, since no log of a probability is ever taken.

    >>> kl(torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, -1e4]]))
    tensor([0.])
    """
    log_p, log_q = log_probabilities(p_logits), log_probabilities(q_logits)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y per example: positive where the answer is wrong (Carlini and Wagner, arXiv 1608.04644);
    (N, C), (N,) -> (N,).

    >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([-1.])
    """
    own = classes(y, "margin")[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the classes, (N, C) -> (N, C); half precision is raised to fp32."""
    return F.log_softmax(raised(logits), dim=1)


@dataclass(frozen=True)
class Natural:
    """Ordinary training: the outer loss never looks at x_adv. Its `inner` is cross-entropy, for whoever attacks the
    network all the same.

    >>> model = nn.Linear(3, 2)
    >>> x, y = torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
    >>> bool(Natural().outer(model, x, None, y) == ce(model(x), y).mean())
    True
    """

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return lambda x_adv: ce(model(x_adv), y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.each(model, x, x_adv, y).mean()

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return ce(model(x), y)


@dataclass(frozen=True)
class AT:
    """Adversarial training: cross-entropy at x_adv, for both. One forward in `outer`.

    >>> model = nn.Linear(3, 2)
    >>> x, y = torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
    >>> bool(AT().outer(model, x, x, y) == AT().inner(model, x, y)(x).mean())
    True
    """

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return lambda x_adv: ce(model(x_adv), y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.each(model, x, x_adv, y).mean()

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return ce(model(x_adv), y)


@dataclass(frozen=True)
class TRADES:
    """Clean cross-entropy plus beta times the divergence between the clean and the attacked prediction.

    `inner` runs the model on x once, without gradient; `outer` runs it on x_adv, then on x (the official order, which
    BatchNorm's running statistics see).

    Args:
        beta: weight of the divergence (6.0 in the paper); no unit.

    Raises: ValueError for a beta that is negative or not finite.

    >>> model = nn.Linear(3, 2)
    >>> x, y = torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
    >>> bool(TRADES(6.0).outer(model, x, x, y) == ce(model(x), y).mean())  # no divergence from itself
    True
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        with torch.no_grad():
            clean = model(x)
        return lambda x_adv: kl(clean, model(x_adv))

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.each(model, x, x_adv, y).mean()

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        attacked, clean = model(x_adv), model(x)
        return ce(clean, y) + self.beta * kl(clean, attacked)


@dataclass(frozen=True)
class MART:
    """Boosted cross-entropy at x_adv, plus beta times the divergence weighted by how wrong the clean prediction is.

    `outer` runs the model on x, then on x_adv (the official order).

    Args:
        beta: weight of the divergence (6.0 with AWP, 5.0 in the original); no unit.

    Raises: ValueError for a beta that is negative or not finite, for labels that are probabilities, and for fewer than
    two classes.

    >>> z, y = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    >>> value = MART(6.0).outer(nn.Identity(), z, z, y)  # log 2 twice, and no divergence
    >>> round(value.item(), 6)
    1.386294
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        classes(y, "MART")
        return lambda x_adv: ce(model(x_adv), y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.each(model, x, x_adv, y).mean()

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        y = classes(y, "MART")
        clean, attacked = model(x), model(x_adv)
        if clean.shape[1] < 2:
            raise ValueError(f"logits: MART needs at least two classes, got {clean.shape[1]}")
        log_clean, log_attacked = log_probabilities(clean), log_probabilities(attacked)
        wrongness = -log_clean.gather(1, y[:, None])[:, 0].expm1()  # 1 - p_y
        boosted = ce(attacked, y) - _log_one_minus_largest_wrong(log_attacked, y)
        return boosted + self.beta * kl(clean, attacked) * wrongness


def _log_one_minus_largest_wrong(log_p: Tensor, y: Tensor) -> Tensor:
    """log(1 - max_{k != y} p_k) = log sum_{j != k} p_j, which keeps its digits when p_k is nearly 1."""
    k = log_p.detach().scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    return log_p.scatter(1, k, -torch.inf).logsumexp(1)


def raised(logits: Tensor) -> Tensor:
    """Half precision as fp32."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def classes(y: Tensor, who: str) -> Tensor:
    """y, if it is (N,); ValueError in the name of `who` for probabilities."""
    if y.ndim != 1:
        raise ValueError(f"y: {who} needs classes of shape (N,), got probabilities of shape {tuple(y.shape)}")
    return y


def check_beta(beta: float) -> None:
    """ValueError for a beta that is no weight: it is finite and >= 0, and has no unit."""
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: expected a finite number >= 0, got {beta!r}")
