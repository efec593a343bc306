import weakref

import pytest
import torch
import torch.nn.functional as F
from matrices import dense_cross_entropy, dense_hessian, matrix_of
from networks import batch, convolutional, equal_states, state
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saltflat import L2, PGD, Linf
from saltflat.inputs import zero
from saltflat.landscape.hessian import as_weights, hessian, reattacked_hessian
from saltflat.landscape.robust import afresh, frozen, total
from saltflat.objectives import ce
from saltflat.weights import displaced

PGD_3 = PGD(Linf(0.05), 0.02, 3)


def everything(name, parameter):
    return True


class Attention(nn.Module):
    """Two heads over 5 tokens of width 4; as a module of torch's, or as its function with fused kernels."""

    def __init__(self, module: bool):
        super().__init__()
        self.module = nn.MultiheadAttention(4, 2, batch_first=True) if module else None
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        if self.module is not None:
            mixed, _ = self.module(x, x, x, need_weights=False)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(mixed.mean(1))


def close(found, expected, relative=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_products_of_a_batch_normalised_network_are_those_of_its_dense_hessian(mode):
    model = convolutional()
    model(batch()[0])  # running statistics that are not 0 and 1
    model.train(mode == "eval")  # the other one
    x, y = batch()
    losses = frozen(model, x, y, None, mode=mode)
    found = matrix_of(hessian(model, losses, where=everything))
    model.train(mode == "train")
    close(found, dense_cross_entropy(model, x, y, everything))
    close(found, found.T)


def test_shares_add_up():
    model, (x, y) = convolutional().eval(), batch(7)
    operator = hessian(model, frozen(model, x, y, None, batch_size=3))
    assert operator.size == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert list(operator.layers) == [name for name, p in model.named_parameters() if p.ndim > 1]
    v = torch.randn(operator.size, dtype=torch.float64)
    close(operator.product(v), dense_cross_entropy(model, x, y) @ v)


def test_frozen_examples_stay_where_they_were_attacked():
    model, (x, y) = convolutional().eval(), batch()
    x_adv = PGD(Linf(0.05), 0.02, 3, zero)(lambda x: ce(model(x), y), x)
    operator = hessian(model, frozen(model, x, y, PGD(Linf(0.05), 0.02, 3, zero)))
    v = torch.randn(operator.size, dtype=torch.float64)
    close(operator.product(v), dense_cross_entropy(model, x_adv, y) @ v)


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_can_be_differentiated_twice(module, training):
    model = Attention(module).double().train(training)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.arange(6) % 3
    with sdpa_kernel(SDPBackend.MATH):  # the oracle's sake: `hessian` chooses it by itself
        expected = dense_cross_entropy(model, x, y)
    close(matrix_of(hessian(model, lambda: ce(model(x), y).mean())), expected)


def test_softmax_regression_s_hessian_is_its_closed_form():
    """mean (diag p - p p^T) (x) x x^T, for weights (C, d) row by row."""
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    p = model(x).softmax(1).detach()
    expected = sum(
        torch.kron(p_i.diag() - p_i.outer(p_i), x_i.outer(x_i)) for p_i, x_i in zip(p, x, strict=True)
    ) / len(x)
    close(matrix_of(hessian(model, lambda: ce(model(x), y).mean())), expected, 1e-13)


def test_linear_regression_s_hessian_is_its_closed_form():
    """(2 / n) X^T X, whatever the weights and the targets."""
    model, x, t = nn.Linear(4, 1, bias=False).double(), *torch.randn(2, 9, 4, dtype=torch.float64)
    operator = hessian(model, lambda: (model(x) - t[:, :1]).square().mean())
    close(matrix_of(operator), 2 / 9 * x.T @ x, 1e-13)


def test_weights_that_the_loss_does_not_reach_or_bend_have_zero_rows():
    model = nn.ModuleDict({"bent": nn.Linear(2, 1), "straight": nn.Linear(2, 1), "unreached": nn.Linear(2, 1)}).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    operator = hessian(model, [lambda: model["bent"](x).square().sum(), lambda: model["straight"](x).sum()])
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[:2, :2] = 2 * x.T @ x
    close(matrix_of(operator), expected, 1e-13)


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    found = matrix_of(hessian(model, lambda: ce(model(x), y).mean()))
    assert found.shape == (9, 9)
    close(found, dense_cross_entropy(model, x, y))


class Token:
    pass


class Holding(torch.autograd.Function):
    """The identity; its node in the graph holds a token."""

    @staticmethod
    def forward(ctx, value, token):
        ctx.token = token
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_one_graph_is_alive_at_a_time():
    model, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=torch.float64)
    graphs: list[weakref.ref] = []

    def loss():
        assert not any(graph() for graph in graphs)
        token = Token()
        graphs.append(weakref.ref(token))
        return Holding.apply(model(x), token).square().sum()

    graph = loss()
    assert graphs.pop()() is not None
    del graph
    hessian(model, [loss] * 3).product(torch.ones(3, dtype=torch.float64))
    assert len(graphs) == 3


def test_precision_and_gradient_mode_of_the_surroundings_do_not_matter():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].double()
    x, y = torch.randn(6, 3), torch.arange(6) % 3
    operator = hessian(model, lambda: ce(model[2](model[1](model[0](x)).double()), y).mean())
    with torch.no_grad():
        found = matrix_of(operator)
    assert found.dtype == operator.dtype == torch.float64  # of both weights
    close(found, dense_cross_entropy(model.double(), x.double(), y), 1e-5)


