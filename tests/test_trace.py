import math

import pytest
import torch
from matrices import dense_cross_entropy, operator_of, symmetric
from memory import Memory
from networks import batch, convolutional

from saltflat.landscape.hessian import Operator, hessian
from saltflat.landscape.lanczos import normal
from saltflat.landscape.robust import frozen
from saltflat.landscape.trace import layer_traces, signs, trace
from saltflat.random import seeded

SIZES = (10, 25, 5)


def indefinite():
    return symmetric(torch.cat([torch.tensor([30.0, 12.0, -8.0]), torch.randn(sum(SIZES) - 3)]).double())


def standardised(found, exact):
    return (found.value - exact) / found.standard_error


def check_calibrated(deviations):
    """Within 3 of their own standard errors, and neither always far inside."""
    z = torch.tensor(deviations)
    assert z.abs().max() < 3
    assert 0.5 < z.square().mean().sqrt() < 1.6


def test_estimates_are_within_their_standard_errors():
    matrix = indefinite()
    exact = matrix.trace().item()
    check_calibrated([standardised(trace(operator_of(matrix), 60, seed), exact) for seed in range(20)])


def test_layers_are_within_their_standard_errors():
    matrix = indefinite()
    found = [layer_traces(operator_of(matrix, *SIZES), 40, seed) for seed in range(20)]
    for k, exact in enumerate(part.sum().item() for part in matrix.diag().split(SIZES)):
        check_calibrated([standardised(layers[str(k)], exact) for layers in found])
    sums = torch.tensor([sum(layer.value for layer in layers.values()) for layers in found], dtype=torch.float64)
    assert abs(sums.mean() - matrix.trace()) < 3 * sums.std() / math.sqrt(20)


def test_the_error_of_hutchinson_is_its_closed_form():
    """Var z^T A z = 2 (‖A‖_F^2 - sum_i a_ii^2) with random signs; between layers the covariance is ‖A_kl‖_F^2."""
    matrix = indefinite()
    (found,) = layer_traces(operator_of(matrix), 4000).values()
    expected = 2 * (matrix.square().sum() - matrix.diag().square().sum())
    assert found.standard_error == pytest.approx((expected / 4000).sqrt().item(), rel=0.1)

    layers = operator_of(matrix, *SIZES).layers
    z = torch.stack([signs(operator_of(matrix), seeded(seed)) for seed in range(4000)])
    draws = torch.stack([((z @ matrix) * z)[:, rows].sum(1) for rows in layers.values()])
    a, b = layers["0"], layers["1"]
    assert draws.cov()[0, 1].item() == pytest.approx(matrix[a, b].square().sum().item(), rel=0.15)


def test_a_diagonal_matrix_is_exact_after_one_probe():
    d = torch.randn(sum(SIZES), dtype=torch.float64)
    found = layer_traces(operator_of(d.diag(), *SIZES), 1)
    for k, part in enumerate(d.split(SIZES)):
        assert found[str(k)].value == pytest.approx(part.sum().item(), rel=1e-13)
        assert math.isnan(found[str(k)].standard_error)
    assert all(layer.standard_error < 1e-14 for layer in layer_traces(operator_of(d.diag(), *SIZES), 5).values())


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_hutch_plus_plus_is_exact_for_low_ranks(rank):
    matrix = symmetric(torch.cat([torch.randn(rank), torch.zeros(40 - rank)]).double())
    found = trace(operator_of(matrix), 12)
    assert found.value == pytest.approx(matrix.trace().item(), abs=1e-12)
    assert found.standard_error < 1e-12
    assert found.draws == 4


def test_hutch_plus_plus_is_exact_for_small_matrices():
    matrix = symmetric(torch.randn(3, dtype=torch.float64))
    found = trace(operator_of(matrix), 30)
    assert found.value == pytest.approx(matrix.trace().item(), abs=1e-12)
    assert found.standard_error < 1e-12


def test_hutch_plus_plus_beats_hutchinson_where_few_eigenvalues_are_large():
    matrix = symmetric(torch.arange(1, 101).double().pow(-2))
    errors = {
        name: torch.tensor([of(seed).value - matrix.trace().item() for seed in range(20)]).square().mean().sqrt()
        for name, of in (
            ("hutch++", lambda seed: trace(operator_of(matrix), 30, seed)),
            ("hutchinson", lambda seed: layer_traces(operator_of(matrix), 30, seed)["0"]),
        )
    }
    assert errors["hutch++"] < errors["hutchinson"] / 5


def test_products_are_those_that_were_paid_for():
    matrix, calls = indefinite(), []
    operator = operator_of(matrix, *SIZES)
    counting = type(operator)(
        lambda v: (calls.append(1), matrix @ v)[1], operator.layers, operator.dtype, operator.device
    )
    for products in (3, 6, 7, 8):
        calls.clear()
        trace(counting, products)
        assert len(calls) == products
    calls.clear()
    assert layer_traces(counting, 5).keys() == {"0", "1", "2"}
    assert len(calls) == 5


@pytest.mark.parametrize("products", range(3, 10))
def test_the_error_is_a_number_from_four_products_on(products):
    found = trace(operator_of(indefinite()), products)
    assert found.draws == products - 2 * (products // 3)
    assert math.isnan(found.standard_error) == (products == 3)
    assert math.isfinite(found.value)


def test_the_sketch_is_let_go_of_when_its_basis_is_known():
    """Twelve vectors are drawn, and twelve span their space: those are all that is held while they are used."""
    n, held = 20_000, []
    d = torch.rand(n, dtype=torch.float64)
    operator = Operator(lambda v: (held.append(memory.held()), d * v)[1], {"w": slice(0, n)}, d.dtype, d.device)
    with Memory(n) as memory:
        trace(operator, 36)
    assert len(held) == 36
    assert max(held[12:]) <= 12 + 5
    assert memory.peak <= 2 * 12 + 5


def test_a_network_s_layers_have_the_traces_of_the_dense_blocks():
    model, (x, y) = convolutional().eval(), batch()
    operator, dense = hessian(model, frozen(model, x, y, None, batch_size=5)), dense_cross_entropy(model, x, y)
    found = [layer_traces(operator, 100, seed) for seed in range(20)]
    for name, rows in operator.layers.items():
        deviations = [standardised(layers[name], dense[rows, rows].trace().item()) for layers in found]
        assert max(abs(z) for z in deviations) < 3
    assert abs(standardised(trace(operator, 60), dense.trace().item())) < 3


def test_draws_are_made_on_the_cpu_in_any_dtype():
    single, double = (operator_of(torch.eye(7, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert torch.equal(signs(single, seeded(3)).double(), signs(double, seeded(3)))
    assert torch.equal(normal(single, seeded(3)), normal(double, seeded(3)).float())
    assert signs(double, seeded(0)).square().eq(1).all()
    torch.manual_seed(1)
    one = trace(double, 6)
    torch.manual_seed(2)
    assert trace(double, 6) == one  # the global generator has no part in it


def test_bad_arguments_are_told():
    operator = operator_of(torch.eye(3))
    with pytest.raises(ValueError, match="products: expected an integer >= 3, got 2"):
        trace(operator, 2)
    with pytest.raises(ValueError, match="probes: expected an integer >= 1, got 0"):
        layer_traces(operator, 0)
