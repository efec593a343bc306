"""Association of two columns of a table of models: Kendall's tau-b, its partial, Spearman's, Pearson's, and ICC(1).

Kendall's tau-b is the cosine of two sign matrices:

    tau_b(x, y) = <A, B> / (‖A‖ ‖B‖),   A_ij = sign(x_i − x_j),   B_ij = sign(y_i − y_j),   <A, B> = Σ_ij A_ij B_ij.

Ties are zeros of a matrix. A resample that holds model i c_i times weighs each pair by c_i c_j, so that <A, B> becomes
the quadratic form cᵀ(A∘B)c: the taus of thousands of resamples are one matrix product. The partial tau is the cosine of
A and B after their projections on the control's matrix C were taken away:

    tau(x, y | z) = (tau_xy − tau_xz tau_yz) / √((1 − tau_xz²)(1 − tau_yz²)).

In words: of two models drawn at random, x and y order them alike in a share (1 + tau) / 2 of cases, were there no ties.

Sources: Kendall, Rank Correlation Methods, chapters 3 and 8; for ICC(1), Shrout and Fleiss, Intraclass Correlations
(1979), case 1.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESIDUE = 1e-12  # 1 − tau² below this is rounding


def signs(x: Array) -> Array:
    """sign(x_i − x_j): (n,) to (n, n)."""
    return np.sign(x[:, None] - x[None, :])


def kendall(columns: Array, counts: Array | None = None) -> Array:
    """Kendall's tau-b of every pair of columns.

    `columns`: (k, n). `counts`: (..., n), how often a resample holds each model; once each by default. Returns
    (..., k, k) in [−1, 1]; nan in the rows of a column whose values are all equal.

    >>> kendall(np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])).round(3).tolist()
    [[1.0, 0.333], [0.333, 1.0]]
    """
    weights = np.ones(columns.shape[1]) if counts is None else counts
    matrices = [signs(column) for column in columns]
    products = np.empty((*weights.shape[:-1], len(columns), len(columns)))
    for i, first in enumerate(matrices):
        for j, second in enumerate(matrices[: i + 1]):
            form = ((weights @ (first * second)) * weights).sum(-1)
            products[..., i, j] = products[..., j, i] = form
    return _cosines(products)


def tau_b(x: Array, y: Array) -> float:
    """Kendall's tau-b of two columns (n,); nan where one of them is constant.

    >>> tau_b(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0]))
    -1.0
    """
    return float(kendall(np.stack([x, y]))[0, 1])


def partial(xy: Array, xz: Array, yz: Array) -> Array:
    """Partial tau of x and y given z from the three taus, elementwise.

    Convention: 0 where z orders x or y entirely (a tau of ±1, the formula's 0/0): nothing is left to be associated.

    >>> float(partial(np.array(0.5), np.array(0.5), np.array(0.5)))
    0.3333333333333333
    >>> float(partial(np.array(0.7), np.array(1.0), np.array(0.7)))
    0.0
    """
    left = (1 - xz**2) * (1 - yz**2)
    ordered = (1 - xz**2 < RESIDUE) | (1 - yz**2 < RESIDUE)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip((xy - xz * yz) / np.sqrt(left), -1.0, 1.0)
    return np.where(ordered, 0.0, found)


def permuted(x: Array, others: Array, orders: NDArray[np.intp]) -> Array:
    """Kendall's tau-b of a permuted x with other columns.

    `x`: (n,). `others`: (k, n). `orders`: (P, n), each row a permutation of the models. Returns (P, k).
    """
    own = signs(x)
    matrices = np.stack([signs(other).ravel() for other in others])
    norms = np.sqrt((own**2).sum() * (matrices**2).sum(1))
    products = np.stack([matrices @ own[order[:, None], order].ravel() for order in orders])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(products / norms)


def ranks(x: Array) -> Array:
    """Ranks from 1 to n, equal values sharing the mean of theirs.

    >>> ranks(np.array([5.0, 2.0, 5.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    return np.asarray((len(x) + 1) / 2 + signs(x).sum(1) / 2)


def pearson(x: Array, y: Array) -> float:
    """Pearson's coefficient: the cosine of the centred columns; nan where one of them is constant."""
    centred = np.stack([x - x.mean(), y - y.mean()])
    scale = np.abs(centred).max(1, keepdims=True)
    if (scale == 0).any():
        return float("nan")
    centred /= scale  # squares of very small or large values would leave the range of floats
    return float(_cosines(centred @ centred.T)[0, 1])


def spearman(x: Array, y: Array) -> float:
    """Spearman's coefficient: Pearson's of the ranks."""
    return pearson(ranks(x), ranks(y))


def intraclass(first: Array, second: Array) -> float:
    """ICC(1): the share of a measure's variance that is between models, from two measurements (n,) of each.

    (B − W) / (B + W), B = 2 Var(mean of a model's two), W = mean of (first − second)² / 2. 1: other draws change
    nothing; 0 or less: the models differ by no more than the draws do. nan with fewer than two models.
    """
    if len(first) < 2:
        return float("nan")
    between = 2 * np.var((first + second) / 2, ddof=1)
    within = np.mean((first - second) ** 2) / 2
    return float((between - within) / (between + within)) if between + within > 0 else float("nan")


def _cosines(products: Array) -> Array:
    """Inner products (..., k, k) divided by the norms on their diagonal."""
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(products / (norms[..., :, None] * norms[..., None, :])).clip(-1.0, 1.0)
