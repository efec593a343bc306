"""The toy of the WT-AWP paper: AWP with a large radius fails on a graph where its truncated and weighted forms do not.

200 points, uniform in the unit square; the class is x_0 < 0.5; a point's neighbours are its three nearest (itself one
of them), made symmetric; 10 % are known, 10 % validate, 80 % are asked. The network is A relu(A x W_0) W_1 with biases,
A = D^-1/2 N D^-1/2, 64 hidden units and dropout; Adam; what validates best in 200 epochs is kept.

Source: Wu, Bojchevski, Huang, AAAI 2023, arXiv 2212.04983, whose published run of it has AWP at 51 %, truncated AWP at
89 % and weighted AWP at 96 %.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saltflat import Layerwise, perturbed
from saltflat.neighbours.weighted import all_but_last
from saltflat.weights import default

GAMMA, SHARE, SEEDS = 3.0, 0.5, range(4)
FORMS = {  # which weights, and the share of the gradient at w + v
    "AWP": (lambda model: default, 1.0),
    "truncated": (all_but_last, 1.0),
    "weighted": (lambda model: default, SHARE),
    "both": (all_but_last, SHARE),
}


class GCN(nn.Module):
    def __init__(self, adjacency):
        super().__init__()
        self.first, self.last, self.adjacency = nn.Linear(2, 64), nn.Linear(64, 2), adjacency

    def forward(self, x):
        hidden = F.dropout(F.relu(self.adjacency @ self.first(x)), 0.5, self.training)
        return self.adjacency @ self.last(hidden)


def problem(seed):
    """x (200, 2), y (200,), A (200, 200), and the rows that are known, validate and are asked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(200, 2, generator=generator)
    nearest = torch.cdist(x, x).topk(3, largest=False).indices
    adjacency = torch.zeros(200, 200).scatter(1, nearest, 1.0)
    adjacency = torch.maximum(adjacency, adjacency.T)
    scale = adjacency.sum(1).rsqrt()
    return (
        x,
        (x[:, 0] < 0.5).long(),
        scale[:, None] * adjacency * scale,
        torch.randperm(200, generator=generator).split([20, 20, 160]),
    )


def accuracy(form, seed):
    x, y, adjacency, (known, validating, asked) = problem(seed)
    torch.manual_seed(seed)
    model = GCN(adjacency)
    choose, share = FORMS[form]
    where, optimizer = choose(model), torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    best, found = (-1.0, 0.0), 0.0
    for _ in range(200):
        model.train()
        loss = lambda: F.cross_entropy(model(x)[known], y[known])
        optimizer.zero_grad()
        with perturbed(model, loss, Layerwise(GAMMA), where=where):
            (share * loss()).backward()
        if share < 1:
            ((1 - share) * loss()).backward()
        optimizer.step()
        with torch.no_grad():
            logits = model.eval()(x)
        right = (logits.argmax(1) == y).float()
        score = (right[validating].mean().item(), -F.cross_entropy(logits[validating], y[validating]).item())
        if score > best:
            best, found = score, right[asked].mean().item()
    return found


@pytest.mark.slow
def test_truncated_and_weighted_AWP_learn_where_AWP_does_not():
    """Means over four seeds: AWP 0.594, truncated 0.931, weighted 0.956, both 0.975."""
    means = {form: sum(accuracy(form, seed) for seed in SEEDS) / len(SEEDS) for form in FORMS}
    assert means["AWP"] < 0.8, means
    assert min(means["truncated"], means["weighted"], means["both"]) > 0.8, means
