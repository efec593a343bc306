"""The benchmarks measure what they say: by counting and by equality, never by time."""

import copy
import doctest
import importlib
import itertools
import json
import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from memory import Memory
from networks import batch, convolutional
from oracles.proxy_awp import at_loss, proxy_step, trades_loss

from saltflat import AT, PGD, TRADES, Layerwise, Linf, double_perturbation_step, models
from saltflat.lab import memory as process_memory
from saltflat.lab import record
from saltflat.lab.climbing import Compiled
from saltflat.lab.config import Awp
from saltflat.lab.recipes import RECIPES
from saltflat.lean import leaner
from saltflat.lean.packed import supported

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))  # as for a script that is run from there; at the end: `memory` is here, too

import alignment  # noqa: E402
import arms  # noqa: E402
import first_step  # noqa: E402
import growth  # noqa: E402
import official  # noqa: E402
import pairs  # noqa: E402
import tables  # noqa: E402
import training_step  # noqa: E402
from alive import Alive  # noqa: E402
from floor import counted, flops, recorded, replayed  # noqa: E402

EPS, ALPHA, K1, GAMMA = 0.05, 0.02, 3, 0.02


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def started(model, x, y):
    """A copy, and its optimiser, with momentum from a step before."""
    twin = copy.deepcopy(model)
    optimizer = sgd(twin)
    torch.nn.functional.cross_entropy(twin(x), y).backward()
    optimizer.step()
    return twin, optimizer


def of_paper(model, optimizer, x, y, mode, start):
    """One iteration of the re-derived procedure."""
    proxy = convolutional()
    official.at_awp_step(
        model, proxy, optimizer, torch.optim.SGD(proxy.parameters(), 0.01), x, y,
        eps=EPS, step_size=ALPHA, steps=K1, gamma=GAMMA, attack_mode=mode, start=start,
    )  # fmt: skip


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_papers_procedure_is_the_step_of_the_oracle_and_of_the_library(mode):
    torch.manual_seed(1)
    model = convolutional()
    x, y = batch()
    delta = Linf(EPS).sample(x)
    (theirs, first), (ours, second), (oracle, third) = (started(model, x, y) for _ in range(3))
    before = weights(theirs)
    attack = PGD(Linf(EPS), ALPHA, K1, start=lambda ball, x, generator=None: delta)

    of_paper(theirs, first, x, y, mode, delta)
    double_perturbation_step(
        ours, x, y, objective=AT(), attack=attack, ball=Layerwise(GAMMA), optimizer=second, attack_mode=mode,
        step_inside=True,
    )  # fmt: skip

    def attack_at(proxy, start):
        return attack(AT().inner(proxy.train(mode == "train"), x, y), x)

    proxy_step(oracle, third, x, y, loss=at_loss, attack_at=attack_at, gamma=GAMMA, steps=1, inside=True)
    assert (weights(theirs) - weights(oracle)).abs().max() < 1e-10
    assert (weights(theirs) - weights(ours)).abs().max() < 1e-10
    assert (weights(theirs) - before).abs().max() > 1e-3


def test_the_papers_procedure_for_trades_is_the_oracles():
    torch.manual_seed(2)
    model = convolutional(batch_norm=False)
    x, y = batch()
    x = 0.2 + 0.6 * x
    noise = 0.001 * torch.randn_like(x)
    (theirs, first), (oracle, second) = started(model, x, y), started(model, x, y)
    proxy = convolutional(batch_norm=False)
    official.trades_awp_step(
        theirs, proxy, first, torch.optim.SGD(proxy.parameters(), 0.1), x, y,
        eps=EPS, step_size=ALPHA, steps=K1, gamma=GAMMA, beta=6.0, start=noise,
    )  # fmt: skip

    def attack_at(network, start):
        attack = PGD(Linf(EPS), ALPHA, K1)
        return attack(TRADES(6.0).inner(network, x, y), x, start=x + noise)

    proxy_step(oracle, second, x, y, loss=trades_loss(6.0), attack_at=attack_at, gamma=GAMMA, steps=1, inside=True)
    assert (weights(theirs) - weights(oracle)).abs().max() < 1e-10


