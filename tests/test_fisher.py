import math

import pytest
import torch
from matrices import dense_cross_entropy
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat.landscape.fisher import fisher_trace, squared_gradients
from saltflat.objectives import ce


def softmax_regression():
    return nn.Linear(4, 3, bias=False).double(), torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % 3


def error_of_mean(draws):
    return (draws.std() / math.sqrt(len(draws))).item()


def one_by_one(model, x, y, where=lambda name, p: p.ndim > 1):
    """‖d CE_i / dw‖^2 by a backward for every example."""
    weights = [p for name, p in model.named_parameters() if where(name, p)]
    slopes = [torch.autograd.grad(ce(model(x[i : i + 1]), y[i : i + 1])[0], weights) for i in range(len(x))]
    return torch.stack([sum(g.square().sum() for g in example) for example in slopes])


def test_softmax_regression_s_fisher_trace_is_its_closed_form():
    """E ‖x‖^2 sum_k p_k (1 - p_k)."""
    model, x, _ = softmax_regression()
    p = model(x).softmax(1).detach()
    per_example = x.square().sum(1) * (p * (1 - p)).sum(1)
    found = fisher_trace(model, x, chunk_size=4)
    assert found.value == pytest.approx(per_example.mean().item(), rel=1e-12)
    assert found.standard_error == pytest.approx(error_of_mean(per_example), rel=1e-12)
    assert found.draws == 11


def test_softmax_regression_s_squared_gradients_are_their_closed_form():
    """E ‖x‖^2 ‖p - e_y‖^2."""
    model, x, y = softmax_regression()
    p, labels = model(x).softmax(1).detach(), nn.functional.one_hot(y, 3)
    per_example = x.square().sum(1) * (p - labels).square().sum(1)
    found = squared_gradients(model, x, y, chunk_size=4)
    assert found.value == pytest.approx(per_example.mean().item(), rel=1e-12)
    assert found.standard_error == pytest.approx(error_of_mean(per_example), rel=1e-12)
    soft = squared_gradients(model, x, labels.double())
    assert soft.value == pytest.approx(found.value, rel=1e-12)


def test_softmax_regression_s_fisher_trace_is_that_of_its_hessian():
    """Logits linear in w: the Hessian does not depend on the labels and is the Fisher matrix."""
    model, x, y = softmax_regression()
    assert fisher_trace(model, x).value == pytest.approx(dense_cross_entropy(model, x, y).trace().item(), rel=1e-12)


def test_labels_drawn_from_the_model_make_squared_gradients_the_fisher_trace():
    model, x, _ = softmax_regression()
    drawn = torch.distributions.Categorical(logits=model(x).detach()).sample((3000,))
    found = squared_gradients(model, x.repeat(3000, 1), drawn.flatten(), chunk_size=40000)
    of_labels = torch.stack([one_by_one(model, x, y) for y in drawn[:50]]).mean(1)
    error = of_labels.std().item() / math.sqrt(3000)  # of the labels alone
    assert abs(found.value - fisher_trace(model, x).value) < 4 * error


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_a_convolutional_network_s_are_those_of_one_backward_an_example(chunk_size):
    model, (x, y) = convolutional(), batch()
    model(x)  # running statistics that are not 0 and 1
    model.eval()
    p = model(x).softmax(1).detach()
    by_class = torch.stack([one_by_one(model, x, torch.full((8,), k)) for k in range(3)], 1)
    model.train()  # eval mode is theirs to choose
    fisher = fisher_trace(model, x, chunk_size=chunk_size)
    squares = squared_gradients(model, x, y, chunk_size=chunk_size)
    assert fisher.value == pytest.approx((p * by_class).sum(1).mean().item(), rel=1e-11)
    assert squares.value == pytest.approx(by_class[torch.arange(8), y].mean().item(), rel=1e-11)


def test_attention_can_be_mapped_over_examples():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    model, x, y = Attention().double(), torch.randn(5, 6, 4, dtype=torch.float64), torch.arange(5) % 3
    assert squared_gradients(model, x, y).value == pytest.approx(one_by_one(model, x, y).mean().item(), rel=1e-11)


def test_where_chooses_the_weights():
    model, (x, y) = convolutional().eval(), batch()
    for where in (lambda name, p: True, lambda name, p: name == "6.bias"):
        expected = one_by_one(model, x, y, where).mean().item()
        assert squared_gradients(model, x, y, where=where).value == pytest.approx(expected, rel=1e-11)


def test_the_model_is_left_as_it_was():
    model, (x, y) = convolutional(), batch()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before, modes, grads = state(model), [m.training for m in model.modules()], [p.grad for p in model.parameters()]
    contents = [grad.clone() for grad in grads]
    fisher_trace(model, x)
    squared_gradients(model, x, y)
    assert equal_states(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(grad, content) for grad, content in zip(grads, contents, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_bad_arguments_are_told():
    model, x, y = softmax_regression()
    with pytest.raises(ValueError, match="chunk_size: expected an integer >= 1, got 0"):
        fisher_trace(model, x, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size: expected an integer >= 1, got 0"):
        squared_gradients(model, x, y, chunk_size=0)
    with pytest.raises(ValueError, match="where: chose none"):
        fisher_trace(model, x, where=lambda name, p: False)
