"""Norm balls: the sets that both adversaries climb in.

A ball B = {v : ‖v‖ <= radius} lies around a centre (an input x, or the weights w) and is three functions without state:

    steepest(g, centre)    argmax_{v in B} <g, v>     the step of steepest ascent in the ball's norm
    project(v, centre)     a member of B (and of x's box) near v; v itself if it is one
    sample(centre, ...)    v uniform in B, or on its surface

so an ascent with step size eta is `replace(ball, radius=eta).steepest` followed by `ball.project`, for inputs and for
weights alike.

Input balls hold for every example of a batch by itself: tensors are (N, ...) of any shape. `box` is the range that x +
v must stay in; it enters only `project` and `sample`. Weight balls act on {name: tensor}.

A zero or non-finite gradient gives the step 0: per example for inputs, per tensor for `Layerwise`, per filter for
`Filterwise`, everywhere for `Global`, `Ellipsoid` and `Box`; and steepest(c g) = steepest(g) for every c > 0, however
small the gradient is.

Every ball raises a ValueError, when it is made, for a radius or an offset that is negative or not finite, and for a box
whose low is not below its high.

Sources: Madry et al., arXiv 1706.06083 (Linf, L2); Croce, Hein, arXiv 2103.01208 (L1); Wu, Xia, Wang, arXiv 2004.05884
(Layerwise); Foret et al., arXiv 2010.01412 (Global); Li et al., arXiv 1712.09913 (Filterwise); Kwon et al., arXiv
2102.11600 (Ellipsoid, offset 0); Keskar et al., arXiv 1609.04836 (Box, offset 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from saltflat.random import Generator, normal, uniform

Weights = Mapping[str, Tensor]
Range = tuple[float, float] | None


class Ball(Protocol):
    """What every ball is: a frozen dataclass with `radius` as its first field."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def radius(self) -> float: ...


class InputBall(Ball, Protocol):
    """What `PGD` needs to know of a ball around a batch of inputs."""

    @property
    def box(self) -> Range: ...
    def steepest(self, gradient: Tensor, centre: Tensor) -> Tensor: ...
    def project(self, displacement: Tensor, centre: Tensor) -> Tensor: ...
    def sample(self, centre: Tensor, generator: Generator = None, surface: bool = False) -> Tensor: ...


class WeightBall(Ball, Protocol):
    """What `perturbed` needs to know of a ball around weights."""

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]: ...
    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]: ...
    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]: ...


def check_radius(radius: float, name: str = "radius") -> None:
    """ValueError, under that name, for a radius that is none: it is finite and >= 0, in whatever unit the ball has."""
    if not 0 <= radius < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {radius!r}")


def _checked(ball: Any) -> None:
    """What a ball is made of: its radius, and its offset or its box if it has one."""
    check_radius(ball.radius)
    check_radius(getattr(ball, "offset", 0.0), "offset")
    box = getattr(ball, "box", None)
    if box is not None and not box[0] < box[1]:
        raise ValueError(f"box: expected (low, high) with low < high, or None, got {box!r}")


@dataclass(frozen=True)
class Linf:
    """{v : max_i |v_i| <= radius} for every example.

    Args:
        radius: in pixel units of the box (8/255 for images in [0, 1]).
        box: (low, high) that x + v stays in, or None. With a box the projection is exact: the nearest member of the
            intersection.

    Shapes: gradient, displacement and centre are (N, ...); so is what comes back. Nothing is changed but the generator.

    >>> Linf(0.5).steepest(torch.tensor([[3.0, -0.1, 0.0]]), torch.zeros(1, 3))
    tensor([[ 0.5000, -0.5000,  0.0000]])
    """

    radius: float
    box: Range = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Tensor, centre: Tensor) -> Tensor:
        """radius * sign(g)."""
        return _usable(_rows(gradient)).sign().mul(self.radius).reshape(gradient.shape)

    def project(self, displacement: Tensor, centre: Tensor) -> Tensor:
        """Clamp to the radius, then to the box."""
        return _clamp_to_box(displacement.clamp(-self.radius, self.radius), centre, self.box)

    def sample(self, centre: Tensor, generator: Generator = None, surface: bool = False) -> Tensor:
        """Uniform in the cube, or on its faces; then clamped to the box."""
        v = _rows(2 * uniform(centre, generator) - 1)
        v = _unit(v, math.inf) if surface else v
        return _clamp_to_box(v.mul(self.radius).reshape(centre.shape), centre, self.box)


