"""Square: random search that repaints one window of the perturbation a query, and keeps what raises the margin.

    x'_t+1 = u if f(u) > f(x'_t), else x'_t;    f = max_{k != y} z_k - z_y;    u = x'_t but for p_t H W pixels

p_t starts at p and is halved after 0.1, 0.5, 2, 5, 10, 20, 40, 60 and 80 % of the queries. With v = x' - x, a window is
repainted so that u stays on the surface of the ball:

    L-inf    v = +-eps, one sign a channel; at first, vertical stripes
    L2       v = b (e + v / ‖v‖) / ‖e + v / ‖v‖‖ for each channel, where e is a bump and its negative side by side, and
             b the norm it had there and in a second window, which becomes 0, with its share of what is left of eps; at
             first, a grid of such e
    L1       as L2, with steeper bumps and norms in L1; then v is projected

No gradient is computed. A query that fails costs no pass over the image in L-inf and L2: the window is put back.

Source: Andriushchenko, Croce, Flammarion, Hein, "Square attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, arXiv 1912.00049; its L1 form in Croce and Hein, arXiv 2103.01208; the schedule, the start
and the budget of AutoAttack's standard version.

Deviation: windows, signs and forms of e are drawn for each example; AutoAttack's are one for the whole batch, but for
the signs in L2 and L1.
Deviation: windows lie anywhere; AutoAttack's never touch the last row and the last column.
Deviation: AutoAttack rescales v to the norm eps after each repainting in L2, which changes nothing unless
e + v / ‖v‖ = 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saltflat.balls import L2, InputBall, Linf
from saltflat.evaluation.search import Logits, Search, Trial, keep, rows_of
from saltflat.lean.network import Lean
from saltflat.lean.windows import Windows
from saltflat.objectives import margin
from saltflat.random import Generator, uniform

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 queries
BLOCK = 100  # queries whose random numbers are drawn together


@dataclass(frozen=True)
class Square:
    """Maximise the margin in `ball` by random search.

    Args:
        ball: `Linf`, `L2` or `L1`; any other is searched as `L1` is, by projecting.
        queries: forwards after the first.
        p: the part of the pixels that the first windows cover, in (0, 1].

    Inputs (N, C, H, W) have square windows. Inputs of any other shape are vectors (N, D): one row of D pixels, whose
    windows are segments of p_t D numbers. Each window holds all channels. The tensor of a trial is valid until the next
    one is asked for, which is written in its place. It draws at the start, and once a block of at most 100 queries.

    On linear models with random weights and up to 200 numbers, 5000 queries gain 99 % of what the ball can give in
    L-inf, but 95 to 60 % in L2, the less the more numbers there are, because bumps are no single pixels.

    >>> from saltflat import Linf
    >>> from saltflat.evaluation import find
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> find(Square(Linf(0.1), queries=20), model, x, y).fooled
    tensor([ True, False])
    """

    ball: InputBall
    queries: int = 5000
    p: float = 0.8

    def __post_init__(self) -> None:
        if self.queries < 0:
            raise ValueError(f"queries: expected a number >= 0, got {self.queries!r}")
        if not 0 < self.p <= 1:
            raise ValueError(f"p: expected a number in (0, 1], got {self.p!r}")

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, *, generator: Generator = None) -> Search:
        shape, move = x.shape[1:], _move(self.ball)
        canvas = _Canvas(*shape) if x.ndim == 4 else _Canvas(1, 1, shape.numel())
        constants, x_adv = move.start(x.reshape(len(x), -1), canvas, generator)
        z = _forward(logits, x_adv, shape)
        kept = yield Trial(x_adv.view(-1, *shape), z)
        s = _State(y, margin(z, y), x_adv, constants, margin(z, y))
        s, generator = keep(s, kept), generator if kept is None else rows_of(generator, kept)
        windows = _windows(logits, self.ball) if x.ndim == 4 else None
        side, near = 0, None
        for now, count in _blocks(self.queries, self.p, canvas, move.least):
            window = _window(now, canvas, move.power, x)
            paints = _paints(window, canvas, count, s.x_adv, generator)
            s = s._replace(mass=move.mass(s))
            if now != side and windows is not None:
                near = None  # before the next maps are kept
                near = windows.near(s.x_adv.view(-1, *shape), window.height, window.width)
            side = now
            for t in range(count):
                paint = _Paint(*(tensor[:, t] for tensor in paints))
                strokes, mass = move.paint(s, window, paint)
                if near is None:
                    z = _forward(logits, s.x_adv, shape)
                else:
                    z = near.ask(strokes[0].new.view(-1, shape[0], window.height, window.width), paint.corners[:, 0])
                kept = yield Trial(s.x_adv.view(-1, *shape), z)
                f = margin(z, s.y)
                better = f > s.f
                s = _settled(s, strokes, mass, f, better)
                if near is not None:
                    near.settle(better)
                if kept is not None:
                    s, paints, generator = keep(s, kept), keep(paints, kept), rows_of(generator, kept)
                    if near is not None:
                        near.keep(kept)


class _State(NamedTuple):
    """A row per example in the search: `constants` are the move's own, `mass` is sum |v|^power."""

    y: Tensor
    f: Tensor
    x_adv: Tensor
    constants: Tensor
    mass: Tensor


