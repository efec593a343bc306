"""The trace of an operator, in all and layer by layer.

    Hutchinson    tr A = E z^T A z,                       z_i = +-1 with equal chances
                  Var z^T A z = 2 (‖A‖_F^2 - sum_i a_ii^2):   0 for a diagonal A
    by layers     tr A_kk = E z_k^T (A z)_k               the same z, and one product, for all layers k
    Hutch++       tr A = tr Q^T A Q + tr (I - Q Q^T) A (I - Q Q^T),    Q = orth(A S), S Gaussian

Hutch++ takes the first part exactly, where the large eigenvalues are, and the second by Hutchinson: m products err by
O(1 / m) instead of O(1 / sqrt m) for a positive semidefinite A, and not at all if A has rank m / 3 or less.

Sources: Hutchinson, Commun. Statist. Simul. 19, 1990; Meyer, Musco, Musco, Woodruff, arXiv 2010.09649, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saltflat.landscape.estimate import Estimate, mean
from saltflat.landscape.hessian import Operator
from saltflat.landscape.lanczos import normal
from saltflat.random import seeded


def trace(operator: Operator, products: int, seed: int = 0) -> Estimate:
    """tr A by Hutch++.

    Args:
        operator: of size P.
        products: with A, >= 3. A third finds Q, a third is spent on tr Q^T A Q, the rest are probes. products // 3
            vectors of the weights' size are held, Q, and as many again (A S) until Q is known.
        seed: of S and the probes.

    Returns: an `Estimate`, unbiased; its standard error is that of the probes, given Q, and `draws` is their number:
    products - 2 (products // 3). The error is NaN with 3 products, which leave a single probe, a number from 4 on, and
    0 up to rounding where rank(A) <= products // 3.

    Raises: ValueError for fewer than 3 products.

    >>> d = torch.tensor([4.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    >>> found = trace(Operator(lambda v: d * v, {"w": slice(0, 5)}, d.dtype, d.device), products=6)
    >>> round(found.value, 6), round(found.standard_error, 6), found.draws
    (5.0, 0.0, 2)
    """
    if products < 3:
        raise ValueError(f"products: expected an integer >= 3, got {products!r}")
    generator, third = seeded(seed), products // 3
    basis = _range(operator, min(third, operator.size), generator)
    seen = sum((q @ operator.product(q)).double().item() for q in basis.T)

    def remainder() -> Tensor:
        z = signs(operator, generator)
        unseen = z - basis @ (basis.T @ z)
        return unseen @ operator.product(unseen)

    rest = mean(torch.stack([remainder() for _ in range(products - 2 * third)]))
    return Estimate(seen + rest.value, rest.standard_error, rest.draws)


def layer_traces(operator: Operator, probes: int, seed: int = 0) -> dict[str, Estimate]:
    """{name: tr A_kk} of the diagonal blocks, by Hutchinson: every probe is one product and tells of all layers.

    Args:
        operator: whose `layers` name the blocks.
        probes: products to take, >= 1.
        seed: of the probes.

    Returns: unbiased estimates. Those of different layers share their probes: their covariance is ‖A_kl‖_F^2 / probes,
    so the error of their sum, which estimates tr A, is more than the root of the errors' squares.

    Raises: ValueError for fewer than 1 probe.

    >>> d = torch.tensor([4.0, 0.0, 1.0])
    >>> operator = Operator(lambda v: d * v, {"a": slice(0, 2), "b": slice(2, 3)}, d.dtype, d.device)
    >>> {name: found.value for name, found in layer_traces(operator, probes=2).items()}
    {'a': 4.0, 'b': 1.0}
    """
    if probes < 1:
        raise ValueError(f"probes: expected an integer >= 1, got {probes!r}")
    generator = seeded(seed)

    def draw() -> Tensor:
        z = signs(operator, generator)
        products = z * operator.product(z)
        return torch.stack([products[rows].sum() for rows in operator.layers.values()])

    draws = torch.stack([draw() for _ in range(probes)])  # (probes, layers)
    return {name: mean(column) for name, column in zip(operator.layers, draws.T, strict=True)}


def signs(operator: Operator, generator: torch.Generator) -> Tensor:
    """A vector (P,) of random signs, drawn on the CPU so that every device gets the same."""
    drawn = torch.randint(0, 2, (operator.size,), generator=generator)
    return (2 * drawn - 1).to(operator.device, operator.dtype)


def _range(operator: Operator, rank: int, generator: torch.Generator) -> Tensor:
    """orth(A S), (P, rank), of a Gaussian S."""
    sketch = torch.empty(rank, operator.size, dtype=operator.dtype, device=operator.device)
    for row in sketch:
        row.copy_(operator.product(normal(operator, generator)))
    basis: Tensor = torch.linalg.qr(sketch.T).Q
    return basis
