"""Second moments of gradients, example by example.

    tr F = mean_i sum_k p_k(x_i) ‖d log p_k(x_i) / dw‖^2      the trace of the Fisher information matrix
    G    = mean_i ‖d l_i / dw‖^2,    l_i = -log p_{y_i}(x_i)  the second moment of the loss's gradients

p = softmax(f_w(x)). In F the labels are the model's own, weighed by what it believes; in G they are the data's. In
expectation the two agree where the model's beliefs are the truth, but not elsewhere (Kunstner, Balles, Hennig, arXiv
1905.12558): where all labels are fitted, G vanishes like (1 - p_y)^2 and F like 1 - p_y. So only the first is called by
Fisher's name here.

Gradients of single examples need single examples' losses: the model is in eval mode, where BatchNorm does not mix them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from saltflat.landscape.estimate import Estimate, mean
from saltflat.objectives import ce, log_probabilities
from saltflat.step import in_mode
from saltflat.weights import Where, buffers_kept, chosen_weights, default


def fisher_trace(model: nn.Module, x: Tensor, *, where: Where = default, chunk_size: int = 32) -> Estimate:
    """tr F, exact over the classes: for each of C classes, one gradient of every example.

    Args:
        model: a classifier, x (N, ...) -> logits (N, C), that `torch.func` can map over examples.
        x: taken as it is: clean, or attacked before.
        where: (name, parameter) -> bool, the weights that gradients are taken in.
        chunk_size: gradients that are held at a time; it changes no value but by rounding.

    Returns: an `Estimate` in nats^2 / weight^2, which the examples are the draws of: the standard error is that of the
    mean over N examples as a sample of others, and not of any randomness here. The weights, `.grad`, buffers and modes
    are left as they were found.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> fisher_trace(model, torch.tensor([[3.0, 4.0]])).value  # ‖x‖^2 sum_k p_k (1 - p_k)
    12.5
    """
    _check(chunk_size)
    with in_mode(model, "eval"), buffers_kept(model), torch.no_grad():
        p = torch.cat([log_probabilities(model(part)).exp() for part in torch.split(x, chunk_size)])
        n, classes = p.shape
        labels = torch.arange(classes, device=x.device)[:, None].expand(classes, n)
        squares = torch.stack([_squares(model, x, y, where, chunk_size) for y in labels], 1)
        return mean((p * squares).sum(1))


def squared_gradients(
    model: nn.Module, x: Tensor, y: Tensor, *, where: Where = default, chunk_size: int = 32
) -> Estimate:
    """G, the mean squared norm of single examples' cross-entropy gradients. It is often called the trace of the
    empirical Fisher, which it is not: see `fisher_trace`.

    Args:
        y: (N,) int64 classes, or (N, C) probabilities.

    The other arguments, and what comes back: as in `fisher_trace`.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> squared_gradients(model, torch.tensor([[3.0, 4.0]]), torch.tensor([1])).value  # ‖x‖^2 ‖p - e_y‖^2
    12.5
    """
    _check(chunk_size)
    with in_mode(model, "eval"), buffers_kept(model), torch.no_grad():
        return mean(_squares(model, x, y, where, chunk_size))


def _squares(model: nn.Module, x: Tensor, y: Tensor, where: Where, chunk_size: int) -> Tensor:
    """‖d CE(f_w(x_i), y_i) / dw‖^2 for every i, (N,)."""
    weights = {name: w.detach() for name, w in chosen_weights(model, where).items()}

    def loss(w: dict[str, Tensor], x_i: Tensor, y_i: Tensor) -> Tensor:
        return ce(functional_call(model, w, (x_i[None],)), y_i[None])[0]

    def square(w: dict[str, Tensor], x_i: Tensor, y_i: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(loss)(w, x_i, y_i).values()]).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be mapped over examples
        found: Tensor = vmap(square, (None, 0, 0), chunk_size=chunk_size)(weights, x, y)
    return found


def _check(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size!r}")