def test_the_paper_computes_weight_gradients_in_the_attack_and_the_library_none():
    x, y = batch()
    model = convolutional()
    layers = 2
    theirs, first = started(model, x, y)
    ours, second = started(model, x, y)
    taken = counted(recorded(lambda: of_paper(theirs, first, x, y, "train", torch.zeros_like(x))))
    assert taken == {
        "forwards": layers * (K1 + 1 + 2 + 1),  # the attack, its end, the proxy and the training pass, logging
        "input_gradients": layers * K1 + 2 * (layers - 1),
        "weight_gradients": layers * (K1 + 2),
    }
    step = partial(
        double_perturbation_step, ours, x, y, objective=AT(), attack=PGD(Linf(EPS), ALPHA, K1), ball=Layerwise(GAMMA),
        optimizer=second, attack_mode="train",
    )  # fmt: skip
    assert counted(recorded(step)) == {
        "forwards": layers * (K1 + 2),
        "input_gradients": layers * K1 + 2 * (layers - 1),
        "weight_gradients": layers * 2,
    }


SMALL = training_step.Setting(network="small-resnet", width=2, batch_size=2, size=8, steps=3, threads=1)
LAYERS = sum(isinstance(module, torch.nn.Conv2d) for module in models.small_resnet(widths=(2, 4, 8)).modules())


