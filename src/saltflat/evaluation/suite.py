"""Suites: attacks in an order, and what became of every example under them.

    example i is robust in a column  <=>  argmax z(x_i) = y_i, and no attack of the column finds x' with another argmax

A `Column` is one number of a table: a chain of attacks, of which each is given those examples only that all before it
have left. `standard`, `fast` and `paper` are the usual ones.

    standard   APGD-CE, APGD-T, FAB-T, Square             AutoAttack's attacks, budgets and order
    fast       APGD-CE, APGD-T                            which decided 8 of 9 published AutoAttack logs of AWP alone
    paper      FGSM, PGD-20, PGD-100, CW, SPSA, standard  the columns of AWP's tables, each on all examples

Targeted attacks are one attack a target class, so that survivors are packed into full batches again in between. What is
drawn depends on the seed, the attack and the example, and on nothing else: not on batches, their order, or the column
an attack stands in. The verdicts are the record; accuracies are derived from them.

Sources: Croce and Hein, arXiv 2003.01690 (AutoAttack); Wu, Xia, Wang, arXiv 2004.05884 (the columns).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saltflat import parallel
from saltflat.balls import L1, InputBall
from saltflat.data.images import to_float
from saltflat.evaluation.accuracy import right
from saltflat.evaluation.apgd import APGD, TargetedAPGD
from saltflat.evaluation.fab import TargetedFAB
from saltflat.evaluation.ratios import dlr
from saltflat.evaluation.restarts import Restarted
from saltflat.evaluation.search import Attack, Logits, find, is_cut
from saltflat.evaluation.sparse_apgd import SparseAPGD, TargetedSparseAPGD
from saltflat.evaluation.spsa import SPSA
from saltflat.evaluation.square import Square
from saltflat.inputs import FGSM, PGD
from saltflat.lean.network import lean
from saltflat.objectives import ce, margin
from saltflat.random import PerExample, derived_seed
from saltflat.step import in_mode

T = TypeVar("T")
R = TypeVar("R")
TARGETS = 9  # wrong classes that AutoAttack's targeted attacks try
SURVIVED = -1  # in `Verdicts.by`
NATURALLY = 0
# bf16 rounds to 8 bits and fp16 to 11; some twenty layers of it move logits by this much of the largest, seldom more
SLACK = {torch.bfloat16: 0.02, torch.float16: 0.004}


@dataclass(frozen=True)
class Stage:
    """One attack of a column.

    Attributes:
        name: what tables call it; consecutive stages of one name are one row.
        attack: what is run.
        cost: forwards it takes for an example that it does not fool; a gradient counts as one more. Fewer, where the
            model has no class of that rank; more, where half precision has to ask again.
        rank: of the target class, if it has one, or of the start; stages of one name differ in it.
        precise: it must be given logits in full precision.
    """

    name: str
    attack: Attack
    cost: int
    rank: int = 0
    precise: bool = False

    @property
    def stream(self) -> int:
        """Of its random numbers, which are the same in whatever column it stands."""
        return zlib.crc32(f"{self.name} {self.rank}".encode())


@dataclass(frozen=True)
class Column:
    """A chain of attacks under one name; without any, plain accuracy."""

    name: str
    stages: tuple[Stage, ...] = ()


def fgsm(ball: InputBall) -> Column:
    """One step of the ball's radius from x itself, on cross-entropy."""
    return Column("fgsm", (Stage("fgsm", Restarted(FGSM(ball)), 3 + is_cut(ball)),))


def pgd(ball: InputBall, steps: int, step_size: float, restarts: int = 1, loss: Any = ce) -> Column:
    """`pgd-20`, or `cw-20` on the margin; `pgd-100x10` with ten restarts."""
    kind = "cw" if loss is margin else "pgd"
    name = f"{kind}-{steps}" + (f"x{restarts}" if restarts > 1 else "")
    attack = Restarted(PGD(ball, step_size, steps), loss, restarts)
    return Column(name, (Stage(name, attack, restarts * (2 * steps + 1 + is_cut(ball))),))


