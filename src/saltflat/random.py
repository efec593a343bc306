"""Random numbers that are asked for explicitly, and that can belong to an example instead of to a batch.

`Generator` is what every drawing function of the library takes: a `torch.Generator` (draws follow each other, so they
depend on batch size and order), a `PerExample` (row i's draws depend on nothing but the seed, the example's id and the
number of the draw), `Rows` of a batch that another generator draws for, or None (torch's global one).

A counter-based generator is a hash of a counter, computed in int64, where torch wraps around as unsigned arithmetic
does.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (counters); Steele, Lea, Flood, OOPSLA
2014 (the hash is the finaliser of their SplitMix64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed integer
# Of a uniform number: the resolution of fp32, so that draws are equal in every precision and never round up to 1
BITS = 24


class PerExample:
    """Draws that belong to examples: equal for an example whatever batch, order, shard or device it stands in.

    Args:
        seed: any integer.
        ids: (N,) int64, one identity per row of the tensors that will be drawn.

    Each call of `uniform` or `normal` counts as one draw and advances `draws`. Devices agree on uniform numbers to the
    bit, on normal ones to rounding.

    Raises: ValueError for ids that are not (N,) int64.

    >>> ids = torch.tensor([7, 3])
    >>> alone, together = PerExample(0, ids[1:]), PerExample(0, ids)
    >>> torch.equal(uniform(torch.zeros(1, 5), alone)[0], uniform(torch.zeros(2, 5), together)[1])
    True
    """

    def __init__(self, seed: int, ids: Tensor) -> None:
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids: expected int64 of shape (N,), got {ids.dtype} of shape {tuple(ids.shape)}")
        self.seed, self.ids, self.draws = seed, ids, 0

    def rows(self, kept: Tensor) -> PerExample:
        """The same draws from here on, for some of the examples: `kept` are indices into `ids`."""
        part = PerExample(self.seed, self.ids[kept.to(self.ids.device)])
        part.draws = self.draws
        return part

    def bits(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform integers in [0, 2**24) of shape (N, ...); one draw. ValueError for a shape of other than N rows."""
        if len(shape) == 0 or shape[0] != len(self.ids):
            raise ValueError(f"shape: the first dimension must be the {len(self.ids)} ids, got {tuple(shape)}")
        self.draws += 1
        row = _mix(_mix(self.ids.to(device)) ^ derived_seed(self.seed, self.draws))
        column = torch.arange(1, math.prod(shape[1:]) + 1, device=device)
        hashed = _mix(row[:, None] + column * GOLDEN)
        return _shift_right(hashed, 64 - BITS).reshape(tuple(shape))


class Rows(NamedTuple):
    """Draws for some rows of a batch: those that they get when the whole batch is drawn for, as it is here.

    Args:
        of: what draws; it advances as for the whole batch.
        rows: which rows, a slice of 0 ... total - 1.
        total: how many the batch has.

    >>> whole, part = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    >>> torch.equal(uniform(torch.zeros(3, 2), whole)[1:], uniform(torch.zeros(2, 2), Rows(part, slice(1, 3), 3)))
    True
    """

    of: Generator
    rows: slice
    total: int

    def taken(self, draw: Callable[[Tensor, Generator], Tensor], like: Tensor) -> Tensor:
        """Those rows of what is drawn for all, of the shape of `like`, (rows, ...)."""
        return draw(like.new_empty((self.total, *like.shape[1:])), self.of)[self.rows].view(like.shape)


Generator = torch.Generator | PerExample | Rows | None


def base(generator: Generator) -> torch.Generator | PerExample | None:
    """What draws for all rows of all batches: for what belongs to none of them, weights."""
    while isinstance(generator, Rows):
        generator = generator.of
    return generator


def uniform(like: Tensor, generator: Generator = None) -> Tensor:
    """Uniform numbers in [0, 1), of the shape, dtype and device of `like`, (N, ...); advances the generator."""
    if isinstance(generator, Rows):
        return generator.taken(uniform, like)
    if isinstance(generator, PerExample):
        u = generator.bits(like.shape, like.device).to(_wide(like.dtype)).div(2**BITS).to(like.dtype)
        return u.clamp(max=1 - torch.finfo(like.dtype).eps / 2)  # half precision may have rounded up to 1
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def normal(like: Tensor, generator: Generator = None) -> Tensor:
    """Standard normal numbers, of the shape, dtype and device of `like`, (N, ...); advances the generator (by two draws
    if `PerExample`).

    `PerExample` uses Box and Muller's sqrt(-2 log u1) cos(2 pi u2) with u1 in (0, 1], so no number exceeds 5.8 in
    absolute value.
    """
    if isinstance(generator, Rows):
        return generator.taken(normal, like)
    if isinstance(generator, PerExample):
        dtype = _wide(like.dtype)
        u1 = generator.bits(like.shape, like.device).to(dtype).add(1).div(2**BITS)
        u2 = generator.bits(like.shape, like.device).to(dtype).div(2**BITS)
        return u1.log().mul(-2).sqrt().mul(u2.mul(2 * math.pi).cos()).to(like.dtype)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def derived_seed(seed: int, *stream: int) -> int:
    """A seed of its own for every stream of random numbers (purpose, epoch, rank, ...), far from those of its
    neighbours.

    >>> derived_seed(0, 1) != derived_seed(1, 0) != derived_seed(0, 1, 0)
    True
    """
    value = _mix_integer(seed)
    for number in (len(stream), *stream):
        value = _mix_integer(value + number)
    return value >> 1  # torch takes seeds below 2**63


def seeded(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator on `device`, seeded with `derived_seed(seed, *stream)`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, *stream))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # which holds integers of 24 bits


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copy the sign: mask it away


def _mix(value: Tensor) -> Tensor:
    value = value + GOLDEN
    value = (value ^ _shift_right(value, 30)) * -4658895280553007687
    value = (value ^ _shift_right(value, 27)) * -7723592293110705685
    return value ^ _shift_right(value, 31)


def _mix_integer(value: int) -> int:
    """`_mix` of one Python integer, as an unsigned number."""
    mask = 2**64 - 1
    value = (value + GOLDEN) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
