"""How long one step of training takes: ours, the paper's procedure, another library's, and the convolutions alone.

    python benchmarks/training_step.py --out training-step.json
    python benchmarks/training_step.py --network small-resnet --batch-size 8 --rounds 2 --contenders '*fp32*'
    python benchmarks/training_step.py --profile

All do the same attack on the same network and batches, each in a process of its own, and take turns (`pairs`). The
names say what a contender is: AT or AT-AWP (TRADES or TRADES-AWP), the precision, the mode that the network is
attacked in. They are measured by

    official eval, train    the paper's procedure (`official`), with its attack in that mode, as torch is by default:
                            its allocator, and TF32 in convolutions where a GPU has it. TRADES attacks in eval mode
    official ..., memory kept    the same, with freed memory kept in the process, as ours does
    floor fp32, bf16        the plain convolutions of a step of AT-AWP, alone and back to back (`floor`)
    AT ...                  the same step without the weight adversary
    peak                    the most operations a second that a product of matrices or a 1x1 convolution reaches here

Ours are steps as recipes take them: fp16 with its loss scale, fp32 strictly that, tf32 a contender of its own on a GPU.
How many times faster than others they are is told of steps that do the same work, exact AT-AWP at every batch; what
amortised ones and every other one save is told over AT. Operations are those of direct convolutions, so that
steps that need fewer, by Winograd's way, show a larger share of the peak than they take, and may be under the floor.

`--profile` instead shows where the milliseconds of one contender's step go.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from floor import counted, flops, peak, recorded, replayed
from official import at_awp_step, trades_awp_step
from pairs import Contender, around, compare, ratios, seconds_of, spread, table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saltflat import AT, PGD, TRADES, Layerwise, Linf, double_perturbation_step, models, perturbed
from saltflat.lab import memory, record
from saltflat.lab.climbing import attack_on
from saltflat.lab.precision import DTYPES, running, taken_in
from saltflat.lab.recipes import RECIPES
from saltflat.lean.convolution import Fixed
from saltflat.neighbours.amortised import amortised_step
from saltflat.objectives import Objective

Mode = Literal["eval", "train"]
Step = Callable[[], Any]
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
POOL = 4  # batches that are on hand, taken in turn


@dataclass(frozen=True)
class Setting:
    """What all have in common. Images are square, with three channels; their pixels and labels are random."""

    network: str = "preact-resnet18"
    width: int = 24  # of the small network's first stage
    classes: int = 10
    size: int = 32
    batch_size: int = 64
    objective: str = "at"
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    ascent_steps: int = 1
    gamma: float = 0.005
    learning_rate: float = 0.01
    threads: int = 2
    device: str = "cpu"
    seed: int = 0


def started(setting: Setting) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    """The network in train mode, in torch's own layout, and a function that gives the next batch."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    model = network(setting).to(setting.device).train()
    shape = (setting.batch_size, 3, setting.size, setting.size)
    batches = [
        (torch.rand(shape).to(setting.device), torch.randint(setting.classes, shape[:1]).to(setting.device))
        for _ in range(POOL)
    ]
    following = itertools.cycle(batches)
    return model, lambda: next(following)


def network(setting: Setting) -> nn.Module:
    """A new one, in torch's own layout."""
    if setting.network == "preact-resnet18":
        return models.preact_resnet18(setting.classes)
    if setting.network == "wide-resnet":
        return models.wide_resnet(num_classes=setting.classes)
    if setting.network == "small-resnet":
        return models.small_resnet(setting.classes, widths=(setting.width, 2 * setting.width, 4 * setting.width))
    raise ValueError(f"network: expected 'preact-resnet18', 'wide-resnet' or 'small-resnet', got {setting.network!r}")


def sgd(model: nn.Module, setting: Setting, **options: Any) -> torch.optim.SGD:
    """The paper's optimiser."""
    return torch.optim.SGD(model.parameters(), setting.learning_rate, momentum=0.9, weight_decay=5e-4, **options)


def finished(step: Step, device: str) -> Step:
    """The step, and whatever it left for a GPU to do."""

    def whole() -> None:
        step()
        torch.cuda.synchronize()

    return whole if torch.device(device).type == "cuda" else step