@dataclass(frozen=True)
class L2:
    """{v : ‖v‖_2 <= radius} for every example.

    Args:
        radius: Euclidean, over all pixels and channels of one example (0.5 or 128/255 for CIFAR images in [0, 1]).
        box: (low, high) that x + v stays in, or None. With a box the projection scales, then clamps: the result lies
            in both sets, but is not always their nearest point.

    Shapes: gradient, displacement and centre are (N, ...); so is what comes back. Nothing is changed but the generator.

    >>> L2(0.5).steepest(torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2))
    tensor([[ 0.3000, -0.4000]])
    """

    radius: float
    box: Range = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Tensor, centre: Tensor) -> Tensor:
        """radius * g / ‖g‖_2."""
        return _unit(_rows(gradient)).mul(self.radius).reshape(gradient.shape)

    def project(self, displacement: Tensor, centre: Tensor) -> Tensor:
        """Scale to the radius, then clamp to the box."""
        v = _shrink(_rows(displacement), self.radius)
        return _clamp_to_box(v.reshape(displacement.shape), centre, self.box)

    def sample(self, centre: Tensor, generator: Generator = None, surface: bool = False) -> Tensor:
        """Uniform in the ball, or on the sphere; then clamped to the box."""
        v = _sample_rows(_rows(centre), generator, surface) * self.radius
        return _clamp_to_box(v.reshape(centre.shape), centre, self.box)


@dataclass(frozen=True)
class L1:
    """{v : sum_i |v_i| <= radius} for every example.

    Args:
        radius: the sum over all pixels and channels of one example (12 for CIFAR images in [0, 1]).
        box: (low, high) that x + v stays in, or None. With a box the projection is exact: the nearest member of the
            intersection.

    The steepest step changes one number only, and ascent by it is hardly an attack: `PGD` refuses this ball, and
    `saltflat.evaluation.SparseAPGD` searches it.

    Shapes: gradient, displacement and centre are (N, ...); so is what comes back. Nothing is changed but the generator.

    >>> L1(0.5).steepest(torch.tensor([[3.0, -4.0, 4.0]]), torch.zeros(1, 3))
    tensor([[ 0.0000, -0.5000,  0.0000]])
    """

    radius: float
    box: Range = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Tensor, centre: Tensor) -> Tensor:
        """radius * sign(g_j) at the first j with the largest |g_j|, 0 elsewhere."""
        g = _usable(_rows(gradient))
        j = g.abs().argmax(1, keepdim=True)
        return torch.zeros_like(g).scatter(1, j, g.gather(1, j).sign() * self.radius).reshape(gradient.shape)

    def project(self, displacement: Tensor, centre: Tensor) -> Tensor:
        """sign(u_i) min(max(|u_i| - t, 0), c_i) for a displacement u, with c_i >= 0 the room that the box leaves x_i on
        u_i's side, and t the least number >= 0 for which that is in the ball; in float64.
        """
        u, boxed = _rows(displacement), _rows(_clamp_to_box(displacement, centre, self.box))
        lowered = _lowered(u.abs().double(), boxed.abs().double(), self.radius)
        return _shrink(lowered, self.radius, 1).to(u.dtype).copysign(u).reshape(displacement.shape)

    def sample(self, centre: Tensor, generator: Generator = None, surface: bool = False) -> Tensor:
        """Uniform in the ball, or on its faces; then clamped to the box."""
        like = _rows(centre)
        spacings = -torch.log1p(-uniform(like, generator))  # exponential, so their shares of a sum are uniform
        faces = _unit(torch.where(uniform(like, generator) < 0.5, -spacings, spacings), 1)
        v = _spread(faces, generator, surface, like.shape[1]) * self.radius
        return _clamp_to_box(v.reshape(centre.shape), centre, self.box)


