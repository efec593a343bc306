import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import dense_cross_entropy, operator_of, symmetric
from memory import Memory
from networks import batch, convolutional
from torch import nn

from saltflat.landscape import lanczos
from saltflat.landscape.hessian import Operator, hessian
from saltflat.landscape.lanczos import BLOCK, normal, top_eigenvalues, tridiagonalised
from saltflat.landscape.robust import frozen
from saltflat.objectives import ce
from saltflat.random import seeded


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def counted(operator):
    calls = []
    return replace(operator, product=lambda v: (calls.append(1), operator.product(v))[1]), calls


def diagonal(d):
    """The diagonal matrix, which is large, as an operator."""
    return Operator(lambda v: d * v, {"w": slice(0, len(d))}, d.dtype, d.device)


def check_pairs(matrix, found, within):
    """Unit, orthogonal, and each as near an eigenvector as it says."""
    v = found.vectors
    torch.testing.assert_close(v @ v.T, torch.eye(len(v), dtype=v.dtype), rtol=0, atol=within)
    residuals = (v @ matrix - found.values[:, None] * v).norm(dim=1)
    assert ((residuals - found.residuals).abs() <= within * matrix.abs().max()).all()


def test_both_ends_of_a_network_s_hessian_are_those_of_the_dense_one():
    model, (x, y) = convolutional().eval(), batch()
    found = top_eigenvalues(hessian(model, frozen(model, x, y, None)), 5, smallest=3, steps=200, tolerance=1e-10)
    dense = dense_cross_entropy(model, x, y)
    exact = torch.linalg.eigvalsh(dense).flip(0)
    assert exact[-1] < -1e-3  # indefinite: the lower end is something else than zero
    torch.testing.assert_close(found.values, torch.cat([exact[:5], exact[-3:]]), rtol=0, atol=1e-8)
    assert found.converged
    check_pairs(dense, found, 1e-9)


def test_the_default_tolerance_gives_eight_digits_where_eigenvalues_are_apart():
    matrix = symmetric(torch.cat([tensor(30, 21, 13, 8), torch.rand(200, dtype=torch.float64)]))
    found = top_eigenvalues(operator_of(matrix), 4)
    torch.testing.assert_close(found.values, tensor(30, 21, 13, 8), rtol=0, atol=1e-8)
    assert found.converged
    assert found.steps < 60
    check_pairs(matrix, found, 1e-10)


@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 2.5]), min_size=1, max_size=12), st.data(), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_every_eigenvalue_is_found_as_often_as_it_is_one(eigenvalues, data, seed):
    n = len(eigenvalues)
    k = data.draw(st.integers(0, n))
    smallest = data.draw(st.integers(0 if k else 1, n - k))
    matrix, exact = symmetric(tensor(*eigenvalues)), tensor(*eigenvalues).sort(descending=True).values
    found = top_eigenvalues(operator_of(matrix), k, smallest=smallest, seed=seed)
    torch.testing.assert_close(found.values, torch.cat([exact[:k], exact[n - smallest :]]), rtol=0, atol=1e-8)
    assert found.converged
    check_pairs(matrix, found, 1e-9)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_multiplicities_are_found_although_one_krylov_space_shows_none(k):
    d = torch.cat([tensor(9, 9, 9, 7), torch.rand(300, dtype=torch.float64)])
    theta, residuals, _ = tridiagonalised(
        operator_of(d.diag()), normal(operator_of(d.diag()), seeded(0)), 11, seeded(0)
    ).ritz()
    torch.testing.assert_close(theta[:2], tensor(9, 7), rtol=0, atol=1e-8)
    assert residuals[:2].max() < 1e-7  # nothing in them tells that a 9 is missing
    found = top_eigenvalues(operator_of(d.diag()), k)
    torch.testing.assert_close(found.values, tensor(9, 9, 9, 7)[:k], rtol=0, atol=1e-8)
    assert found.converged


