"""Eigenvalues of an operator from products with vectors.

    A Q_m = Q_m T_m + beta_m q_{m+1} e_m^T,    T_m = tridiagonal(alpha, beta) = S diag(theta) S^T

The rows q_1 ... q_m that are kept (columns of Q_m) are an orthonormal basis of the Krylov space of a start q_1: A q_j
is made orthogonal to *all* of them, twice, since in floating point the three-term recurrence alone loses orthogonality
and finds false copies of eigenvalues (Parlett, "The Symmetric Eigenvalue Problem", chapters 6 and 13). The Ritz values
theta_i are estimates of eigenvalues, outermost first, and the residual of each is known without another product:

    ‖A y_i - theta_i y_i‖ = |beta_m s_mi|,    y_i = Q_m s_i,    and A has an eigenvalue that close to theta_i

One Krylov space holds one direction of each eigenspace, so it shows no multiplicities. Two things are done about that.
Where it is exhausted (beta_m = 0), it goes on with a random vector orthogonal to it. And whatever was found is not
believed before another Krylov space, orthogonal to the found eigenvectors, holds nothing that belongs among it.

Source: Lanczos, J. Res. Nat. Bur. Standards 45, 1950; for Hessians of networks Ghorbani, Krishnan, Xiao, arXiv
1901.10159.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saltflat.landscape.hessian import Operator
from saltflat.random import seeded

SETTLED = 1e-2  # a Ritz value known to this share of itself tells whether it belongs among others
LEAST = 4  # steps of any space: a start that happens to be nearly an eigenvector would seem to have settled at once
BLOCK = 8  # vectors of a basis that memory is taken for at a time: how many will be needed is not known before


@dataclass(frozen=True)
class Tridiagonal:
    """Attributes:
    alpha: (m,) float64 on the CPU, the diagonal of T.
    beta: (m,), of which the first m - 1 stand beside the diagonal; beta_m leads out of the Krylov space. A zero is
        where the space was exhausted and another began.
    basis: q_1 ... q_m, as the rows of tensors (<= BLOCK, P).
    """

    alpha: Tensor
    beta: Tensor
    basis: tuple[Tensor, ...]

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """theta (m,) in descending order, residuals (m,), and S (m, m), whose columns are the eigenvectors of T."""
        beside = self.beta[:-1]
        theta, s = torch.linalg.eigh(self.alpha.diag() + beside.diag(1) + beside.diag(-1))
        theta, s = theta.flip(0), s.flip(1)
        return theta, (self.beta[-1] * s[-1]).abs(), s

    def combined(self, s: Tensor) -> Tensor:
        """Q s, (P,), of s (m,)."""
        found = torch.zeros_like(self.basis[0][0])
        parts = torch.split(s.to(found), [len(rows) for rows in self.basis])
        for part, rows in zip(parts, self.basis, strict=True):
            found += part @ rows
        return found


@dataclass(frozen=True)
class Eigenvalues:
    """Attributes:
    values: float64, in descending order: the k largest, then the smallest ones that were asked for.
    residuals: ‖A y - theta y‖ of each, in its unit. Some eigenvalue lies within that of it; a simple one lies within
        residual^2 / gap, the gap being the distance to the others.
    vectors: one unit row (P,) for each, in the operator's dtype; `as_weights` makes a direction of it.
    steps: products that were taken.
    converged: whether all residuals are within the tolerance, and another Krylov space had nothing to add.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor
    steps: int
    converged: bool


