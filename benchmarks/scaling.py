"""One training on one process and on two: how much of the second core arrives, and where the rest stays.

    python benchmarks/scaling.py --out scaling.json
    python benchmarks/scaling.py --network small-resnet --batch-size 16 --out scaling-small.json

Steps of AT-AWP, as the lab takes them: the attack on the lean network under the raw module, or, where weights are
sharded, on the network itself. Contenders take turns (`pairs`), each process with one thread unless it says otherwise:

    1 process                  n rows; half the rows: n / 2
    2 side by side             two processes that know nothing of each other, n rows each: what it costs to share
                               caches, memory and whatever else the machine has once
    2 processes, DDP, FSDP2    n rows each (weak scaling); half the rows: n / 2 each, the batch of one process (strong)
    1 process, 2 threads       2 n rows
    ..., FSDP2                 of one process: what its steps compute and copy, without anybody to exchange it with

and alone, between two processes: an all-reduce of the model's gradient, and of a single number; a gather and a scatter
of it; and, by one process, a checkpoint as a run writes it, on the disk when its turn ends (in `--folder`).

What two processes should take is computed from these parts (`scaling_model`),

    predicted = s c(n) + what the collectives of a step take,     s = 2 side by side / 1 process

round by round; collectives are counted, in number and bytes, as a step makes them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import training_step
from pairs import Contender, around, compare, ranks_of, seconds_of, spread, table
from scaling_model import Link, Sent, communication, link_of, messages, step_seconds
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import Setting, climbed_on, network, sgd, started

from saltflat import AT, PGD, Layerwise, Linf, double_perturbation_step, parallel
from saltflat.averaging import ema
from saltflat.lab import build, checkpoints, memory, record
from saltflat.lab.precision import taken_in
from saltflat.parallel import Alone, Replicated, Sharded, Spread
from saltflat.random import Rows, seeded
from saltflat.step import Step, itself

PROCESSES = 2
EXCHANGED, NUMBER = ("all-reduce", "gather", "scatter"), "all-reduce of a number"  # alone
SPREADS: dict[str, Callable[[nn.Module], Spread]] = {
    "alone": Alone,
    "DDP": Replicated,
    "FSDP2": partial(Sharded, parts=build.parts),
}
_together = ExitStack()  # what a process of several has entered, until it ends


def joined(by_itself: bool = False) -> None:
    """This process and the others of its contender are ranks of each other from now on; or it is the only one."""
    if by_itself:
        _together.enter_context(parallel.together(store=distributed.HashStore(), rank=0, world_size=1))
    else:
        _together.enter_context(parallel.together())


def stepping(setting: Setting, *, spread: str = "alone", by_itself: bool = False) -> Any:
    """A step of AT-AWP, of this process' rows."""
    memory.keep()
    if spread != "alone":
        joined(by_itself)
    model, batch = started(setting)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    laid = SPREADS[spread](model)
    optimizer = sgd(model, setting, fused=spread != "FSDP2")  # shards have no fused form
    lean = {} if spread == "FSDP2" else climbed_on(setting, "eval", "fp32", False)
    total, draws = setting.batch_size * parallel.ranks(), seeded(setting.seed)
    given: dict[str, Any] = {
        "ball": Layerwise(setting.gamma),
        "attack": PGD(Linf(setting.eps), setting.step_size, setting.steps),
        "attack_on": parallel.on_raw(lean.get("attack_on", itself)),
        "optimizer": optimizer,
        "generator": draws if parallel.ranks() == 1 else Rows(draws, parallel.share(total), total),
    }

    def step() -> None:
        x, y = batch()

        def taken(objective: Any) -> Step:
            return double_perturbation_step(laid.called, x, y, objective=objective, **given)

        taken_in("fp32", taken, AT(), optimizer, {}, torch.device("cpu"))
        laid.settle()

    return step