@pytest.mark.parametrize("of", [hessian, reattacked_hessian])
def test_the_model_is_left_as_it_was(of):
    model, (x, y) = convolutional(), batch()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    losses = (frozen if of is hessian else afresh)(model, x, y, PGD_3, mode="train")
    before, modes = state(model), [module.training for module in model.modules()]
    grads, tensors = [p.grad.clone() for p in model.parameters()], [p.grad for p in model.parameters()]
    operator = of(model, losses)
    operator.product(torch.randn(operator.size, dtype=torch.float64))
    assert equal_states(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is tensor for p, tensor in zip(model.parameters(), tensors, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


def test_a_vector_as_weights_goes_back_to_where_it_came_from():
    model, (x, y) = convolutional().eval(), batch()
    losses = frozen(model, x, y, None)
    operator = hessian(model, losses)
    v = torch.randn(operator.size, dtype=torch.float64)
    d = as_weights(model, operator, v)
    assert torch.equal(torch.cat([part.flatten() for part in d.values()]), v)
    h, values = 1e-4, []
    for alpha in (-1, 0, 1):
        with displaced(model, {name: alpha * h * part for name, part in d.items()}):
            values.append(total(losses))
    second = (values[0] - 2 * values[1] + values[2]) / h**2
    assert second == pytest.approx((v @ operator.product(v)).item(), rel=1e-4)


# Re-attacked


def test_differences_of_a_smooth_loss_are_its_hessian():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    losses = frozen(model, x, y, None, batch_size=4)
    expected = matrix_of(hessian(model, losses))
    close(matrix_of(reattacked_hessian(model, losses)), expected, 1e-8)
    # the error is of second order in the step
    errors = [(matrix_of(reattacked_hessian(model, losses, step=step)) - expected).abs().max() for step in (1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


def test_differences_do_not_depend_on_a_vector_s_length():
    model, (x, y) = convolutional().eval(), batch()
    operator = reattacked_hessian(model, frozen(model, x, y, None), where=lambda name, p: name == "6.weight")
    v = torch.randn(operator.size, dtype=torch.float64)
    for scale in (1e-9, 1e9):
        close(operator.product(scale * v) / scale, operator.product(v), 1e-7)
    assert torch.equal(operator.product(torch.zeros_like(v)), torch.zeros_like(v))


def test_differences_can_be_taken_around_zero_weights():
    model = nn.Linear(3, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    losses = frozen(model, x, y, None)
    close(matrix_of(reattacked_hessian(model, losses)), matrix_of(hessian(model, losses)), 1e-8)


class Logistic(nn.Module):
    """Two classes with logits (0, <w, x>)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 5, dtype=torch.float64))

    def forward(self, x):
        z = x @ self.weight[0]
        return torch.stack([torch.zeros_like(z), z], 1)


def logistic():
    model, y = Logistic(), torch.arange(20) % 2
    return model, torch.randn(20, 5, dtype=torch.float64), y, model.weight.detach()[0], (2 * y - 1).double()


def test_in_linf_a_linear_model_s_frozen_hessian_is_that_of_rho():
    model, x, y, w, s = logistic()
    attack = PGD(Linf(0.3, box=None), 0.3, 1, zero)
    by_attack = matrix_of(reattacked_hessian(model, afresh(model, x, y, attack)))
    close(by_attack, matrix_of(hessian(model, frozen(model, x, y, attack))), 1e-5)
    z = s * (x @ w) - 0.3 * w.abs().sum()
    slopes = s[:, None] * x - 0.3 * w.sign()
    close(by_attack, (slopes.T * (z.sigmoid() * (-z).sigmoid())) @ slopes / len(x), 1e-5)


def test_in_l2_a_linear_model_s_frozen_hessian_lacks_what_moves_the_examples():
    """mean sigma(-z) eps (I - what what^T) / ‖w‖, from rho(w) = mean softplus(-(s <w, x> - eps ‖w‖))."""
    model, x, y, w, s = logistic()
    attack = PGD(L2(0.3, box=None), 0.3, 1, zero)
    by_attack = matrix_of(reattacked_hessian(model, afresh(model, x, y, attack)))
    still = matrix_of(hessian(model, frozen(model, x, y, attack)))
    z, unit = s * (x @ w) - 0.3 * w.norm(), w / w.norm()
    lacking = (-z).sigmoid().mean() * 0.3 * (torch.eye(5, dtype=torch.float64) - unit.outer(unit)) / w.norm()
    close(by_attack - still, lacking, 1e-5)

    def rho(network):
        v = network(torch.eye(5, dtype=torch.float64))[:, 1]
        return F.softplus(-(s * (x @ v) - 0.3 * v.norm())).mean()

    close(by_attack, dense_hessian(model, rho), 1e-5)


@pytest.mark.parametrize("of", [hessian, reattacked_hessian])
def test_bad_arguments_are_told(of):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="loss: expected a closure"):
        of(model, 3.0)
    with pytest.raises(ValueError, match="where: chose none"):
        of(model, lambda: model(torch.ones(1, 2)).sum(), where=lambda name, p: False)
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"where: expected weights that are trained, got '1\.weight'"):
        of(model, lambda: model(torch.ones(1, 2)).sum(), where=lambda name, p: p.ndim > 1)
    for step in (0.0, -1.0, float("nan"), float("inf")) if of is reattacked_hessian else ():
        with pytest.raises(ValueError, match="step: expected a finite number > 0"):
            of(model, lambda: model(torch.ones(1, 2)).sum(), step=step)