@dataclass(frozen=True)
class Layerwise:
    """{v : ‖v_l‖_F <= radius * ‖w_l‖_F for every layer l}: the ball of Adversarial Weight Perturbation.

    Args:
        radius: the paper's gamma, relative to the norm of each tensor (5e-3 for TRADES, 1e-2 for AT on CIFAR-10).

    gradient, displacement and centre are {name: tensor}; the names of the first must be in the centre. Nothing is
    changed but the generator.

    >>> Layerwise(0.1).steepest({"l": torch.tensor([[3.0, -4.0]])}, {"l": torch.tensor([[0.0, 2.0]])})
    {'l': tensor([[ 0.1200, -0.1600]])}
    """

    radius: float

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]:
        """v_l = radius * ‖w_l‖ * g_l / ‖g_l‖."""
        v = copies(gradient)
        for g, w in alike(v.values(), [centre[name] for name in v]):
            torch._foreach_div_(g, [*norms(g, math.inf)])  # first, as in `_unit`
            lengths = norms(g)  # NaN, if g was 0 or not finite
            torch._foreach_mul_(g, [*(self.radius * norms(w) / lengths)])
            torch._foreach_mul_(numbers := bits(g), [*(lengths > 0).to(numbers[0].dtype)])
        return v

    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]:
        """Scale each tensor to its radius."""
        found = copies(displacement)
        for v, w in alike(found.values(), [centre[name] for name in found]):
            lengths, limits = norms(v), self.radius * norms(w)
            torch._foreach_mul_(v, [*torch.where(lengths > limits, limits / lengths, 1)])
        return found

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        """Uniform in (or on) each tensor's own ball."""
        found = {name: _sample_rows(_rows(w[None]), generator, surface).reshape(w.shape) for name, w in centre.items()}
        for v, w in alike(found.values(), centre.values()):
            torch._foreach_mul_(v, [*(self.radius * norms(w))])
        return found


@dataclass(frozen=True)
class Filterwise:
    """{v : ‖v_lj‖ <= radius * ‖w_lj‖ for every filter j of every layer l}: the normalisation of loss landscapes.

    A filter is one index of the first dimension (an output channel, or an output unit); each number of a 1-D tensor is
    a filter of its own.

    Args:
        radius: relative to the norm of each filter; `Filterwise(1).sample(w, generator, surface=True)` is the
            landscape direction of Li et al.

    >>> Filterwise(1.0).project({"l": torch.tensor([[4.0], [1.0]])}, {"l": torch.tensor([[2.0], [2.0]])})
    {'l': tensor([[2.],
            [1.]])}
    """

    radius: float

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]:
        """v_lj = radius * ‖w_lj‖ * g_lj / ‖g_lj‖."""
        return {name: (_unit(_rows(g)) * self._limit(centre[name])).reshape(g.shape) for name, g in gradient.items()}

    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]:
        """Scale each filter of the displacement to its radius."""
        return {name: _shrink(_rows(v), self._limit(centre[name])).reshape(v.shape) for name, v in displacement.items()}

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        """Uniform in (or on) each filter's own ball."""
        units = {name: _sample_rows(_rows(w), generator, surface) for name, w in centre.items()}
        return {name: (units[name] * self._limit(w)).reshape(w.shape) for name, w in centre.items()}

    def _limit(self, w: Tensor) -> Tensor:
        return self.radius * _norm(_rows(w))


@dataclass(frozen=True)
class Global:
    """{v : ‖v‖_2 <= radius} over all tensors together: the ball of SAM.

    Args:
        radius: in units of the weights, SAM's rho; or of ‖w‖_2 over all tensors with `relative=True`, RobustWP's gamma.

    >>> Global(1.0).steepest({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {})
    {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """

    radius: float
    relative: bool = False

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]:
        """v = radius * g / ‖g‖_2."""
        return _split(_unit(_joined(gradient)) * self._limit(centre), gradient)

    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]:
        """Scale all tensors of the displacement by one factor."""
        return _split(_shrink(_joined(displacement), self._limit(centre)), displacement)

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        """Uniform in the ball, or on its surface, drawn from the generator, which advances."""
        return _split(_sample_rows(_joined(centre), generator, surface) * self._limit(centre), centre)

    def _limit(self, centre: Weights) -> Tensor | float:
        return self.radius * _norm(_joined(centre)) if self.relative else self.radius


