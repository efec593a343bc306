"""Two processes with half of the batch each take the step of one process with the whole batch."""

import copy
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family import ATTACK, MEMBERS, Poisoned, bits, everything, sgd, taking
from networks import convolutional, equal_states
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from saltflat.neighbours.adaptive_random_wp import PREFIX
from saltflat.neighbours.free import NAME

RANKS, STEPS = 2, 3
WAYS = ("copies", "views", "poison")  # gradients of their own, in DDP's buckets, and one batch that is not finite


def fixed():
    """A network without BatchNorm, whose statistics would be those of half batches."""
    torch.manual_seed(0)
    return Poisoned(convolutional(batch_norm=False)).train()


def batches(way):
    """The second of them is poison if one shall be, in the last row alone: for one rank of the two."""
    torch.manual_seed(1)
    found = [(torch.rand(8, 3, 6, 6, dtype=torch.float64) / 4, torch.randint(3, (8,))) for _ in range(STEPS)]
    found[1][0][7, :, 0, 0] = 0.75 if way == "poison" else 0.25
    return found


def part(name, rank):
    """The rows of a rank. m-RWP's step cuts a batch in two: a rank has the half of each half."""
    if name == "m-rwp":
        half = torch.arange(2) + 2 * rank
        return torch.cat([half, half + 4])
    return torch.arange(4) + 4 * rank


def trained(name, way, model, rows=slice(None)):
    optimizer, memory = sgd(model), {}
    take = taking(name, model, optimizer, memory, attack=replace(ATTACK, steps=3))
    steps = [take(x[rows], y[rows]) for x, y in batches(way)]
    return {
        "state": everything(getattr(model, "module", model), optimizer),
        "gradients": {key.removeprefix("module."): p.grad for key, p in model.named_parameters()},
        "memory": {key.replace(f"{PREFIX}module.", PREFIX): tensor for key, tensor in memory.items()},
        "dropped": sum(int(step.dropped) for step in steps),
    }


def work(rank, folder):
    """One process: every member's three steps on its half of the batches."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = {}
    for name in MEMBERS:
        for way in WAYS:
            model = DistributedDataParallel(fixed(), gradient_as_bucket_view=way == "views")
            found[name, way] = copy.deepcopy(trained(name, way, model, part(name, rank)))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found: started once for all members, since importing takes them seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MEMBERS)
def test_two_ranks_take_the_step_of_the_whole_batch(ranks, name, way):
    """To 1e-12, weights, momentum, gradients and ARWP's memory, and equal on both ranks to the bit; with momentum and
    weight decay, attacks that start at x, and generators that are equal on all ranks. What is not finite on one rank is
    dropped by both.

    It is the definition of every member here, since each asks for gradients that are averaged over ranks. Two things
    are defined otherwise elsewhere: the published SAM climbs along each device's own gradient, so that its v is not one
    for all ("m-sharpness"), and would fail this. And free AT's displacement is that of a row of the loader, so that
    every rank keeps its own: two ranks agree with one process where rows lie as they do here, the first half of each
    batch on the first rank; not after a batch that was poison for one rank only, where the other's rows move on.
    """
    expected, (one, other) = trained(name, way, fixed()), [rank[name, way] for rank in ranks]
    for kind in ("state", "gradients"):
        assert equal_states(bits(one[kind]), bits(other[kind])), kind
        for key, tensor in expected[kind].items():
            assert tensor.isfinite().all()
            if (name in ("free-at", "free-at-awp"), way) != (True, "poison"):
                torch.testing.assert_close(one[kind][key], tensor, rtol=1e-12, atol=1e-12)
    assert one["dropped"] == other["dropped"] == expected["dropped"]
    assert (expected["dropped"] > 0) == (way == "poison")
    assert one["memory"].keys() == expected["memory"].keys()
    for key, tensor in expected["memory"].items():
        if key != NAME:
            assert torch.equal(one["memory"][key], other["memory"][key])
            torch.testing.assert_close(one["memory"][key], tensor, rtol=1e-12, atol=1e-12)
        elif way != "poison":
            joined = torch.cat([one["memory"][key], other["memory"][key]])
            torch.testing.assert_close(joined, tensor, rtol=1e-12, atol=1e-12)