def test_too_few_steps_are_told_and_give_lower_bounds():
    d = torch.cat([tensor(9, 9, 7), torch.linspace(0, 6, 300, dtype=torch.float64)])
    found = top_eigenvalues(operator_of(d.diag()), 3, steps=8)
    assert not found.converged
    assert found.steps == 8
    assert (found.values <= tensor(9, 9, 7) + 1e-12).all()


def test_nothing_is_called_converged_before_copies_were_looked_for():
    d = torch.cat([tensor(9, 9, 7), torch.linspace(0, 6, 100, dtype=torch.float64)])
    found = [top_eigenvalues(operator_of(d.diag()), 2, steps=steps) for steps in range(2, 110, 2)]
    misled = [one for one in found if one.residuals.max() < 1e-7 and one.values[1] < 8]
    right = [one for one in found if one.converged]
    assert misled  # (9, 7), and small residuals
    assert not any(one.converged for one in misled)
    assert right
    for one in right:
        torch.testing.assert_close(one.values, tensor(9, 9), rtol=0, atol=1e-8)


def test_residuals_tell_how_far_an_eigenvalue_is():
    matrix = symmetric(torch.linspace(-1, 1, 60, dtype=torch.float64))
    exact = torch.linalg.eigvalsh(matrix)
    for steps in (3, 6, 12):
        found = top_eigenvalues(operator_of(matrix), 2, smallest=1, steps=steps)
        for value, residual in zip(found.values, found.residuals, strict=True):
            assert (exact - value).abs().min() <= residual + 1e-12


def test_no_more_products_are_taken_than_told():
    operator, calls = counted(operator_of(symmetric(torch.rand(50, dtype=torch.float64))))
    found = top_eigenvalues(operator, 2, steps=30)
    assert len(calls) == found.steps <= 30


def test_products_are_saved_where_few_are_enough():
    operator, calls = counted(operator_of(symmetric(torch.cat([tensor(100, 50), torch.zeros(98).double()]))))
    assert top_eigenvalues(operator, 2).converged
    assert len(calls) <= 8


@pytest.mark.parametrize("matrix", [torch.zeros(5, 5), 3 * torch.eye(5), torch.ones(1, 1)], ids=["0", "cI", "1"])
def test_a_space_that_is_exhausted_at_once_goes_on(matrix):
    matrix = matrix.double()
    n = len(matrix)
    found = top_eigenvalues(operator_of(matrix), n)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(matrix).flip(0))
    assert found.converged
    assert found.steps == n
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(n, dtype=torch.float64))


def test_softmax_regression_at_zero_has_each_eigenvalue_of_its_inputs_c_minus_1_times():
    """H = (I - 11^T / C) / C (x) mean x x^T."""
    model, x = nn.Linear(4, 3, bias=False).double(), torch.randn(30, 4, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    found = top_eigenvalues(hessian(model, lambda: ce(model(x), torch.arange(30) % 3).mean()), 6, smallest=4)
    of_inputs = torch.linalg.eigvalsh(x.T @ x / 30).flip(0) / 3
    expected = torch.cat([of_inputs.repeat_interleave(2)[:6], torch.zeros(4, dtype=torch.float64)])
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-8)


def test_the_factorisation_holds_and_its_basis_is_orthonormal():
    """A Q = Q T + beta_m q_{m+1} e_m^T, also where rounding would long have lost the plain recurrence."""
    matrix = symmetric(torch.logspace(0, -14, 60, dtype=torch.float64))
    operator = operator_of(matrix)
    chain = tridiagonalised(operator, normal(operator, seeded(0)), 40, seeded(0))
    q, m = torch.cat(chain.basis).T, len(chain.alpha)
    t = chain.alpha.diag() + chain.beta[:-1].diag(1) + chain.beta[:-1].diag(-1)
    torch.testing.assert_close(q.T @ q, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-13)
    ahead = matrix @ q - q @ t
    torch.testing.assert_close(ahead[:, :-1], torch.zeros(60, m - 1, dtype=torch.float64), rtol=0, atol=1e-13)
    assert ahead[:, -1].norm().item() == pytest.approx(chain.beta[-1].item(), abs=1e-13)


