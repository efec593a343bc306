"""Hessians by peers' code, against the dense Hessian of the same small network.

Every tool has the same network, batch and loss, in fp32, and may take about 100 products with the Hessian; what it is
held against is the matrix itself, in float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.training import script

SEEDS, PRODUCTS = 20, 99
Fact = dict[str, Any]


def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 267 weights, trained a little, and its batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = (x[:, :3] + 0.5 * torch.randn(64, 3, generator=generator)).argmax(dim=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, x, y


def dense(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(P, P), float64."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, given, (x.double(),)), y)

    found = torch.autograd.functional.hessian(loss, weights)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


def error(found: float, exact: float) -> float:
    """|found - exact| / |exact|."""
    return abs(found - exact) / abs(exact)


def over_seeds(trace: Callable[[int], tuple[float, int]], exact: float) -> Fact:
    """Errors of a random trace over `SEEDS` seeds, and the products it took: medians and the worst."""
    runs = [trace(seed) for seed in range(SEEDS)]
    errors, products = (torch.tensor(each, dtype=torch.float64) for each in zip(*runs, strict=True))
    errors = (errors - exact).abs() / abs(exact)
    return {
        "median error": float(errors.median()),
        "worst error": float(errors.max()),
        "fewest products": int(products.min()),
        "most products": int(products.max()),
    }


def pyhessian(source: Path | None) -> Fact:
    """`hessian` as its README calls it, with its defaults; `None` for the release that is installed."""
    if source is None:
        kind = importlib.import_module("pyhessian").hessian
    else:
        with script(source):
            kind = importlib.import_module("pyhessian").hessian
    model, x, y = subject()
    matrix = dense(model, x, y)
    of = kind(model, F.cross_entropy, data=(x, y), cuda=False)

    def trace(seed: int, **budget: float) -> tuple[float, int]:
        torch.manual_seed(seed)
        terms = of.trace(**budget)
        return sum(terms) / len(terms), len(terms)

    torch.manual_seed(0)
    largest = error(of.eigenvalues(top_n=1)[0][0], float(torch.linalg.eigvalsh(matrix)[-1]))
    return {
        "largest eigenvalue": largest,
        "trace": over_seeds(trace, float(matrix.trace())),
        "trace with the full budget": over_seeds(partial(trace, maxIter=PRODUCTS, tol=0.0), float(matrix.trace())),
        "density": _attempt(of),
    }


def _attempt(of: Any) -> str:
    """How its spectral density ends, in words."""
    torch.manual_seed(0)
    try:
        _, weights = of.density(iter=20)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    total = complex(sum(complex(weight) for weight in weights[0]))
    return f"runs; its weights sum to {total.real:.3f}"


def curvlinops(source: Path) -> Fact:
    """Its Hessian as a linear operator; SciPy's Lanczos, as its documentation has it; its Hutch++."""
    with script(source):
        found = importlib.import_module("curvlinops")
    from scipy.sparse.linalg import eigsh

    model, x, y = subject()
    matrix = dense(model, x, y)
    operator = found.HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(x, y)])
    start = torch.ones(len(matrix)).numpy()
    largest = eigsh(operator.to_scipy(), k=1, which="LA", v0=start, return_eigenvectors=False)[0]

    def trace(seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        return float(found.hutchpp_trace(operator, PRODUCTS)), PRODUCTS

    exact = float(torch.linalg.eigvalsh(matrix)[-1])
    return {"largest eigenvalue": error(float(largest), exact), "trace": over_seeds(trace, float(matrix.trace()))}


def saltflat() -> Fact:
    """Ours: Lanczos, Hutch++, and stochastic Lanczos quadrature."""
    from saltflat.landscape import hessian, spectral_density, top_eigenvalues, trace

    model, x, y = subject()
    matrix = dense(model, x, y)
    operator = hessian(model, lambda: F.cross_entropy(model(x), y), where=lambda name, p: p.requires_grad)
    largest = float(top_eigenvalues(operator, 1, steps=PRODUCTS).values[0])
    weights = spectral_density(operator, steps=20, runs=1).weights
    return {
        "largest eigenvalue": error(largest, float(torch.linalg.eigvalsh(matrix)[-1])),
        "trace": over_seeds(lambda seed: (trace(operator, PRODUCTS, seed=seed).value, PRODUCTS), float(matrix.trace())),
        "density": f"runs; its weights sum to {float(weights.sum()):.3f}",
    }
