"""Float64 models whose flatness is known in closed form."""

import torch
from networks import equal_states, state
from torch import nn

from saltflat import PGD, Linf
from saltflat.inputs import zero
from saltflat.landscape import afresh

SHAPES = {"a": (3, 2), "b": (2, 4)}
P = 14


class Quadratic(nn.Module):
    """rho(w) = <slope, w - w_0> + (w - w_0)^T H (w - w_0) / 2 + height, w the tensors a and b in a row, that start at
    w_0; in two shares, each with an H of its own.
    """

    def __init__(self, seed=0, slope=0.0, height=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
        self.a, self.b = (nn.Parameter(randn(*shape)) for shape in SHAPES.values())
        self.centre, self.height = self.flat().detach().clone(), height
        self.slope = slope * randn(P)
        roots = randn(2, P, P)
        self.parts = roots @ roots.mT / P

    @property
    def hessian(self):
        return self.parts.sum(0)

    def block_diagonal(self):
        """Without the part of H that joins a and b."""
        mask = torch.block_diag(torch.ones(6, 6), torch.ones(8, 8)).double()
        self.parts = self.parts * mask
        return self

    def diagonal(self):
        self.parts = self.parts * torch.eye(P, dtype=torch.float64)
        return self

    def flat(self):
        return torch.cat([self.a.flatten(), self.b.flatten()])

    @property
    def losses(self):
        def share(part):
            v = self.flat() - self.centre
            return (self.slope @ v + v @ part @ v + self.height) / 2

        return [lambda part=part: share(part) for part in self.parts * 1.0]


def joined(weights):
    return torch.cat([tensor.flatten() for tensor in weights.values()])


class Logistic(nn.Module):
    """Two classes with logits (0, <w, x>), and data; in L-inf, rho(w) = mean softplus(-(s <w, x> - eps ‖w‖_1))."""

    eps = 0.1
    attack = PGD(Linf(eps, box=None), 0.025, 8, zero)

    def __init__(self, n=40, d=12):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, d, dtype=torch.float64))
        self.x, self.y = torch.rand(n, d, dtype=torch.float64), torch.arange(n) % 2

    def forward(self, x):
        z = x @ self.weight[0]
        return torch.stack([torch.zeros_like(z), z], 1)

    def losses(self, batch_size=16):
        return afresh(self, self.x, self.y, self.attack, batch_size=batch_size)

    def rho(self, w):
        return nn.functional.softplus(-((2 * self.y - 1) * (self.x @ w) - self.eps * w.abs().sum())).mean()


class LeftAsFound:
    """A block after which weights, buffers, gradients and modes are as they were before it.

    >>> with LeftAsFound(nn.Linear(1, 1)):
    ...     pass
    """

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        self.before = state(self.model)
        self.grads = [(p.grad, p.grad.clone(), p.data_ptr()) for p in self.model.parameters()]
        self.modes = [module.training for module in self.model.modules()]

    def __exit__(self, *_):
        assert equal_states(state(self.model), self.before)
        for p, (grad, content, place) in zip(self.model.parameters(), self.grads, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, content)
            assert p.data_ptr() == place
        assert [module.training for module in self.model.modules()] == self.modes
