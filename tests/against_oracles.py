"""What tests of the neighbours against their oracles share."""

import torch

from saltflat.weights import trained


def close(found, expected, atol=1e-15):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].detach(), tensor.detach(), rtol=1e-12, atol=atol)


def identical(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(model, where=trained):
    return {name: p.detach().clone() for name, p in model.named_parameters() if where(name, p)}


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def normals(w, seed=3):
    """The draws that one generator gives, tensor by tensor."""
    draws = generator(seed)
    return {name: torch.randn(part.shape, dtype=part.dtype, generator=draws) for name, part in w.items()}