@dataclass(frozen=True)
class Ellipsoid:
    """{v : ‖v / c‖_2 <= radius} over all tensors together, c = |w| + offset: the ball of ASAM and adaptive sharpness.

    Args:
        radius: relative to the size of each weight (ASAM's rho).
        offset: in units of the weights, what lets small ones move. With 0, a weight that is 0 stays 0.

    gradient, displacement and centre are {name: tensor}; the names of the first must be in the centre.

    >>> Ellipsoid(0.5).steepest({"l": torch.tensor([3.0, 2.0, 9.0])}, {"l": torch.tensor([1.0, 2.0, 0.0])})
    {'l': tensor([0.3000, 0.8000, 0.0000])}
    """

    radius: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]:
        """v = radius * c^2 g / ‖c g‖_2."""
        c = _sizes(gradient, centre, self.offset)
        return _split(_unit(c * _unit(_joined(gradient))) * c * self.radius, gradient)

    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]:
        """0 where c is 0, then all tensors scaled by one factor: the nearest member in the norm ‖v / c‖_2, not in the
        Euclidean one.
        """
        c, v = _sizes(displacement, centre, self.offset), _joined(displacement)
        norm = _norm(torch.where(c > 0, v / c, 0))
        return _split(torch.where(norm > self.radius, v * (self.radius / norm), v).where(c > 0, 0), displacement)

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        """Uniform in the ellipsoid; or on its surface, as the unit sphere stretched by c. Advances the generator."""
        c = _sizes(centre, centre, self.offset)
        directions = _unit(normal(c, generator).where(c > 0, 0))
        v = _spread(directions, generator, surface, max(1, int((c > 0).sum())))
        return _split(v * c * self.radius, centre)


@dataclass(frozen=True)
class Box:
    """{v : |v_i| <= radius (|w_i| + offset)} for every weight: the box of Keskar et al. (offset 1), and of adaptive
    sharpness in L-inf (offset 0).

    Args:
        radius: relative to the size of each weight.
        offset: in units of the weights. With 0, a weight that is 0 stays 0.

    gradient, displacement and centre are {name: tensor}; the names of the first must be in the centre.

    >>> Box(0.5, offset=1.0).steepest({"l": torch.tensor([3.0, -0.1, 0.0])}, {"l": torch.tensor([1.0, 2.0, 3.0])})
    {'l': tensor([ 1.0000, -1.5000,  0.0000])}
    """

    radius: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        _checked(self)

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]:
        """v_i = radius * (|w_i| + offset) * sign(g_i)."""
        return _split(_usable(_joined(gradient)).sign() * self._limit(gradient, centre), gradient)

    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]:
        """Clamp each number to its radius."""
        limit = self._limit(displacement, centre)
        return _split(_joined(displacement).clamp(-limit, limit), displacement)

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        """Uniform in the box, or on its surface: the cube's faces stretched by |w| + offset. The generator advances."""
        limit = self._limit(centre, centre)
        v = (2 * uniform(limit, generator) - 1).where(limit > 0, 0)
        return _split((_unit(v, math.inf) if surface else v) * limit, centre)

    def _limit(self, like: Weights, centre: Weights) -> Tensor:
        return self.radius * _sizes(like, centre, self.offset)


# Many tensors at once, since on a GPU small ones cost what their launches cost. To multiply each by a number of its own
# is a launch for each all the same: torch has no kernel for that.


