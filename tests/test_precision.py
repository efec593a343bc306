import contextlib
import math
from dataclasses import replace

import pytest
import torch
from networks import batch, convolutional, equal_states, state

from saltflat import AT, MART, PGD, TRADES, Layerwise, Linf, Natural, double_perturbation_step
from saltflat import train as training
from saltflat.lab import (
    adversaries,
    build,
    evaluations,
    flatness,
    gaps,
    labels,
    landscapes,
    precision,
    record,
    trainings,
)
from saltflat.lab.config import Attack, Awp, Compute, Data, Evaluation, Model, Objective, Optimizer, Train
from saltflat.lab.precision import Cast, Scaled, exact, resolved, running, taken_in
from saltflat.neighbours.logit_pairing import ALP

CPU = torch.device("cpu")
OBJECTIVES = [Natural(), AT(), TRADES(6.0), MART(5.0), ALP(0.5)]
ATTACK = PGD(Linf(8 / 255), 4 / 255, 2)
BEFORE = {
    "torch's own": lambda: None,
    "matrix products, older switch": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "convolutions off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "all backends, newer switch": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "all of a CPU, newer switch": lambda: _on_a_cpu("bf16"),
    "matrix products, newer switch": lambda: precision._places() and setattr(precision._places()[0], *NEWER),
}
NEWER = ("fp32_precision", "tf32")


def newer():
    """All of torch's newer switches but the general one, which stands for those that are not set."""
    of = torch.backends
    names = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    return [getattr(getattr(of, name.split(".")[0]), name.split(".")[1]) for name in names if precision._places()]


def _on_a_cpu(value):
    for place in newer()[3:]:
        place.fp32_precision = value


@pytest.fixture(autouse=True)
def _as_torch_begins():
    yield
    if precision._places():
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for place in newer():
        if place not in newer()[1:3]:
            place.fp32_precision = "none"


def strict():
    """Whether convolutions and matrix products are strict fp32, as both sets of switches say."""
    older = not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    return older and {place.fp32_precision for place in newer()} <= {"ieee"}


@pytest.mark.parametrize("name", BEFORE)
def test_switches_are_set_inside_and_as_before_afterwards_on_any_way_out(name):
    BEFORE[name]()
    before = precision._switches()
    with contextlib.suppress(ZeroDivisionError), exact():
        assert strict()
        with contextlib.suppress(KeyError), precision._rounding(True):
            assert torch.backends.cudnn.allow_tf32
            assert torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert strict()
        raise ZeroDivisionError
    assert precision._switches() == before


@pytest.mark.skipif(not precision._places(), reason="needs the newer switches")
@pytest.mark.parametrize(("general", "places"), [("tf32", [0, 3, 4, 5]), ("none", range(6))])
def test_a_switch_that_was_not_set_follows_the_general_one_afterwards_as_before(general, places):
    """Those of cuDNN are tf32 from the beginning, which in a general tf32 cannot be seen."""
    torch.backends.fp32_precision = general
    torch.backends.mkldnn.rnn.fp32_precision = "bf16"
    found = []
    for block in (contextlib.nullcontext(), exact()):
        with block:
            pass
        for later in ("ieee", "tf32", general):
            torch.backends.fp32_precision = later
            found.append([newer()[i].fp32_precision for i in places])
    assert found[:3] == found[3:]
    assert len({tuple(each) for each in found}) > 1


def test_a_step_on_a_gpu_has_tf32_where_it_is_asked_for_and_nowhere_else():
    gpu = torch.device("cuda")
    for name in ("fp32", "bf16", "fp16"):
        with running(name, gpu):
            assert strict()
    with exact(), running("tf32", gpu):
        assert torch.backends.cudnn.allow_tf32
    with running("fp32", CPU):
        assert torch.backends.cudnn.allow_tf32  # says nothing there, and costs nothing


