"""Many processes, one training: all of torch.distributed that the project touches.

    L = (1 / R) sum_r L_r,    L_r = (R n_r / n) mean of the losses of rank r's n_r rows of a batch of n

R processes ("ranks") hold the same weights, or a shard each, and take a share of every batch's rows; gradients are
averaged over ranks, so that with the factor R n_r / n, which is 1 where shares are equal, they are those of the whole
batch. What is drawn for a row is what one process would have drawn for it (`random.Rows`).

torchrun starts the processes and says who is who; without it there is one, and nothing here costs anything.

Source: PyTorch's DistributedDataParallel and FSDP2 (`fully_shard`).
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from saltflat.balls import Weights, own
from saltflat.objectives import Objective, Value
from saltflat.random import Generator

T = TypeVar("T")
R = TypeVar("R")
TIMEOUT = timedelta(minutes=10)  # that ranks wait for each other: what one does alone may take that long
GLOO = ("gloo/transport", "Application timeout caused pair closure")  # its errors have no type of their own
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # by torch, besides WORLD_SIZE
TOLD = "the first process has it, too"  # noted on what `first` raises on others
_talk: list[Any] = []  # the group that Python objects are exchanged in, on CPUs: [group] while there is one


class RankLost(ConnectionError):
    """Another process of the same job is gone, or does not answer."""


# Who is who


def rank() -> int:
    """Which of the processes this is: 0 ... ranks() - 1."""
    return distributed.get_rank() if _talk else 0


def ranks() -> int:
    """How many processes work on this together; 1 without torchrun."""
    return distributed.get_world_size() if _talk else 1


def launched() -> bool:
    """torchrun, or whoever sets its environment variables, started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def together(device: str = "cpu", *, timeout: timedelta = TIMEOUT, **options: Any) -> Iterator[None]:
    """The processes that torchrun started work together inside the block: by nccl on GPUs, by gloo on CPUs.

    Args:
        device: "cpu" or "cuda"; on GPUs, a process takes the one of its local rank.
        timeout: how long one waits for the others before it takes them for lost.
        options: of `torch.distributed.init_process_group`, where nobody has set torchrun's variables.

    Without torchrun and options, nothing happens. Raises `RankLost` for what a collective raises inside, and for
    variables that say that there are others, but not where.
    """
    if not launched() and not options:
        yield
        return
    if (
        "init_method" not in options
        and "store" not in options
        and (missing := set(NEEDED) - os.environ.keys() - {key.upper() for key in options})
    ):
        names = ", ".join(sorted(missing))
        raise RankLost(f"WORLD_SIZE is set, but {names} not: expected torchrun to start this, or all of them")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    gpu = device == "cuda"
    leave: Callable[[], None] = _abort if gpu else distributed.destroy_process_group
    try:
        distributed.init_process_group("nccl" if gpu else "gloo", timeout=timeout, **options)
        _talk.append(distributed.new_group(backend="gloo", timeout=timeout) if gpu else distributed.group.WORLD)
        yield
        distributed.barrier(group=_talk[0])  # whoever leaves first closes connections that another still waits on
        leave = distributed.destroy_process_group
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or _of_gloo(str(error)):
            raise RankLost(_lost(error, options)) from error
        raise
    finally:
        _talk.clear()
        gc.collect()  # models that hold on to the group
        if distributed.is_initialized():
            leave()


def _abort() -> None:
    """Out of the group without waiting for what is under way with a process that may be gone, as nccl would. Where
    torch offers no such thing, the group is left to the end of the process.
    """
    if abort := getattr(distributed.distributed_c10d, "_abort_process_group", None):
        with suppress(Exception):  # older torch's knows nccl's groups alone; what has failed is told already
            abort()


def _of_gloo(said: str) -> bool:
    return any(part in said for part in GLOO) or said == "Wait timeout"  # the latter from a store of files