def official(setting: Setting, *, attack_mode: Mode, kept: bool = False) -> Step:
    """The paper's procedure, under torch's defaults; `kept`: but with freed memory kept."""
    if kept:
        memory.keep()
    model, batch = started(setting)
    proxy = network(setting).to(setting.device)
    optimizer, proxy_optimizer = sgd(model, setting), torch.optim.SGD(proxy.parameters(), 0.01)
    attack: dict[str, Any] = {"eps": setting.eps, "step_size": setting.step_size, "steps": setting.steps}

    def step() -> None:
        if setting.objective == "trades":
            trades_awp_step(model, proxy, optimizer, proxy_optimizer, *batch(), gamma=setting.gamma, **attack)
        else:
            at_awp_step(
                model, proxy, optimizer, proxy_optimizer, *batch(), gamma=setting.gamma, attack_mode=attack_mode,
                **attack,
            )  # fmt: skip

    return finished(step, setting.device)


def ours(
    setting: Setting,
    *,
    attack_mode: Mode = "eval",
    precision: str = "fp32",
    awp: bool = True,
    every: int = 1,
    amortised: bool = False,
    step_inside: bool = False,
    attack_on_itself: bool = False,
    compiled: bool = False,
) -> Step:
    """A step of the library's, as a recipe takes it: channels-last, in its precision, the attack on a cheaper network
    where there is one, or on the compiled one. A call makes `every` steps, the first of them with the weight adversary.
    """
    memory.keep()
    model, batch = started(setting)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ball = Layerwise(setting.gamma) if awp else None
    objective: Objective = TRADES(6.0) if setting.objective == "trades" else AT()
    optimizer, device = sgd(model, setting, fused=True), torch.device(setting.device)
    given: dict[str, Any] = {
        "attack": PGD(Linf(setting.eps), setting.step_size, setting.steps),
        "optimizer": optimizer,
        "attack_mode": attack_mode,
        "step_inside": step_inside and awp,
        **({} if attack_on_itself else climbed_on(setting, attack_mode, precision, compiled)),
    }
    take: Callable[..., Any] = double_perturbation_step
    if amortised:
        take = amortised_step
    elif setting.ascent_steps > 1:
        given["steps"] = setting.ascent_steps
    scale: dict[str, Tensor] = {}

    def step() -> None:
        for number in range(every):
            x, y = batch()

            def taken(objective: Objective, x: Tensor = x, y: Tensor = y, number: int = number) -> Any:
                return take(model, x, y, objective=objective, ball=ball if number == 0 else None, **given)

            taken_in(precision, taken, objective, optimizer, scale, device)

    return finished(step, setting.device)


def climbed_on(setting: Setting, attack_mode: Mode, precision: str, compiled: bool) -> dict[str, Any]:
    """What a recipe's attack climbs on, where that is not the network itself, as an argument of the step."""
    recipe = RECIPES["at-awp"]
    config = replace(
        recipe,
        attack=replace(recipe.attack, mode=attack_mode),
        compute=replace(recipe.compute, compile=compiled),
    )
    found = attack_on(config, precision, torch.device(setting.device))
    return {} if found is None else {"attack_on": found}


def art(setting: Setting) -> Step:
    """One batch through the Adversarial Robustness Toolbox (MIT): its AWP trainer's `fit`, with its PGD."""
    import numpy as np
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.defences.trainer import AdversarialTrainerAWPPyTorch
    from art.estimators.classification import PyTorchClassifier

    model, batch = started(setting)
    kind = "gpu" if torch.device(setting.device).type == "cuda" else "cpu"

    def classifier(of: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return PyTorchClassifier(
            of, nn.CrossEntropyLoss(), (3, setting.size, setting.size), setting.classes, optimizer,
            clip_values=(0.0, 1.0), device_type=kind,
        )  # fmt: skip

    proxy = network(setting).to(setting.device)
    trained = classifier(model, sgd(model, setting))
    attack = ProjectedGradientDescentPyTorch(
        trained, norm=np.inf, eps=setting.eps, eps_step=setting.step_size, max_iter=setting.steps, num_random_init=1,
        batch_size=setting.batch_size, verbose=False,
    )  # fmt: skip
    trainer = AdversarialTrainerAWPPyTorch(
        trained, classifier(proxy, torch.optim.SGD(proxy.parameters(), 0.01)), attack,
        mode="TRADES" if setting.objective == "trades" else "PGD", gamma=setting.gamma, beta=6.0, warmup=0,
    )  # fmt: skip

    def step() -> None:
        x, y = batch()
        trainer.fit(x.cpu().numpy(), y.cpu().numpy(), batch_size=setting.batch_size, nb_epochs=1)

    return finished(step, setting.device)


def convolutions_alone(setting: Setting, *, precision: str) -> Step:
    """The floor: what `ours` on the network itself convolves, and nothing else; with memory kept as there."""
    calls = recorded(ours(setting, precision=precision, attack_on_itself=True))
    again = replayed(calls, setting.device)

    def step() -> None:
        with running(precision, torch.device(setting.device)):
            again()

    return finished(step, setting.device)


def perturb_and_restore(setting: Setting) -> Step:
    """w + v from a gradient at hand, and w again, without anything in between."""
    memory.keep()
    model, batch = started(setting)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = batch()
    AT().outer(model, x, x, y).backward()  # type: ignore[no-untyped-call]
    g = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.ndim > 1}

    def step() -> None:
        with perturbed(model, g, Layerwise(setting.gamma)):
            pass

    return finished(step, setting.device)