class _Canvas(NamedTuple):
    """The shape of an example, whose number (c, i, j) stands at c height width + i width + j."""

    channels: int
    height: int
    width: int


class _Window(NamedTuple):
    """Height and width; where its numbers stand, (C, S), counted from its corner; the two forms of e, (2, S)."""

    height: int
    width: int
    offsets: Tensor
    bumps: Tensor


class _Paint(NamedTuple):
    """What is random in queries: two corners (M, ..., 2), the form of e (M, ...), bits for signs (M, ..., C)."""

    corners: Tensor
    turned: Tensor
    positive: Tensor


class _Stroke(NamedTuple):
    """`new` written over `old` at `places`, all (M, K); over whole rows where places is None."""

    places: Tensor | None
    new: Tensor
    old: Tensor


class _Move(Protocol):
    """What depends on the ball: the start, and how a window is repainted; rows are flat, (M, D)."""

    @property
    def power(self) -> int: ...
    @property
    def least(self) -> int: ...
    def start(self, x: Tensor, canvas: _Canvas, generator: Generator) -> tuple[Tensor, Tensor]:
        """What `constants` will be, and x'_0."""

    def mass(self, s: _State) -> Tensor: ...
    def paint(self, s: _State, window: _Window, paint: _Paint) -> tuple[list[_Stroke], Tensor]:
        """Repaints s.x_adv in place; returns what was written, in order, and the mass afterwards."""


def _move(ball: InputBall) -> _Move:
    if isinstance(ball, Linf):
        return _InCube(ball)
    return _InL2(ball) if isinstance(ball, L2) else _InL1(ball)


@dataclass(frozen=True)
class _InCube:
    """Constants are (M, 2 D): x - eps and x + eps, cut at the box."""

    ball: InputBall
    power: int = 1
    least: int = 1

    def start(self, x: Tensor, canvas: _Canvas, generator: Generator) -> tuple[Tensor, Tensor]:
        low, high = (_boxed(x + sign * self.ball.radius, self.ball) for sign in (-1, 1))
        stripes = _random((len(x), canvas.channels, 1, canvas.width), x, generator) < 0.5
        chosen = stripes.expand(-1, -1, canvas.height, -1).reshape(x.shape)
        return torch.cat([low, high], 1), torch.where(chosen, low, high)

    def mass(self, s: _State) -> Tensor:
        return s.mass

    def paint(self, s: _State, window: _Window, paint: _Paint) -> tuple[list[_Stroke], Tensor]:
        index = paint.corners[:, 0, None, None] + window.offsets
        side = paint.positive[:, :, None] * s.x_adv.shape[1]
        new = s.constants.gather(1, (index + side).flatten(1))
        return [_stroke(s.x_adv, index.flatten(1), new)], s.mass


