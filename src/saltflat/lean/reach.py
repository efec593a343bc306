"""How far a change of one window of an image reaches into the maps of a network, and what is worth computing of them.

Of a convolution with kernel k, stride s, padding p and dilation d, a change of the places a ... b of an axis reaches

    ceil((a + p - d (k - 1)) / s) ... floor((b + p) / s),

so that a small window stays small through the first layers of a network, whose maps are the largest. Where it reaches
most of a map, or the network does what is not known, the rest is computed on the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from saltflat.lean.layers import SCALINGS, SUMS, Layers

MOST = 0.7  # of a map that patches are worth their while for
WORTH = 0.75  # of all multiplications that may be left to do
OVERHEAD = 1.6e7  # multiplications that a CPU does while one map is cut and joined
BYTES = 2**31  # that may be kept


class Region(NamedTuple):
    """A part of a map: its first row and its first column for each place of the window along the axis, and its size."""

    top: Tensor
    left: Tensor
    height: int
    width: int

    def equals(self, other: Region) -> bool:
        at = torch.equal(self.top, other.top) and torch.equal(self.left, other.left)
        return at and (self.height, self.width) == (other.height, other.width)


class Reach(NamedTuple):
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

    def through(self, kernel: int, stride: int, padding: int, dilation: int, extent: int) -> Reach:
        """A convolution, to an axis of `extent` places; a window that reaches none of them keeps one."""
        first = -((dilation * (kernel - 1) - padding - self.first) // stride)
        first = first.clamp(0, extent - 1)
        return Reach(first, ((self.last + padding) // stride).clamp(max=extent - 1).maximum(first), extent)

    def joined(self, other: Reach) -> Reach:
        return Reach(self.first.minimum(other.first), self.last.maximum(other.last), self.extent)


Reaches = tuple[Reach, Reach]  # along rows' numbers, and along columns'


class Plan(NamedTuple):
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
    patches: dict[fx.Node, Region]
    cuts: dict[fx.Node, dict[fx.Node, Region]]
    rings: dict[fx.Node, int]
    done: dict[fx.Node, list[fx.Node]]


def planned(layers: Layers, values: Mapping[fx.Node, Any], n: int, height: int, width: int) -> Plan | None:
    """For n images, and windows of height x width; None where little would be gained, or too much kept.

    Args:
        values: by node, for a few such images.
    """
    reached: dict[fx.Node, Reaches] = {}
    changed: set[fx.Node] = set()
    image_width, columns, usual, left = 0, 0, 0.0, 0.0
    for node in layers.nodes:
        before = [other for other in node.all_input_nodes if other in changed]
        reaches: Reaches | None = None
        if node.op == "placeholder":
            reaches = _of_window(values[node], height, width)
            image_width, columns = reaches[1].extent, len(reaches[1].first)
        elif not before:
            continue
        elif all(other in reached for other in before):
            reaches = _reaches(layers, node, before, reached, values)
        changed.add(node)
        part = 1.0 if reaches is None else math.prod(reach.size / reach.extent for reach in reaches)
        if reaches is not None and part <= MOST:
            reached[node] = reaches
        cost = _multiplications(layers.modules.get(node), values[node])
        usual, left = usual + cost, left + cost * (part if node in reached else 1)
    patches = {
        node: Region(rows.start, across.start, rows.size, across.size) for node, (rows, across) in reached.items()
    }
    plan = Plan(image_width, columns, changed, patches, {}, {}, {})
    for node in layers.nodes:
        for other in node.all_input_nodes:
            if other in patches:
                _demand(layers, plan, node, other)
    last_users = {other: node for node in layers.nodes for other in node.all_input_nodes if other in changed}
    for other, node in last_users.items():
        plan.done.setdefault(node, []).append(other)
    pays = 0 < left <= WORTH * usual and n * (usual - left) >= OVERHEAD * len(plan.rings)
    return plan if pays and _bytes(plan, values, n) <= BYTES else None


def _of_window(x: Tensor, height: int, width: int) -> Reaches:
    rows, columns = torch.arange(x.shape[2] - height + 1), torch.arange(x.shape[3] - width + 1)
    return Reach(rows, rows + height - 1, x.shape[2]), Reach(columns, columns + width - 1, x.shape[3])


def _reaches(
    layers: Layers,
    node: fx.Node,
    before: list[fx.Node],
    reached: Mapping[fx.Node, Reaches],
    values: Mapping[fx.Node, Any],
) -> Reaches | None:
    """How far the window reaches in the map of this node; None if that is not known."""
    if node in layers.convolutions:
        module = layers.convolutions[node]
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
    if node in layers.pointwise or (scaling and all(_is_by_channel(value) for value in constants)):
        if len(before) == 1:
            return reached[before[0]]
        if node.target in SUMS and values[before[0]].shape == values[before[1]].shape:
            rows, columns = (
                one.joined(other) for one, other in zip(*(reached[other] for other in before), strict=True)
            )
            return rows, columns
    return None


def _demand(layers: Layers, plan: Plan, node: fx.Node, before: fx.Node) -> None:
    """Write down what a node takes of one before it that is computed in patches."""
    ring, region = 0, plan.patches.get(node)
    if region is not None and node in layers.convolutions:
        module = layers.convolutions[node]
        region, ring = _field(module, region), max(_padding(module))
    if region is None or not region.equals(plan.patches[before]):
        plan.rings[before] = max(ring, plan.rings.get(before, 0))
        if region is not None:
            plan.cuts.setdefault(node, {})[before] = region


def _field(module: nn.Conv2d, region: Region) -> Region:
    """What a convolution without padding makes this region of."""
    (up, left), (down, across), (high, wide) = _padding(module), module.stride, module.kernel_size
    return Region(
        region.top * down - up,
        region.left * across - left,
        (region.height - 1) * down + module.dilation[0] * (high - 1) + 1,
        (region.width - 1) * across + module.dilation[1] * (wide - 1) + 1,
    )


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(module.padding, str)
    up, left = module.padding
    return up, left


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


def _bytes(plan: Plan, values: Mapping[fx.Node, Any], n: int) -> float:
    """Of n maps each, and of indices into them."""
    places = max(len(region.top) for region in plan.patches.values()) * plan.columns
    maps = sum(n * values[node][0].numel() * values[node].element_size() for node in plan.rings)
    regions = [region for cuts in plan.cuts.values() for region in cuts.values()]
    regions += [plan.patches[node] for node in plan.rings]
    return float(maps + 8 * places * sum(region.height * region.width for region in regions))