def test_auto_and_tf32_are_tf32_where_a_gpu_has_it(monkeypatch):
    for capability, found in (((7, 5), "fp32"), ((8, 0), "tf32"), ((12, 0), "tf32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert resolved("auto", torch.device("cuda")) == resolved("tf32", torch.device("cuda")) == found
    assert resolved("auto", CPU) == resolved("tf32", CPU) == "fp32"
    assert resolved("fp16", torch.device("cuda")) == "fp16"


class Looked(Exception):
    pass


class Subject:
    """Says which switches are on when it is first looked at."""

    def __getattr__(self, name):
        raise Looked(strict())


@pytest.mark.parametrize(
    "measure",
    [
        lambda of: evaluations.evaluation(of, ("clean",), "test", 0, evaluations.How()),
        lambda of: landscapes.line(of, [0.0], 1, landscapes.How()),
        lambda of: landscapes.plane(of, [0.0], [0.0], landscapes.How()),
        lambda of: flatness.flatness(of, ("norms",), flatness.How()),
        lambda of: gaps.robust_gap(of, gaps.How()),
        lambda of: labels._classes(of, torch.zeros(1), 1),
    ],
    ids=["evaluate", "line", "plane", "flatness", "gap", "label"],
)
def test_whatever_measures_is_in_strict_fp32(measure):
    assert not strict()
    with pytest.raises(Looked, match="True"):
        measure(Subject())
    assert not strict()


TINY = Train(
    data=Data(examples=60, validation_examples=20),
    model=Model("small-cnn", width=4),
    attack=Attack(eps=0.15, step_size=0.075, steps=2),
    awp=Awp(gamma=0.01),
    optimizer=Optimizer(epochs=2, batch_size=20),
    evaluation=Evaluation(examples=20, steps=2),
)


def test_measurements_of_a_training_are_in_strict_fp32(tmp_path, monkeypatch):
    found, measuring = [], training.measuring
    monkeypatch.setattr(training, "measuring", lambda *of: found.append(strict()) or measuring(*of))
    trainings.train(TINY, tmp_path / "run")
    assert found == [True] * 6
    assert not strict()


def single():
    """The shared network and batch, in fp32."""
    x, y = batch()
    return convolutional().float().train(), x.float(), y


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda of: type(of).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forwards_are_under_autocast_and_losses_are_not(objective, dtype):
    model, x, y = single()
    cast, seen = Cast(objective, "cpu", dtype), []
    model[0].register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    x_adv = (x + 0.05).requires_grad_()
    for f in (lambda of: of.inner(model, x, y)(x_adv), lambda of: of.outer(model, x, x_adv, y)):
        seen.clear()
        found = f(cast)
        assert set(seen) == {dtype}
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, f(objective), rtol=0.05, atol=0.02)
    torch.testing.assert_close(cast.each(model, x, x_adv, y).mean(), cast.outer(model, x, x_adv, y))
    assert not torch.is_autocast_enabled("cpu")


def stepped(name, objective, model, optimizer, memory, x, y, ball=None):
    def take(of):
        generator = torch.Generator().manual_seed(0)
        return double_perturbation_step(
            model, x, y, objective=of, attack=ATTACK, ball=ball, optimizer=optimizer, generator=generator
        )

    return taken_in(name, take, objective, optimizer, memory, CPU)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_weights_statistics_and_gradients_stay_in_fp32_and_nearly_what_they_would_be(name):
    ends = []
    for each in ("fp32", name):
        torch.manual_seed(0)
        model, x, y = single()
        optimizer, memory = sgd(model), {}
        begun = state(model)
        for _ in range(2):
            found = stepped(each, AT(), model, optimizer, memory, x, y, Layerwise(0.01))
        tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
        tensors += [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.int64}
        assert found.perturbed_loss > found.loss  # what autocast remembers of weights follows their perturbation
        ends.append(torch.cat([(state(model)[key] - begun[key]).flatten() for key in begun if "num_" not in key]))
        loss = found.loss
    assert torch.linalg.vector_norm(ends[1] - ends[0]) < 0.1 * torch.linalg.vector_norm(ends[0])
    assert 0.5 < loss < 2.0  # and not s times as much


def test_a_scaled_loss_and_divided_gradients_are_the_same_to_the_bit(monkeypatch):
    """s is a power of 2. Autocast is left out, which rounds."""
    monkeypatch.setattr(precision, "Cast", lambda objective, *_: objective)
    ends = []
    for each in ("fp32", "fp16"):
        torch.manual_seed(0)
        model, x, y = single()
        optimizer, memory = sgd(model), {}
        for share in (0.01, 0.0, 0.01):
            found = stepped(each, TRADES(6.0), model, optimizer, memory, x, y, Layerwise(share))
        ends.append((state(model), found))
    assert equal_states(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1].loss, ends[1][1].loss)
    assert torch.equal(ends[0][1].perturbed_loss, ends[1][1].perturbed_loss)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_batch_that_is_not_finite_is_dropped_and_halves_the_scale():
    model, x, y = single()
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.05), {}
    stepped("fp16", AT(), model, optimizer, memory, x, y)
    before, scale = state(model), float(memory["loss_scale"])
    found = stepped("fp16", AT(), model, optimizer, memory, x * torch.nan, y)
    assert int(found.dropped) == 1
    assert equal_states(state(model), before)
    assert float(memory["loss_scale"]) == scale / 2
    assert int(memory["good_steps"]) == 0
    memory["loss_scale"] = torch.tensor(2.0**24)  # too large for fp16: it comes down until a batch fits
    for _ in range(12):
        found = stepped("fp16", AT(), model, optimizer, memory, x, y)
    assert int(found.dropped) == 0