@dataclass(frozen=True)
class _InL2:
    """Constants are x."""

    ball: InputBall
    power: int = 2
    least: int = 3

    def start(self, x: Tensor, canvas: _Canvas, generator: Generator) -> tuple[Tensor, Tensor]:
        v = _grid(x, canvas, self.power, generator)
        unit = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
        return x, _boxed(x + self.ball.radius * unit, self.ball)

    def mass(self, s: _State) -> Tensor:
        return (s.x_adv - s.constants).square().sum(1)

    def paint(self, s: _State, window: _Window, paint: _Paint) -> tuple[list[_Stroke], Tensor]:
        first, second = (paint.corners[:, i, None, None] + window.offsets for i in (0, 1))
        x, before = s.constants.gather(1, first.flatten(1)), s.x_adv.gather(1, first.flatten(1))
        x2 = s.constants.gather(1, second.flatten(1))
        erased = _stroke(s.x_adv, second.flatten(1), x2)
        rest = s.x_adv.gather(1, first.flatten(1)) - x
        v, v2, rest = ((before - x).view(first.shape), (erased.old - x2).view(first.shape), rest.view(first.shape))
        freed = (v2.square() + rest.square()).sum(2, keepdim=True)
        spare = (self.ball.radius**2 - s.mass).clamp(min=0)[:, None, None]
        budget = (spare / first.shape[1] + freed).sqrt()
        new = _boxed(x + (budget * _mixed(v, window, paint, self.power)).flatten(1), self.ball)
        painted = _stroke(s.x_adv, first.flatten(1), new)._replace(old=before)  # where they overlap, nothing is erased
        return [erased, painted], s.mass - freed.sum((1, 2)) + (new - x).square().sum(1)


@dataclass(frozen=True)
class _InL1:
    """Constants are x."""

    ball: InputBall
    power: int = 1
    least: int = 3

    def start(self, x: Tensor, canvas: _Canvas, generator: Generator) -> tuple[Tensor, Tensor]:
        return x, x + self.ball.project(_grid(x, canvas, self.power, generator), x)

    def mass(self, s: _State) -> Tensor:
        return (s.x_adv - s.constants).abs().sum(1)

    def paint(self, s: _State, window: _Window, paint: _Paint) -> tuple[list[_Stroke], Tensor]:
        first, second = (paint.corners[:, i, None, None] + window.offsets for i in (0, 1))
        x, v = s.constants, s.x_adv - s.constants
        old = v.gather(1, first.flatten(1)).view(first.shape)
        erased = _stroke(v, second.flatten(1), torch.zeros_like(old).flatten(1)).old.view(first.shape)
        rest = v.gather(1, first.flatten(1)).view(first.shape)
        freed = (erased.abs() + rest.abs()).sum(2, keepdim=True)
        spare = (self.ball.radius - s.mass).clamp(min=0)[:, None, None]
        # AutoAttack official: channels times what a channel had, of which the projection leaves the largest
        budget = spare + freed * first.shape[1]
        v.scatter_(1, first.flatten(1), (budget * _mixed(old, window, paint, self.power)).flatten(1))
        v = self.ball.project(v, x)
        whole = _Stroke(None, x + v, s.x_adv.clone())
        s.x_adv.copy_(whole.new)
        return [whole], v.abs().sum(1)


def _mixed(v: Tensor, window: _Window, paint: _Paint, power: int) -> Tensor:
    """(e + v / ‖v‖) / ‖e + v / ‖v‖‖ for each channel; v is (M, C, S)."""
    signs = (paint.positive * 2 - 1)[:, :, None].to(v.dtype)
    e = window.bumps[paint.turned][:, None] * signs + _unit(v, power)
    return _unit(e, power)


def _unit(v: Tensor, power: int) -> Tensor:
    mass = v.square() if power == 2 else v.abs()
    norm = mass.sum(2, keepdim=True)
    return v / ((norm.sqrt() if power == 2 else norm) + 1e-12)


def _windows(logits: Logits, ball: InputBall) -> Windows | None:
    """In L-inf a query changes one window, and a network may have a quicker way to tell what that does."""
    return logits.windows() if isinstance(logits, Lean) and isinstance(ball, Linf) else None


def _forward(logits: Logits, x_adv: Tensor, shape: torch.Size) -> Tensor:
    with torch.no_grad():
        return logits(x_adv.view(-1, *shape))


def _stroke(rows: Tensor, index: Tensor, new: Tensor) -> _Stroke:
    old = rows.gather(1, index)
    rows.scatter_(1, index, new)
    return _Stroke(index, new, old)


def _settled(s: _State, strokes: list[_Stroke], mass: Tensor, f: Tensor, better: Tensor) -> _State:
    """Where it is not better, what was there before; strokes that overlap are written in their order again."""
    for places, new, old in strokes:
        chosen = torch.where(better[:, None], new, old)
        if places is None:
            s.x_adv.copy_(chosen)
        else:
            s.x_adv.scatter_(1, places, chosen)
    return s._replace(f=torch.where(better, f, s.f), mass=torch.where(better, mass, s.mass))