def alike(*lists: Iterable[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """The lists in pieces that torch takes in one launch: by devices and types. Where the first tensor of a row is one
    that torch has yet to conjugate, or to negate, the whole row is taken the other way, so that writing to it works.

    >>> alike([torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3])])
    [([tensor([1]), tensor([3])],), ([tensor([2.])],)]
    """
    pieces: dict[object, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        row = tuple(tensor.conj() for tensor in row) if row[0].is_conj() else row
        row = tuple(torch._neg_view(tensor) for tensor in row) if row[0].is_neg() else row
        row = tuple(tensor.resolve_conj().resolve_neg() for tensor in row)
        pieces.setdefault(tuple((tensor.device, tensor.dtype) for tensor in row), []).append(row)
    return [tuple(map(list, zip(*piece, strict=True))) for piece in pieces.values()]


def own(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors; of a DTensor the shard that is here, since torch has no rule for copying many."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


@torch.no_grad()
def copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Each of the sources into its target, in place: targets may be shards, and of any shapes and devices."""
    for into, values in alike(own(targets), own(sources)):
        torch._foreach_copy_(into, values)


def copies(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Detached clones."""
    made = {key: torch.empty_like(tensor, requires_grad=False) for key, tensor in tensors.items()}
    copy(made.values(), tensors.values())
    return made


def expanded(tensor: Tensor) -> bool:
    """Whether several numbers of a tensor (N, ...) lie in one place, so that torch writes nothing into it.

    >>> expanded(torch.zeros(1).expand(3)), expanded(torch.zeros(3))
    (True, False)
    """
    strided = tensor.layout == torch.strided
    return strided and any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def norms(tensors: Sequence[Tensor], order: float = 2) -> Tensor:
    """The norm of every tensor, (L,), on the first one's device and in its unit; 0 for one without numbers.

    Args:
        order: 1, 2, or inf for the largest absolute value.

    >>> norms([torch.tensor([[3.0, -4.0]]), torch.tensor(2.0)])
    tensor([5., 2.])
    """
    filled = [tensor if tensor.numel() > 0 else tensor.new_zeros(1) for tensor in tensors]
    scalar = order == math.inf and filled[0].is_cpu  # where torch's norm looks at one number at a time
    found = [t.abs().amax() for t in filled] if scalar else torch._foreach_norm(filled, order)
    return torch.stack([norm.to(found[0].device) for norm in found])


def bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views of the numbers as integers of their size: times 0 they are 0, where NaN times 0 is NaN.

    >>> x = torch.tensor([1.0, torch.nan])
    >>> _ = torch._foreach_mul_(bits([x]), torch.tensor(0))
    >>> x
    tensor([0., 0.])
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    real = (torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors)
    return [tensor.view(integers[tensor.itemsize]) for tensor in real]


# Below, every norm is taken over the second dimension of a matrix: a row is whatever has a radius of its own.


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(*tensor.shape[:1] or [1], math.prod(tensor.shape[1:]))


def _joined(tensors: Weights) -> Tensor:
    if not tensors:
        raise ValueError("weights: expected at least one tensor, got none")
    return torch.cat([tensor.flatten() for tensor in tensors.values()])[None]


def _sizes(like: Weights, centre: Weights, offset: float) -> Tensor:
    return _joined({name: centre[name] for name in like}).abs() + offset


def _split(row: Tensor, like: Weights) -> dict[str, Tensor]:
    pieces = torch.split(row[0], [tensor.numel() for tensor in like.values()])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def _norm(rows: Tensor, order: float = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, ord=order, dim=1, keepdim=True)
    return norm


def _usable(rows: Tensor) -> Tensor:
    """The rows; 0 where a row is not finite."""
    return torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)


def _unit(rows: Tensor, order: float = 2) -> Tensor:
    """Each row divided by its norm; 0 where the row is zero or not finite."""
    largest = rows.abs().amax(1, keepdim=True)
    usable = (largest > 0) & (largest < math.inf)  # false for NaN, too
    scaled = rows / largest  # first, or the squares of a tiny gradient underflow and a huge one's overflow
    return torch.where(usable, scaled / _norm(scaled, order), 0)


def _shrink(rows: Tensor, limit: Tensor | float, order: int = 2) -> Tensor:
    norm = _norm(rows, order)
    return torch.where(norm > limit, rows * (limit / norm), rows)


def _lowered(rows: Tensor, caps: Tensor, limit: float) -> Tensor:
    """min(max(rows - t, 0), caps), 0 <= caps <= rows, which sums to `limit`; the caps themselves if those do not exceed
    it.

    As t grows, an entry begins to fall at rows - caps and ends at rows; between these points, 2 D in a row, the sum is
    linear in t.
    """
    points, order = torch.cat([rows - caps, rows], 1).sort(1)
    falling = torch.where(order < rows.shape[1], 1.0, -1.0).to(rows).cumsum(1)  # entries that fall after each point
    drops = falling * points.diff(dim=1, append=points[:, -1:])
    sums = caps.sum(1, keepdim=True) - drops.cumsum(1) + drops  # at each point
    k = (sums > limit).sum(1, keepdim=True).sub(1).clamp(min=0)  # the last above
    t = points.gather(1, k) + (sums.gather(1, k) - limit) / falling.gather(1, k).clamp(min=1)
    return (rows - t).clamp(min=0).minimum(caps)


def _sample_rows(like: Tensor, generator: Generator, surface: bool) -> Tensor:
    """A point of the unit sphere per row, or of the unit ball."""
    return _spread(_unit(normal(like, generator)), generator, surface, like.shape[1])


def _spread(directions: Tensor, generator: Generator, surface: bool, dimensions: int) -> Tensor:
    """Points of a sphere, or the same at the distance u^(1/d) from 0 that the volume of balls asks for."""
    if surface:
        return directions
    # in fp64, since a power may differ in its last digit with the place that its row has in a batch
    length = uniform(directions[:, :1], generator).double() ** (1 / dimensions)
    return directions * length.to(directions.dtype)


def _clamp_to_box(displacement: Tensor, centre: Tensor, box: Range) -> Tensor:
    return displacement if box is None else displacement.clamp(box[0] - centre, box[1] - centre)
