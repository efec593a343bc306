import math

import pytest
import torch
from matrices import dense_cross_entropy, operator_of, symmetric
from networks import batch, convolutional

from saltflat.landscape.density import spectral_density
from saltflat.landscape.hessian import hessian
from saltflat.landscape.robust import frozen
from saltflat.landscape.trace import signs
from saltflat.random import seeded


def test_weights_are_a_probability_in_every_run():
    found = spectral_density(operator_of(symmetric(torch.randn(40, dtype=torch.float64))), steps=12, runs=5)
    assert found.nodes.shape == found.weights.shape == (5, 12)
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-13)


def test_first_moments_are_within_their_standard_errors_of_the_trace():
    eigenvalues = torch.cat([torch.tensor([6.0, -4.0]), torch.randn(48)]).double()
    operator, exact = operator_of(symmetric(eigenvalues)), eigenvalues.mean().item()
    moments = [spectral_density(operator, 2, 40, seed).moment(1) for seed in range(20)]
    z = torch.tensor([(found.value - exact) / found.standard_error for found in moments])
    assert z.abs().max() < 3
    assert 0.5 < z.square().mean().sqrt() < 1.6


@pytest.mark.parametrize("order", [2, 3])
def test_higher_moments_are_within_their_standard_errors(order):
    """tr A^j / P for j <= 2 m - 1. Their draws are skewed, so that few runs err by more than 3 too often: many runs."""
    eigenvalues = torch.cat([torch.tensor([6.0, -4.0]), torch.randn(48)]).double()
    operator, exact = operator_of(symmetric(eigenvalues)), eigenvalues.pow(order).mean().item()
    moments = [spectral_density(operator, 2, 800, seed).moment(order) for seed in range(20)]
    z = torch.tensor([(found.value - exact) / found.standard_error for found in moments])
    assert z.abs().max() < 3
    assert 0.5 < z.square().mean().sqrt() < 1.6


def test_quadrature_is_exact_for_its_start_up_to_degree_2m_minus_1():
    """v^T A^j v, with the v = z / sqrt P that was drawn; at degree 2 m it is not."""
    matrix = symmetric(torch.randn(30, dtype=torch.float64))
    v = signs(operator_of(matrix), seeded(5)) / math.sqrt(30)
    found = spectral_density(operator_of(matrix), steps=4, runs=1, seed=5)
    errors = [abs(found.moment(j).value - (v @ torch.linalg.matrix_power(matrix, j) @ v).item()) for j in range(9)]
    assert max(errors[:8]) < 1e-11
    assert errors[8] > 1e-3


@pytest.mark.parametrize("c", [-2.5, 0.0, 7.0])
def test_a_multiple_of_the_identity_is_one_atom(c):
    found = spectral_density(operator_of(c * torch.eye(20, dtype=torch.float64)), steps=5, runs=3)
    torch.testing.assert_close(found.nodes, torch.full((3, 5), c, dtype=torch.float64))
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_distinct_diagonal_numbers_are_atoms_of_equal_mass():
    d = torch.arange(1, 7, dtype=torch.float64)
    found = spectral_density(operator_of(d.diag()), steps=100, runs=2)  # more steps than numbers
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        torch.testing.assert_close(nodes, d.flip(0))
        torch.testing.assert_close(weights, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_atoms_have_the_mass_of_their_multiplicities():
    """A start with signs sees diagonal numbers exactly as often as they stand there; what is left of the nodes weighs
    nothing.
    """
    d = torch.tensor([1.0] * 15 + [2.0] * 5, dtype=torch.float64)
    found = spectral_density(operator_of(d.diag()), steps=6, runs=2)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        assert weights[(nodes - 1).abs() < 1e-10].sum().item() == pytest.approx(0.75)
        assert weights[(nodes - 2).abs() < 1e-10].sum().item() == pytest.approx(0.25)


def test_a_smoothed_density_is_the_spectrum_s_convolved_with_a_gaussian():
    d = torch.tensor([-1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    grid, width = torch.linspace(-6, 7, 1301, dtype=torch.float64), 0.5
    curve = spectral_density(operator_of(d.diag()), steps=4, runs=3).smoothed(grid, width)
    gaussians = (-((grid[:, None] - d) ** 2) / (2 * width**2)).exp() / (width * math.sqrt(2 * math.pi))
    torch.testing.assert_close(curve.value, gaussians.mean(1))
    assert torch.trapezoid(curve.value, curve.grid).item() == pytest.approx(1, abs=1e-10)
    assert curve.standard_error.max() < 1e-10  # signs make a diagonal exact


def test_a_smoothed_density_s_error_is_that_of_its_runs():
    eigenvalues = torch.cat([torch.tensor([6.0, -4.0]), torch.randn(48)]).double()
    operator, grid = operator_of(symmetric(eigenvalues)), torch.tensor([-4.0, 0.0, 1.0, 6.0])
    gaussians = (-((grid.double()[:, None] - eigenvalues) ** 2) / 2).exp() / math.sqrt(2 * math.pi)
    exact = gaussians.mean(1)
    curves = [spectral_density(operator, 25, 20, seed).smoothed(grid, 1.0) for seed in range(20)]
    z = torch.stack([(curve.value - exact) / curve.standard_error for curve in curves])
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean().sqrt() < 1.6
    alone = spectral_density(operator, 10, 1).smoothed(grid, 1.0)
    assert alone.standard_error.isnan().all()
    assert alone.value.isfinite().all()


def test_a_network_s_density_has_its_trace_and_its_edges():
    model, (x, y) = convolutional().eval(), batch()
    found = spectral_density(hessian(model, frozen(model, x, y, None)), steps=30, runs=8)
    exact = torch.linalg.eigvalsh(dense_cross_entropy(model, x, y))
    first = found.moment(1)
    assert abs(first.value - exact.mean().item()) < 3 * first.standard_error
    assert found.nodes.amax().item() == pytest.approx(exact[-1].item(), rel=1e-6)
    assert found.nodes.amin().item() == pytest.approx(exact[0].item(), rel=1e-6)


def test_bad_arguments_are_told():
    operator = operator_of(torch.eye(3))
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        spectral_density(operator, 0, 1)
    with pytest.raises(ValueError, match="runs: expected an integer >= 1, got 0"):
        spectral_density(operator, 1, 0)
    for width in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="width: expected a finite number > 0"):
            spectral_density(operator, 1, 1).smoothed(torch.zeros(1), width)