@pytest.mark.parametrize(
    ("options", "forwards", "weight_gradients"),
    [({}, 3 + 2, 2), ({"awp": False}, 3 + 1, 1), ({"every": 2}, 2 * 3 + 3, 3), ({"step_inside": True}, 3 + 2, 2)],
    ids=["AT-AWP", "AT", "every 2nd", "inside"],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_floor_lists_every_convolution_of_a_step(options, forwards, weight_gradients, mode):
    step = training_step.ours(SMALL, attack_mode=mode, attack_on_itself=True, **options)
    attacks = 3 * options.get("every", 1)
    for _ in range(2):  # the second step as the first
        assert counted(recorded(step)) == {
            "forwards": LAYERS * forwards,
            "input_gradients": LAYERS * attacks + (LAYERS - 1) * weight_gradients,
            "weight_gradients": LAYERS * weight_gradients,
        }


def test_the_amortised_step_needs_no_forward_and_one_weight_gradient_more_than_at():
    needed = training_step.work(SMALL)
    assert needed["amortised"]["forwards"] == needed["AT"]["forwards"]
    assert needed["amortised"]["weight_gradients"] == needed["AT"]["weight_gradients"] + LAYERS
    assert needed["AT-AWP"]["forwards"] == needed["AT"]["forwards"] + LAYERS


def test_a_replay_makes_the_same_calls_on_the_same_shapes_layouts_and_types():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        calls = recorded(training_step.ours(SMALL, precision=precision, attack_on_itself=True))
        again = recorded(replayed(calls))
        assert again == calls
        assert {like.dtype for call in calls for like in call.arguments[:2]} == {dtype}
    inner = calls[LAYERS // 2].arguments[0]
    assert inner.strides[1] == 1, "channels-last"


def test_work_is_counted_for_two_examples_and_in_proportion():
    calls = recorded(training_step.ours(SMALL, attack_on_itself=True))
    assert training_step.work(SMALL, ["AT-AWP"])["AT-AWP"]["flops"] == flops(calls)
    more = training_step.replace(SMALL, batch_size=6)
    recounted = flops(recorded(training_step.ours(more, attack_on_itself=True)))
    assert training_step.work(more, ["AT-AWP"])["AT-AWP"]["flops"] == recounted


class Straight(torch.nn.Module):
    """Three convolutions, a stride of 1 all along."""

    def __init__(self, channels=(3, 4, 4, 5)):
        super().__init__()
        sizes = itertools.pairwise(channels)
        parts = [(torch.nn.Conv2d(c, k, 3, padding=1, bias=False), torch.nn.BatchNorm2d(k)) for c, k in sizes]
        self.parts = torch.nn.Sequential(*(each for part in parts for each in (*part, torch.nn.ReLU())))
        self.last = torch.nn.Linear(channels[-1], 10)

    def forward(self, x):
        return self.last(self.parts(x).mean((2, 3)))


on_onednn = pytest.mark.skipif(not supported(torch.float32), reason="no oneDNN on this machine")


@on_onednn
def test_the_default_path_makes_as_many_convolutions_as_the_network_itself(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(training_step, "network", lambda setting: Straight())
    layers, attacks = 3, SMALL.steps
    lean, plain = training_step.ours(SMALL), training_step.ours(SMALL, attack_on_itself=True)
    lean()  # which tries the lean network on the network itself, once
    outer = {"input_gradients": 2 * (layers - 1), "weight_gradients": 2 * layers}
    calls = recorded(lean)
    # packed convolutions are forward and input gradient of the attack
    assert counted(calls) == {"forwards": layers * (2 * attacks + 2), **outer}
    assert flops(calls) == flops(recorded(plain))
    with pytest.raises(ValueError, match="calls: expected convolutions of the network itself"):
        replayed(calls)


@on_onednn
@pytest.mark.parametrize("channels", [8, 512], ids=["packed", "Winograd's way"])
def test_a_lean_networks_products_count_as_its_convolutions(channels, monkeypatch):
    part = Straight((channels, channels)).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    model = torch.nn.Sequential(*part.parts)
    climbed, x = leaner(), torch.rand(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)

    def step():
        climbed(model)(x.requires_grad_()).backward(torch.ones(2, channels, 4, 4))

    step()
    kept = training_step.Fixed.forward
    taken = training_step.profiled(step, "cpu", 1)
    assert {"convolution, forward", "convolution, input gradient", "activation"} <= taken.keys()
    assert "linear and pooling" not in taken
    assert training_step.Fixed.forward is kept


def test_splitting_a_convolutions_backward_for_the_profile_changes_no_number():
    def gradients():
        torch.manual_seed(0)
        model = convolutional()
        x, y = batch()
        x.requires_grad_()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    plain = gradients()
    with training_step.Labelled():
        labelled = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, labelled, strict=True))


def test_bytes_are_counted_as_the_memory_of_the_tests_counts_numbers():
    def work():
        x = torch.zeros(300)
        y = x[:100] + 1
        del x
        return y.double()

    with Alive() as alive, Memory(1) as memory:
        kept = work()
    assert len(kept) == 100
    assert (alive.peak, alive.held()) == (4 * 400, 800)
    assert memory.peak == 400


def test_awp_adds_one_copy_of_the_perturbed_weights_and_two_with_the_step_inside():
    memory = importlib.import_module("benchmarks.memory")  # `memory` is that of the tests
    # Where a step's maps weigh several times what its weights do, as in practice
    setting = training_step.replace(SMALL, width=32, batch_size=16, size=32, steps=2)
    found = {each.name: {"counted": memory.counted(each), "measured": [0.0]} for each in memory.contenders(setting)}
    over = {name: of["counted"] for name, of in memory.copies(found, memory.perturbed_bytes(setting)).items()}
    assert over["AT"] == 0
    assert over["AT-AWP, step after"] == pytest.approx(1, abs=0.02)
    assert over["AT-AWP, amortised"] == pytest.approx(1, abs=0.02)
    assert over["AT-AWP, step inside"] == pytest.approx(2, abs=0.02)
    assert over["official"] > 3


def test_where_maps_weigh_less_than_weights_the_ascent_itself_is_the_peak():
    memory = importlib.import_module("benchmarks.memory")
    setting = training_step.replace(SMALL, width=32)
    plain, after, *_ = (memory.counted(each) for each in memory.contenders(setting)[:2])
    copies = (after - plain) / memory.perturbed_bytes(setting)
    assert 1.9 < copies < 2.1, "w, and of gradient and displacement what the gradients of AT do not weigh"


ORDER: list[str] = []


def noting(name):
    ORDER.append(f"{name} sets up")
    return lambda: ORDER.append(name)


def process_of(setting):
    """A step that says where it is, by its page faults' stead: it fails if it is not where it should be."""
    variable, parent = setting
    assert os.getppid() == parent
    assert os.environ["SALTFLAT_CONTENDER"] == variable
    return lambda: None


def test_contenders_set_up_first_and_then_take_turns():
    ORDER.clear()
    entered = [pairs.Contender(name, noting, name) for name in "abc"]
    found = pairs.compare(entered, rounds=2, warm_up=1, calls=2, in_process=True, say=lambda line: None)
    assert [*(f"{name} sets up" for name in "abc"), *("aabbcc" * 3)] == ORDER
    assert all(len(of["seconds"]) == len(of["page_faults"]) == 2 for of in found.values())
    with pytest.raises(ValueError, match="contenders: expected different names"):
        pairs.compare([entered[0]] * 2, rounds=1)
    with pytest.raises(ValueError, match="rounds: expected an integer >= 1, got 0"):
        pairs.compare(entered, rounds=0)


@pytest.mark.slow
def test_every_contender_has_a_process_and_an_environment_of_its_own_and_says_why_it_failed(monkeypatch):
    monkeypatch.delenv("SALTFLAT_CONTENDER", raising=False)
    here = os.getpid()
    entered = [
        pairs.Contender(name, process_of, (name, here), environment={"SALTFLAT_CONTENDER": name}) for name in "ab"
    ]
    found = pairs.compare(entered, rounds=1, say=lambda line: None)
    assert found.keys() == {"a", "b"}
    assert all(of["peak_bytes"] > 1e6 for of in found.values())
    assert "SALTFLAT_CONTENDER" not in os.environ
    wrong = pairs.Contender("c", process_of, ("b", here), environment={"SALTFLAT_CONTENDER": "c"})
    with pytest.raises(RuntimeError, match=r"(?s)c: .*AssertionError"):
        pairs.compare([wrong], rounds=1, say=lambda line: None)


def test_a_call_of_several_steps_counts_for_each():
    clock = iter([0.0, 0.0, 12.0])
    turn = pairs._turn
    original = pairs.time.perf_counter
    try:
        pairs.time.perf_counter = lambda: next(clock)
        next(clock)
        assert turn(lambda: None, 3, 2).seconds == 2
    finally:
        pairs.time.perf_counter = original


def test_ratios_are_of_the_same_round():
    seconds = {"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 40.0, 6.0]}
    assert pairs.ratios(seconds, "ours")["theirs"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 3}
    assert pairs.ratios(seconds, "theirs")["ours"]["median"] == pytest.approx(1 / 3)
    # medians of the seconds alone would have said 6 / 2, by luck, and with another order of rounds something else
    shuffled = {"ours": [1.0, 2.0, 10.0], "theirs": [2.0, 40.0, 6.0]}
    assert pairs.ratios(shuffled, "ours")["theirs"]["median"] == 2


TURNS = {
    name: {"seconds": seconds, "page_faults": [5.0, 5.0], "set_up_seconds": 1.0, "peak_bytes": 2.0**30}
    for name, seconds in {
        "official eval": [8.0, 10.0],
        "official train": [9.0, 12.0],
        "AT-AWP fp32 eval": [4.0, 4.0],
        "AT-AWP fp32 train": [6.0, 6.0],
        "AT fp32 eval": [3.2, 3.2],
        "AT-AWP bf16 eval, amortised": [2.0, 2.0],
        "AT-AWP fp32 eval, every 2nd step": [3.0, 3.0],
        "official eval, memory kept": [4.0, 4.0],
        "ART eval": [12.0, 16.0],
        "floor fp32": [3.2, 4.0],
        "perturb and restore": [0.04, 0.04],
    }.items()
}
NEEDED = {kind: {"flops": 4e9} for kind in ("AT-AWP", "AT", "amortised")}
PEAK = {"fp32": {"flops_per_second": 2e9, "by": "a"}, "bf16": {"flops_per_second": 4e9, "by": "b"}}


def test_every_contender_is_judged_by_its_own_mode_and_precision():
    summary = training_step.judged(TURNS, NEEDED, PEAK)
    ours = summary["AT-AWP fp32 eval"]
    assert ours["times_faster"] == {"median": 2.25, "min": 2.0, "max": 2.5, "n": 2}
    assert summary["AT-AWP fp32 train"]["times_faster"]["max"] == 2
    assert ours["over_floor"] == {"median": 1.125, "min": 1.0, "max": 1.25, "n": 2}
    assert ours["share_of_peak"] == 0.5
    assert summary["AT-AWP bf16 eval, amortised"]["share_of_peak"] == 0.5
    assert "over_floor" not in summary["AT fp32 eval"]
    assert ours["times_faster_than_art"] == {"median": 3.5, "min": 3.0, "max": 4.0, "n": 2}
    alike = {"official eval", "official train", "AT-AWP fp32 eval", "AT-AWP fp32 train", "ART eval"}
    alike.add("official eval, memory kept")
    assert {name for name, of in summary.items() if "times_faster" in of} == alike
    in_eval_mode = {name for name in alike if "train" not in name}
    assert {name for name, of in summary.items() if "times_faster_than_art" in of} == in_eval_mode
    assert "share_of_peak" not in summary["perturb and restore"]
    added = training_step.adding(TURNS)
    assert added["AT-AWP fp32 eval, over AT fp32 eval"]["median"] == pytest.approx(0.25)
    assert added["perturb and restore, of AT-AWP fp32 eval"]["median"] == pytest.approx(0.01)
    assert training_step.shown(summary, added, TURNS).count("\n") == len(TURNS) + len(added) + 2
    assert "times faster than ART" in training_step.shown(summary, added, TURNS)
    without = {name: turns for name, turns in TURNS.items() if name != "ART eval"}
    assert "ART" not in training_step.shown(training_step.judged(without, NEEDED, PEAK), added, without)


def test_trades_is_judged_as_at_is():
    renamed = {name.replace("AT", "TRADES") if name.startswith("AT") else name: of for name, of in TURNS.items()}
    summary = training_step.judged(renamed, NEEDED, PEAK)
    assert summary["TRADES-AWP fp32 eval"] == training_step.judged(TURNS, NEEDED, PEAK)["AT-AWP fp32 eval"] | {
        "ratio_to": summary["TRADES-AWP fp32 eval"]["ratio_to"]
    }
    assert training_step.adding(renamed)["TRADES-AWP fp32 eval, over TRADES fp32 eval"]["median"] == pytest.approx(0.25)


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_all_contenders_have_names_of_their_own_and_the_default_ones_exist(objective):
    on_cpu = training_step.replace(SMALL, objective=objective)
    on_gpu = training_step.replace(on_cpu, device="cuda")
    names = [each.name for each in training_step.contenders(on_gpu)]
    assert len(set(names)) == len(names)
    assert {name for name in names if "tf32" not in name} == {e.name for e in training_step.contenders(on_cpu)}
    assert any(name.startswith(f"{objective.upper()}-AWP tf32") for name in names)
    asked = [pattern for pattern in training_step.default(on_gpu) if not pattern.startswith("ART")]
    missing = [each for each in asked if not any(training_step.fnmatch(name, each) for name in names)]
    if objective == "at":
        assert not missing
    else:  # whose attack is in eval mode, in the paper's procedure
        assert not any(" train" in name or name.startswith("AT") for name in names)
        assert all(each.endswith(" train") for each in missing)
    with pytest.raises(SystemExit, match="contenders: expected some of"):
        training_step.chosen(training_step.contenders(on_cpu), ["nobody"])


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_every_contender_on_a_cpu_takes_a_step(objective):
    setting = training_step.replace(SMALL, objective=objective)
    for each in training_step.contenders(setting):
        if not each.name.startswith("ART") and not each.name.endswith("compiled"):
            each.make(each.setting)()


def test_what_ours_climbs_on_is_what_a_recipe_does():
    def climbed_on(mode, precision, compiled=False):
        return training_step.climbed_on(SMALL, mode, precision, compiled)

    assert isinstance(climbed_on("eval", "fp32", True)["attack_on"], Compiled)
    assert climbed_on("eval", "fp32")["attack_on"].dtype is leaner(None).dtype
    assert climbed_on("eval", "bf16")["attack_on"].dtype is torch.bfloat16
    assert climbed_on("eval", "fp16") == climbed_on("train", "fp32") == climbed_on("train", "fp32", True) == {}


def test_steps_in_fp16_have_a_loss_scale(monkeypatch):
    scales = []

    def noting(precision, take, objective, optimizer, memory, device):
        found = taken_in(precision, take, objective, optimizer, memory, device)
        scales.append((precision, "loss_scale" in memory))
        return found

    taken_in = training_step.taken_in
    monkeypatch.setattr(training_step, "taken_in", noting)
    for precision in ("fp32", "fp16"):
        training_step.ours(SMALL, precision=precision)()
    assert scales == [("fp32", False), ("fp16", True)]


def test_only_contenders_that_say_so_keep_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(process_memory, "keep", lambda: kept.append(True))
    for each in training_step.contenders(SMALL):
        if each.name.startswith("official"):
            kept.clear()
            each.make(each.setting)
            assert len(kept) == each.name.endswith("memory kept")


def test_a_slope_is_the_exponent():
    assert growth.slope([2, 4, 8], [5 * a**1.5 for a in (2, 4, 8)]) == pytest.approx(1.5)
    assert training_step.Setting().__dict__.keys() >= growth.VALUES.keys() == growth.QUICK.keys() == growth.WORDS.keys()


@pytest.mark.slow
def test_the_process_of_a_first_step_tells_its_parts():
    _, output = first_step.seconds(first_step.commands(1, 1)[first_step.UNTIL], 1)
    parts = json.loads(output)
    assert next(iter(parts)) == "import torch"
    assert list(parts)[-2:] == ["first step", "second step"]


SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
MACHINE = {"cuda": None, "threads": 2, "processor": "some CPU", "torch": "2.13.0", "device": "cpu"}


def test_records_become_tables(tmp_path):
    summary = training_step.judged(TURNS, NEEDED, PEAK)
    common = {"setting": vars(SMALL), "rounds": 2, "environment": MACHINE}
    made = {
        "training-step": {"summary": summary, "turns": TURNS, "peak": PEAK, "added": training_step.adding(TURNS)},
        "profile-fp32": {"contender": "AT-AWP fp32 eval", "taken": {"activation": 0.5, "all": 2.0}},
        "memory": {
            "bytes": {"AT": {"counted": 2**20}}, "copies_over_at": {"AT": {"counted": 0.0, "measured": SPREAD}},
            "copy_bytes": 2**21,
        },
        "growth": {"growth": {"steps": {"values": [1, 2], "slope": SPREAD, "slope_of_flops": 1.0}}},
        "data-pipeline": {"summary": {"crop": {"images_per_second": SPREAD, "share_of_step": SPREAD}}},
        "first-step": {"batch_size": 64, "summary": {"import torch": SPREAD, "  import torch": SPREAD}},
    }  # fmt: skip
    for name, content in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**common, **content}))
    text = tables.compared(tmp_path)
    assert (
        "| AT-AWP fp32 eval | 4.000 (4.000 to 4.000) | 2.25 (2.00 to 2.50) | 3.50 (3.00 to 4.00) | 1.12 (1.00 to 1.25) "
        "| 50% | 1024 |" in text
    )
    assert "| AT fp32 eval | 3.200 (3.200 to 3.200) |  |  |  | 62% | 1024 |" in text
    assert "| perturb and restore, of AT-AWP fp32 eval | 1.0% (1.0% to 1.0%) | 2 |" in text
    assert "| activation | 500.0 | 25.0% |" in text
    assert "| AT | 1.0 | +0.000 | +2.00 (+1.00 to +3.00) |" in text
    assert "| steps | 1, 2 | 2.00 (1.00 to 3.00) | 1.00 |" in text
    assert "| crop | 2 (1 to 3) | 200.00% (100.00% to 300.00%) |" in text
    assert "| import torch | 2.00 (1.00 to 3.00) |" in text
    assert "| of it: import torch | 2.00 (1.00 to 3.00) |" in text
    assert text.count("2 threads of some CPU, torch 2.13.0") == len(made)
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1, "as many cells in every line"
    gpu = {**common, **made["growth"], "environment": {**MACHINE, "cuda": "12.8", "device": "some GPU"}}
    (tmp_path / "growth.json").write_text(json.dumps(gpu))
    assert "on some GPU, torch 2.13.0" in tables.compared(tmp_path)


