"""`examples/gnn.py`: WT-AWP on three kinds of graph networks, against a proxy that is perturbed instead of them."""

import copy
import warnings

import pytest
import torch
from networks import equal_states, state
from torch.nn import functional as F

from saltflat import Layerwise, perturbed
from saltflat.neighbours.weighted import all_but_last
from saltflat.weights import default

with warnings.catch_warnings():
    # torch_geometric scripts a class of its own when it is imported.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
    from torch_geometric.datasets import KarateClub

    from examples.gnn import networks, step

KINDS = ["GCN", "GAT", "APPNP"]
TRUNCATED = {
    "GCN": ["module_0.lin.weight"],
    "GAT": ["module_0.att_src", "module_0.att_dst", "module_0.lin.weight"],
    "APPNP": ["module_0.weight"],
}


def club():
    graph = KarateClub()[0]
    graph.x = graph.x.double()
    return graph


def network(kind):
    torch.manual_seed(1)
    return networks(34, 4, dropout=0.0)[kind].double()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=5e-4)


def loss(model, graph):
    logits = model(graph.x, graph.edge_index)
    return F.cross_entropy(logits[graph.train_mask], graph.y[graph.train_mask])


def stepped(kind, share, where, steps=5, gamma=0.5):
    model = network(kind)
    optimizer, graph = sgd(model), club()
    for _ in range(steps):
        step(model, graph, optimizer, where(model), gamma, share)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicate_leaves_out_the_whole_last_layer(kind):
    model = network(kind)
    where = all_but_last(model)
    assert [name for name, parameter in model.named_parameters() if where(name, parameter)] == TRUNCATED[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_weights_are_those_of_a_proxy_that_is_perturbed(kind, share):
    model, found, graph = network(kind), stepped(kind, share, all_but_last), club()
    optimizer = sgd(model)
    for _ in range(5):
        proxy = copy.deepcopy(model)
        chosen = [proxy.get_parameter(name) for name in TRUNCATED[kind]]
        gradients = torch.autograd.grad(loss(proxy, graph), chosen)
        with torch.no_grad():
            for p, g in zip(chosen, gradients, strict=True):
                p += 0.5 * p.norm() * g / g.norm()
        here = torch.autograd.grad(loss(model, graph), list(model.parameters()))
        there = torch.autograd.grad(loss(proxy, graph), list(proxy.parameters()))
        for p, g, h in zip(model.parameters(), here, there, strict=True):
            p.grad = (1 - share) * g + share * h
        optimizer.step()
    assert not equal_states(state(found), state(network(kind)))
    for name, w in model.state_dict().items():
        assert torch.allclose(found.state_dict()[name], w, rtol=0, atol=1e-13), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_one_in_all_layers_is_AWP_to_the_bit(kind):
    model, graph = network(kind), club()
    optimizer = sgd(model)
    for _ in range(5):
        optimizer.zero_grad()
        with perturbed(model, lambda: loss(model, graph), Layerwise(0.5)):
            loss(model, graph).backward()
        optimizer.step()
    assert equal_states(state(model), state(stepped(kind, 1.0, lambda model: default)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_zero_is_plain_training_to_the_bit(kind):
    model, graph = network(kind), club()
    optimizer = sgd(model)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, graph).backward()
        optimizer.step()
    assert equal_states(state(model), state(stepped(kind, 0.0, all_but_last)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_network_trains(kind):
    """With the example's dropout: the loss on the labelled nodes falls."""
    model, graph = networks(34, 4)[kind].double(), club()
    before = loss(model.eval(), graph)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(50):
        step(model, graph, optimizer, all_but_last(model), gamma=0.5, share=0.5)
    assert loss(model.eval(), graph) < 0.7 * before
