"""The evaluation behind `saltflat evaluate`: a suite of attacks, batch by batch into the run folder, with its checks.

outcomes/NAME.part           verdicts so far, after every batch; what a killed evaluation goes on from
outcomes/NAME.npz  NAME.json verdicts of all examples; accuracies, checks and settings, written last
examples/NAME.json           the first images that were fooled, to look at

Processes that torchrun started take batches in turn, and the first of them writes. What becomes of an example, and what
is written, is what one process finds, to the bit, and any number of them goes on from what any other number left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from saltflat import parallel
from saltflat.evaluation import checks, interval
from saltflat.evaluation.checks import Flag
from saltflat.evaluation.suite import Column, Done, Verdicts, evaluate, prepared
from saltflat.lab import examples as fooled
from saltflat.lab import once, record, verdicts_file
from saltflat.lab.config import BadInput
from saltflat.lab.console import CONSOLE, progress, say
from saltflat.lab.precision import exact
from saltflat.lab.subjects import Subject, chosen, identity, place
from saltflat.lab.threat import Described, columns
from saltflat.lean.network import lean

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOOKED_AT = 64  # examples that checks before the attack are made on
BLACK_BOXES = ("square", "spsa")


@dataclass(frozen=True)
class How:
    """How an evaluation is run; everything in it may move an outcome near the boundary, so it is on record.

    precision: fp32, bf16 or fp16, of the attacks. padded: all forwards have batch_size rows.
    """

    batch_size: int = 256
    seed: int = 0
    precision: str = "fp32"
    padded: bool = False


@exact()
def evaluation(of: Subject, names: Sequence[str], split: str, examples: int, how: How) -> dict[str, Any]:
    """Attack a checkpoint; the summary of the outcomes, which are written into the subject's folder.

    What was asked before, of the same weights, is read and not computed again; what was interrupted goes on.
    """
    described = columns(names, of.threat)
    x, y, rows = chosen(of, split, examples)
    asked: dict[str, Any] = {
        **identity(of, x, y),
        "split": split,
        "n": len(y),
        "settings": {**asdict(how), "mode": "eval", "weights": of.weights},
    }
    wanted = {found.column.name: found.words for found in described}
    path = place(of, "outcomes", split, {**asked, "attacks": wanted})
    there = parallel.first(lambda: _already(path, list(wanted), y))
    if there is not None:
        return there
    with once.alone(path.with_suffix(".lock")):
        flags = parallel.first(lambda: _before(of, x, y))
        done, seconds = _attacked(of, described, x, y, rows, how, path.with_suffix(".part"))

        def written() -> dict[str, Any]:
            doubts = flags + _after(of, described, done, x, y, how)
            verdicts_file.write(path.with_suffix(".npz"), verdicts_file.Kept(done, seconds), y, rows)
            fooled.keep(
                of.folder / "examples" / path.name,
                {**asked, "threat": str(of.threat)},
                of,
                [found.column for found in described],
                done.verdicts,
                (x, y, rows),
                seed=how.seed,
                dtype=PRECISIONS[how.precision],
            )
            summary = {
                **asked,
                "threat": asdict(of.threat),
                "attacks": [_row(found, done.verdicts[found.column.name]) for found in described],
                "flags": [asdict(flag) for flag in doubts],
                "seconds": round(seconds, 1),
                "environment": record.environment(*_machine(of)),
            }
            record.write_json(path, summary)
            path.with_suffix(".part").unlink(missing_ok=True)
            return {**summary, "outcomes": str(path.with_suffix(".npz"))}

        return parallel.first(written)


def _already(path: Path, wanted: Sequence[str], y: Tensor) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if not path.with_suffix(".npz").is_file():
        say(f"begins anew: the verdicts of {path} are gone")
        return None
    verdicts_file.read(path.with_suffix(".npz"), wanted, y)
    say(f"already there: {path}")
    return record.read_again(path)


def _attacked(
    of: Subject, described: Sequence[Described], x: Tensor, y: Tensor, rows: Tensor, how: How, part: Path
) -> tuple[Done, float]:
    """All verdicts, and how many seconds they took, those before an interruption among them."""
    wanted = [found.column for found in described]
    names = [column.name for column in wanted]
    kept = parallel.first(lambda: verdicts_file.read(part, names, y) if part.is_file() else None)
    if kept is not None:
        say(f"goes on after {kept.seconds:.0f} s of work: {part}")
    began = time.perf_counter() - (0.0 if kept is None else kept.seconds)
    done, named = None if kept is None else kept.done, None
    batches = evaluate(
        of.model,
        x,
        y,
        wanted,
        batch_size=how.batch_size,
        seed=how.seed,
        ids=rows,
        dtype=PRECISIONS[how.precision],
        padded=how.padded,
        after=done,
        shared=True,
    )
    try:
        with progress() as bar:
            task = bar.add_task("evaluation", total=None)
            for done in batches:
                seconds = time.perf_counter() - began
                parallel.first(partial(verdicts_file.write, part, verdicts_file.Kept(done, seconds), y, rows))
                bar.update(task, completed=done.spent, total=done.spent + done.left, description=_where(wanted, done))
                here = _attack(wanted, done)
                if named is not None and named[0] != here:
                    say(named[1])
                named = (here, f"{_where(wanted, done)}  ({_clock(seconds)})")
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last batch")
        raise
    except ValueError as error:
        if done is not None and done.stage > 0:  # the images as they are have shown what was wrong with the input
            raise
        raise BadInput(f"model: {error}") from None
    assert done is not None  # the images as they are make a batch
    if named is not None:
        say(named[1])
    return done, time.perf_counter() - began


def _attack(wanted: Sequence[Column], done: Done) -> tuple[int, str]:
    """Which attack of which column; all targets of one are one."""
    return done.column, wanted[done.column].stages[done.stage - 1].name if done.stage else "clean"


def _where(wanted: Sequence[Column], done: Done) -> str:
    """standard: apgd-t 3/9, 41 survive"""
    column = wanted[done.column]
    if done.stage == 0:
        return f"clean: {done.survivors} of {len(done.verdicts[column.name].by)} are right"
    stage = column.stages[done.stage - 1]
    alike = [other.rank for other in column.stages if other.name == stage.name]
    target = f" {stage.rank}/{max(alike)}" if stage.rank else ""
    name = column.name if column.name == stage.name else f"{column.name}: {stage.name}"
    return f"{name}{target}, {done.survivors} survive"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _before(of: Subject, x: Tensor, y: Tensor) -> list[Flag]:
    """What can be said before any attack, on the first examples."""
    some = prepared(x[:LOOKED_AT], of.model)
    if of.threat.eps <= 0:
        return []
    flags = checks.before(of.model, of.model, some, y[:LOOKED_AT].to(some.device), of.threat.ball)
    for flag in flags:
        say(f"caution, {flag.name}: {flag.found}")
    return flags


def _after(of: Subject, described: Sequence[Described], done: Done, x: Tensor, y: Tensor, how: How) -> list[Flag]:
    """What the verdicts say of each other, and, of a whole suite, whether plain PGD had converged."""
    flags = [
        flag for found in described if (flag := _black_box(found.column, done.verdicts[found.column.name])) is not None
    ]
    if any(len(found.column.stages) > 1 for found in described):
        flag = _weak_pgd(of, x[:LOOKED_AT], y[:LOOKED_AT], how)
        flags += [flag] if flag is not None else []
    for flag in flags:
        say(f"caution, {flag.name}: {flag.found}")
    return flags


def _weak_pgd(of: Subject, x: Tensor, y: Tensor, how: How) -> Flag | None:
    """Up to 1,020 gradients an example, about as many as `fast` may take, so that a person is told."""
    say(f"last, whether plain PGD had converged: longer runs on {len(y)} examples")
    x, network = prepared(x, of.model), lean(of.model)
    with progress() as bar:
        task = bar.add_task("longer PGD", total=len(y) * (checks.SHORT + checks.LONG * checks.RESTARTS))

        def counted(x_adv: Tensor) -> Tensor:
            bar.advance(task, len(x_adv))
            return network(x_adv)

        return checks.weak_pgd(counted, x, y.to(x.device), of.threat.ball, seed=how.seed)


def _black_box(column: Column, of: Verdicts) -> Flag | None:
    """Of a column in which attacks without gradients come after others."""
    first = next((k for k, stage in enumerate(column.stages) if stage.name in BLACK_BOXES), 0)
    if first == 0:
        return None
    return checks.black_box_beats_white_box(of.robust(first), of.robust())


def _row(found: Described, of: Verdicts) -> dict[str, Any]:
    """Accuracy with its interval, and what each attack of a chain left."""
    robust, n = int(of.robust().sum()), len(of.by)
    left = {stage.name: int(of.robust(k).sum()) / n for k, stage in enumerate(found.column.stages, start=1)}
    return {
        "name": found.column.name,
        "description": found.words,
        "accuracy": robust / n,
        "interval": interval(robust, n),
        "stages": [f"{stage.name} {stage.rank}" if stage.rank else stage.name for stage in found.column.stages],
        "left": left if len(left) > 1 else {},
    }


def _machine(of: Subject) -> tuple[str, int, str | None]:
    device = next(iter(of.model.parameters()), torch.empty(0)).device
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else str(device)
    return name, torch.get_num_threads(), torch.version.cuda if gpu else None


def show(of: Subject, summary: dict[str, Any]) -> None:
    """A table in the terminal, then every reason to doubt it."""
    title = f"{of.folder}: {summary['checkpoint']} checkpoint, {summary['split']} split, n = {summary['n']}"
    table = Table("attack", "accuracy", "95 % interval", "settings", title=title)
    for row in summary["attacks"]:
        low, high = row["interval"]
        table.add_row(row["name"], f"{row['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", row["description"])
        for name, share in row["left"].items():
            table.add_row(f"  after {name}", f"{share:.2%}", "", "")
    CONSOLE.print(table)
    for flag in summary["flags"]:
        say(f"caution, {flag['name']}: {flag['found']}. {flag['explanation']}")
    if "outcomes" in summary:
        say(f"outcomes: {summary['outcomes']}")
