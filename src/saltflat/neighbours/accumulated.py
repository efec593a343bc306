"""A batch that does not fit, in micro-batches: the step of the whole, or a cheaper one.

    L(w) = sum_c (n_c / n) L_c(w)          of n rows, n_c in micro-batch c; L_c is the mean over its rows

    v = ascent on L: all micro-batches,    then g = sum_c (n_c / n) grad L_c(w + v)       `accumulated_step`
    v_c = ascent on L_c: its own alone,    then g = sum_c (n_c / n) grad L_c(w + v_c)     `cheaply_accumulated_step`
    w <- w - lr g

The first is `double_perturbation_step` on the whole batch, up to rounding, for losses that are means over rows and
without BatchNorm in train mode, which normalises each micro-batch by itself. The second is another method, though one
that many loops have without knowing: n_c rows choose v, not n. Both ask as much of the network as the whole batch does;
the first has attacked all micro-batches before it climbs, the second is done with one before the next. One
micro-batch's graph is alive at a time.

Source: Wu, Xia, Wang, arXiv 2004.05884, for the step; that micro-batches with a v of their own are another method is
Foret et al.'s remark on m-sharpness, arXiv 2010.01412, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.balls import Weights
from saltflat.inputs import InputAdversary
from saltflat.objectives import Objective
from saltflat.parallel import unsynchronised
from saltflat.random import Generator, PerExample, Rows, base
from saltflat.step import AttackOn, Climb, Mode, Radius, Step, beside, cleared, dropping, fixing, in_mode, itself
from saltflat.weights import Ascent, Closure, Where, displaced, perturbed

Loss = Callable[[nn.Module, Any, Any, Tensor], Tensor]  # (model, x, x_adv, y) -> scalar


def accumulated_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    ball: Radius | None,
    optimizer: torch.optim.Optimizer,
    micro_batches: int,
    climb: Climb = perturbed,
    climbed: Loss | None = None,
    attack_mode: Mode = "eval",
    attack_on: AttackOn = itself,
    steps: int = 1,
    step_size: float | None = None,
    alternations: int = 1,
    step_inside: bool = False,
    where: Where | None = None,
    generator: Generator = None,
) -> Step:
    """Attack x, climb in w, step down, a micro-batch at a time: `double_perturbation_step` in less memory.

    Args:
        x, y: the whole batch; (n, ...) and (n,) or (n, C).
        micro_batches: in how many it is taken, which differ by one row at most.
        objective, climbed: means over rows.
        climb: `perturbed`, or a function that is called like it and takes a sequence of closures.
        generator: what the attack's start is drawn from, for the whole batch, once for each micro-batch; torch's global
            one (None) draws for each by itself.
        attack, ball, optimizer, attack_mode, attack_on, steps, step_size, alternations, step_inside, where: as in
            `double_perturbation_step`.

    Under DistributedDataParallel ranks exchange gradients once an ascent step and once for the descent, with the last
    micro-batch; under FSDP2 with each.

    Changes what `double_perturbation_step` changes; BatchNorm's running statistics see every micro-batch by itself. A
    batch of which one micro-batch's gradient is not finite is dropped as a whole. `Step.x_adv` is the whole batch.

    Raises: ValueError for fewer than one micro-batch, fewer than one alternation, or more without a weight adversary.

    >>> from saltflat import AT, PGD, Layerwise, Linf
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = accumulated_step(model, torch.rand(8, 4), torch.arange(8) % 2, objective=AT(), micro_batches=3,
    ...                         attack=PGD(Linf(0.1), 0.025, 10), ball=Layerwise(5e-3), optimizer=optimizer)
    >>> bool(step.perturbed_loss > step.loss), len(step.x_adv)
    (True, 8)
    """
    parts = _parts(len(y), micro_batches)
    if alternations < 1:
        raise ValueError(f"alternations: expected an integer >= 1, got {alternations!r}")
    ball = ball if ball is not None and ball.radius > 0 else None
    if ball is None and alternations > 1:
        raise ValueError(f"alternations: expected 1 without a weight adversary, got {alternations!r}")
    climb = climb if where is None else partial(climb, where=where)
    drop = dropping(model, optimizer)
    cleared(model, optimizer)

    def attacked(v: Weights, x_adv: Tensor | None) -> Tensor:
        if attack is None:
            return x
        drawing = _drawing(generator, len(y))
        with in_mode(model, attack_mode), displaced(model, v):
            network, found = attack_on(model), []
            for rows, share in parts:
                f, start = objective.inner(network, x[rows], y[rows]), None if x_adv is None else x_adv[rows]
                with drawing(rows) as draws:
                    x_c = attack(f, x[rows], start=start, generator=draws)
                found += [x_c] if share > 0 else []
        return torch.cat(found)

    def losses(of: Loss) -> list[Closure]:
        """Of micro-batches; their sum is that of the batch, and its gradient is averaged over ranks with the last."""
        each = [partial(_share, of, share, model, x[rows], x_adv[rows], y[rows]) for rows, share in parts]
        return [*(partial(_to_itself, model, loss) for loss in each[:-1]), each[-1]]

    x_adv = attacked({}, None)
    if ball is None:
        value = _descend(losses(objective.outer))
        dropped = drop()
        optimizer.step()
        return Step(value, value, x_adv, torch.zeros_like(dropped), dropped)

    v: Weights = {}
    climbs: list[Ascent] = []
    height = fixing(beside(model, optimizer), climbed or objective.outer)
    for _ in range(alternations - 1):
        with climb(model, losses(height), ball, steps=steps, step_size=step_size, start=v) as ascent:
            v = ascent.displacement
        climbs.append(ascent)
        x_adv = attacked(v, x_adv)

    up = losses(height)
    with climb(model, up, ball, steps=steps, step_size=step_size, start=v, step_inside=step_inside) as ascent:
        v = {}  # the weights stand at w + v; no copy of v is kept
        value = _descend(losses(objective.outer))
        if step_inside:
            dropped = drop()
            optimizer.step()
    if not step_inside:
        dropped = drop()
        optimizer.step()
    climbs.append(ascent)
    first = value if climbed is not None or climbs[0].value is None else climbs[0].value
    return Step(first, value, x_adv, torch.stack([done.skipped for done in climbs]).sum(), dropped)


def cheaply_accumulated_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    ball: Radius | None,
    optimizer: torch.optim.Optimizer,
    micro_batches: int,
    climb: Climb = perturbed,
    climbed: Loss | None = None,
    attack_mode: Mode = "eval",
    attack_on: AttackOn = itself,
    steps: int = 1,
    step_size: float | None = None,
    where: Where | None = None,
    generator: Generator = None,
) -> Step:
    """Attack a micro-batch, climb in w on it alone, add its gradient at w + v_c; step down, at w, after the last.

    Args: as in `accumulated_step`; without `step_inside`, since the last v_c is not that of the others, and without
        alternations.

    `Step.loss` and `Step.perturbed_loss` are means over the batch, the latter each at its own w + v_c; `skipped` counts
    tensors over all ascents. Under DistributedDataParallel, v_c climbs the loss of all ranks' c-th micro-batches, and
    ranks exchange gradients once for each.

    >>> from saltflat import AT, PGD, Layerwise, Linf
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = cheaply_accumulated_step(model, torch.rand(8, 4), torch.arange(8) % 2, objective=AT(), micro_batches=3,
    ...                                 attack=PGD(Linf(0.1), 0.025, 10), ball=Layerwise(5e-3), optimizer=optimizer)
    >>> bool(step.perturbed_loss > step.loss), len(step.x_adv)
    (True, 8)
    """
    parts, drawing = _parts(len(y), micro_batches), _drawing(generator, len(y))
    ball = ball if ball is not None and ball.radius > 0 else None
    climb = climb if where is None else partial(climb, where=where)
    drop = dropping(model, optimizer)
    cleared(model, optimizer)
    others, at_w, away, attacks, skipped = beside(model, optimizer), [], [], [], []

    for number, (rows, share) in enumerate(parts, 1):
        x_c, y_c = x[rows], y[rows]
        x_adv = x_c
        if attack is not None:
            with in_mode(model, attack_mode), drawing(rows) as draws:
                x_adv = attack(objective.inner(attack_on(model), x_c, y_c), x_c, generator=draws)
        attacks += [x_adv] if share > 0 else []
        loss = partial(_share, objective.outer, share, model, x_c, x_adv, y_c)
        descent = loss if number == len(parts) else partial(_to_itself, model, loss)
        if ball is None:
            away.append(_descend([descent]))
            continue
        height = loss if climbed is None else partial(climbed, model, x_c, x_adv, y_c)
        with climb(model, fixing(others, height), ball, steps=steps, step_size=step_size) as ascent:
            away.append(_descend([descent]))
        at_w.append(away[-1] if climbed is not None or ascent.value is None else ascent.value)
        skipped += [ascent.skipped] if share > 0 else []

    dropped = drop()
    optimizer.step()
    value = torch.stack(away).sum()
    first = torch.stack(at_w).sum() if at_w else value
    counted = torch.stack(skipped).sum() if skipped else torch.zeros_like(dropped)
    return Step(first, value, torch.cat(attacks), counted, dropped)


def _parts(n: int, micro_batches: int) -> list[tuple[slice, float]]:
    """Rows of n, and their share of the mean. Where they do not suffice, some are taken again and count nothing, since
    forwards of sharded weights have to be as many on every rank.

    >>> _parts(5, 2)
    [(slice(0, 2, None), 0.4), (slice(2, 5, None), 0.6)]
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches: expected an integer >= 1, got {micro_batches!r}")
    cuts = [n * i // micro_batches for i in range(micro_batches + 1)]
    return [(slice(a, b) if a < b else slice(0, 1), (b - a) / n) for a, b in pairwise(cuts)]


def _share(of: Loss, share: float, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    return share * of(model, x, x_adv, y)


def _to_itself(model: nn.Module, loss: Closure) -> Tensor:
    with unsynchronised(model):
        return loss()


def _descend(losses: Sequence[Closure]) -> Tensor:
    """The sum; adds its gradient to `.grad`, one graph after the other."""
    values = []
    for loss in losses:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        values.append(value.detach())
    return torch.stack(values).sum()


def _drawing(generator: Generator, n: int) -> Callable[[slice], AbstractContextManager[Rows]]:
    """rows -> a block in which draws for them are those for all n from here on, however often and for whichever rows it
    is asked. After the first block the generator stands where those n would have left it, after others where it stood
    before them, so that what else is drawn from it goes on. Torch's global generator goes on always.
    """
    of = base(generator)
    first = _place(of)
    entered: list[slice] = []

    @contextmanager
    def drawing(rows: slice) -> Iterator[Rows]:
        here = _place(of)
        first()
        yield Rows(generator, rows, n)
        if entered:
            here()
        entered.append(rows)

    return drawing


def _place(of: torch.Generator | PerExample | None) -> Callable[[], object]:
    """Where a generator stands, as what puts it there again."""
    if isinstance(of, PerExample):
        return partial(setattr, of, "draws", of.draws)
    return (lambda: None) if of is None else partial(of.set_state, of.get_state())
