"""WT-AWP on graphs: the gradient is taken at w and at w + v, and the last layer is not perturbed.

    g = (1 - share) grad L(w) + share grad L(w + v),    v in Layerwise(gamma), but for the last layer

A predicate chooses what is perturbed, since names tell little: GATConv's `att_src` and `att_dst` are weights, too, of
three dimensions. Source: Wu, Bojchevski, Huang, AAAI 2023, arXiv 2212.04983.

python examples/gnn.py
"""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch_geometric.datasets import KarateClub  # type: ignore[import-untyped]
from torch_geometric.nn import APPNP, GATConv, GCNConv, MessagePassing, Sequential  # type: ignore[import-untyped]

from saltflat import Layerwise, perturbed
from saltflat.neighbours.weighted import all_but_last
from saltflat.weights import Where


def networks(d: int, k: int, dropout: float = 0.5) -> dict[str, nn.Module]:
    """Of each kind one, (x (N, d), edges (2, E)) -> logits (N, k)."""

    def chain(first: nn.Module, last: nn.Module, *propagation: nn.Module) -> nn.Module:
        layers = [first, nn.ReLU(), nn.Dropout(dropout), last, *propagation]
        takes = ["x, edges -> x" if isinstance(layer, MessagePassing) else "x -> x" for layer in layers]
        return Sequential("x, edges", list(zip(layers, takes, strict=True)))  # type: ignore[no-any-return]

    return {
        "GCN": chain(GCNConv(d, 16), GCNConv(16, k)),
        "GAT": chain(GATConv(d, 4, heads=4), GATConv(16, k)),
        "APPNP": chain(nn.Linear(d, 16), nn.Linear(16, k), APPNP(K=10, alpha=0.1)),
    }


def step(model: nn.Module, graph: Any, optimizer: Optimizer, where: Where, gamma: float, share: float) -> None:
    known = graph.train_mask
    loss = lambda: nn.functional.cross_entropy(model(graph.x, graph.edge_index)[known], graph.y[known])
    optimizer.zero_grad()
    with perturbed(model, loss, Layerwise(gamma), where=where):
        (share * loss()).backward()  # type: ignore[no-untyped-call]
    ((1 - share) * loss()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


if __name__ == "__main__":
    graph = KarateClub()[0]
    torch.manual_seed(0)
    for name, model in networks(graph.num_features, 4).items():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
        for _ in range(200):
            step(model, graph, optimizer, all_but_last(model), gamma=0.5, share=0.5)
        right = model.eval()(graph.x, graph.edge_index).argmax(1) == graph.y
        print(f"{name}: the group of {right[~graph.train_mask].float().mean():.1%} of the other members found")
