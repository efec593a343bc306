"""Networks asked about images of which one window has changed: only what the window can reach is computed again.

Of a convolution with kernel k, stride s, padding p and dilation d, a change of the places a ... b of an axis reaches

    ceil((a + p - d (k - 1)) / s) ... floor((b + p) / s),

so that a small window stays small through the first layers of a network, whose maps are the largest. What those layers
give for the images as they are is kept, and of the next images only patches are computed, of one size in all rows, from
what is kept and from the patches before. Where a window reaches most of a map, the rest is computed as usual. Each
number depends on its inputs alone, however many windows came before, so nothing drifts.

Which layer follows which is read from a symbolic trace. Known are convolutions, functions of single numbers, and sums;
whatever else a network does is done on the whole.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saltflat.models.normalise import Normalise

MOST = 0.7  # of a map that patches are worth their while for
WORTH = 0.75  # of all multiplications that may be left to do
OVERHEAD = 1.6e7  # multiplications that a CPU does while one map is cut and joined
BYTES = 2**31  # that may be kept

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


class Windows:
    """A network in eval mode, without gradients, asked about images of which windows change.

    Args:
        network: any; it is not changed. What it computes from its weights alone is computed once for each `near`.
        pointwise: which modules, other than torch's own, act on every number of a channel alike, wherever it stands.
        context: in which the network runs, such as autocast.

    Raises Untraceable where there is no trace of its forward, or none that holds all of it.

    >>> layers = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()
    >>> network, x = nn.Sequential(*layers, nn.Linear(32 * 32 * 32, 2)).eval(), torch.rand(8, 1, 32, 32)
    >>> near = Windows(network).near(x, 2, 2)
    >>> z = near.ask(torch.zeros(8, 1, 2, 2), torch.full((8,), 5 * 32 + 3))
    >>> x[:, :, 5:7, 3:5] = 0
    >>> torch.allclose(z, network(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        network: nn.Module,
        pointwise: Callable[[nn.Module], bool] = lambda module: False,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        if is_changed(network):
            raise Untraceable("a trace does not hold the hooks of the whole")
        try:
            own = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
            # a copy, of the same tensors, since a forward may remember what it is traced with
            self.root = nn.Sequential(copy.deepcopy(network, own))  # which gives one argument, as everybody does
            self.nodes = list(_Tracer().trace(self.root).nodes)
        except Exception as error:  # whatever somebody's forward does when it is given no numbers
            raise Untraceable(str(error)) from error
        self.network, self.context = network, context
        self.modules = {
            node: self.root.get_submodule(str(node.target)) for node in self.nodes if node.op == "call_module"
        }
        self.convolutions = {node: module for node, module in self.modules.items() if _is_plain(module)}
        self.pointwise = {node for node in self.nodes if self._is_pointwise(node, pointwise)}
        self.calls = {node: self._call(node) for node in self.nodes}

    def near(self, x: Tensor, height: int, width: int) -> Near | None:
        """Around the images x (N, C, H, W), for windows of this size; None where little would be gained, and where the
        network turns out to be more than its trace.
        """
        try:
            with torch.no_grad(), self.context():
                plan = self._plan(x[:2], len(x), height, width)
                if plan is None:
                    return None
                near = Near(self, plan, x)
                new, y = 1 - x[:, :, :height, :width], x.clone()
                y[:, :, :height, :width] = new
                z, answer = near.ask(new, torch.zeros(len(x), dtype=torch.int64)), self.network(y)
                agree = z.shape == answer.shape and (z - answer).abs().max() <= 1e-3 * answer.abs().max()
        except Exception:  # of a trace or of patches; as usual, somebody's forward may do without
            return None
        return near if agree else None

    def _plan(self, x: Tensor, n: int, height: int, width: int) -> _Plan | None:
        """For n images like these."""
        values: dict[fx.Node, Any] = {}
        versions = {}
        for node in self.nodes:
            values[node] = x if node.op == "placeholder" else self.calls[node](values)
            versions[node] = _version(values[node])
        plan = _plan(self, values, n, height, width)
        written_over = {node for node, value in values.items() if _version(value) != versions[node]}
        if plan is None or any(node in plan.rings or node.op == "placeholder" for node in written_over):
            return None  # what is kept has to be what was read
        return plan

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


class Near:
    """The network around some images, of which the next ones differ in a window; made by `Windows.near`."""

    def __init__(self, windows: Windows, plan: _Plan, x: Tensor) -> None:
        self.windows, self.plan = windows, plan
        self.unchanged: dict[fx.Node, Any] = {}
        self.kept: dict[fx.Node, _Kept] = {}
        values: dict[fx.Node, Any] = {}
        for node in windows.nodes:
            values[node] = x if node.op == "placeholder" else windows.calls[node](values)
            if node in plan.rings:
                self.kept[node] = _Kept(values[node], plan.patches[node], plan.rings[node])
            if node not in plan.changed:
                self.unchanged[node] = values[node]
            for done in plan.done.get(node, ()):
                del values[done]
        self.indices = {
            (node, before): self.kept[before].index(region)
            for node, cuts in plan.cuts.items()
            for before, region in cuts.items()
        }
        self.place = torch.empty(0, dtype=torch.int64)
        self.steps = [
            (node, node.all_input_nodes, self._call(node), self.kept.get(node), plan.done.get(node, ()))
            for node in windows.nodes
            if node in plan.changed
        ]

    def ask(self, new: Tensor, corner: Tensor) -> Tensor:
        """Logits (N, K) of the images with the windows new (N, C, height, width) in them, whose first pixels are
        `corner`, (N,), counted line by line.
        """
        plan, values = self.plan, dict(self.unchanged)
        self.place = corner - corner // plan.width * (plan.width - plan.columns)  # of the window's, line by line
        with torch.no_grad(), self.windows.context():
            for node, inputs, call, kept, done in self.steps:
                value = call({before: self._taken(node, before, values) for before in inputs}) if inputs else new
                values[node] = value
                if kept is not None:
                    kept.put(value)
                for other in done:
                    del values[other]
        z: Tensor = values[self.windows.nodes[-1]]
        return z

    def _call(self, node: fx.Node) -> Call:
        if node in self.plan.patches and node in self.windows.convolutions:
            module, (before,) = self.windows.convolutions[node], node.all_input_nodes
            return lambda given: _unpadded(module, given[before])
        return self.windows.calls[node]

    def _taken(self, node: fx.Node, before: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What a node is given of one before it: its patch, another region of it, or the whole."""
        if (node, before) in self.indices:
            index = self.indices[node, before].index_select(0, self.place)
            return self.kept[before].at(index, self.plan.cuts[node][before])
        if before in self.kept and node not in self.plan.patches:
            return self.kept[before].whole(self.place)
        return values[before]

    def settle(self, accepted: Tensor) -> None:
        """From now on these rows, (N,) bool, are the images that were asked about last."""
        rows = accepted.nonzero()[:, 0]
        if len(rows) > 0:
            for kept in self.kept.values():
                kept.settle(rows, self.place[rows])

    def keep(self, rows: Tensor) -> None:
        """Only these rows, by index, are left."""
        for kept in self.kept.values():
            kept.keep(rows)


class _Kept:
    """The map of a node for every row, as (N, places, C): first the map itself with a ring of zeros around it, line by
    line; then the latest patch.
    """

    def __init__(self, value: Tensor, patch: _Region, ring: int) -> None:
        self.height, self.width, self.ring, self.patch = value.shape[2], value.shape[3], ring, patch
        self.stride = self.width + 2 * ring
        self.area = (self.height + 2 * ring) * self.stride
        ringed = F.pad(value, (ring, ring, ring, ring)).permute(0, 2, 3, 1).flatten(1, 2)
        self.slots = ringed.new_zeros(len(value), self.area + patch.height * patch.width, value.shape[1])
        self.slots[:, : self.area] = ringed
        self.home = self._places(patch)
        self.rows = torch.arange(len(value))[:, None]
        self.lies_by_row = value.is_contiguous()

    def _places(self, region: _Region) -> Tensor:
        """(window's places, height width): where the numbers of a region are in the map."""
        rows = (region.top[:, None] + torch.arange(region.height) + self.ring) * self.stride
        columns = region.left[:, None] + torch.arange(region.width) + self.ring
        return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(len(rows) * len(columns), -1)

    def index(self, region: _Region) -> Tensor:
        """The same, but in the patch where that covers the region."""
        rows = region.top[:, None] + torch.arange(region.height) - self.patch.top[:, None]
        columns = region.left[:, None] + torch.arange(region.width) - self.patch.left[:, None]
        covered = [(at >= 0) & (at < size) for at, size in ((rows, self.patch.height), (columns, self.patch.width))]
        both = (covered[0][:, None, :, None] & covered[1][None, :, None, :]).reshape(len(rows) * len(columns), -1)
        inside = (rows[:, None, :, None] * self.patch.width + columns[None, :, None, :]).reshape(both.shape)
        return torch.where(both, self.area + inside, self._places(region))

    def put(self, patch: Tensor) -> None:
        self.slots[:, self.area :] = patch.permute(0, 2, 3, 1).flatten(1, 2)

    def at(self, index: Tensor, region: _Region) -> Tensor:
        """(N, C, height, width) of numbers by index (N, height width)."""
        n, places, channels = self.slots.shape
        index = torch.add(index, self.rows, alpha=places)
        numbers = self.slots.view(-1, channels).index_select(0, index.flatten())
        return numbers.view(n, region.height, region.width, channels).permute(0, 3, 1, 2)

    def whole(self, place: Tensor) -> Tensor:
        """(N, C, H, W), with the patch where it belongs."""
        n, _, channels = self.slots.shape
        numbers = self.slots[:, : self.area].clone()
        index = torch.add(self.home[place], self.rows, alpha=self.area)
        numbers.view(-1, channels).index_copy_(0, index.flatten(), self.slots[:, self.area :].reshape(-1, channels))
        ringed = numbers.view(n, self.height + 2 * self.ring, self.stride, channels)
        inner = ringed[:, self.ring : self.ring + self.height, self.ring : self.ring + self.width]
        inner = inner.permute(0, 3, 1, 2)
        return inner.contiguous() if self.lies_by_row else inner  # there are views of that only

    def settle(self, rows: Tensor, place: Tensor) -> None:
        self.slots[rows[:, None], self.home[place]] = self.slots[rows, self.area :]

    def keep(self, rows: Tensor) -> None:
        self.slots, self.rows = self.slots[rows], self.rows[: len(rows)]


class _Region(NamedTuple):
    """A part of a map: its first row and its first column for each place of the window along the axis, and its size."""

    top: Tensor
    left: Tensor
    height: int
    width: int

    def equals(self, other: _Region) -> bool:
        at = torch.equal(self.top, other.top) and torch.equal(self.left, other.left)
        return at and (self.height, self.width) == (other.height, other.width)


class _Reach(NamedTuple):
    """Along an axis of `extent` places, for each place of the window: the first and the last that it reaches."""

    first: Tensor
    last: Tensor
    extent: int

    @property
    def size(self) -> int:
        """Of patches: as much for every place of the window as for the one that reaches the most."""
        return int((self.last - self.first).max()) + 1

    @property
    def start(self) -> Tensor:
        return self.first.clamp(max=self.extent - self.size)

    def through(self, kernel: int, stride: int, padding: int, dilation: int, extent: int) -> _Reach:
        """A convolution, to an axis of `extent` places; a window that reaches none of them keeps one."""
        first = -((dilation * (kernel - 1) - padding - self.first) // stride)
        first = first.clamp(0, extent - 1)
        return _Reach(first, ((self.last + padding) // stride).clamp(max=extent - 1).maximum(first), extent)

    def joined(self, other: _Reach) -> _Reach:
        return _Reach(self.first.minimum(other.first), self.last.maximum(other.last), self.extent)


Reaches = tuple[_Reach, _Reach]  # along rows' numbers, and along columns'


class _Plan(NamedTuple):
    """For windows of one size.

    Attributes:
        width: of the image.
        columns: places of the window along a row of it.
        changed: the nodes that depend on the image.
        patches: those of which a patch is computed, and its region.
        cuts: by node and node before it, the region that is taken of that, where it is not its patch.
        rings: nodes whose maps are kept, and how wide the ring of zeros around them is.
        done: by node, the changed ones that are not needed after it.
    """

    width: int
    columns: int
    changed: set[fx.Node]
    patches: dict[fx.Node, _Region]
    cuts: dict[fx.Node, dict[fx.Node, _Region]]
    rings: dict[fx.Node, int]
    done: dict[fx.Node, list[fx.Node]]


def _plan(windows: Windows, values: Mapping[fx.Node, Any], n: int, height: int, width: int) -> _Plan | None:
    reached: dict[fx.Node, Reaches] = {}
    changed: set[fx.Node] = set()
    image_width, columns, usual, left = 0, 0, 0.0, 0.0
    for node in windows.nodes:
        before = [other for other in node.all_input_nodes if other in changed]
        reaches: Reaches | None = None
        if node.op == "placeholder":
            reaches = _of_window(values[node], height, width)
            image_width, columns = reaches[1].extent, len(reaches[1].first)
        elif not before:
            continue
        elif all(other in reached for other in before):
            reaches = _reaches(windows, node, before, reached, values)
        changed.add(node)
        part = 1.0 if reaches is None else math.prod(reach.size / reach.extent for reach in reaches)
        if reaches is not None and part <= MOST:
            reached[node] = reaches
        cost = _multiplications(windows.modules.get(node), values[node])
        usual, left = usual + cost, left + cost * (part if node in reached else 1)
    patches = {
        node: _Region(rows.start, across.start, rows.size, across.size) for node, (rows, across) in reached.items()
    }
    plan = _Plan(image_width, columns, changed, patches, {}, {}, {})
    for node in windows.nodes:
        for other in node.all_input_nodes:
            if other in patches:
                _demand(windows, plan, node, other)
    last_users = {other: node for node in windows.nodes for other in node.all_input_nodes if other in changed}
    for other, node in last_users.items():
        plan.done.setdefault(node, []).append(other)
    pays = 0 < left <= WORTH * usual and n * (usual - left) >= OVERHEAD * len(plan.rings)
    return plan if pays and _bytes(plan, values, n) <= BYTES else None


def _of_window(x: Tensor, height: int, width: int) -> Reaches:
    rows, columns = torch.arange(x.shape[2] - height + 1), torch.arange(x.shape[3] - width + 1)
    return _Reach(rows, rows + height - 1, x.shape[2]), _Reach(columns, columns + width - 1, x.shape[3])


def _reaches(
    windows: Windows,
    node: fx.Node,
    before: list[fx.Node],
    reached: Mapping[fx.Node, Reaches],
    values: Mapping[fx.Node, Any],
) -> Reaches | None:
    """How far the window reaches in the map of this node; None if that is not known."""
    if node in windows.convolutions:
        module = windows.convolutions[node]
        settings = zip(
            reached[before[0]],
            module.kernel_size,
            module.stride,
            _padding(module),
            module.dilation,
            values[node].shape[2:],
            strict=True,
        )
        rows, columns = (reach.through(*axis) for reach, *axis in settings)
        return rows, columns
    constants = [values[other] for other in node.all_input_nodes if other not in before]
    scaling = node.op in ("call_function", "call_method") and node.target in SCALINGS
    if node in windows.pointwise or (scaling and all(_is_by_channel(value) for value in constants)):
        if len(before) == 1:
            return reached[before[0]]
        if node.target in SUMS and values[before[0]].shape == values[before[1]].shape:
            rows, columns = (
                one.joined(other) for one, other in zip(*(reached[other] for other in before), strict=True)
            )
            return rows, columns
    return None


def _demand(windows: Windows, plan: _Plan, node: fx.Node, before: fx.Node) -> None:
    """Write down what a node takes of one before it that is computed in patches."""
    ring, region = 0, plan.patches.get(node)
    if region is not None and node in windows.convolutions:
        module = windows.convolutions[node]
        region, ring = _field(module, region), max(_padding(module))
    if region is None or not region.equals(plan.patches[before]):
        plan.rings[before] = max(ring, plan.rings.get(before, 0))
        if region is not None:
            plan.cuts.setdefault(node, {})[before] = region


def _field(module: nn.Conv2d, region: _Region) -> _Region:
    """What a convolution without padding makes this region of."""
    (up, left), (down, across), (high, wide) = _padding(module), module.stride, module.kernel_size
    return _Region(
        region.top * down - up,
        region.left * across - left,
        (region.height - 1) * down + module.dilation[0] * (high - 1) + 1,
        (region.width - 1) * across + module.dilation[1] * (wide - 1) + 1,
    )


def _unpadded(module: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(module.padding, str)
    up, left = module.padding
    return up, left


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d
        and not is_changed(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def is_changed(module: nn.Module) -> bool:
    """It may compute something else than its class says."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks) or not vars(module).keys().isdisjoint(("forward", "_conv_forward"))


def _is_by_channel(value: Any) -> bool:
    """A number, or one for each channel."""
    if isinstance(value, Tensor):
        return value.ndim == 0 or (
            value.ndim in (3, 4) and value.shape[-2:] == (1, 1) and value.shape[:-3] in ((), (1,))
        )
    return isinstance(value, int | float)


def _multiplications(module: nn.Module | None, value: Any) -> float:
    if isinstance(module, nn.Conv2d | nn.Linear):
        return float(value[0].numel() * module.weight[0].numel())
    return 0.0


def _bytes(plan: _Plan, values: Mapping[fx.Node, Any], n: int) -> float:
    """Of n maps each, and of indices into them."""
    places = max(len(region.top) for region in plan.patches.values()) * plan.columns
    maps = sum(n * values[node][0].numel() * values[node].element_size() for node in plan.rings)
    regions = [region for cuts in plan.cuts.values() for region in cuts.values()]
    regions += [plan.patches[node] for node in plan.rings]
    return float(maps + 8 * places * sum(region.height * region.width for region in regions))


def _itself(value: Any) -> Any:
    return value


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0