def top_eigenvalues(
    operator: Operator,
    k: int,
    *,
    smallest: int = 0,
    steps: int = 100,
    tolerance: float | None = None,
    seed: int = 0,
) -> Eigenvalues:
    """The k algebraically largest eigenvalues, with their multiplicities, and `smallest` from the lower end (Hessians
    of networks are indefinite).

    Args:
        operator: of size P.
        k, smallest: how many; together 1 ... P.
        steps: the most products to take in all. So many vectors of the weights' size are held at most: those of one
            Krylov space, in blocks of 8 as it grows, and the eigenvectors that were found before it; besides, the new
            eigenvectors when they are made of both, and a few to work with.
        tolerance: of residuals, relative to the largest |theta|. The default is the root of the dtype's rounding unit
            (1.5e-8 in float64, 3.5e-4 in float32): a simple, separated eigenvalue is then as exact as its products.
        seed: of the starts.

    Multiplicities cost: each Krylov space shows one copy, and one more space has to show that there is no other. With
    too few steps, `converged` is False, and the largest values are lower bounds.

    Raises: ValueError for numbers out of range; FloatingPointError for products that are not finite.

    >>> d = torch.tensor([5.0, 1.0, 5.0, -2.0, 0.0], dtype=torch.float64)
    >>> found = top_eigenvalues(Operator(lambda v: d * v, {"w": slice(0, 5)}, d.dtype, d.device), 3, smallest=1)
    >>> [round(value, 6) for value in found.values.tolist()], found.converged
    ([5.0, 5.0, 1.0, -2.0], True)
    """
    wanted = k + smallest
    if k < 0 or smallest < 0 or not 1 <= wanted <= operator.size:
        raise ValueError(f"k: expected 1 to {operator.size} eigenvalues in all, got {k!r} and {smallest!r}")
    if steps < wanted:
        raise ValueError(f"steps: expected at least {wanted}, one for each eigenvalue, got {steps!r}")
    if tolerance is None:
        tolerance = math.sqrt(torch.finfo(operator.dtype).eps)

    generator = seeded(seed)
    values, residuals = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    vectors = torch.zeros(0, operator.size, dtype=operator.dtype, device=operator.device)
    taken, confirmed = 0, False

    def merged(theta: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """What is wanted of all that is known, where it stands in there, and the size that errors are relative to."""
        together, errors = torch.cat([values, theta]), torch.cat([residuals, near])
        order = together.argsort(descending=True, stable=True)
        rows = torch.cat([order[:k], order[max(k, len(order) - smallest) :]])
        return rows, together[rows], errors[rows], tolerance * together.abs().max().item()

    def enough(chain: Tridiagonal) -> bool:
        """What is wanted has converged, and the space's own ends are known well enough not to be wanted."""
        theta, near, _ = chain.ritz()
        rows, _, errors, allowed = merged(theta, near)
        ends = [0] * (k > 0) + [-1] * (smallest > 0)
        settled = all(near[end] <= max(SETTLED * theta[end].abs().item(), allowed) for end in ends)
        settled = settled and len(theta) >= min(LEAST, operator.size - len(values))
        return len(rows) == wanted and bool((errors <= allowed).all()) and settled

    while not confirmed and taken < steps and len(values) < operator.size:
        start = normal(operator, generator)
        chain = tridiagonalised(operator, start, steps - taken, generator, against=vectors, enough=enough)
        theta, near, s = chain.ritz()
        rows, now, errors, allowed = merged(theta, near)
        everything = len(values) + len(theta) == operator.size
        nothing_new = len(values) == wanted and bool(((now - values).abs() <= allowed).all())
        confirmed = enough(chain) and (everything or nothing_new)
        n, known = len(values), vectors
        vectors = known.new_empty(len(rows), operator.size)
        for vector, row in zip(vectors, rows.tolist(), strict=True):
            vector.copy_(known[row] if row < n else chain.combined(s[:, row - n]))
        values, residuals, taken = now, errors, taken + len(theta)
        del chain, known  # before there is another: they are large

    return Eigenvalues(values, residuals, vectors, taken, confirmed)


def tridiagonalised(
    operator: Operator,
    start: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    against: Tensor | None = None,
    enough: Callable[[Tridiagonal], bool] = lambda chain: False,
) -> Tridiagonal:
    """Lanczos with full reorthogonalisation, from `start`.

    Args:
        start: (P,), of any length but 0.
        steps: m, products to take; fewer where they fill the space.
        generator: of the vectors to go on with where a Krylov space is exhausted.
        against: (j, P), orthonormal rows that the basis stays orthogonal to: A is then restricted to their complement.
        enough: asked after every step whether to stop.

    Memory: the basis, taken in blocks of 8 as it grows, at most `steps` vectors; nothing of `against` is copied.

    >>> d = torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)
    >>> operator = Operator(lambda v: d * v, {"w": slice(0, 3)}, d.dtype, d.device)
    >>> theta, residuals, _ = tridiagonalised(operator, torch.ones_like(d), 3, seeded(0)).ritz()
    >>> [round(value, 6) for value in theta.tolist()]
    [3.0, 3.0, 1.0]
    """
    locked = () if against is None else (against,)
    m = min(steps, operator.size - sum(len(rows) for rows in locked))
    alpha, beta, ahead = [0.0] * m, [0.0] * m, _orthogonal(start, locked)
    basis: tuple[Tensor, ...] = ()
    for j in range(m):
        if j > 0 and beta[j - 1] == 0:
            ahead = _orthogonal(normal(operator, generator), (*locked, *basis))
        if j % BLOCK == 0:
            full = basis
            block = torch.empty(min(BLOCK, m - j), operator.size, dtype=operator.dtype, device=operator.device)
        block[j % BLOCK] = q = ahead / ahead.norm()
        basis = (*full, block[: j % BLOCK + 1])
        image = operator.product(q)
        ahead = _orthogonal(image, (*locked, *basis))
        alpha[j], beta[j] = (q @ image).item(), ahead.norm().item()
        if not (math.isfinite(alpha[j]) and math.isfinite(beta[j])):
            raise FloatingPointError(f"operator: products are not finite: <q, A q> = {alpha[j]} at step {j + 1}")
        scale = max(abs(number) for number in alpha[: j + 1] + beta[: j + 1])
        if beta[j] <= 10 * torch.finfo(operator.dtype).eps * scale:  # nothing but rounding
            beta[j] = 0.0
        numbers = torch.tensor([alpha[: j + 1], beta[: j + 1]], dtype=torch.float64)
        chain = Tridiagonal(numbers[0], numbers[1], basis)
        if enough(chain):
            break
    return chain


def normal(operator: Operator, generator: torch.Generator) -> Tensor:
    """A standard normal vector (P,), drawn on the CPU so that every device gets the same."""
    return torch.randn(operator.size, dtype=torch.float64, generator=generator).to(operator.device, operator.dtype)


def _orthogonal(vector: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Gram and Schmidt, twice: once leaves rounding errors of the size of what was taken off, twice is enough."""
    for rows in (*blocks, *blocks):
        vector = vector - rows.T @ (rows @ vector)
    return vector