def _lost(error: Exception, options: Mapping[str, Any]) -> str:
    said = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
    # as it was told, since they may not have met
    own = options.get("rank", os.environ.get("RANK"))
    total = options.get("world_size", os.environ.get("WORLD_SIZE"))
    return f"rank {own} of {total}: another process is gone, or does not answer ({said[:200]})"


# What ranks tell each other


def everyones(value: T) -> list[T]:
    """What each rank gave, in the order of ranks; any object that pickles."""
    if not _talk:
        return [value]
    found: list[Any] = [None] * ranks()
    distributed.all_gather_object(found, value, group=_talk[0])
    return found


def first(make: Callable[[], T]) -> T:
    """What the first rank makes, told to all; what it raises is raised on all."""
    if not _talk:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except Exception as error:
            told[1] = _carried(error)
    distributed.broadcast_object_list(told, 0, group=_talk[0])
    if told[1] is not None:
        if rank() > 0:
            told[1].add_note(TOLD)
        raise told[1]
    found: T = told[0]
    return found


def anyones(value: bool) -> bool:
    """Whether it is true on any rank; on CPUs, so that a GPU goes on meanwhile."""
    if not _talk:
        return value
    flag = torch.tensor(int(value))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=_talk[0])
    return bool(flag)


def everywhere(flag: Tensor, shards: Iterable[Tensor]) -> Tensor:
    """Whether a flag, which each rank finds of its own shards, is true on all that have any of those tensors; on the
    device. Tensors that are whole ask nobody.
    """
    meshes = dict.fromkeys(shard.device_mesh for shard in shards if hasattr(shard, "device_mesh"))
    number = flag.int()
    for mesh in meshes:
        number = number.to(mesh.device_type)
        for group in mesh.get_all_groups():
            # not the largest of what may be NaN, which is lost on the way
            distributed.all_reduce(number, distributed.ReduceOp.MIN, group=group)
    return number.bool()


def mean(values: Tensor) -> Tensor:
    """Over ranks, number by number."""
    if not _talk:
        return values
    summed = values.clone()
    distributed.all_reduce(summed)
    return summed / ranks()


