"""A network in eval mode as a list of fewer operations, from a trace of its forward: what attacks in training climb on.

    convolution, norm, + branch, ReLU     one operation (`convolution`), where nothing else looks at what is between
    norm                                  input * scale + shift (`norms`)
    norm, ReLU                            the ReLU over it, in place

All else is done as the network does it. Weights are read when the operations are made, and have no gradient.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saltflat.lean.convolution import Fixed
from saltflat.lean.layers import Call, Layers, Untraceable
from saltflat.lean.norms import Affine, is_affine, scale_and_shift
from saltflat.lean.packed import supported

Logits = Callable[[Tensor], Tensor]
RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
SUMS = (operator.add, torch.add, "add")
IN_PLACE = (operator.iadd, "add_")  # in place of the first
TOLERANCE = 1e-2  # relative, between a network and its trace in fp32: rounding is far below, a wrong trace above


def leaner(dtype: torch.dtype | None = None) -> Callable[[nn.Module], Logits]:
    """model -> (x' -> logits), for `attack_on`: a function that reads the weights of a model as they stand and gives
    back what computes its logits up to rounding, in fewer operations, and nothing of the weights' gradients.

    Args:
        dtype: `torch.bfloat16` for convolutions and sums in it, with logits in it; else the model's.

    The function remembers what it has found out about the last model: which operations it consists of (so a model must
    not change that), and whether they give the same answer, which is tried on two images. Where they don't, or there is
    no telling (a forward that is decided by numbers, hooks, modules in train mode, a GPU, no oneDNN), the model itself
    is what comes back.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()).eval()
    >>> x = torch.rand(2, 1, 4, 4)
    >>> bool(torch.allclose(leaner()(model)(x), model(x), atol=1e-6))
    True
    """
    return _Leaner(dtype)


class _Leaner:
    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.of: Callable[[], nn.Module | None] = lambda: None
        self.layers: Layers | None = None
        self.tried = False

    def __call__(self, model: nn.Module) -> Logits:
        if any(module.training for module in model.modules()):
            return model
        if self.of() is not model:
            self.of, self.layers, self.tried = weakref.ref(model), _layers(model), False
        if self.layers is None:
            return model
        fused = Fused(self.layers, self.dtype)
        return fused if self.tried else self._trying(model, fused)

    def _trying(self, model: nn.Module, fused: Logits) -> Logits:
        def logits(x: Tensor) -> Tensor:
            if not self.tried:
                self.tried = True
                if self.layers is not None and not _agree(model, self.layers, x[:2]):
                    self.layers = None
            z: Tensor = model(x) if self.layers is None else fused(x)
            return z

        return logits


def _layers(model: nn.Module) -> Layers | None:
    """Its trace, where the operations here would gain something."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type != "cpu" or tensor.dtype is torch.float64 for tensor in tensors):
        return None
    try:
        layers = Layers(model)
    except Untraceable:
        return None
    return layers if layers.convolutions and supported(torch.float32) else None


def _agree(model: nn.Module, layers: Layers, x: Tensor) -> bool:
    """Logits, and the gradient of their squares, are the same."""
    with torch.autocast("cpu", enabled=False), torch.enable_grad():
        expected = _answers(model, x)
        try:
            found = _answers(Fused(layers, None), x)
        except Exception:  # of a trace; the model may do without
            return False
    return all(
        one.shape == other.shape and bool((one - other).norm() <= TOLERANCE * other.norm())
        for one, other in zip(found, expected, strict=True)
    )


