"""Matrices as operators, and operators as matrices."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from saltflat.landscape.hessian import Operator
from saltflat.objectives import ce
from saltflat.weights import Where, default


def operator_of(matrix: Tensor, *sizes: int) -> Operator:
    """The matrix as an operator, with layers "0", "1", ... of these sizes, or one."""
    ends = torch.tensor(sizes or (len(matrix),)).cumsum(0).tolist()
    layers = {str(k): slice(start, end) for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False))}
    return Operator(lambda v: matrix @ v, layers, matrix.dtype, matrix.device)


def matrix_of(operator: Operator) -> Tensor:
    """Column by column."""
    units = torch.eye(operator.size, dtype=operator.dtype)
    return torch.stack([operator.product(unit) for unit in units], 1)


def symmetric(eigenvalues: Tensor) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return q @ eigenvalues.diag() @ q.T


def dense_hessian(model: nn.Module, loss, where: Where = default) -> Tensor:
    """(P, P), of loss(network) in the chosen weights, by torch's own Hessian of one flat vector; the model's copy is
    looked at.
    """
    model = copy.deepcopy(model)
    chosen = {name: p.detach() for name, p in model.named_parameters() if where(name, p)}

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in chosen.values()])
        weights = {name: part.view_as(w) for (name, w), part in zip(chosen.items(), parts, strict=True)}
        return loss(lambda x: functional_call(model, weights, (x,)))

    return torch.autograd.functional.hessian(of, torch.cat([w.flatten() for w in chosen.values()]))


def dense_cross_entropy(model: nn.Module, x: Tensor, y: Tensor, where: Where = default) -> Tensor:
    return dense_hessian(model, lambda network: ce(network(x), y).mean(), where)