def shared_out(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """[work(item) for item in items], of which each rank does its share and all have all; what `work` raises on one is
    raised on all, once all have done theirs.

    >>> shared_out([1, 2, 3], lambda n: n * n)
    [1, 4, 9]
    """
    if not _talk:
        return [work(item) for item in items]
    own: list[R] = []
    failed: Exception | None = None
    try:
        own += [work(item) for item in items[rank() :: ranks()]]
    except Exception as error:
        failed = _carried(error)
    parts = everyones((own, failed))
    for _, theirs in parts:
        if theirs is not None:
            raise theirs
    return [parts[i % ranks()][0][i // ranks()] for i in range(len(items))]


def _carried(error: Exception) -> Exception:
    """What others can be told: the exception itself, if it survives pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def share(n: int) -> slice:
    """This rank's rows of n: shares follow each other, and differ by one at most.

    >>> share(7)
    slice(0, 7, None)
    """
    return slice(n * rank() // ranks(), n * (rank() + 1) // ranks())


def joined(rows: Tensor) -> Tensor:
    """Every rank's rows, one after the other, on the CPU: what `share` took apart."""
    return torch.cat(everyones(rows.cpu())) if _talk else rows.cpu()


# Rows of a batch


@dataclass(frozen=True)
class Weighted:
    """An objective, times a factor: R n_r / n, for rows that are fewer or more than other ranks'."""

    objective: Objective
    factor: float

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return self.objective.inner(model, x, y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        return self.factor * self.objective.outer(model, x, x_adv, y)

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        """Without the factor, which is none of an example's: see `weighted`."""
        found: Tensor = self.objective.each(model, x, x_adv, y)  # type: ignore[attr-defined]  # all of ours have it
        return found


def weighted(loss: Callable[..., Tensor], objective: Objective) -> Callable[..., Tensor]:
    """The mean over rows of something else, times the factor that an objective has, if it has one: what is `climbed`
    beside it.

    >>> float(weighted(lambda: torch.tensor(3.0), Weighted(None, 0.5))())
    1.5
    """
    return (lambda *batch: objective.factor * loss(*batch)) if isinstance(objective, Weighted) else loss


# How weights lie


class Spread(Protocol):
    """How a model lies on ranks: whole on one (`Alone`), a replica on each (`Replicated`), a shard on each (`Sharded`).

    Attributes:
        called: what steps are given; its forwards and backwards keep ranks together.
    """

    called: nn.Module

    def settle(self) -> None:
        """After a step: what forwards changed on each rank by itself, buffers, becomes equal on all."""

    def network(self) -> nn.Module:
        """Whole, equal on all ranks, as the weights stand; to measure and to keep, not to train. All ranks ask."""

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Of "model" and "optimizer", whole and by the weights' names: any spread over any number of ranks goes on from
        it. All ranks ask. Tensors may be those of the model and the optimiser, no copies.
        """

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """What `state` gave, of this spread or another. All ranks ask."""


class Alone:
    """One process, one model."""

    def __init__(self, model: nn.Module) -> None:
        self.called = model

    def settle(self) -> None:
        pass

    def network(self) -> nn.Module:
        return self.called

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _state(self.called, optimizer)

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        _load(self.called, optimizer, state)


class Replicated:
    """A replica on every rank, gradients averaged over them (DistributedDataParallel).

    BatchNorm in train mode normalises each rank's rows by themselves; running statistics are the first rank's, from
    `settle` on, which is what DistributedDataParallel does as forwards begin, too late for an attack.

    Args:
        model: on its device; equal on all ranks from now on.
        sync_batch_norm: statistics over the rows of all ranks (SyncBatchNorm, which torch has on GPUs alone).

    Raises: ValueError for the latter on CPUs.
    """

    def __init__(self, model: nn.Module, sync_batch_norm: bool = False) -> None:
        gpu = next(model.parameters()).device
        same_buffers(model)  # which DistributedDataParallel leaves to forwards, or to us
        if sync_batch_norm:
            if gpu.type == "cpu":
                raise ValueError("sync_batch_norm: expected False on CPUs: SyncBatchNorm runs on GPUs alone")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.model = model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name, which older torch has not
            self.called: nn.Module = nn.parallel.DistributedDataParallel(
                model, device_ids=[gpu] if gpu.type == "cuda" else None, broadcast_buffers=False
            )

    def settle(self) -> None:
        same_buffers(self.model)

    def network(self) -> nn.Module:
        return self.model

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _state(self.model, optimizer)

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        _load(self.model, optimizer, state)


class Sharded:
    """A shard of every weight on each rank, gathered module by module as forwards and backwards reach them (FSDP2).

    Args:
        model: on its device, with equal weights on all ranks; sharded in place, so that an optimiser has to be made
            afterwards.
        parts: which of its modules are gathered each by itself; the rest is gathered as one.

    Raises: RuntimeError on CPUs for a torch that adds gradients up where it is asked to average.
    """

    def __init__(self, model: nn.Module, parts: Callable[[nn.Module], Sequence[nn.Module]]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        weight = next(model.parameters())
        # or torch takes the machine's GPUs, if there are any, and moves the model to them
        mesh = init_device_mesh(weight.device.type, (distributed.get_world_size(),))
        if weight.device.type == "cpu":
            _check_average(mesh, weight.dtype)
        same_buffers(model)
        self.whole = copy.deepcopy(model)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
        for part in parts(model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # the root as well, which torch otherwise leaves whole after a forward: see `reshard`
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        self.called = model

    def settle(self) -> None:
        same_buffers(self.called)

    def network(self) -> nn.Module:
        self.whole.load_state_dict({name: gathered(value) for name, value in self.called.state_dict().items()})
        return self.whole

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _state(self.called, optimizer)

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        _load(self.called, optimizer, state)


def _check_average(mesh: Any, dtype: torch.dtype) -> None:
    """On the smallest of models, a number on each rank, each with a gradient of 1: gloo adds up in some releases
    (pytorch's issue 162338).
    """
    from torch.distributed.fsdp import fully_shard

    probe = nn.Linear(1, mesh.size(), bias=False, device="meta", dtype=dtype).to_empty(device="cpu")  # draws nothing
    fully_shard(probe, mesh=mesh)
    probe(torch.ones(1, 1, dtype=dtype)).sum().backward()
    if (found := float(own(p.grad for p in probe.parameters() if p.grad is not None)[0])) != 1:
        raise RuntimeError(
            f"torch: FSDP2 on CPUs needs a release that averages gradients over ranks, got 1 as {found:g}"
        )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names, kept = _names(model, optimizer), optimizer.state_dict()
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in kept["param_groups"]]
    return {
        "model": {name: gathered(value) for name, value in model.state_dict().items()},
        "optimizer": {
            "state": {
                names[i]: {key: gathered(value) for key, value in own.items()} for i, own in kept["state"].items()
            },
            "param_groups": groups,
        },
    }


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    own, weights, kept = model.state_dict(), dict(model.named_parameters()), state["optimizer"]
    if len(kept["param_groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"state: expected {len(optimizer.param_groups)} groups of weights, got {len(kept['param_groups'])}"
        )
    names = _names(model, optimizer)
    for number, (group, mine) in enumerate(zip(kept["param_groups"], optimizer.param_groups, strict=True)):
        here, names = names[: len(mine["params"])], names[len(mine["params"]) :]
        if strange := sorted({*here} ^ {*group["params"]}):
            raise ValueError(f"state: expected equal groups of weights, but {strange[0]!r} is in another than {number}")
    numbers = {name: i for i, name in enumerate(_names(model, optimizer))}
    model.load_state_dict({name: _laid(value, own.get(name)) for name, value in state["model"].items()})
    optimizer.load_state_dict(
        {
            "state": {
                numbers[name]: {key: _laid(value, weights[name]) for key, value in found.items()}
                for name, found in kept["state"].items()
            },
            # in the order that the optimiser has them in, since it goes by that
            "param_groups": [
                {**group, **_kernels(mine), "params": sorted(numbers[name] for name in group["params"])}
                for group, mine in zip(kept["param_groups"], optimizer.param_groups, strict=True)
            ],
        }
    )


def _kernels(group: dict[str, Any]) -> dict[str, Any]:
    """How a group's steps are computed, which hangs on how its weights lie, not on what they are."""
    return {key: group[key] for key in ("fused", "foreach", "capturable") if key in group}


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the optimiser's weights, in its order, by which its own state goes."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if strange := [key for key in given if key not in names]:
        raise ValueError(f"optimizer: expected the model's parameters alone, got {len(strange)} others")
    return [names[key] for key in given]


def _laid(value: Any, like: Any) -> Any:
    """In shards as `like` lies in, for a tensor of its shape; anything else as it is."""
    if not isinstance(value, Tensor) or not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, **_by_itself())


@cache
def _by_itself() -> dict[str, None]:
    """Tells torch, where it can be told, that every rank has the whole, so that none has to send it."""
    from torch.distributed.tensor import distribute_tensor

    return {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}


def gathered(value: Any) -> Any:
    """Whole, of a tensor that lies on ranks in shards (a DTensor), which all ranks have to ask for; anything else as it
    is.
    """
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()


def is_sharded(model: nn.Module) -> bool:
    """Some of its weights lie on ranks in shards."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@dataclass(frozen=True)
class Gathered:
    """A ball, or a law to draw from, around sharded weights: every rank asks `ball` about whole tensors, and keeps its
    shards of what that gives.

    `Layerwise` needs none of this, since its norms are sums over shards. Others look at all numbers side by side, and
    every rank needs room for whole weights, gradients and displacements. With equal generators, all draw alike.

    Args:
        radius: as the ball's, which it replaces.
        ball: `Global`, `Box`, `Gaussian`, ...
    """

    radius: float
    ball: Any

    def steepest(self, gradient: Weights, centre: Weights) -> dict[str, Tensor]:
        return self._shards(self._sized().steepest(_wholes(gradient), _wholes(centre)), gradient)

    def project(self, displacement: Weights, centre: Weights) -> dict[str, Tensor]:
        return self._shards(self._sized().project(_wholes(displacement), _wholes(centre)), displacement)

    def sample(self, centre: Weights, generator: Generator = None, surface: bool = False) -> dict[str, Tensor]:
        return self._shards(self._sized().sample(_wholes(centre), generator, surface), centre)

    def _sized(self) -> Any:
        return replace(self.ball, radius=self.radius)

    def _shards(self, found: Weights, like: Weights) -> dict[str, Tensor]:
        return {name: _laid(value, like[name]) for name, value in found.items()}


def _wholes(tensors: Weights) -> dict[str, Tensor]:
    return {name: gathered(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def same_buffers(model: nn.Module) -> None:
    """All buffers become the first rank's; those of one type travel together."""
    if not _talk:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_type.values():
        packed = torch.cat([buffer.reshape(-1) for buffer in buffers])
        distributed.broadcast(packed.view(torch.uint8), 0)  # backends know few types
        parts = torch.split(packed, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view(of.shape) for part, of in zip(parts, buffers, strict=True)])


def raw(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel wraps; any other model itself. What attacks climb on: a gradient of
    pixels has nothing to average.
    """
    wrapped: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return wrapped


def on_raw(attack_on: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """An `attack_on` of steps, asked for what lies under DistributedDataParallel."""
    return lambda model: attack_on(raw(model))


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """A block whose forwards' gradients each rank keeps to itself; the next backward of a forward outside averages what
    has come together. Of DistributedDataParallel alone: FSDP2 would have to keep whole gradients for it.
    """
    block: AbstractContextManager[None] = nullcontext()
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else block


def per_rank(climb: Callable[..., Any]) -> Callable[..., Any]:
    """A climb whose v is every rank's own: its direction comes from the rank's rows alone, without communication. The
    descent's gradient is averaged, and w stays equal on all ranks: the step has to be taken after the block.

    Args:
        climb: `perturbed`, or a function that is called like it; the model has to be a DistributedDataParallel.

    Raises: ValueError with step_inside=True, by which replicas would drift apart.
    """

    @contextmanager
    def local(model: nn.Module, *arguments: Any, **named: Any) -> Iterator[Any]:
        if named.get("step_inside"):
            raise ValueError("step_inside: expected False with an ascent per rank, or replicas would drift apart")
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(f"model: an ascent per rank needs DistributedDataParallel, got {type(model).__name__}")
        with ExitStack() as stack:
            with model.no_sync():
                ascent = stack.enter_context(climb(model, *arguments, **named))
            yield ascent

    return local


def reshard(model: nn.Module) -> None:
    """FSDP2's root, which by default stays whole after a forward without backward, is in shards again: what is done to
    whole weights is lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # nobody has asked for it, and importing it takes long
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def refuse_others(model: nn.Module) -> None:
    """ValueError for what shards weights in a way that this cannot follow: FSDP1 and DeepSpeed's ZeRO-3."""
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("torch.distributed.fsdp.fully_sharded"):
            raise ValueError("model: FSDP1 flattens weights, so that no layer can be told; use FSDP2, `fully_shard`")
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            raise ValueError("model: ZeRO-3 holds no weights between forwards, to perturb; use FSDP2, `fully_shard`")
