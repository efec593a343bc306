"""How long AutoAttack's standard version takes here, and in pyautoattack: ratios of alternating runs in one process.

    python benchmarks/evaluation_speed.py RUN --eps 4/255 --examples 96 --out speed.json

Each round runs pyautoattack (fp32), ours in fp32, and ours in bf16 with every success asked again in fp32, one after
the other, on the same examples with full budgets. A ratio is that of two runs of one round. The share of time in the
model is that between a forward's beginning and its end, and between a backward's entering the model and its leaving;
where only patches of a model's maps are computed, cutting them out counts, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peer import standard as by_peer
from torch import Tensor, nn

from saltflat.evaluation.suite import evaluate, prepared, standard
from saltflat.lab import record
from saltflat.lab.config import number, shown
from saltflat.lab.subjects import chosen, from_run, with_threat
from saltflat.lean.windows import Near, Windows


class Clock:
    """Seconds spent in networks, between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds, self.began, self.inside = 0.0, 0.0, False

    def start(self) -> None:
        self.began, self.inside = time.perf_counter(), True

    def stop(self) -> None:
        self.seconds, self.inside = self.seconds + time.perf_counter() - self.began, False


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Forwards and backwards of whole networks, and what is asked of windows, run on the clock."""
    whole, near, ask = nn.Module.__call__, Windows.near, Near.ask

    def forward(module: nn.Module, *given: Any, **settings: Any) -> Any:
        if clock.inside or len(given) != 1:  # a layer, or a loss
            return whole(module, *given, **settings)
        clock.start()
        x = given[0].view_as(given[0])
        if x.requires_grad:
            x.register_hook(lambda gradient: clock.stop())
        z = whole(module, x)
        clock.stop()
        if z.requires_grad:
            z.register_hook(lambda gradient: clock.start())
        return z

    def on_the_clock(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            clock.start()
            found = function(*given)
            clock.stop()
            return found

        return timed

    nn.Module.__call__ = forward  # type: ignore[method-assign]
    Windows.near, Near.ask = on_the_clock(near), on_the_clock(ask)  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, Windows.near, Near.ask = whole, near, ask  # type: ignore[method-assign]


def as_loaded(network: nn.Module) -> nn.Module:
    """The network in torch's default memory layout, as a checkpoint gives it to everybody."""
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def measured(work: Callable[[], Tensor], clock: Clock) -> dict[str, Any]:
    """Seconds, the model's share of them, and who stayed right."""
    clock.seconds, began = 0.0, time.perf_counter()
    with clocked(clock):
        robust = work()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "in_model": clock.seconds / seconds, "robust": robust}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--data-path", type=Path, default=None)
    parser.add_argument("--norm", default=None)
    parser.add_argument("--eps", type=number, default=None)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()

    of = with_threat(from_run(given.run, given.checkpoint, "cpu", None, given.data_path), given.norm, given.eps, None)
    images, y, _ = chosen(of, "test", given.examples)
    model, clock = as_loaded(of.model), Clock()
    x, ball, norm, eps = prepared(images, model), of.threat.ball, of.threat.norm, of.threat.eps

    def peer() -> Tensor:
        return by_peer(model, x, y, norm, eps, batch_size=given.batch_size, seed=given.seed)

    def ours(dtype: torch.dtype | None) -> Tensor:
        *_, last = evaluate(model, x, y, [standard(ball)], batch_size=given.batch_size, seed=given.seed, dtype=dtype)
        return last.verdicts["standard"].robust()

    contenders = {"pyautoattack": peer, "fp32": lambda: ours(None), "bf16": lambda: ours(torch.bfloat16)}
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(given.rounds):
        rounds.append({})
        for name, work in contenders.items():
            found = rounds[-1][name] = measured(work, clock)
            print(
                f"round {len(rounds)}  {name:12}  {found['seconds']:7.1f} s  {found['in_model']:6.1%} in the model  "
                f"{int(found['robust'].sum())} of {len(y)} robust",
                flush=True,
            )
    robust = rounds[0]["pyautoattack"]["robust"]
    summary: dict[str, Any] = {}
    for name in ("fp32", "bf16"):
        ratios = [each[name]["seconds"] / each["pyautoattack"]["seconds"] for each in rounds]
        differ = int((rounds[0][name]["robust"] != robust).sum())
        summary[name] = {"ratios": ratios, "median": statistics.median(ratios), "verdicts_that_differ": differ}
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name}: {statistics.median(ratios):.3f} of pyautoattack's time ({spread}), {differ} verdicts differ")
    if given.out is not None:
        plain = [
            {name: {**found, "robust": int(found["robust"].sum())} for name, found in each.items()} for each in rounds
        ]
        record.write_json(
            given.out,
            {
                "what": "AutoAttack standard, full budgets",
                "run": given.run.name,
                "sha256": of.sha256,
                "parameters": sum(parameter.numel() for parameter in of.model.parameters()),
                "norm": norm,
                "eps": shown(eps),
                "n": len(y),
                "batch_size": given.batch_size,
                "seed": given.seed,
                "rounds": plain,
                "summary": summary,
                "environment": record.environment("cpu", torch.get_num_threads(), None),
            },
        )


if __name__ == "__main__":
    main()