def _boxed(x_adv: Tensor, ball: InputBall) -> Tensor:
    return x_adv if ball.box is None else x_adv.clamp(*ball.box)


def _blocks(queries: int, p: float, canvas: _Canvas, least: int) -> Iterator[tuple[int, int]]:
    """The side of the windows (length, where the canvas is a row), for how many queries: at most BLOCK at once."""
    side, count = 0, 0
    for t in range(queries):
        now = _side(p / 2 ** bisect_left(HALVED_AFTER, t * 10000 // queries), canvas, least)
        if count == BLOCK or (now != side and count > 0):
            yield side, count
            count = 0
        side, count = now, count + 1
    if count > 0:
        yield side, count


def _side(p: float, canvas: _Canvas, least: int) -> int:
    pixels = p * canvas.height * canvas.width
    side = max(round(pixels if canvas.height == 1 else pixels**0.5), least)
    if least > 1 and side % 2 == 0:
        side += 1
    return min(side, canvas.width if canvas.height == 1 else min(canvas.height, canvas.width))


def _window(side: int, canvas: _Canvas, power: int, like: Tensor) -> _Window:
    height = min(side, canvas.height)
    pixels = torch.arange(canvas.channels * canvas.height * canvas.width).view(canvas)
    offsets = pixels[:, :height, :side].flatten(1)
    return _Window(height, side, offsets.to(like.device), _bumps(height, side, power).to(like).flatten(1))


def _bumps(height: int, width: int, power: int) -> Tensor:
    """e and its other form, transposed (mirrored, where it is a segment): (2, height, width), of norm 1.

    A bump is sum_{k >= r} 1 / (k + 1)^2 (in L1, ^4) at the distance r from its middle, in the maximum norm.
    """
    halves = [_bump(length, height, power) for length in (width // 2, width - width // 2)]
    e = torch.cat([halves[0], -halves[1]])
    e = e / _norm(e, power)
    return torch.stack([e, e.T]) if height > 1 else torch.stack([e.T, e.flip(0).T])


def _bump(height: int, width: int, power: int) -> Tensor:
    ranges = [torch.arange(size) - size // 2 for size in (height, width)]
    distance = torch.maximum(ranges[0].abs()[:, None], ranges[1].abs())
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-2 if power == 2 else -4)
    bump = terms.flip(0).cumsum(0).flip(0)[distance]
    return bump / _norm(bump, power)


def _norm(v: Tensor, power: int) -> Tensor:
    return v.abs().pow(power).sum().pow(1 / power)


def _grid(x: Tensor, canvas: _Canvas, power: int, generator: Generator) -> Tensor:
    """A grid of about 5 x 5 patches e, of random sign and form, in the middle of the canvas: (M, D)."""
    c, h, w = canvas
    side = max((w if h == 1 else h) // 5, 1)
    height, width = (1 if h == 1 else min(side, w)), min(side, w)
    rows, columns = h // height, w // width
    forms = (_random((len(x), rows, columns), x, generator) < 0.5).long()
    signs = (_random((len(x), c, rows, columns), x, generator) < 0.5).to(x.dtype) * 2 - 1
    e = _bumps(height, width, power).to(x)[forms]
    patches = torch.einsum("mckl,mklij->mckilj", signs, e).reshape(len(x), c, rows * height, columns * width)
    v = x.new_zeros(len(x), *canvas)
    top, left = (h - rows * height) // 2, (w - columns * width) // 2
    v[:, :, top : top + rows * height, left : left + columns * width] = patches
    return v.flatten(1)


def _paints(window: _Window, canvas: _Canvas, count: int, x: Tensor, generator: Generator) -> _Paint:
    u = _random((len(x), count, 5 + canvas.channels), x, generator)
    i = (u[..., 0:2] * (canvas.height - window.height + 1)).long()
    j = (u[..., 2:4] * (canvas.width - window.width + 1)).long()
    bits = (u[..., 4:] < 0.5).long()
    return _Paint(i * canvas.width + j, bits[..., 0], bits[..., 1:])


def _random(shape: tuple[int, ...], x: Tensor, generator: Generator) -> Tensor:
    # fp32 whatever x is: half precision has too few places for windows
    return uniform(torch.empty(shape, dtype=torch.float32, device=x.device), generator)