def apgd_ce(ball: InputBall, steps: int = 100, restarts: int = 1) -> Column:
    """APGD on cross-entropy; each of the restarts is a stage of its own. In L1, the sparse form."""
    attack, cost = _ascent(ball, ce, steps), _cost_of_ascent(ball, steps)
    return Column("apgd-ce", tuple(Stage("apgd-ce", attack, cost, start) for start in range(restarts)))


def apgd_dlr(ball: InputBall, steps: int = 100) -> Column:
    """APGD on the difference-of-logits ratio, untargeted. In L1, the sparse form."""
    return Column("apgd-dlr", (Stage("apgd-dlr", _ascent(ball, dlr, steps), _cost_of_ascent(ball, steps)),))


def apgd_t(ball: InputBall, steps: int = 100, targets: int = TARGETS) -> Column:
    """APGD on the targeted ratio, towards the likeliest wrong class, the next, and so on: a stage for each of the
    targets, as far as there are classes. In L1, the sparse form.
    """
    cost = _cost_of_ascent(ball, steps) + 1  # the choice of the class

    def towards(rank: int) -> Stage:
        if isinstance(ball, L1):
            return Stage("apgd-t", TargetedSparseAPGD(ball, rank, steps=steps), cost, rank)
        return Stage("apgd-t", TargetedAPGD(ball, rank, steps=steps), cost, rank)

    return Column("apgd-t", tuple(map(towards, range(1, targets + 1))))


def fab_t(ball: InputBall, steps: int = 100, targets: int = TARGETS) -> Column:
    """FAB towards one wrong class after the other, a stage for each of the targets."""
    ranks, cost = range(1, targets + 1), 2 * steps + 2
    return Column("fab-t", tuple(Stage("fab-t", TargetedFAB(ball, rank, steps), cost, rank) for rank in ranks))


def square(ball: InputBall, queries: int = 5000) -> Column:
    """Square, which asks for no gradient, with so many queries an example."""
    return Column("square", (Stage("square", Square(ball, queries), queries + 1),))


def spsa(ball: InputBall, steps: int = 100, samples: int = 256) -> Column:
    """SPSA, which estimates gradients from `samples` pairs of queries a step; in full precision always."""
    cost = steps * (2 * samples + 1) + 1
    return Column("spsa", (Stage("spsa", SPSA(ball, steps, samples), cost, precise=True),))


def chained(name: str, columns: Sequence[Column]) -> Column:
    """One column of all their attacks, in order.

    >>> from saltflat import Linf
    >>> [stage.name for stage in chained("mine", [fgsm(Linf(0.1)), square(Linf(0.1))]).stages]
    ['fgsm', 'square']
    """
    return Column(name, tuple(stage for column in columns for stage in column.stages))


def standard(ball: InputBall, *, steps: int = 100, queries: int = 5000, targets: int = TARGETS) -> Column:
    """AutoAttack's standard version; in L1, with five starts of APGD-CE and at most five targets of APGD-T."""
    parts = [_apgd_of_standard(ball, steps, targets), fab_t(ball, steps, targets), square(ball, queries)]
    return chained("standard", parts)


def fast(ball: InputBall, *, steps: int = 100, targets: int = TARGETS) -> Column:
    """The two attacks of `standard` that decide nearly always."""
    return chained("fast", [_apgd_of_standard(ball, steps, targets)])


def _apgd_of_standard(ball: InputBall, steps: int, targets: int) -> Column:
    if isinstance(ball, L1):
        return chained("apgd", [apgd_ce(ball, steps, restarts=5), apgd_t(ball, steps, min(targets, 5))])
    return chained("apgd", [apgd_ce(ball, steps), apgd_t(ball, steps, targets)])


def paper(ball: InputBall, step_size: float | None = None) -> tuple[Column, ...]:
    """The columns of AWP's tables; steps of PGD and CW are a quarter of the radius, as published, unless told.

    Not in L1, where PGD, SPSA and FGSM are a sham or undefined.
    """
    size = ball.radius / 4 if step_size is None else step_size
    return (
        fgsm(ball),
        pgd(ball, 20, size),
        pgd(ball, 100, size),
        pgd(ball, 100, size, loss=margin),
        spsa(ball),
        standard(ball),
    )


