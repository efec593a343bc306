"""Networks asked about images of which one window has changed: only what the window can reach is computed again.

What the first layers give for the images as they are is kept, and of the next images only patches are computed, of one
size in all rows, from what is kept and from the patches before. Each number depends on its inputs alone, however many
windows came before, so nothing drifts. `layers` knows what the network does, `reach` how far a window gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saltflat.lean.layers import Call, Layers
from saltflat.lean.reach import Plan, Region, planned


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
        self.network, self.layers, self.context = network, Layers(network, pointwise), context

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

    def _plan(self, x: Tensor, n: int, height: int, width: int) -> Plan | None:
        """For n images like these."""
        values: dict[fx.Node, Any] = {}
        versions = {}
        for node in self.layers.nodes:
            values[node] = x if node.op == "placeholder" else self.layers.calls[node](values)
            versions[node] = _version(values[node])
        plan = planned(self.layers, values, n, height, width)
        written_over = {node for node, value in values.items() if _version(value) != versions[node]}
        if plan is None or any(node in plan.rings or node.op == "placeholder" for node in written_over):
            return None  # what is kept has to be what was read
        return plan


class Near:
    """The network around some images, of which the next ones differ in a window; made by `Windows.near`."""

    def __init__(self, windows: Windows, plan: Plan, x: Tensor) -> None:
        self.windows, self.plan = windows, plan
        self.unchanged: dict[fx.Node, Any] = {}
        self.kept: dict[fx.Node, _Kept] = {}
        values: dict[fx.Node, Any] = {}
        for node in windows.layers.nodes:
            values[node] = x if node.op == "placeholder" else windows.layers.calls[node](values)
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
            for node in windows.layers.nodes
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
        z: Tensor = values[self.windows.layers.nodes[-1]]
        return z

    def _call(self, node: fx.Node) -> Call:
        if node in self.plan.patches and node in self.windows.layers.convolutions:
            module, (before,) = self.windows.layers.convolutions[node], node.all_input_nodes
            return lambda given: _unpadded(module, given[before])
        return self.windows.layers.calls[node]

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

    def __init__(self, value: Tensor, patch: Region, ring: int) -> None:
        self.height, self.width, self.ring, self.patch = value.shape[2], value.shape[3], ring, patch
        self.stride = self.width + 2 * ring
        self.area = (self.height + 2 * ring) * self.stride
        ringed = F.pad(value, (ring, ring, ring, ring)).permute(0, 2, 3, 1).flatten(1, 2)
        self.slots = ringed.new_zeros(len(value), self.area + patch.height * patch.width, value.shape[1])
        self.slots[:, : self.area] = ringed
        self.home = self._places(patch)
        self.rows = torch.arange(len(value))[:, None]
        self.lies_by_row = value.is_contiguous()

    def _places(self, region: Region) -> Tensor:
        """(window's places, height width): where the numbers of a region are in the map."""
        rows = (region.top[:, None] + torch.arange(region.height) + self.ring) * self.stride
        columns = region.left[:, None] + torch.arange(region.width) + self.ring
        return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(len(rows) * len(columns), -1)

    def index(self, region: Region) -> Tensor:
        """The same, but in the patch where that covers the region."""
        rows = region.top[:, None] + torch.arange(region.height) - self.patch.top[:, None]
        columns = region.left[:, None] + torch.arange(region.width) - self.patch.left[:, None]
        covered = [(at >= 0) & (at < size) for at, size in ((rows, self.patch.height), (columns, self.patch.width))]
        both = (covered[0][:, None, :, None] & covered[1][None, :, None, :]).reshape(len(rows) * len(columns), -1)
        inside = (rows[:, None, :, None] * self.patch.width + columns[None, :, None, :]).reshape(both.shape)
        return torch.where(both, self.area + inside, self._places(region))

    def put(self, patch: Tensor) -> None:
        self.slots[:, self.area :] = patch.permute(0, 2, 3, 1).flatten(1, 2)

    def at(self, index: Tensor, region: Region) -> Tensor:
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


def _unpadded(module: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0