def bytes_of(setting: Setting) -> tuple[int, int]:
    """Of weights, which is that of their gradient, and of buffers."""
    model = network(setting)
    weights, buffers = (sum(t.numel() * t.element_size() for t in of) for of in (model.parameters(), model.buffers()))
    return weights, buffers


def exchanging(setting: Setting, *, kind: str, number: bool = False) -> Callable[[], Any]:
    """One collective of the model's gradient, or of one number."""
    memory.keep()
    torch.set_num_threads(setting.threads)
    joined()
    size = PROCESSES if number else bytes_of(setting)[0] // 4 // PROCESSES * PROCESSES
    whole, part = torch.ones(size), torch.ones(size // PROCESSES)
    if kind == "all-reduce":
        return partial(distributed.all_reduce, whole)
    if kind == "gather":  # newer torch has other names, and warns of these
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        return partial(gather, whole, part)
    scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    return partial(scatter, part, whole)


def writing(setting: Setting, *, folder: str) -> Callable[[], Any]:
    """A checkpoint of weights, momentum and moving average, as a run leaves it at the end of an epoch."""
    model, batch = started(setting)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, spread, average = sgd(model, setting, fused=True), Alone(model), ema(model, 0.995)
    x, y = batch()
    AT().outer(model, x[:2], x[:2], y[:2]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    step = 0

    def write() -> None:
        nonlocal step
        step += 1
        state = {**spread.state(optimizer), "average": average.state_dict(), "step": step}
        state["ranks"] = [{"random": torch.get_rng_state()}]
        checkpoints.save_state(Path(folder), state)

    return write


@dataclass(frozen=True)
class Entry:
    """A contender, and what it is: rows of each process, how many of those; of what its prediction is made, a
    contender's seconds, those of the one whose neighbour costs it as much, and what is sent.
    """

    contender: Contender
    rows: int = 0
    alone: str = ""
    beside: tuple[str, str] = ("", "")
    sends: str = ""


def entries(setting: Setting, folder: str) -> list[Entry]:
    """All of them, in the order of their turns; the first is what rows a second are told in."""
    n = setting.batch_size
    one, half, two = setting, replace(setting, batch_size=n // 2), replace(setting, threads=2, batch_size=2 * n)
    sharded = partial(stepping, spread="FSDP2", by_itself=True)

    def entry(name: str, make: Any, of: Setting, processes: int = 1, **more: Any) -> Entry:
        return Entry(Contender(name, make, of, processes=processes), of.batch_size, **more)

    found = [
        entry("1 process", stepping, one),
        entry("1 process, half the rows", stepping, half),
        entry("1 process, FSDP2", sharded, one),
        entry("1 process, FSDP2, half the rows", sharded, half),
        entry("1 process, 2 threads, twice the rows", stepping, two),
        entry("2 side by side", stepping, one, 2),
        entry("2 side by side, FSDP2", sharded, one, 2),
    ]
    for laid, kind in (("DDP", ""), ("FSDP2", ", FSDP2")):
        make, beside = partial(stepping, spread=laid), (f"2 side by side{kind}", f"1 process{kind}")
        for of, rows in ((one, ""), (half, ", half the rows")):
            name, alone = f"2 processes, {laid}{rows}", f"1 process{kind}{rows}"
            found.append(entry(name, make, of, 2, alone=alone, beside=beside, sends=laid))
    exchanges = {kind: partial(exchanging, kind=kind) for kind in EXCHANGED}
    found += [Entry(Contender(kind, make, one, processes=2)) for kind, make in exchanges.items()]
    number = partial(exchanging, kind="all-reduce", number=True)
    found.append(Entry(Contender(NUMBER, number, one, processes=2)))
    return [*found, Entry(Contender("checkpoint", partial(writing, folder=folder), one))]


def chosen(of: list[Entry], patterns: list[str]) -> list[Entry]:
    """Those whose names fit one of the patterns, and the first, which the others are told in."""
    return [entry for entry in of if entry is of[0] or any(fnmatch(entry.contender.name, each) for each in patterns)]


# Collectives, counted

KINDS = {  # what an operation's name contains
    "all-reduce": ("allreduce", "all_reduce"),
    "gather": ("allgather", "all_gather"),
    "scatter": ("reduce_scatter",),
    "broadcast": ("broadcast",),
}


class Collectives(TorchDispatchMode):
    """A block whose collectives are counted, by kind: how many, and bytes in all, of what is whole on every process."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "full_tensor") for each in types):
            return NotImplemented  # so that a sharded tensor's own operations come by, one by one
        name = str(operation)
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), None)
        if kind is not None and "c10d" in name:
            self.number[kind] += 1
            self.bytes[kind] += max(_bytes(argument) for argument in args)
        return operation(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


@contextmanager
def counting() -> Iterator[dict[str, Sent]]:
    """What is sent in the block, filled in when it is left."""
    found: dict[str, Sent] = {}
    with Collectives() as seen:
        yield found
    found.update({kind: Sent(number, seen.bytes[kind]) for kind, number in seen.number.items()})


def sent(setting: Setting, spreads: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Sent]]:
    """{name: by kind} of one step of each: arguments of `stepping`, by name. In two processes of their own."""
    few, found = replace(setting, batch_size=2), {}
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for name, options in spreads.items():
            asked = [pool.submit(_sent, who, few, dict(options)) for who in ranks_of(PROCESSES)]
            found[name], _ = (each.result() for each in asked)
    return found


def _sent(who: Mapping[str, str], setting: Setting, options: Mapping[str, Any]) -> dict[str, Sent]:
    with patch.dict("os.environ", who), _together:
        step = stepping(setting, **options)
        step()  # which makes what later steps have
        with counting() as found:
            step()
    return found


# What came of it


def judged(everybody: list[Entry], turns: Mapping[str, Any], counted: Mapping[str, Any], size: int) -> dict[str, Any]:
    """By contender: seconds a step, rows a second in those of the first, what was predicted and how far off that was,
    round by round; and what of the prediction is compute, sharing and communication, in seconds, medians.
    """
    seconds, first = seconds_of(turns), everybody[0]
    rounds = range(len(seconds[first.contender.name]))
    summary = {}
    for entry in everybody:
        name = entry.contender.name
        of: dict[str, Any] = {"seconds": spread(seconds[name]), "processes": entry.contender.processes}
        if entry.rows:
            rate = entry.rows * entry.contender.processes / first.rows
            theirs = zip(seconds[first.contender.name], seconds[name], strict=True)
            of |= {"rows": entry.rows, "threads": entry.contender.setting.threads}
            of["rows_a_second"] = spread([rate * one / own for one, own in theirs])
        if entry.sends and needed(entry, counted) <= seconds.keys():
            parts = [predicted(entry, {n: each[i] for n, each in seconds.items()}, counted, size) for i in rounds]
            totals = [sum(part.values()) for part in parts]
            of["predicted"] = spread(totals)
            of["over_predicted"] = spread([own / total for own, total in zip(seconds[name], totals, strict=True)])
            of["parts"] = {part: spread([each[part] for each in parts])["median"] for part in parts[0]}
        summary[name] = of
    return summary


def needed(entry: Entry, counted: Mapping[str, Any]) -> set[str]:
    """Whose seconds a prediction is made of."""
    return {entry.alone, *entry.beside, NUMBER, *({*counted[entry.sends], "all-reduce"} - {"broadcast"})}


def links(seconds: Mapping[str, float], size: int, kinds: Iterable[str]) -> dict[str, Link]:
    """Of what collectives took alone; broadcasts go over that of all-reduces."""
    latency = seconds[NUMBER] / messages("all-reduce", PROCESSES)
    alone = {kind: "all-reduce" if kind == "broadcast" else kind for kind in kinds}
    return {kind: link_of(other, PROCESSES, size, seconds[other], latency) for kind, other in alone.items()}


def predicted(entry: Entry, seconds: Mapping[str, float], counted: Mapping[str, Any], size: int) -> dict[str, float]:
    """Seconds of compute, of sharing the machine, and of communication; of one round."""
    compute, (together, alone) = seconds[entry.alone], entry.beside
    sharing, sends = seconds[together] / seconds[alone], counted[entry.sends]
    over = links(seconds, size, sends)
    whole = step_seconds(compute, sends, PROCESSES, over, sharing)
    talk = communication(sends, PROCESSES, over)
    return {"compute": compute, "sharing": whole - talk - compute, "communication": talk}


def shown(summary: Mapping[str, Any], counted: Mapping[str, Any], sizes: Mapping[str, float]) -> str:
    """What is printed."""
    rows = []
    for name, of in summary.items():
        cells = [str(of.get("rows", "")), around(of["seconds"], ".4f"), around(of.get("rows_a_second"))]
        parts = of.get("parts", {})
        off = [around(of.get("predicted"), ".4f"), around(of.get("over_predicted"))]
        rows.append([name, *cells, *off, " + ".join(f"{1e3 * each:.0f}" for each in parts.values())])
    head = ["", "rows each", "seconds", "rows a second", "predicted", "over predicted", "compute + sharing + sent, ms"]
    kinds = [
        [name, kind, str(each.number), f"{each.bytes / 2**20:.2f}"]
        for name, of in counted.items()
        for kind, each in of.items()
    ]
    rates = [
        [name, f"{size / 2**20:.2f}", f"{size / summary[name]['seconds']['median'] / 1e6:.0f}"]
        for name, size in sizes.items()
    ]
    return "\n\n".join(
        [
            table(head, rows),
            table(["a step sends", "", "number", "MiB"], kinds),
            table(["alone", "MiB", "MB a second"], rates),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_step.common(parser)
    parser.set_defaults(threads=1, batch_size=32)
    parser.add_argument("--contenders", nargs="+", default=["*"], metavar="PATTERN", help="names; * for anything")
    parser.add_argument("--calls", type=int, default=1, help="steps in a turn; more for small networks")
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk that checkpoints go to; default: a new one here"
    )
    given = parser.parse_args()
    if given.device != "cpu" or given.objective != "at":
        raise SystemExit("device, objective: expected cpu and at")
    setting = training_step.setting_of(given)
    counted = sent(setting, {name: {"spread": name} for name in SPREADS if name != "alone"})
    (weights, buffers), parts = bytes_of(setting), len(build.parts(network(setting)))
    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd()) as folder:
        everybody = chosen(entries(setting, folder), given.contenders)
        turns = compare(
            [entry.contender for entry in everybody], rounds=given.rounds, warm_up=given.warm_up, calls=given.calls,
            say=partial(print, flush=True),
        )  # fmt: skip
        written = [path.stat().st_size for path in checkpoints.states(Path(folder))[:1]]
    summary = judged(everybody, turns, counted, weights)
    sizes = {
        name: size
        for name, size in zip((*EXCHANGED, "checkpoint"), [weights] * 3 + written, strict=False)
        if name in summary
    }
    print(shown(summary, counted, sizes))
    if given.out is not None:
        content = {
            "what": "one training on two processes", "setting": asdict(setting), "rounds": given.rounds,
            "warm_up": given.warm_up, "calls": given.calls, "summary": summary, "turns": turns,
            "sent": {name: {kind: each._asdict() for kind, each in of.items()} for name, of in counted.items()},
            "bytes": {"weights": weights, "buffers": buffers, "parts": parts, **sizes},
        }  # fmt: skip
        record.write_json(given.out, {**content, "environment": training_step.environment(given)})


if __name__ == "__main__":
    main()