def precisions(setting: Setting) -> list[str]:
    """CPUs have no tf32."""
    gpu = torch.device(setting.device).type == "cuda"
    return [precision for precision in PRECISIONS if gpu or precision != "tf32"]


def floors(setting: Setting) -> list[str]:
    """The precisions that have one: CPUs hardly compute in fp16."""
    return [precision for precision in precisions(setting) if precision != "fp16"]


def contenders(setting: Setting) -> list[Contender]:
    """All that can be asked for; `default` names those that take part unless others are named."""
    modes: tuple[Mode, ...] = ("eval",) if setting.objective == "trades" else ("eval", "train")
    plain = setting.objective.upper()
    of: dict[str, Callable[[Setting], Step]] = {}
    for mode in modes:
        of[f"official {mode}"] = partial(official, attack_mode=mode)
        of[f"official {mode}, memory kept"] = partial(official, attack_mode=mode, kept=True)
    for precision in precisions(setting):
        take, name = partial(ours, precision=precision), f"{plain}-AWP {precision}"
        of |= {f"{name} {mode}": partial(take, attack_mode=mode) for mode in modes}
        of |= {f"{plain} {precision} {mode}": partial(take, attack_mode=mode, awp=False) for mode in modes}
        of[f"{name} eval, amortised"] = partial(take, amortised=True)
        of[f"{name} eval, every 2nd step"] = partial(take, every=2)
        of[f"{name} eval, on itself"] = partial(take, attack_on_itself=True)
        of[f"{name} eval, compiled"] = partial(take, compiled=True)
    of |= {f"floor {precision}": partial(convolutions_alone, precision=precision) for precision in floors(setting)}
    of["perturb and restore"] = perturb_and_restore
    found = [Contender(name, make, setting, steps=2 if "every" in name else 1) for name, make in of.items()]
    if importlib.util.find_spec("art") is not None:
        found.insert(2 * len(modes), Contender("ART eval", art, setting, environment={"TQDM_DISABLE": "1"}))
    return found


def default(setting: Setting) -> list[str]:
    """Patterns of names."""
    plain = setting.objective.upper()
    return [
        "official eval", "official train", "official eval, memory kept", "ART *",
        *(f"{plain}-AWP {precision} {mode}" for precision in ("fp32", "tf32", "bf16") for mode in ("eval", "train")),
        *(f"{plain} {precision} eval" for precision in ("fp32", "tf32", "bf16")),
        f"{plain}-AWP fp32 eval, amortised", f"{plain}-AWP bf16 eval, amortised",
        f"{plain}-AWP fp32 eval, every 2nd step", "floor *", "perturb and restore",
    ]  # fmt: skip


def chosen(of: Sequence[Contender], patterns: Sequence[str]) -> list[Contender]:
    """Those whose names fit one of the patterns, `*` for anything."""
    found = [contender for contender in of if any(fnmatch(contender.name, pattern) for pattern in patterns)]
    if not found:
        raise SystemExit(f"contenders: expected some of {[contender.name for contender in of]}, got {list(patterns)}")
    return found


KINDS: dict[str, dict[str, bool]] = {"AT-AWP": {}, "AT": {"awp": False}, "amortised": {"amortised": True}}