def _answers(logits: Logits, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    z = logits(leaf)
    (gradient,) = torch.autograd.grad(z.square().sum(), leaf)
    return z.detach(), gradient


class Fused:
    """x' -> logits, by fewer operations than a trace has.

    Args:
        layers: the trace; weights are read now.
        dtype: as in `leaner`; left aside where this machine has no such convolutions.
    """

    def __init__(self, layers: Layers, dtype: torch.dtype | None) -> None:
        self.dtype = dtype if dtype is not None and supported(dtype) else None
        chains = _chains(layers)
        needed = [{before for node in chain for before in node.all_input_nodes} - set(chain) for chain in chains]
        last = {before: number for number, nodes in enumerate(needed) for before in nodes}
        self.steps = [
            (
                chain[-1],
                _operation(layers, chain, self.dtype or torch.float32),
                [before for before in needed[number] if last[before] == number],
            )
            for number, chain in enumerate(chains)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        with nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype):
            for node, call, done in self.steps:
                values[node] = x if node.op == "placeholder" else call(values)
                for before in done:
                    del values[before]
        z: Tensor = values[node]
        return z


def _chains(layers: Layers) -> list[list[fx.Node]]:
    """The nodes of a trace, those together that become one operation, where the last of them stands."""
    taken: set[fx.Node] = set()
    by_last = {}
    for node in layers.nodes:
        if node not in taken:
            chain = _chain(layers, node, taken)
            taken |= set(chain)
            by_last[chain[-1]] = chain
    return [by_last[node] for node in layers.nodes if node in by_last]


def _chain(layers: Layers, node: fx.Node, taken: set[fx.Node]) -> list[fx.Node]:
    def goes_on(fits: Callable[[fx.Node], bool]) -> bool:
        following = list(chain[-1].users)
        if len(following) == 1 and following[0] not in taken and fits(following[0]):
            chain.append(following[0])
            return True
        return False

    chain = [node]
    if node in layers.convolutions and _of_one(node):
        goes_on(lambda after: _is_norm(layers, after))
        goes_on(lambda after: _is_sum(after, chain[-1]))
        goes_on(lambda after: _is_relu(layers, after))
    elif _is_norm(layers, node):
        goes_on(lambda after: _is_relu(layers, after))
    return chain


def _operation(layers: Layers, chain: list[fx.Node], dtype: torch.dtype) -> Call:
    first, last = chain[0], chain[-1]
    relu = len(chain) > 1 and _is_relu(layers, last)
    if _is_norm(layers, first):
        affine, before = Affine(layers.modules[first]), first.all_input_nodes[0]  # type: ignore[arg-type]
        return lambda given: F.relu(affine(given[before]), inplace=True) if relu else affine(given[before])
    if first not in layers.convolutions or not _of_one(first):
        return layers.calls[first]
    norms = [layers.modules[node] for node in chain[1:] if _is_norm(layers, node)]
    scale, shift = scale_and_shift(norms[0]) if norms else (None, None)  # type: ignore[arg-type]
    fixed, x = Fixed(layers.convolutions[first], scale, shift, relu, dtype), first.all_input_nodes[0]
    sums = [node for node in chain[1:] if _is_sum(node, chain[chain.index(node) - 1])]
    if not sums:
        return lambda given: fixed(given[x].to(dtype))
    (branch,) = (node for node in sums[0].all_input_nodes if node not in chain)
    return lambda given: fixed(given[x].to(dtype), given[branch])


def _of_one(node: fx.Node) -> bool:
    """Called with one node, and nothing else."""
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _is_norm(layers: Layers, node: fx.Node) -> bool:
    return node in layers.modules and is_affine(layers.modules[node]) and _of_one(node)


def _is_sum(node: fx.Node, of: fx.Node) -> bool:
    """of + another, or another + of; in place of `of`, perhaps."""
    if node.kwargs or len(node.args) != 2 or len(node.all_input_nodes) != 2:  # not of a number, nor of + of
        return False
    return node.target in SUMS or (node.target in IN_PLACE and node.args[0] is of)


def _is_relu(layers: Layers, node: fx.Node) -> bool:
    if node in layers.modules:
        return type(layers.modules[node]) is nn.ReLU and node in layers.pointwise
    return node.target in RELUS and len(node.args) == 1
