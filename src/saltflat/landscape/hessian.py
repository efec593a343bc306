"""The Hessian of a loss in the weights, known by what it does to vectors.

    L(w + v) = L(w) + <g, v> + v^T H v / 2 + ...,    H = d^2 L / dw^2,    (H v) = d/dw <g(w), v>

H is (P, P) for the P numbers of the chosen weights and is never written down: `Operator` holds v -> H v, and Lanczos,
traces and densities ask for nothing else. A product by double backward costs about three gradients (Pearlmutter, "Fast
exact multiplication by the Hessian", Neural Computation 6, 1994).

Of which function of w? With rho(w) = max_{x'} l(w, x'), and x' the maximiser at w, there are two answers:

    frozen        H_f = d^2 l / dw^2 at x' held fixed                                      `hessian(frozen(...))`
    re-attacked   H_r = d/dw of Danskin's gradient, x' = x'(w) = H_f + d^2 l / dw dx' dx' / dw
                                                                          `reattacked_hessian(afresh(...))`

Since rho >= l(., x') with equality at w, H_r - H_f is positive semidefinite wherever both exist and the attack attains
the maximum: frozen examples underestimate. For the linear logistic model l = softplus(-z), with the label s = +-1 and
the robust margin z = s <w, x> - eps ‖w‖_q, q dual to the attack's norm, and what = w / ‖w‖_2,

    L-inf attack   H_r = H_f almost everywhere: x' = x - eps s sign(w) moves in jumps
    L2 attack      H_r = H_f + mean sigma(-z) eps (I - what what^T) / ‖w‖_2

Source of the gradient: Danskin's theorem, as used by Madry et al., arXiv 1706.06083.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saltflat.weights import Closure, Where, as_closures, buffers_kept, chosen_weights, default, displaced, gradient


@dataclass(frozen=True)
class Operator:
    """A symmetric (P, P) matrix A, known by what it does to vectors.

    Attributes:
        product: v (P,) -> A v (P,), both of this dtype and on this device.
        layers: {name: slice}, where each weight's numbers lie in v, in the order of `named_parameters()`.
        dtype, device: of the vectors.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> operator = Operator(lambda v: A @ v, {"w": slice(0, 2)}, A.dtype, A.device)
    >>> operator.size, operator.product(torch.ones(2))
    (2, tensor([3., 3.]))
    """

    product: Callable[[Tensor], Tensor]
    layers: Mapping[str, slice]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """P."""
        return sum(rows.stop - rows.start for rows in self.layers.values())


def hessian(model: nn.Module, losses: Closure | Sequence[Closure], *, where: Where = default) -> Operator:
    """The Hessian of the sum of `losses`, by double backward: exact but for rounding.

    Args:
        model: looked at as it stands at each product.
        losses: closures () -> scalar whose sum is L, such as `robust.frozen(...)`; one graph is alive at a time. With
            frozen examples this is H_f, not the Hessian of rho: see the head of this file for what it lacks.
        where: (name, parameter) -> bool, which weights; the default takes trained ones of more than one dimension.

    Rows and columns of weights that the loss does not reach are zero. The weights, `.grad` and buffers are left as they
    were found, modes are the closures' business. Attention is computed by torch's math kernel inside, since the fused
    ones cannot be differentiated twice. Under DistributedDataParallel it is the Hessian of this rank's loss.

    Raises: ValueError for a `where` that chooses nothing, or a weight that is not trained; TypeError for losses that
    are no closures.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> operator = hessian(model, lambda: model(torch.tensor([[3.0, 4.0]])).square().sum())
    >>> operator.product(torch.tensor([1.0, 0.0]))  # 2 x x^T v
    tensor([18., 24.])
    """
    closures, parameters = as_closures(losses), _trained(model, where)
    layers = _layers(parameters)
    weights = list(parameters.values())

    def product(v: Tensor) -> Tensor:
        pieces = [v[rows].view_as(w).to(w.dtype) for rows, w in zip(layers.values(), weights, strict=True)]
        found = torch.zeros_like(v)
        with buffers_kept(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for closure in closures:
                found += _bent(closure, weights, pieces)
        return found

    return Operator(product, layers, _dtype(weights), weights[0].device)


def reattacked_hessian(
    model: nn.Module, losses: Closure | Sequence[Closure], *, step: float | None = None, where: Where = default
) -> Operator:
    """The Hessian of rho, by central differences of its gradient, attacked afresh on both sides:

        H v = ( g(w + h v) - g(w - h v) ) / 2h + O(h^2),    h = step ‖w‖ / ‖v‖

    Args:
        model: looked at as it stands at each product.
        losses: closures whose sum is rho and which attack at every call: `robust.afresh(...)`.
        step: how far to go, relative to the norm of all chosen weights (to 1 where that is 0). The default is
            u^(1/3), u the dtype's rounding unit, which balances the differences' error O(step^2) with the gradients'
            rounding O(u / step): 6e-6 in float64, 5e-3 in float32.
        where: (name, parameter) -> bool, which weights.

    Each product is two attacks and gradients of the whole data. Weights come back to the bit; `.grad` and buffers are
    left as they were found.

    Attacks of finitely many steps make rho piecewise smooth only, and x' need not be the maximiser: then the gradients
    are not quite rho's, and the matrix of the differences not quite symmetric. Sign steps even make x' piecewise
    constant in w. So with L-inf attacks the differences tend to H_f as step -> 0, almost everywhere, and how x' moves
    is in rare jumps, of a size like 1 / step: take a larger step to average over them.

    Raises: ValueError for a step that is not positive, and as `hessian` does.

    >>> from saltflat import Linf, PGD
    >>> from saltflat.landscape.robust import afresh
    >>> model, x, y = nn.Linear(4, 2), torch.rand(6, 4), torch.arange(6) % 2
    >>> operator = reattacked_hessian(model, afresh(model, x, y, PGD(Linf(0.1), 0.05, 4)))
    >>> operator.product(torch.ones(operator.size)).shape
    torch.Size([8])
    """
    closures, parameters = as_closures(losses), _trained(model, where)
    layers, weights = _layers(parameters), list(parameters.values())
    dtype = _dtype(weights)
    relative = torch.finfo(dtype).eps ** (1 / 3) if step is None else step
    if not 0 < relative < math.inf:
        raise ValueError(f"step: expected a finite number > 0, got {step!r}")

    def slope(displacement: Tensor) -> Tensor:
        v = {name: displacement[rows].view_as(parameters[name]) for name, rows in layers.items()}
        with displaced(model, v):
            found = gradient(model, closures, where=where)
        return _joined([found.get(name, torch.zeros_like(w)) for name, w in parameters.items()])

    def product(v: Tensor) -> Tensor:
        length = v.norm().item()
        if length == 0:
            return torch.zeros_like(v)
        h: float = relative * (_joined(weights).norm().item() or 1.0) / length
        return (slope(h * v) - slope(-h * v)) / (2 * h)

    return Operator(product, layers, dtype, weights[0].device)


def as_weights(model: nn.Module, operator: Operator, vector: Tensor) -> dict[str, Tensor]:
    """A vector (P,) as {name: v} of the weights' shapes: an eigenvector as a direction for `along` or `displaced`.

    >>> model = nn.Linear(2, 1)
    >>> operator = hessian(model, lambda: model(torch.ones(1, 2)).square().sum())
    >>> as_weights(model, operator, torch.tensor([1.0, 2.0]))
    {'weight': tensor([[1., 2.]])}
    """
    return {name: vector[rows].view_as(model.get_parameter(name)) for name, rows in operator.layers.items()}


def _bent(closure: Closure, weights: Sequence[nn.Parameter], v: Sequence[Tensor]) -> Tensor:
    """H v of one closure. Its graph goes when this returns."""
    slopes = torch.autograd.grad(closure(), weights, create_graph=True, materialize_grads=True)
    # A gradient without a graph is a constant: the loss is linear in that weight, or does not reach it.
    curved = [(g, piece) for g, piece in zip(slopes, v, strict=True) if g.requires_grad]
    if not curved:
        return _joined([torch.zeros_like(w) for w in weights])
    outputs, pieces = zip(*curved, strict=True)
    return _joined(torch.autograd.grad(outputs, weights, pieces, materialize_grads=True))


def _trained(model: nn.Module, where: Where) -> dict[str, nn.Parameter]:
    chosen = chosen_weights(model, where)
    if still := [name for name, w in chosen.items() if not w.requires_grad]:
        raise ValueError(f"where: expected weights that are trained, got {still[0]!r}")
    return chosen


def _layers(parameters: Mapping[str, nn.Parameter]) -> dict[str, slice]:
    layers, start = {}, 0
    for name, w in parameters.items():
        layers[name] = slice(start, start := start + w.numel())
    return layers


def _dtype(weights: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (w.dtype for w in weights))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
