"""The density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    phi(t) = (1/P) sum_i delta(t - lambda_i) = E v^T delta(t - A) v ~ (1/R) sum_r sum_j s_r1j^2 delta(t - theta_rj)

v = z / sqrt P has random signs; theta and S are the Ritz values and eigenvectors of the T that m steps of Lanczos from
v give, and the squared first components are Gauss's weights: exact for polynomials of degree up to 2 m - 1, given v.
The zeroth moment is 1, the first tr A / P. To be looked at, phi is smoothed with a Gaussian.

Sources: Golub, Welsch, Math. Comp. 23, 1969 (the weights); Lin, Saad, Yang, arXiv 1308.5467 (densities); Ghorbani,
Krishnan, Xiao, arXiv 1901.10159 (of Hessians of networks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saltflat.landscape.estimate import Estimate, mean
from saltflat.landscape.hessian import Operator
from saltflat.landscape.lanczos import tridiagonalised
from saltflat.landscape.trace import signs
from saltflat.random import seeded


@dataclass(frozen=True)
class Curve:
    """Attributes:
    grid: (G,), in the unit of the eigenvalues.
    value: (G,), density per unit of the grid; its integral is 1.
    standard_error: (G,), over the runs, in the same unit; NaN for a single run.
    """

    grid: Tensor
    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class Density:
    """Atoms at `nodes` (R, m) of mass `weights` (R, m), which are >= 0 and sum to 1 in each of R independent runs;
    float64 on the CPU.
    """

    nodes: Tensor
    weights: Tensor

    def moment(self, order: int) -> Estimate:
        """The mean of lambda^order over all eigenvalues, tr A^order / P; unbiased for order <= 2 m - 1."""
        return mean((self.weights * self.nodes**order).sum(1))

    def smoothed(self, grid: Tensor, width: float) -> Curve:
        """phi * N(0, width^2) at the points of the grid (G,), the mean over the runs.

        Raises: ValueError for a width that is not positive.
        """
        if not 0 < width < math.inf:
            raise ValueError(f"width: expected a finite number > 0, got {width!r}")
        points = grid.detach().double().cpu()
        distance = (points[:, None, None] - self.nodes) / width
        kernel = distance.square().div(-2).exp() / (width * math.sqrt(2 * math.pi))
        runs = (kernel * self.weights).sum(2)  # (G, R)
        n = runs.shape[1]
        error = runs.std(1) / math.sqrt(n) if n > 1 else torch.full_like(points, math.nan)
        return Curve(points, runs.mean(1), error)


def spectral_density(operator: Operator, steps: int, runs: int, seed: int = 0) -> Density:
    """phi of the operator, from `runs` starts of `steps` products each.

    Args:
        operator: of size P.
        steps: m; at most P are taken. So many vectors of the weights' size are held.
        runs: R, independent starts.
        seed: of the starts.

    Returns: a `Density`. Where a start's Krylov space is exhausted early, the nodes that are left weigh nothing.

    Raises: ValueError for fewer than 1 step or run; FloatingPointError for products that are not finite.

    >>> d = torch.tensor([1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    >>> found = spectral_density(Operator(lambda v: d * v, {"w": slice(0, 4)}, d.dtype, d.device), steps=2, runs=1)
    >>> [round(node, 6) for node in found.nodes[0].tolist()], [round(weight, 6) for weight in found.weights[0].tolist()]
    ([2.0, 1.0], [0.75, 0.25])
    """
    for name, number in (("steps", steps), ("runs", runs)):
        if number < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {number!r}")
    generator = seeded(seed)
    chains = (tridiagonalised(operator, signs(operator, generator), steps, generator).ritz() for _ in range(runs))
    nodes, weights = zip(*((theta, s[0].square()) for theta, _, s in chains), strict=True)
    return Density(torch.stack(nodes), torch.stack(weights))
