"""`examples/text_embeddings.py`: attacks on embedded tokens against their formulas, and with the weights against a loop
that does all by hand.
"""

import copy
import inspect
import re
import statistics

import pytest
import torch
from networks import equal_states, state
from transformers import BertConfig, BertForSequenceClassification

from examples.text_embeddings import FGM, K_PGD, lines, losses, step


def bert():
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config).double().eval()


def batch(n=5, length=9):
    ids = torch.randint(1, 20, (n, length))
    for row, words in enumerate([9, 7, 4, 1, 8][:n]):
        ids[row, words:] = 0
    return ids, torch.arange(n) % 3, torch.zeros(n, length, 32, dtype=torch.float64)


def by_hand(model, ids, y, u):
    """Every text by itself, without its padding: its loss, and the gradient with respect to its embedded words."""
    values, gradients = [], []
    for row, label, moved in zip(ids, y, u, strict=True):
        words = row[row > 0]
        embedded = (model.bert.embeddings.word_embeddings.weight[words] + moved[: len(words)]).detach().requires_grad_()
        value = -model(inputs_embeds=embedded[None]).logits.log_softmax(1)[0, label]
        gradients.append(torch.zeros_like(moved))
        (gradients[-1][: len(words)],) = torch.autograd.grad(value, embedded)
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


def length(u):
    return u.square().sum((1, 2), keepdim=True).sqrt()


def test_lines_have_a_number_for_every_word_and_none_is_learnt_and_held_out():
    ids, y, words = lines()
    assert ids.shape == (len(y), 16)
    assert set(y.tolist()) == {0, 1}
    assert len(ids.unique(dim=0)) == len(ids)
    assert ((ids[:, 1:] == 0) | (ids[:, :-1] > 0)).all()  # padding stands at the end
    assert (ids[:, 0] > 0).all()
    told = [inspect.getdoc(member) or "" for _, member in inspect.getmembers(statistics)]
    source = [line for text in (inspect.getsource(statistics), *told) for line in text.splitlines()]
    different = {word for line in source for word in re.findall(r"\w+|\S", line)[:16]}
    assert words - 1 == len(different) == len(ids.unique()) - 1 == ids.max()


def test_losses_are_those_of_each_text_without_its_padding():
    (ids, y, u), model = batch(), bert()
    u = torch.randn_like(u)
    assert torch.allclose(losses(model, ids, y, u), by_hand(model, ids, y, u)[0], rtol=0, atol=1e-12)


def test_FGM_is_the_normalised_gradient_of_each_text():
    (ids, y, u), model = batch(), bert()
    g = by_hand(model, ids, y, u)[1]
    found = FGM(lambda u: losses(model, ids, y, u), u)
    assert (found - FGM.ball.radius * g / length(g)).abs().max() < 1e-12
    assert not found[ids == 0].any()


def test_PGD_climbs_and_stays_in_the_ball_of_each_text():
    (ids, y, u), model = batch(), bert()
    found, u = K_PGD(lambda u: losses(model, ids, y, u), u), u.clone()
    for _ in range(K_PGD.steps):
        g = by_hand(model, ids, y, u)[1]
        u = u + K_PGD.step_size * g / length(g)
        u = u * (K_PGD.ball.radius / length(u)).clamp(max=1)
    assert (found - u).abs().max() < 1e-12
    assert length(found).max() <= K_PGD.ball.radius + 1e-15


@pytest.mark.parametrize("attack", [FGM, K_PGD], ids=["FGM", "PGD"])
def test_a_step_is_that_of_a_loop_by_hand(attack):
    """Three steps: u, then v_l = gamma ‖w_l‖ g_l / ‖g_l‖ at u, then g = grad L(w + v; u), and w - lr g."""
    model = bert()
    before, expected = state(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        ids, y, u = batch()
        step(model, ids, y, attack, optimizer)
        for _ in range(attack.steps):
            g = by_hand(expected, ids, y, u)[1]
            u = u + attack.step_size * g / length(g)
            u = u * (attack.ball.radius / length(u)).clamp(max=1)
        proxy = copy.deepcopy(expected)
        losses(expected, ids, y, u).mean().backward()
        with torch.no_grad():
            for p, w in zip(proxy.parameters(), expected.parameters(), strict=True):
                if w.ndim > 1:
                    p += 0.001 * w.norm() * w.grad / w.grad.norm()
        losses(proxy, ids, y, u).mean().backward()
        with torch.no_grad():
            for p, w in zip(proxy.parameters(), expected.parameters(), strict=True):
                w -= 0.1 * p.grad
                w.grad = None
    assert not equal_states(state(model), before)
    for name, w in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), w.double(), rtol=0, atol=1e-13), name


def test_a_step_leaves_the_mode_that_it_found():
    model = bert().train()
    ids, y, _ = batch()
    step(model, ids, y, FGM, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(module.training for module in model.modules())