def test_an_empty_record_has_no_tables(tmp_path):
    assert tables.compared(tmp_path) == ""


@pytest.mark.parametrize("name", ["pairs", "floor", "alive", "growth", "training_step", "tables", "benchmarks.memory"])
def test_examples_in_docstrings_hold(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def test_arms_are_paired_seed_by_seed():
    arms_found = {
        "exact": {"n": 2, "values": {"gap, nats": {0: 1.0, 1: 3.0}}, "differences": {"gap, nats": {0: 0.0, 1: 0.0}}},
        "cheap": {"n": 2, "values": {"gap, nats": {0: 1.5, 1: 4.5}}, "differences": {"gap, nats": {0: 0.5, 1: 1.5}}},
    }
    rows = tables.arms_beside(arms_found, "exact").splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["**exact**", "**cheap**", "− exact"]
    assert "2.0 ± 1.4" in rows[2]
    assert "+1.00 ± 0.71" in rows[4]


def test_arms_are_read_from_runs_that_differ_in_more_than_their_seeds(tmp_path):
    for arm, gamma in (("exact", 0.1), ("cheap", 0.2)):
        for seed in (0, 1):
            made = replace(RECIPES["at-awp"], seed=seed, awp=Awp(gamma=gamma))
            record.create(tmp_path / f"{arm}-seed{seed}", made, {}, {})
            of = {"n": 10, "clean_accuracy": 0.9, "robust_accuracy": 0.5 + gamma * seed, "robust_loss": 1.0}
            line = {"epoch": 1, "train": {**of, "robust_accuracy": 0.9}, "test": of}
            record.append_metrics(tmp_path / f"{arm}-seed{seed}", line)
    found = arms.summary(arms.arms(tmp_path), "exact")
    assert {arm: of["settings"] for arm, of in found.items()} == {
        "cheap": {"awp.gamma": "0.2"},
        "exact": {"awp.gamma": "0.1"},
    }
    assert found["cheap"]["values"]["gap, points"] == pytest.approx({0: 40.0, 1: 20.0})
    assert found["cheap"]["differences"]["gap, points"] == pytest.approx({0: 0.0, 1: -10.0})


def made_run(path, seed=0, gamma=0.1, n=10, precision="fp32", attack="PGD-20", size=0.5):
    """A run folder with an evaluation and a measure."""
    record.create(path, replace(RECIPES["at-awp"], seed=seed, awp=Awp(gamma=gamma)), {"precision": precision}, {})
    of = {"checkpoint": "last", "split": "test", "n": n, "settings": {"seed": 0}}
    robust = {"name": "pgd-20", "description": attack, "accuracy": 0.4}
    measure = {"name": "average case", "value": 1.0, "unit": "nats", "settings": f"size {size}"}
    for kind, content in (("outcomes", {"attacks": [robust]}), ("flatness", {"measures": [measure]})):
        (path / kind).mkdir(exist_ok=True)
        (path / kind / "last.json").write_text(json.dumps({**of, **content}))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"gamma": 0.2}, "exact: expected runs that differ in their seeds alone, got several awp.gamma"),
        ({"precision": "bf16"}, "exact: expected one precision, got bf16 and fp32"),
        ({"n": 20}, "pgd-20, last: expected the same of all runs, got 10 of test; PGD-20; seed 0 and 20 of test"),
        ({"attack": "PGD-9"}, "pgd-20, last: expected the same of all runs, got 10 of test; PGD-20"),
        ({"size": 0.1}, "average case, last: expected the same of all runs, got 10 of test; size 0.1"),
        ({"seed": 0}, "exact: expected one run a seed, got seeds 0, 1, 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_that_are_not_alike_are_refused_in_a_line(other, why, tmp_path, monkeypatch, capsys):
    made_run(tmp_path / "exact-seed0")
    made_run(tmp_path / "exact-seed1", seed=1)
    monkeypatch.setattr(sys, "argv", ["arms.py", str(tmp_path)])
    arms.main()
    assert "**exact**" in capsys.readouterr().out
    made_run(tmp_path / "exact-seed2", **{"seed": 2, **other})
    with pytest.raises(SystemExit) as refused:
        arms.main()
    assert str(refused.value).startswith(why)
    assert "\n" not in str(refused.value)


def test_directions_of_one_batch_have_no_deviation_and_wrong_arguments_an_error_of_a_line(tmp_path, monkeypatch):
    by_mode = {"attack": [0.5], "outer": [0.25]}
    assert alignment.shown({"a": by_mode}).splitlines()[1].split() == ["a", "0.500", "0.250"]
    assert alignment.shown({"a": {"attack": [1.0, 3.0]}}).endswith("2.000 ± 1.414")
    found = {"cosines": {"a": by_mode}, "checkpoint": "last", "batches": 1}
    (tmp_path / "alignment.json").write_text(json.dumps(found))
    assert "| a | 0.500 | 0.250 |" in tables.compared(tmp_path)
    for arguments, why in (
        ([str(tmp_path / "none")], "run: expected a run folder"),
        ([str(tmp_path), "--batches", "0"], "batches: expected an integer >= 1, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["alignment.py", *arguments])
        with pytest.raises(SystemExit, match=why):
            alignment.main()
