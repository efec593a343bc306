"""A network in eval mode as a list of fewer operations, from a trace of its forward: what attacks in training climb on.

    convolution, norm, + branch, ReLU     one operation (`convolution`), where nothing else looks at what is between
    norm                                  input * scale + shift (`norms`)
    norm, ReLU                            the ReLU over it, in place
    ReLU, all of it into convolutions     their gradient is of what is within it

All else is done as the network does it. Weights are read when the operations are made, and convolutions and norms have
no gradient of them.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saltflat.lean.convolution import Fixed
from saltflat.lean.layers import Call, Layers
from saltflat.lean.norms import Affine, is_affine, scale_and_shift

RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
SUMS = (operator.add, torch.add, "add")
IN_PLACE = (operator.iadd, "add_")  # in place of the first


class Fused:
    """x' -> logits, by fewer operations than a trace has.

    Args:
        layers: the trace; weights are read now.
        dtype: of convolutions, and of what autocast puts between them; None computes in fp32, under autocast as well.
    """

    def __init__(self, layers: Layers, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        chains = _chains(layers)
        within = _within(layers, chains)
        needed = [
            {before for node in chain.nodes for before in node.all_input_nodes} - {*chain.nodes} for chain in chains
        ]
        last = {before: number for number, nodes in enumerate(needed) for before in nodes}
        self.steps = [
            (
                chain.nodes[-1],
                _operation(layers, chain, within, dtype or torch.float32),
                [before for before in needed[number] if last[before] == number],
            )
            for number, chain in enumerate(chains)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            for node, call, done in self.steps:
                values[node] = x if node.op == "placeholder" else call(values)
                for before in done:
                    del values[before]
        z: Tensor = values[self.steps[-1][0]]
        return z


class Chain(NamedTuple):
    """Nodes, one after the other, that become one operation where the last of them stands.

    Attributes:
        norm: the one that is folded into the convolution before it.
        branch: what is added to it.
        relu: whether the last is one.
    """

    nodes: list[fx.Node]
    norm: fx.Node | None = None
    branch: fx.Node | None = None
    relu: bool = False


def _chains(layers: Layers) -> list[Chain]:
    """All nodes of a trace, in an order in which they can be computed."""
    taken: set[fx.Node] = set()
    by_last = {}
    for node in layers.nodes:
        if node not in taken:
            chain = _chain(layers, node, taken)
            taken |= {*chain.nodes}
            by_last[chain.nodes[-1]] = chain
    return [by_last[node] for node in layers.nodes if node in by_last]


def _chain(layers: Layers, node: fx.Node, taken: set[fx.Node]) -> Chain:
    nodes, norm, branch = [node], None, None

    def following() -> fx.Node | None:
        """The only node that looks at the last one, if there is one, and nobody else has it."""
        users = list(nodes[-1].users)
        return users[0] if len(users) == 1 and users[0] not in taken else None

    if _is_convolution(layers, node):
        after = following()
        if after is not None and _is_norm(layers, after):
            nodes.append(norm := after)
            after = following()
        if after is not None and _is_sum(after, nodes[-1]):
            (branch,) = (other for other in after.all_input_nodes if other is not nodes[-1])
            nodes.append(after)
    elif not _is_norm(layers, node):
        return Chain(nodes)
    after = following()
    relu = after is not None and _is_relu(layers, after)
    return Chain([*nodes, after] if after is not None and relu else nodes, norm, branch, relu)


def _within(layers: Layers, chains: list[Chain]) -> dict[fx.Node, Tensor | None]:
    """The ReLUs that nothing but convolutions look at, with s of those that are relu(s u + t) over a norm."""
    found: dict[fx.Node, Tensor | None] = {}
    for chain in chains:
        last = chain.nodes[-1]
        if chain.relu and all(_is_convolution(layers, of) and layers.convolutions[of].groups == 1 for of in last.users):
            norm = layers.modules[chain.nodes[0]] if _is_norm(layers, chain.nodes[0]) else None
            found[last] = None if norm is None else scale_and_shift(norm)[0]  # type: ignore[arg-type]
    return found


def _operation(layers: Layers, chain: Chain, within: dict[fx.Node, Tensor | None], dtype: torch.dtype) -> Call:
    first, before = chain.nodes[0], chain.nodes[0].all_input_nodes[:1]
    given_within = chain.nodes[-1] in within
    if _is_norm(layers, first):
        affine = Affine(layers.modules[first])  # type: ignore[arg-type]
        if not chain.relu:
            return lambda given: affine(given[before[0]])
        if given_within:
            return lambda given: _GivenWithin.apply(given[before[0]], affine)  # type: ignore[no-untyped-call]
        return lambda given: F.relu(affine(given[before[0]]), inplace=True)
    if not _is_convolution(layers, first):
        return layers.calls[first]
    norm = None if chain.norm is None else scale_and_shift(layers.modules[chain.norm])  # type: ignore[arg-type]
    fixed = Fixed(
        layers.convolutions[first],
        norm,
        chain.relu,
        dtype,
        within=before[0] in within,
        scale=within.get(before[0]),
        given_within=given_within,
    )
    branch = chain.branch
    if branch is None:
        return lambda given: fixed(given[before[0]].to(dtype))
    return lambda given: fixed(given[before[0]].to(dtype), given[branch])


class _GivenWithin(torch.autograd.Function):
    """relu(s x + t), where what comes back is the gradient of x already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Affine) -> Tensor:
        return F.relu(affine(x), inplace=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None


def _of_one(node: fx.Node) -> bool:
    """Called with one node, and nothing else."""
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _is_convolution(layers: Layers, node: fx.Node) -> bool:
    return node in layers.convolutions and _of_one(node)


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