def work(setting: Setting, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, dict[str, float]]:
    """Flops and numbers of the convolutions of a step, by kind of step: of two examples, counted up to a batch."""
    few = replace(setting, batch_size=2, device="cpu")
    found = {}
    for kind in kinds:
        calls = recorded(partial(ours, attack_on_itself=True, **KINDS[kind])(few))
        found[kind] = {"flops": flops(calls) * setting.batch_size / 2, **counted(calls)}
    return found


def kind_of(name: str) -> str | None:
    """Whose convolutions a contender could not do without; None if it makes none."""
    if name.startswith("perturb"):
        return None
    if "amortised" in name:
        return "amortised"
    return "AT" if is_plain(name) else "AT-AWP"


def is_plain(name: str) -> bool:
    """Ours without a weight adversary."""
    return name.startswith(("AT ", "TRADES "))


def is_ours_with_awp(name: str) -> bool:
    return name.startswith(("AT-AWP ", "TRADES-AWP "))


def is_whole(name: str) -> bool:
    """A step that does what the paper's does: the weight adversary in full, at every batch."""
    return kind_of(name) == "AT-AWP" and "every" not in name and not name.startswith("floor")


def peaks(setting: Setting) -> dict[str, Any]:
    """What the machine can do, by precision, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return {name: pool.submit(_peak, name, setting.device, setting.threads).result() for name in floors(setting)}


def _peak(precision: str, device: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with running(precision, torch.device(device)):
        return peak(DTYPES.get(precision, torch.float32), device)


REFERENCES = ("official eval", "official train", "ART eval")


def judged(found: Mapping[str, Mapping[str, Any]], needed: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """By contender: seconds a step, and ratios to all that others are measured by; of those that do the same work, how
    many times faster than the paper's procedure with its attack in the same mode, and than ART, which attacks in eval
    mode; and the share of the peak that the (direct) convolutions it needs reach.
    """
    seconds = seconds_of(found)
    references = [name for name in found if name in REFERENCES or is_plain(name) or name.startswith("floor")]
    to = {reference: ratios(seconds, reference) for reference in references}
    summary = {}
    for name, values in seconds.items():
        of: dict[str, Any] = {
            "seconds": spread(values),
            "page_faults": spread(found[name]["page_faults"]),
            "ratio_to": {reference: to[reference][name] for reference in to if reference != name},
        }
        theirs, kind, precision = f"official {mode_of(name)}", kind_of(name), precision_of(name)
        if is_whole(name) and theirs in found:
            of["times_faster"] = times_faster(values, seconds[theirs])
        if is_whole(name) and mode_of(name) == "eval" and "ART eval" in found:
            of["times_faster_than_art"] = times_faster(values, seconds["ART eval"])
        if kind == "AT-AWP" and f"floor {precision}" in found and "every" not in name:
            of["over_floor"] = to[f"floor {precision}"][name]
        if kind is not None and precision in top and "every" not in name:
            of["flops_per_second"] = needed[kind]["flops"] / of["seconds"]["median"]
            of["share_of_peak"] = of["flops_per_second"] / top[precision]["flops_per_second"]
        summary[name] = of
    return summary


def times_faster(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Round by round."""
    return spread([theirs / ours_ for theirs, ours_ in zip(other, own, strict=True)])


def mode_of(name: str) -> str:
    """The attack's."""
    return "train" if " train" in name else "eval"


def precision_of(name: str) -> str:
    return next((precision for precision in PRECISIONS if precision in name), "fp32")