def test_a_batch_that_is_dropped_is_the_search_s_while_the_scale_can_come_down():
    """And not when it is 1: then the gradients themselves are not finite."""
    model, x, y = single()
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.05), {}
    stepped("fp16", AT(), model, optimizer, memory, x, y)
    found = []
    memory["loss_scale"] = torch.tensor(4.0)
    for bad in (True, False, True, True, True):
        stepped("fp16", AT(), model, optimizer, memory, x * torch.nan if bad else x, y)
        found.append((float(memory["loss_scale"]), int(precision.searched(memory))))
    assert found == [(2.0, 1), (2.0, 1), (1.0, 2), (1.0, 2), (1.0, 2)]
    assert int(precision.searched({})) == 0


def test_a_training_whose_loss_scale_is_being_found_goes_on(tmp_path):
    """TRADES with a beta for which 2^12 is far too much, two batches an epoch."""
    config = replace(
        TINY,
        objective=Objective("trades", 1e5),
        awp=Awp(),
        compute=Compute("fp16"),
        optimizer=Optimizer(epochs=6, batch_size=30, learning_rate=1e-6),
    )
    trainings.train(config, tmp_path / "run")
    metrics = record.read_metrics(tmp_path / "run")
    assert metrics[0]["dropped"] == 2
    assert math.isnan(metrics[0]["loss"])  # no batch was used
    assert metrics[-1]["dropped"] == 0
    assert math.isfinite(metrics[-1]["loss"])


def test_a_training_whose_gradients_are_not_finite_at_any_scale_stops():
    config = replace(TINY, compute=Compute("fp16"), optimizer=Optimizer(epochs=9, batch_size=20, learning_rate=1e4))
    sets = build.sets(config)
    model = build.network(config, sets.train)
    with pytest.raises(FloatingPointError, match=r"epoch [5-7]: the gradient of [23] of 3 batches was not finite"):
        list(training.fit(model, sets.train, {}, build.plan(config, 10), build.optimizer(config, model)))


def test_the_scale_doubles_after_enough_batches_that_fit():
    model, x, y = single()
    optimizer, memory = sgd(model), {}
    stepped("fp16", AT(), model, optimizer, memory, x, y)
    assert int(memory["good_steps"]) == 1
    scale = float(memory["loss_scale"])
    memory["good_steps"] = torch.tensor(precision.PATIENCE - 1)
    stepped("fp16", AT(), model, optimizer, memory, x, y)
    assert float(memory["loss_scale"]) == 2 * scale
    assert int(memory["good_steps"]) == 0
    memory |= {"loss_scale": torch.tensor(precision.LARGEST), "good_steps": torch.tensor(precision.PATIENCE - 1)}
    precision._learn(memory, torch.tensor(0))
    assert float(memory["loss_scale"]) == precision.LARGEST


def test_the_scaled_loss_leaves_the_attack_alone():
    model, x, y = single()
    found = Scaled(AT(), torch.tensor(1024.0))
    assert torch.equal(found.inner(model, x, y)(x), AT().inner(model, x, y)(x))
    assert found.outer(model, x, x, y) == 1024 * AT().outer(model, x, x, y)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_members_of_the_family_train_in_lower_precision(name):
    """One epoch by the lab's plan, for every kind of step."""
    for awp in (
        Awp(gamma=0.01, amortised=True),
        Awp(gamma=0.01, every=3),
        Awp("m-rwp", gamma=0.01, share=0.5),
        Awp("fast", gamma=0.01),
        Awp("kaggle", gamma=0.01),
    ):
        config = replace(TINY, awp=awp, compute=Compute(precision=name), optimizer=replace(TINY.optimizer, epochs=1))
        sets = build.sets(config)
        model = build.network(config, sets.train)
        plan = build.plan(config, 10)
        *_, last = training.fit(model, sets.train, {}, plan, build.optimizer(config, model))
        assert last.metrics["dropped"] == 0
        assert all(bool(p.isfinite().all()) and p.dtype == torch.float32 for p in model.parameters())
        assert ("loss_scale" in plan.memory) == (name == "fp16")


def test_free_training_runs_in_lower_precision():
    config = replace(TINY, attack=replace(TINY.attack, replays=2), compute=Compute(precision="fp16"))
    sets = build.sets(config)
    model = build.network(config, sets.train)
    plan, before = build.plan(config, 10), state(model)
    *_, last = training.fit(model, sets.train, {}, plan, build.optimizer(config, model))
    assert last.metrics["dropped"] == 0
    assert float(plan.memory["loss_scale"]) == precision.FIRST
    assert int(plan.memory["good_steps"]) == last.metrics["step"]
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_no_step_waits_for_a_gpu_in_any_precision(name):
    model, x, y = (of.cuda() for of in single())
    optimizer, memory, config = (
        sgd(model),
        {},
        replace(TINY, compute=Compute(name), awp=Awp(gamma=0.01, amortised=True)),
    )
    step, generator = adversaries.step(config, memory), torch.Generator("cuda").manual_seed(0)

    def take():
        return step(
            model, x, y, objective=AT(), attack=ATTACK, ball=Layerwise(0.01), optimizer=optimizer, generator=generator
        )

    take()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(found.dropped) == 0
    assert all(kept.is_cuda for kept in memory.values())
