"""What a network does, layer by layer: a symbolic trace of its forward, with one input, and defaults for all others.

A trace is made without numbers. It does not hold what a forward decides by numbers, nor hooks, and what is remembered
or drawn while it is made is a constant in it; whoever uses it has to try it against the network.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn import functional as F

from saltflat.models.normalise import Normalise

POINTWISE_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
    nn.Identity,
    Normalise,
)
POINTWISE_FUNCTIONS = (
    F.relu,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.softplus,
    torch.relu,
    torch.relu_,
    torch.tanh,
    torch.sigmoid,
)
POINTWISE_METHODS = ("relu", "relu_", "tanh", "sigmoid")
DROPOUT = (nn.Dropout, nn.Dropout2d)
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
SCALINGS = (*SUMS, operator.sub, operator.mul, operator.truediv, torch.sub, torch.mul, torch.div, "sub", "mul", "div")


Call = Callable[[Mapping[fx.Node, Any]], Any]  # what a node makes of those before it


class Untraceable(Exception):
    """It cannot be read from a network's forward which layer follows which."""


class _Tracer(fx.Tracer):
    """Does not look into `Normalise`, which asks for a shape."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalise) or super().is_leaf_module(m, module_qualified_name)


class Layers:
    """The nodes of a trace, in order, and what is known of them.

    Args:
        network: any; it is not changed.
        known: which modules, other than torch's own, act on every number of a channel alike, wherever it stands.

    Attributes:
        nodes: the first is the input, the last the answer.
        modules: by node, those that are called.
        convolutions: of these, two-dimensional ones with zeros around the map, and nothing else about them.
        pointwise: nodes that act on every number of a channel alike, wherever it stands.
        calls: by node, what it makes of the nodes before it.

    Raises Untraceable where there is no trace, or none that holds all of the forward.

    >>> layers = Layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
    >>> len(layers.nodes), len(layers.convolutions), len(layers.pointwise)
    (4, 1, 1)
    """

    def __init__(self, network: nn.Module, known: Callable[[nn.Module], bool] = lambda module: False) -> None:
        if is_changed(network):
            raise Untraceable("a trace does not hold the hooks of the whole")
        try:
            own = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
            # a copy, of the same tensors, since a forward may remember what it is traced with
            self.root = nn.Sequential(copy.deepcopy(network, own))  # which gives one argument, as everybody does
            self.nodes = list(_Tracer().trace(self.root).nodes)
        except Exception as error:  # whatever somebody's forward does when it is given no numbers
            raise Untraceable(str(error)) from error
        self.modules = {
            node: self.root.get_submodule(str(node.target)) for node in self.nodes if node.op == "call_module"
        }
        self.convolutions = {node: module for node, module in self.modules.items() if _is_plain(module)}
        self.pointwise = {node for node in self.nodes if self._is_pointwise(node, known)}
        self.calls = {node: self._call(node) for node in self.nodes}

    def _call(self, node: fx.Node) -> Call:
        target = str(node.target)
        function: Callable[..., Any]
        if node.op == "get_attr":
            return lambda given: operator.attrgetter(target)(self.root)
        if node.op == "call_module":
            function = self.modules[node]
        elif node.op == "call_method":
            function = lambda tensor, *rest, **settings: getattr(tensor, target)(*rest, **settings)
        else:
            function = _itself if node.op in ("output", "placeholder") else node.target  # type: ignore[assignment]
        args, kwargs = node.args, node.kwargs
        if not kwargs and all(isinstance(arg, fx.Node) for arg in args):
            return lambda given: function(*(given[arg] for arg in args))  # type: ignore[index]

        def call(given: Mapping[fx.Node, Any]) -> Any:
            found, settings = fx.node.map_arg((args, kwargs), given.__getitem__)
            return function(*found, **settings)

        return call

    def _is_pointwise(self, node: fx.Node, known: Callable[[nn.Module], bool]) -> bool:
        module = self.modules.get(node)
        if module is not None:
            still = type(module) in DROPOUT and not module.training
            return known(module) or (not is_changed(module) and (type(module) in POINTWISE_MODULES or still))
        if node.op == "call_method":
            return node.target in POINTWISE_METHODS
        return node.target in POINTWISE_FUNCTIONS or (
            node.target is F.dropout and not node.kwargs.get("training", True)
        )


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d
        and not is_changed(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def is_changed(module: nn.Module) -> bool:
    """It may compute something else than its class says."""
    return len(changes(module)) > 0


def changes(module: nn.Module) -> list[Any]:
    """What makes it do so: hooks, and functions in the place of its methods."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    own = [vars(module)[name] for name in ("forward", "_conv_forward") if name in vars(module)]
    return [*(hook for of in hooks for hook in of.values()), *own]


def _itself(value: Any) -> Any:
    return value