def adding(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the weight adversary adds to a step: seconds beyond those of AT in the same precision and mode, as a share
    of them; and what perturbing and restoring alone take, as a share of a step with it.
    """
    seconds, added = seconds_of(found), {}
    for name, values in seconds.items():
        plain = f"{name.partition('-')[0]} {precision_of(name)} {mode_of(name)}"
        if is_ours_with_awp(name) and plain in seconds and not name.endswith(("on itself", "compiled")):
            shares = [own / other - 1 for own, other in zip(values, seconds[plain], strict=True)]
            added[f"{name}, over {plain}"] = spread(shares)
        if "perturb and restore" in seconds and is_ours_with_awp(name) and "," not in name:
            alone = zip(seconds["perturb and restore"], values, strict=True)
            added[f"perturb and restore, of {name}"] = spread([share / own for share, own in alone])
    return added


def shown(summary: Mapping[str, Any], added: Mapping[str, Any], turns: Mapping[str, Any]) -> str:
    """What is printed."""
    beside = {"times faster than official": "times_faster"}
    if any("times_faster_than_art" in of for of in summary.values()):
        beside["times faster than ART"] = "times_faster_than_art"
    beside["over the floor"] = "over_floor"
    rows = []
    for name, of in summary.items():
        share = f"{of['share_of_peak']:.1%}" if "share_of_peak" in of else ""
        memory = turns[name].get("peak_gpu_bytes", turns[name]["peak_bytes"]) / 2**20
        cells = [*(around(of.get(key)) for key in beside.values()), share, f"{memory:.0f}"]
        rows.append([name, around(of["seconds"], ".4f"), *cells, f"{of['page_faults']['median']:.0f}"])
    head = ["", "seconds a step", *beside, "of peak", "MiB", "page faults"]
    shares = [[name, around(of, ".2%"), str(of["n"])] for name, of in added.items()]
    return "\n\n".join([table(head, rows), *([table(["", "adds", "n"], shares)] if shares else [])])


GROUPS = (
    "convolution, forward", "convolution, input gradient", "convolution, weight gradient", "BatchNorm", "activation",
    "linear and pooling", "sums", "weights, multi-tensor", "casts, copies and layouts", "other",
)  # fmt: skip


NAMES = {  # what an operation's name contains
    "BatchNorm": ("batch_norm",),
    "activation": ("relu", "threshold", "silu"),
    "linear and pooling": ("addmm", ".mm.", "linear", "pool", "mean"),
    "weights, multi-tensor": ("_foreach", "_fused"),
    "casts, copies and layouts": ("_to_copy", "clone", "copy_", "to_mkldnn", "reorder"),
    "sums": (".add.", ".add_."),
}


def group(name: str, backward: bool = False) -> str:
    """Which part of a step an operation belongs to, by its name, and whether autograd's backward asked for it.

    >>> group("aten.native_batch_norm_backward.default"), group("aten.convolution.default")
    ('BatchNorm', 'convolution, forward')
    """
    if "convolution" in name:
        return "convolution, input gradient" if backward else "convolution, forward"
    return next((part for part, words in NAMES.items() if any(word in name for word in words)), "other")


class Labelled(TorchDispatchMode):
    """A block in which every operation runs under the label of its group, for torch's profiler. A convolution's
    backward for both gradients is made in two calls, one for each. What a lean network does for a convolution, products
    of matrices, packing and a ReLU that follows at once among it, is that convolution's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.within: str | None = None
        self.patched = ExitStack()

    def __enter__(self) -> Labelled:
        for name, part in (("forward", "forward"), ("input_gradient", "input gradient")):
            whole = self._noting(getattr(Fixed, name), f"convolution, {part}")
            self.patched.enter_context(patch.object(Fixed, name, whole))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patched.close()

    def _noting(self, method: Callable[..., Tensor], part: str) -> Callable[..., Tensor]:
        def whole(*args: Any) -> Tensor:
            self.within = part
            try:
                return method(*args)
            finally:
                self.within = None

        return whole

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within is not None or operation is not torch.ops.aten.convolution_backward.default:
            backward = torch._C._current_graph_task_id() != -1
            with torch.profiler.record_function(self.within or group(str(operation), backward)):
                return operation(*args, **(kwargs or {}))
        wanted, parts = args[10], [None, None, None]
        for name, mask in (("input", [wanted[0], False, False]), ("weight", [False, *wanted[1:]])):
            if any(mask):
                with torch.profiler.record_function(f"convolution, {name} gradient"):
                    made = operation(*args[:10], mask)
                parts = [new if asked else old for new, old, asked in zip(made, parts, mask, strict=True)]
        return tuple(parts)


def profiled(step: Step, device: str, steps: int) -> dict[str, float]:
    """Seconds of a step by group of operations, and what is none of them: Python, autograd, and what it costs to
    look.
    """
    gpu = torch.device(device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    step()
    with torch.profiler.profile(activities=kinds) as profile:
        with torch.profiler.record_function("all"), Labelled():
            for _ in range(steps):
                step()
    events = {event.key: event for event in profile.key_averages()}
    taken = {
        name: (events[name].device_time_total if gpu else events[name].cpu_time_total) / steps / 1e6
        for name in GROUPS
        if name in events
    }
    whole = events["all"].cpu_time_total / steps / 1e6
    return {**taken, "between operations": max(0.0, whole - sum(taken.values())), "all": whole}


def shown_profile(taken: Mapping[str, float]) -> str:
    rows = [[name, f"{1e3 * seconds:.1f}", f"{seconds / taken['all']:.1%}"] for name, seconds in taken.items()]
    return table(["", "ms a step", "share"], rows)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common(parser)
    parser.add_argument("--contenders", nargs="+", default=None, metavar="PATTERN", help="names; * for anything")
    parser.add_argument("--list", action="store_true", help="name all contenders")
    parser.add_argument("--profile", action="store_true", help="of the first contender of ours, instead of all times")
    parser.add_argument("--calls", type=int, default=1, help="steps in a turn; more for a GPU")
    parser.add_argument("--in-process", action="store_true", help="all in this process, to debug")
    return parser


def common(parser: argparse.ArgumentParser, rounds: int = 7) -> None:
    """The arguments that settings of steps have, here and in the other scripts."""
    like = Setting()
    parser.add_argument("--network", default=like.network, help="preact-resnet18, wide-resnet or small-resnet")
    parser.add_argument("--width", type=int, default=like.width, help="of small-resnet's first stage")
    parser.add_argument("--classes", type=int, default=like.classes)
    parser.add_argument("--size", type=int, default=like.size, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=like.batch_size)
    parser.add_argument("--objective", choices=["at", "trades"], default=like.objective)
    parser.add_argument("--steps", type=int, default=like.steps, help="K1, of the attack")
    parser.add_argument("--gamma", type=float, default=like.gamma)
    parser.add_argument("--threads", type=int, default=like.threads)
    parser.add_argument("--device", default=like.device)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--out", type=Path, default=None)


def setting_of(given: argparse.Namespace) -> Setting:
    names = ("network", "width", "classes", "size", "batch_size", "objective", "steps", "gamma", "threads", "device")
    return Setting(**{name: getattr(given, name) for name in names})


def environment(given: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions, with the GPU's name where there is one."""
    gpu = torch.device(given.device).type == "cuda"
    name = torch.cuda.get_device_name(given.device) if gpu else given.device
    return record.environment(name, given.threads, torch.version.cuda if gpu else None)


def main() -> None:
    given = arguments().parse_args()
    setting = setting_of(given)
    everybody = contenders(setting)
    if given.list:
        print("\n".join(contender.name for contender in everybody))
        return
    taking_part = chosen(everybody, given.contenders or default(setting))
    if not any(contender.name.startswith("ART") for contender in everybody):
        print("ART is left out: no module named art (pip install adversarial-robustness-toolbox)")
    asked = {"what": "seconds of a training step", "setting": asdict(setting)}
    if given.profile:
        subject = next((each for each in taking_part if is_plain(each.name) or is_ours_with_awp(each.name)), None)
        if subject is None:
            raise SystemExit("contenders: expected one of ours to profile")
        taken = profiled(subject.make(setting), setting.device, max(1, given.rounds))
        print(f"{subject.name}\n{shown_profile(taken)}")
        found: dict[str, Any] = {**asked, "what": "where a step's time goes", "contender": subject.name, "taken": taken}
    else:
        kinds = sorted({kind for each in taking_part if (kind := kind_of(each.name)) is not None})
        needed, top = work(setting, kinds), peaks(setting)
        for precision, of in top.items():
            print(f"peak {precision}: {of['flops_per_second'] / 1e9:.0f} Gflop/s, {of['by']}")
        turns = compare(
            taking_part, rounds=given.rounds, warm_up=given.warm_up, calls=given.calls, in_process=given.in_process,
            say=partial(print, flush=True),
        )  # fmt: skip
        summary = judged(turns, needed, top)
        added = adding(turns)
        print(shown(summary, added, turns))
        found = {**asked, "rounds": given.rounds, "warm_up": given.warm_up, "calls": given.calls}
        found |= {"work": needed, "peak": top, "turns": turns, "summary": summary, "added": added}
    if given.out is not None:
        record.write_json(given.out, {**found, "environment": environment(given)})


if __name__ == "__main__":
    main()