def test_what_is_locked_is_left_out():
    matrix = symmetric(tensor(5, 4, 3, 2, 1))
    v = torch.linalg.eigh(matrix).eigenvectors.T
    chain = tridiagonalised(operator_of(matrix), normal(operator_of(matrix), seeded(0)), 9, seeded(0), against=v[3:])
    torch.testing.assert_close(chain.ritz()[0], tensor(3, 2, 1))
    assert (torch.cat(chain.basis) @ v[3:].T).abs().max() < 1e-14


WORK = 6  # vectors that a step needs, besides those that are kept


def test_one_krylov_space_is_let_go_of_before_the_next_is_made(monkeypatch):
    """Three copies take several; the largest is all that is held, with the eigenvectors that it has to be orthogonal
    to, and those that are made of both.
    """
    d, lengths = torch.cat([tensor(9, 9, 9), torch.rand(20_000, dtype=torch.float64)]), []

    def noted(*args, **kwargs):
        chain = tridiagonalised(*args, **kwargs)
        lengths.append(len(chain.alpha))
        return chain

    monkeypatch.setattr(lanczos, "tridiagonalised", noted)
    with Memory(len(d)) as memory:
        found = top_eigenvalues(diagonal(d), 3, steps=2000, tolerance=1e-3)
    assert found.converged
    assert memory.peak <= max(lengths) + BLOCK + 3 + 3 + WORK < sum(lengths)


def test_memory_is_taken_as_steps_are():
    d = torch.cat([tensor(100, 50), torch.rand(20_000, dtype=torch.float64)])
    with Memory(len(d)) as memory:
        found = top_eigenvalues(diagonal(d), 2, steps=2000)
    assert found.steps < 40
    assert memory.peak <= found.steps + BLOCK + 2 + WORK


@pytest.mark.parametrize("steps", [9, 30, 50])
def test_no_more_vectors_are_held_than_steps_allow(steps):
    d = torch.cat([tensor(9, 9, 9), torch.rand(20_000, dtype=torch.float64)])
    with Memory(len(d)) as memory:
        found = top_eigenvalues(diagonal(d), 3, steps=steps)
    assert found.steps == steps
    assert memory.peak <= steps + 3 + WORK


def test_equal_seeds_give_equal_bits():
    operator = operator_of(symmetric(torch.rand(30, dtype=torch.float64)))
    one, again, other = (top_eigenvalues(operator, 2, steps=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.values, again.values)
    assert torch.equal(one.vectors, again.vectors)
    assert not torch.equal(one.vectors, other.vectors)


def test_single_precision_reaches_its_own_tolerance():
    matrix = symmetric(torch.cat([tensor(30, 21, 21), torch.rand(100, dtype=torch.float64)]))
    found = top_eigenvalues(operator_of(matrix.float()), 3)
    assert found.converged
    assert found.vectors.dtype == torch.float32
    torch.testing.assert_close(found.values, tensor(30, 21, 21), rtol=1e-5, atol=0)


def test_scipy_agrees():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix = symmetric(torch.randn(80, dtype=torch.float64))
    found = top_eigenvalues(operator_of(matrix), 4, steps=160, tolerance=1e-10)
    expected = linalg.eigsh(matrix.numpy(), 4, which="LA", return_eigenvectors=False)
    torch.testing.assert_close(found.values, torch.tensor(sorted(expected, reverse=True)), rtol=0, atol=1e-8)


def test_bad_arguments_are_told():
    operator = operator_of(torch.eye(3, dtype=torch.float64))
    for k, smallest in ((0, 0), (-1, 2), (2, -1), (4, 0), (2, 2)):
        with pytest.raises(ValueError, match="k: expected 1 to 3 eigenvalues"):
            top_eigenvalues(operator, k, smallest=smallest)
    with pytest.raises(ValueError, match="steps: expected at least 2"):
        top_eigenvalues(operator, 2, steps=1)
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="products are not finite"):
            top_eigenvalues(operator_of(torch.full((3, 3), bad, dtype=torch.float64)), 1)
