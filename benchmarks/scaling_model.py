"""What a step on R processes takes, and what a training on them needs besides: for a plan past what was measured.

    T(R) = s c(n) + d R n + sum over kinds k of collectives of  N_k a_k(R) l_k + B_k b_k(R) / W_k

    c(n)      seconds of compute that a process alone takes for its n rows; on a GPU
              max(n F / f, o t): F operations a row, f of them a second, o kernels a step, t seconds to launch one
    s         times as long because others share the machine's memory and caches; 1 where nothing is shared
    d         seconds a row to make a batch: each process makes all R n rows of it, of which it takes its own
    N_k, B_k  how many collectives of that kind a step makes, and their bytes in all
    l_k, W_k  seconds until a message arrives, and bytes a second that a process sends

                         a(R)               b(R)
    all-reduce           2 ceil(log2 R)     2 (R - 1) / R      a scatter, then a gather
    gather, scatter      ceil(log2 R)       (R - 1) / R        of the whole, B bytes
    broadcast            ceil(log2 R)       1, if R > 1

b is the least that can be sent, which rings reach; a is that of trees, which libraries take where latency counts, and
at R = 2 a ring's. Nothing is taken to overlap, and all goes over the slowest link there is, which errs on the side of
too long: torch sends gradients while it computes others, and machines of many GPUs first talk within themselves.

    checkpoints       every sqrt(2 w M) seconds: w to write one, M between failures
    effective batch   R n rows; N / (R n) steps for a pass over N images

Source: rings: Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69 (2009);
trees: Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel
Computing 35 (2009); latency and bandwidth: Hockney, "The communication challenge for MPP", Parallel Computing 20
(1994); the time between checkpoints: Young, "A first order approximation to the optimum checkpoint interval", CACM 17
(1974).

    python benchmarks/scaling_model.py --flops 1e14 --between 5e10 --rows 64
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

FLOAT = 4  # bytes
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes of gradients that DistributedDataParallel sends together
GENERATOR = 5056  # bytes of the state of torch's global generator, which a checkpoint has of each process


class Sent(NamedTuple):
    """Collectives of one kind: how many, and their bytes in all."""

    number: float
    bytes: float


class Link(NamedTuple):
    """Seconds until a message arrives, and bytes a second that a process sends."""

    latency: float
    bandwidth: float


Collectives = Mapping[str, Sent]  # by kind: all-reduce, gather, scatter, broadcast


def messages(kind: str, ranks: int) -> int:
    """a(R).

    >>> messages("all-reduce", 4), messages("gather", 5), messages("broadcast", 1)
    (4, 3, 0)
    """
    return (2 if kind == "all-reduce" else 1) * (ranks - 1).bit_length()


def times_sent(kind: str, ranks: int) -> float:
    """b(R).

    >>> times_sent("all-reduce", 4), times_sent("gather", 4), times_sent("broadcast", 4)
    (1.5, 0.75, 1)
    """
    if kind == "broadcast":
        return min(1, ranks - 1)
    return (2 if kind == "all-reduce" else 1) * (ranks - 1) / ranks


def communication(sent: Collectives, ranks: int, links: Mapping[str, Link]) -> float:
    """Seconds of all of them, each kind over its link."""
    return sum(
        of.number * messages(kind, ranks) * links[kind].latency
        + of.bytes * times_sent(kind, ranks) / links[kind].bandwidth
        for kind, of in sent.items()
    )


def step_seconds(
    compute: float, sent: Collectives, ranks: int, links: Mapping[str, Link], sharing: float = 1.0, making: float = 0.0
) -> float:
    """T(R), for `compute` = c(n) and `making` = d R n seconds.

    >>> step_seconds(2.0, {"all-reduce": Sent(1, 100)}, 1, {"all-reduce": Link(1.0, 1.0)})
    2.0
    """
    return sharing * compute + making + communication(sent, ranks, links)


def link_of(kind: str, ranks: int, size: float, seconds: float, latency: float) -> Link:
    """The link that one collective of `size` bytes took so many seconds over.

    >>> link_of("all-reduce", 2, 100.0, 3.0, 0.5)
    Link(latency=0.5, bandwidth=50.0)
    """
    left = seconds - messages(kind, ranks) * latency
    return Link(latency, size * times_sent(kind, ranks) / left if left > 0 else math.inf)


# What a step sends


def buckets(size: float) -> int:
    """How many all-reduces DistributedDataParallel makes of so many bytes of gradients, about: no tensor is cut.

    >>> buckets(2**20), buckets(44_688_680)
    (1, 3)
    """
    return 1 + math.ceil(max(0.0, size - FIRST_BUCKET) / BUCKET)


def replicated(weights: float, buffers: float, averaged_ascents: int = 1) -> dict[str, Sent]:
    """Of a step with replicas: the gradient of each ascent that is averaged over processes (AWP: 1; an ascent of each
    process' own, or none: 0), and that of the descent; then BatchNorm's statistics, of two types of numbers.
    """
    passes = averaged_ascents + 1
    return {"all-reduce": Sent(passes * buckets(weights), passes * weights), "broadcast": Sent(2, buffers)}


def sharded(weights: float, buffers: float, parts: int, attack_steps: int, passes: int = 2) -> dict[str, Sent]:
    """Of a step with shards: every forward and every backward gathers all weights, those of the attack as well; the
    backwards of the `passes` (AWP: 2) scatter gradients. Norms of weights, some bytes each, are left out.
    """
    times = 2 * (attack_steps + passes)
    return {
        "gather": Sent(times * parts, times * weights),
        "scatter": Sent(passes * parts, passes * weights),
        "broadcast": Sent(2, buffers),
    }


# What is kept


def checkpoint_bytes(weights: float, buffers: float, ranks: int = 1, average: bool = True) -> float:
    """Of a file to go on from: weights, momentum, the moving average, buffers, generators.

    >>> checkpoint_bytes(100.0, 10.0, average=False) - GENERATOR
    210.0
    """
    return weights * (3 if average else 2) + buffers * (2 if average else 1) + ranks * GENERATOR


def between_checkpoints(write: float, between_failures: float) -> float:
    """Seconds after which the next one loses least, writing and work that is done again taken together.

    >>> between_checkpoints(2.0, 100.0)
    20.0
    """
    return math.sqrt(2 * write * between_failures)


# A plan


@dataclass(frozen=True)
class Network:
    """Counted, not measured: bytes of weights and buffers, operations of convolutions in one forward of one 32 x 32
    image, kernels of a forward and backward in the attack and outside, parts that FSDP2 gathers.
    """

    weights: int
    buffers: int
    flops: float
    kernels: int
    kernels_outside: int
    parts: int


NETWORKS = {
    "PreActResNet-18": Network(4 * 11_172_170, 31_368, 1_110_835_200, 130, 149, 7),
    "WRN-34-10": Network(4 * 46_160_474, 89_976, 13_317_799_936, 228, 261, 6),
    "WRN-70-16": Network(4 * 266_796_506, 316_056, 77_528_399_872, 480, 549, 6),
}


@dataclass(frozen=True)
class Assumed:
    """What a plan rests on, and nothing here has measured. Seconds, bytes, bytes a second, operations a second.

    Args:
        flops: operations a second that convolutions reach on a GPU, of any network.
        launch: until the next kernel can begin.
        inside: bytes a second that a GPU sends to others of its machine.
        between: and to those of other machines.
        inside_latency, between_latency: until a message arrives.
        node: GPUs of a machine.
        making: seconds to crop, flip and draw a row of a batch.
        disk: bytes a second that a checkpoint is written at.
        life: seconds that one GPU works between failures, with its share of machine and network.
        rows: of a batch, on each GPU.
        batch: rows of all GPUs, where the batch is held.
        attack_steps: K1.
        share: of a batch that is generated images.
        image: bytes of one.
    """

    flops: float = 5e13
    launch: float = 2e-5
    inside: float = 1e11
    between: float = 2e10
    inside_latency: float = 5e-6
    between_latency: float = 1e-5
    node: int = 8
    making: float = 5e-8
    disk: float = 5e8
    life: float = 50_000 * 3600
    rows: int = 128
    batch: int = 2048
    attack_steps: int = 10
    share: float = 0.7
    image: int = 3 * 32 * 32


def compute(of: Network, rows: float, given: Assumed) -> float:
    """c(n) of AT-AWP on a GPU: K1 forwards and input gradients, 2 forwards and gradients of inputs and weights."""
    flops = of.flops * rows * (2 * given.attack_steps + 2 * 3)
    kernels = given.attack_steps * of.kernels + 2 * of.kernels_outside
    return max(flops / given.flops, kernels * given.launch)


def link(ranks: int, given: Assumed) -> Link:
    """The slowest that there is."""
    if ranks <= given.node:
        return Link(given.inside_latency, given.inside)
    return Link(given.between_latency, given.between)


class Step(NamedTuple):
    """Of a plan: seconds a step, the part of them in which processes talk, and rows of the whole batch."""

    seconds: float
    talking: float
    batch: float


def step(of: Network, ranks: int, rows: float, given: Assumed, sent: Collectives | None = None) -> Step:
    """T(R) on GPUs; with replicas and an averaged ascent, unless something else is sent."""
    sent = replicated(of.weights, of.buffers) if sent is None else sent
    links = dict.fromkeys(sent, link(ranks, given))
    making = given.making * ranks * rows
    seconds = step_seconds(compute(of, rows, given), sent, ranks, links, making=making)
    return Step(seconds, communication(sent, ranks, links), ranks * rows)


def pass_seconds(of: Step, images: float, given: Assumed) -> float:
    """Of one pass over that many generated images, beside the others of every batch."""
    return images / (given.share * of.batch) * of.seconds


def read_rate(of: Step, given: Assumed) -> float:
    """Bytes of generated images a second, of all processes together, where each row is read once."""
    return given.share * of.batch * given.image / of.seconds


GPUS, IMAGES = (8, 64, 256, 1024), (1e6, 1e7, 1e8)
Part = tuple[str, Sequence[str], list[list[str]]]  # words, head, rows


def plan(given: Assumed, gpus: Sequence[int] = GPUS) -> list[Part]:
    """All of it, as tables."""
    return [_steps(given, gpus), _passes(given, gpus), _kept(given, gpus), _sets(given)]


def _steps(given: Assumed, gpus: Sequence[int]) -> Part:
    rows = []
    for name, of in NETWORKS.items():
        for ranks in gpus:
            made, few = step(of, ranks, given.rows, given), given.batch / ranks
            held = step(of, ranks, few, given)
            own = step(of, ranks, given.rows, given, replicated(of.weights, of.buffers, averaged_ascents=0))
            shards = sharded(of.weights, of.buffers, of.parts, given.attack_steps)
            others = [f"{each.seconds:.3f}" for each in (own, step(of, ranks, given.rows, given, shards))]
            cells = [f"{made.batch:,.0f}", f"{made.seconds:.3f}", _percent(made), *others]
            rows.append([name, str(ranks), *cells, f"{few:g}", f"{held.seconds:.3f}", _percent(held)])
    words = (
        f"**A step of AT-AWP**, PGD-{given.attack_steps}: with {given.rows} rows on every GPU, and with a batch of "
        f"{given.batch:,} shared out among them. Seconds, and the share of them in which GPUs talk."
    )
    head = ("", "GPUs", "batch", "s", "talking", "s, ascent per rank", "s, FSDP2", "rows a GPU", "s", "talking")
    return words, head, rows


def _few(value: float) -> str:
    """Two digits that count."""
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _percent(of: Step) -> str:
    return f"{of.talking / of.seconds:.0%}"


def _passes(given: Assumed, gpus: Sequence[int]) -> Part:
    rows = []
    for name, of in NETWORKS.items():
        for ranks in gpus:
            weak, held = (step(of, ranks, each, given) for each in (given.rows, given.batch / ranks))
            hours = [_few(pass_seconds(each, n, given) / 3600) for each in (weak, held) for n in IMAGES]
            steps = f"{IMAGES[1] / (given.share * weak.batch):,.0f}"
            rows.append([name, str(ranks), steps, *hours, f"{read_rate(weak, given) / 1e6:,.1f}"])
    words = (
        f"**Hours of one pass** over 1, 10 and 100 million generated images, {given.share:.0%} of every batch: with "
        f"{given.rows} rows on every GPU, and with a batch of {given.batch:,}. Beside them the steps of a pass over 10 "
        f"million in the first case, and the megabytes a second that all GPUs together then read."
    )
    head = ("", "GPUs", "steps, 10M", "1M", "10M", "100M", "batch held: 1M", "10M", "100M", "MB/s")
    return words, head, rows


def _kept(given: Assumed, gpus: Sequence[int]) -> Part:
    rows = []
    for name, of in NETWORKS.items():
        size = checkpoint_bytes(of.weights, of.buffers, max(gpus))
        write = size / given.disk
        cells = []
        for ranks in gpus:
            every = between_checkpoints(write, given.life / ranks)
            cells.append(f"{every / 60:.0f} min, {write / every + every * ranks / given.life / 2:.2%}")
        rows.append([name, f"{of.weights / 1e6:,.0f}", f"{2 * of.weights / 1e6:,.0f}", f"{size / 1e9:.2f}", *cells])
    words = (
        "**What is sent and kept**: megabytes of weights, and of a step's two gradients; gigabytes of a checkpoint "
        "with momentum and moving average; how often writing one loses least, and the share of time that is then lost "
        "to writing and to failures, by the number of GPUs."
    )
    return words, ("", "weights, MB", "gradients, MB", "checkpoint, GB", *map(str, gpus)), rows


def _sets(given: Assumed) -> Part:
    rows = [[f"{n / 1e6:.0f} million", f"{n * given.image / 1e9:,.1f}", f"{n * 8 / 1e9:.2f}"] for n in IMAGES]
    return "**Images**, uncompressed, and labels: gigabytes.", ("", "images, GB", "labels, GB"), rows


def in_words(given: Assumed) -> str:
    """Each of what is assumed, by its name."""
    return ", ".join(f"`{name}` {value:g}" for name, value in asdict(given).items())


def main() -> None:
    from pairs import table  # here, so that the model can be imported as part of a package, too

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    like = Assumed()
    for each in fields(Assumed):
        value = getattr(like, each.name)
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(value), default=value)
    given = replace(like, **vars(parser.parse_args()))
    for words, head, rows in plan(given):
        print(f"{words}\n{table(head, rows)}\n")
    print(f"assumed: {in_words(given)}")


if __name__ == "__main__":
    main()