def _ascent(ball: InputBall, loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> Attack:
    return SparseAPGD(ball, loss, steps) if isinstance(ball, L1) else APGD(ball, loss, steps)


def _cost_of_ascent(ball: InputBall, steps: int) -> int:
    """In L1 it begins in three balls, or in one if steps are few, and looks at a corner in the end; in L2, at what is
    stretched.
    """
    if isinstance(ball, L1):
        return 2 * (steps + (3 if steps > 2 else 1)) + 1
    return 2 * (steps + 1) + is_cut(ball)


@dataclass(frozen=True)
class Verdicts:
    """What became of each example in one column, on the CPU; rows are written as they are decided.

    Attributes:
        by: (N,) int64: k if the column's k-th stage (from 1) fooled it, 0 if it is wrong without an attack, -1 if it
            survived (or was not tried yet).
        iteration: (N,) int64, at which trial of that stage; -1 if none did.
        margin: (N,) max_{k != y} z_k - z_y in full precision where it is wrong, else the largest that was seen.
    """

    by: Tensor
    iteration: Tensor
    margin: Tensor

    def robust(self, stages: int | None = None) -> Tensor:
        """(N,) bool: right, also after the first so many stages (None: after all)."""
        survived = self.by == SURVIVED
        return survived if stages is None else survived | (self.by > stages)


@dataclass(frozen=True)
class Done:
    """A batch is decided, or one of every rank. `evaluate` yields one after each, and takes the last one to go on from.

    Attributes:
        verdicts: by column's name, those of all batches so far; the same tensors in every `Done` of one evaluation.
        column, stage, batches: how far it is: so many batches of this stage of this column are done. Stage 0 of column
            0 are the images as they are.
        survivors: of the column, as yet.
        spent, left: cost of what is done, and of what is left if nobody else is fooled, in forwards.
    """

    verdicts: Mapping[str, Verdicts]
    column: int
    stage: int
    batches: int
    survivors: int
    spent: int
    left: int


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    columns: Sequence[Column],
    *,
    batch_size: int = 256,
    seed: int = 0,
    ids: Tensor | None = None,
    dtype: torch.dtype | None = None,
    padded: bool = False,
    after: Done | None = None,
    shared: bool = False,
) -> Iterator[Done]:
    """Attack every example by every column, a batch at a time.

    Args:
        model: evaluated in eval mode on its own device; modes come back before a batch is yielded, nothing is changed.
        x: (N, ...) uint8 images, or numbers in the balls' box; may stay on another device than the model.
        y: (N,) int64 classes.
        columns: of different names.
        batch_size: examples at a time.
        seed: of everything that is drawn.
        ids: (N,) int64, who the examples are, for whatever is drawn; default 0 ... N - 1.
        dtype: `torch.bfloat16` or `torch.float16` lets attacks run under autocast; what looks fooled, or nearly so, is
            asked again in full precision, which alone decides. Attacks that cannot do with less are not affected.
        padded: all forwards have `batch_size` rows, so that outcomes are equal to the bit in whatever order and company
            an example comes.
        after: go on after this batch; its verdicts are written on.
        shared: all ranks (`saltflat.parallel`) ask for the same, and take a batch each at a time. Batches are cut as
            one process cuts them, survivors of all ranks into full ones before every attack, so that outcomes are one
            process's to the bit, and an evaluation can go on with another number of ranks. Fewer batches than ranks
            leave ranks idle.

    Yields: `Done` after each batch; if shared, after one of each rank.

    Raises ValueError for columns of one name, for x outside of the box, for uint8 images with another box than
    (0, 1), for shapes that do not fit, for y that are no class of the model, for SPSA on a model in half precision, and
    for a dtype in which its logits overflow.

    >>> from saltflat import Linf
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1], [0.1, 0.2]]), torch.tensor([0, 0, 0])
    >>> *_, last = evaluate(model, x, y, [standard(Linf(0.1), steps=10, queries=20)])
    >>> last.verdicts["standard"].by
    tensor([ 1, -1,  0])
    """
    _check(x, y, columns)
    _check_precision(model, columns)
    ids, y = torch.arange(len(y)) if ids is None else ids.cpu(), y.cpu()
    _check_settings(y, columns, batch_size, ids, dtype, after)
    networks: tuple[Logits, ...] = (model, lean(model), lean(model, dtype))
    exact, precise, quick = (_padded(network, batch_size) if padded else network for network in networks)
    verdicts = _unknown(columns, len(y)) if after is None else after.verdicts
    reached = (0, -1, 0) if after is None else (after.column, after.stage, after.batches)
    spent = 0 if after is None else after.spent

    width, dealt = (parallel.ranks(), parallel.shared_out) if shared else (1, _one_by_one)

    def turns(rows: Tensor, c: int, k: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Batches that are not done, as many at a time as are done at once, and the number of the last of them."""
        parts = torch.split(rows, batch_size)
        first = sum((c, k, number) <= reached for number in range(1, len(parts) + 1))
        for number in range(first, len(parts), width):
            some = list(parts[number : number + width])
            yield number + len(some), some

    def answered(rows: Tensor) -> Tensor:
        images = prepared(x[rows.to(x.device)], model)
        with in_mode(model, "eval"), torch.no_grad():
            z = exact(images).cpu()
            if dtype is not None:
                _check_range(quick(images), z, dtype)
        _check_classes(y, z.shape[1])
        return z

    def tried(stage: Stage, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = prepared(x[rows.to(x.device)], model)
        generator = PerExample(derived_seed(seed, stage.stream), ids[rows].to(images.device))
        reduced = dtype is not None and not stage.precise
        with in_mode(model, "eval"):  # and no longer: between batches, the model is its owner's
            found = find(
                stage.attack,
                quick if reduced else precise,
                images,
                y[rows].to(images.device),
                exact=exact,
                slack=SLACK[dtype] if reduced and dtype else 0.0,
                generator=generator,
            )
        return found.fooled.cpu(), found.iteration.cpu(), found.margin.float().cpu()

    for number, some in turns(torch.arange(len(y)), 0, 0):
        for rows, z in zip(some, dealt(some, answered), strict=True):
            _write_clean(verdicts, rows, z, y[rows])
            spent += len(rows)
        untried = len(y) - 1 - int(some[-1][-1])
        yield Done(verdicts, 0, 0, number, *_stand(verdicts, columns, 0, 0, spent, untried))
    for c, column in enumerate(columns):
        of = verdicts[column.name]
        for k, stage in enumerate(column.stages, start=1):
            # also those that it fooled before an interruption, so that batches are cut as they were
            standing = (of.robust() | (of.by == k)).nonzero()[:, 0]
            for number, some in turns(standing, c, k):
                found = dealt(some, partial(tried, stage))
                for rows, (fooled, iteration, largest) in zip(some, found, strict=True):
                    of.by[rows[fooled]] = k
                    of.iteration[rows[fooled]] = iteration[fooled]
                    of.margin[rows] = torch.maximum(of.margin[rows], largest)
                    spent += stage.cost * len(rows)
                untried = len(standing) - min(number * batch_size, len(standing))
                yield Done(verdicts, c, k, number, *_stand(verdicts, columns, c, k, spent, untried * stage.cost))


def _one_by_one(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    return [work(item) for item in items]


def prepared(x: Tensor, model: nn.Module) -> Tensor:
    """uint8 images as numbers in [0, 1], and any x where the model is, in its dtype."""
    like = next(iter(model.parameters()), torch.empty(0))
    x = x.to(like.device)
    return x.to(like.dtype) if x.is_floating_point() else to_float(x, like.dtype)


def _check(x: Tensor, y: Tensor, columns: Sequence[Column]) -> None:
    if len(x) == 0 or y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(
            f"y: expected int64 classes of shape ({len(x)},), one for each of at least one input, got {y.dtype} of "
            f"shape {tuple(y.shape)}"
        )
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"x: expected uint8 or floating point numbers, got {x.dtype}")
    balls = {stage.attack.ball for column in columns for stage in column.stages}
    if too_small := [ball for ball in balls if not ball.radius > 0]:
        raise ValueError(f"radius: expected a number > 0, got {too_small[0].radius:g}")
    smallest, largest = (end.item() for end in x.aminmax()) if x.is_floating_point() else (0.0, 1.0)
    for low, high in {ball.box for ball in balls if ball.box is not None}:
        if not x.is_floating_point() and (low, high) != (0.0, 1.0):
            raise ValueError(f"x: uint8 is taken as numbers in (0, 1), expected floating point in ({low:g}, {high:g})")
        if not (low <= smallest and largest <= high):  # NaN is not inside, either
            raise ValueError(f"x: expected numbers in the box ({low:g}, {high:g}), got {smallest:g} to {largest:g}")
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"x: expected finite numbers, got {smallest:g} to {largest:g}")


def _check_precision(model: nn.Module, columns: Sequence[Column]) -> None:
    dtype = next(iter(model.parameters()), torch.empty(0)).dtype
    if dtype.itemsize < 4 and (names := [s.name for column in columns for s in column.stages if s.precise]):
        raise ValueError(f"model: expected fp32 weights for {names[0]}, whose differences {dtype} rounds away")


def _check_settings(
    y: Tensor, columns: Sequence[Column], batch_size: int, ids: Tensor, dtype: torch.dtype | None, after: Done | None
) -> None:
    names = [column.name for column in columns]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"columns: expected at least one, and names that differ, got {names}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    if ids.shape != y.shape or ids.dtype != torch.int64:
        raise ValueError(f"ids: expected int64 of shape ({len(y)},), got {ids.dtype} of shape {tuple(ids.shape)}")
    if dtype is not None and dtype not in SLACK:
        raise ValueError(f"dtype: expected torch.bfloat16, torch.float16 or None, got {dtype}")
    if after is not None:
        there, n = list(after.verdicts), len(next(iter(after.verdicts.values())).by)
        if there != names or n != len(y):
            raise ValueError(
                f"after: expected verdicts of {len(y)} examples in the columns {names}, got those of {n} in {there}"
            )


def _check_range(lower: Tensor, z: Tensor, dtype: torch.dtype) -> None:
    # attacks would stand still, and the network would look robust
    if not lower.isfinite().all() and z.isfinite().all():
        raise ValueError(f"dtype: expected one that holds the network's numbers (its logits overflow), got {dtype}")


def _check_classes(y: Tensor, classes: int) -> None:
    smallest, largest = (int(end) for end in y.aminmax())
    if smallest < 0 or largest >= classes:
        raise ValueError(f"y: expected classes in 0 ... {classes - 1}, got {smallest} to {largest}")


def _unknown(columns: Sequence[Column], n: int) -> dict[str, Verdicts]:
    nowhere = Verdicts(torch.full((n,), SURVIVED), torch.full((n,), -1), torch.full((n,), -torch.inf))
    return {c.name: Verdicts(nowhere.by.clone(), nowhere.iteration.clone(), nowhere.margin.clone()) for c in columns}


def _write_clean(verdicts: Mapping[str, Verdicts], rows: Tensor, z: Tensor, y: Tensor) -> None:
    wrong = rows[~right(z, y)]
    for of in verdicts.values():
        of.margin[rows] = margin(z, y).float()
        of.by[wrong], of.iteration[wrong] = NATURALLY, 0


def _stand(
    verdicts: Mapping[str, Verdicts], columns: Sequence[Column], c: int, k: int, spent: int, of_stage: int
) -> tuple[int, int, int]:
    """Survivors, what is spent, what is left."""
    survivors = [int(verdicts[column.name].robust().sum()) for column in columns]
    ahead = [stage.cost * survivors[c] for stage in columns[c].stages[k:]]
    ahead += [
        stage.cost * count
        for column, count in zip(columns[c + 1 :], survivors[c + 1 :], strict=True)
        for stage in column.stages
    ]
    return survivors[c], spent, of_stage + sum(ahead)


def _padded(logits: Logits, size: int) -> Logits:
    """The same network, always on `size` rows: how a sum is cut into parts depends on their number."""

    def fixed(x: Tensor) -> Tensor:
        missing = -len(x) % size
        whole = torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])]) if missing else x
        return torch.cat([logits(part) for part in torch.split(whole, size)])[: len(x)]

    return fixed
