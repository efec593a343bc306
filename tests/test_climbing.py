import copy
from dataclasses import replace

import pytest
import torch
from commands import QUICK, run
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat.lab import build, checkpoints, climbing, record
from saltflat.lab.climbing import Compiled, attack_on, check_compiles, sharing
from saltflat.lab.config import Attack, Awp, Compute, Data, Evaluation, Model, Optimizer, Train
from saltflat.train import Epoch, fit

CPU = torch.device("cpu")
TINY = Train(
    data=Data(examples=90, validation_examples=20),
    model=Model("small-resnet", width=4),
    attack=Attack(eps=0.15, step_size=0.075, steps=3),
    awp=Awp(gamma=0.01),
    optimizer=Optimizer(epochs=3, batch_size=20, learning_rate=0.05),
    evaluation=Evaluation(examples=20, steps=2),
)


def begun(config):
    sets = build.sets(config)
    return build.network(config, sets.train), sets


def trained(config, state=None, until=None):
    """The epochs of a training, and the network."""
    model, sets = begun(config)
    found = []
    for event in fit(
        model, sets.train, sets.measured, build.plan(config, 10), build.optimizer(config, model), state=state
    ):
        if isinstance(event, Epoch):
            found.append(replace(event, state=copy.deepcopy(event.state)))
            if event.epoch == until:
                break
    return found, model


def test_what_an_attack_climbs_on():
    assert attack_on(TINY, "fp32", CPU) is not None
    assert attack_on(TINY, "fp32", torch.device("cuda")) is None
    assert attack_on(TINY, "fp16", CPU) is None
    assert attack_on(replace(TINY, compute=Compute(lean=False)), "fp32", CPU) is None
    assert isinstance(attack_on(replace(TINY, compute=Compute(compile=True)), "fp32", CPU), Compiled)
    for changes in ({"mode": "train"}, {"replays": 2}):
        assert attack_on(replace(TINY, attack=replace(TINY.attack, **changes)), "fp32", CPU) is None


@pytest.mark.parametrize("awp", [Awp(gamma=0.01), Awp(gamma=0.01, amortised=True), Awp("m-rwp", 0.01, share=0.5)])
def test_a_training_on_a_lean_copy_is_the_same_but_for_rounding(awp):
    """One epoch, in which rounding cannot grow much; in L2, since signs of gradients would hide it."""
    config = replace(TINY, awp=awp, optimizer=replace(TINY.optimizer, epochs=1))
    config = replace(config, attack=replace(config.attack, norm="L2", eps=1.0, step_size=0.5))
    found, lean = trained(config)
    expected, plain = trained(replace(config, compute=Compute(lean=False)))
    begin = state(begun(config)[0])
    assert not equal_states(state(lean), state(plain))  # it was climbed on
    for name, w in state(plain).items():
        if w.is_floating_point():
            distance, moved = torch.linalg.vector_norm(state(lean)[name] - w), torch.linalg.vector_norm(w - begin[name])
            assert distance <= 0.05 * moved
    assert found[0].metrics["loss"] == pytest.approx(expected[0].metrics["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": Compute("bf16")},
        {"compute": Compute("fp16")},
        {"compute": Compute(lean=False)},
        {"awp": Awp(gamma=0.01, amortised=True)},
        {"awp": Awp(gamma=0.01, every=3)},
        {"awp": Awp("fast", gamma=0.01, every=2)},
        {"awp": Awp(gamma=0.01, amortised=True, every=3), "compute": Compute("bf16")},
    ],
    ids=str,
)
def test_going_on_ends_with_equal_bits(changes, tmp_path):
    config = replace(TINY, **changes)
    whole, model = trained(config)
    (first,), half = trained(config, until=1)
    checkpoints.save_state(tmp_path, {**first.state, "config": "", "metrics": []})
    path, kept = checkpoints.newest_whole(tmp_path, pytest.fail)
    checkpoints.check_state(path, kept, half, averaged=False)
    rest, other = trained(config, state=kept)
    assert equal_states(state(other), state(model))
    for one, again in zip(whole[1:], rest, strict=True):
        for name in set(one.metrics) - {"seconds", "evaluation_seconds"}:
            assert one.metrics[name] == again.metrics[name], name
        assert one.state["ranks"][0]["memory"] == again.state["ranks"][0]["memory"]


def test_a_sharing_copy_follows_the_weights_and_buffers_and_stays_in_eval_mode():
    model, (x, _) = convolutional().train(), batch()
    other = sharing(model)
    model(x)  # moves running statistics
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert equal_states(state(other), state(model))
    assert torch.equal(other(x), copy.deepcopy(model).eval()(x))
    assert not any(p.requires_grad for p in other.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert not other.training


def test_where_nothing_can_be_compiled_one_line_says_so(tmp_path, monkeypatch, capsys):
    def compile(function, **_):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(SystemExit) as stop:
        run("train", "at", *QUICK, "--compute.compile", "--out", tmp_path / "run")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saltflat: compute.compile: torch.compile does not work here, expected false: Invalid")
    assert not (tmp_path / "run").exists()


def test_the_precision_is_said_first_and_on_record(tmp_path, capsys):
    run("train", "at-awp-amortised", *QUICK, "--compute.precision", "bf16", "--out", tmp_path / "run")
    assert "bf16 on cpu" in capsys.readouterr().out.splitlines()[0]
    assert '"precision": "bf16"' in (tmp_path / "run" / "environment.json").read_text()
    assert record.read_config(tmp_path / "run").compute == Compute("bf16")
    run("train", "--resume", tmp_path / "run")
    capsys.readouterr()
    changed = (tmp_path / "run" / "config.yaml").read_text().replace("epochs: 2", "epochs: 3")
    (tmp_path / "run" / "config.yaml").write_text(changed.replace("precision: bf16", "precision: fp32"))
    with pytest.raises(SystemExit):
        run("train", "--resume", tmp_path / "run")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("config.yaml was changed or damaged since the run began: put it back, or begin a new run")
    unsigned = (tmp_path / "run" / "config.yaml").read_text().partition("\n")[2]
    (tmp_path / "run" / "config.yaml").write_text(unsigned.replace("epochs: 3", "epochs: 4"))
    with pytest.raises(SystemExit):
        run("train", "--resume", tmp_path / "run")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "config.yaml was changed since the run began: put it back, or begin a new run; or an earlier version of "
        "saltflat began it"
    )


def test_a_precision_that_is_not_there_is_neither_said_nor_on_record(tmp_path, capsys):
    run("train", "at", *QUICK, "--device", "cpu", "--compute.precision", "tf32", "--out", tmp_path / "run")
    assert "fp32 on cpu" in capsys.readouterr().out.splitlines()[0]
    assert '"precision": "fp32"' in (tmp_path / "run" / "environment.json").read_text()
    assert record.read_config(tmp_path / "run").compute == Compute("tf32")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_network_is_climbed_on():
    """A training, in bf16; of fp32 the next has the network alone: each takes a compiler its minute."""
    check_compiles(CPU)
    config = replace(TINY, optimizer=replace(TINY.optimizer, epochs=1))
    plain = replace(config, compute=Compute("bf16", lean=False))
    found, _ = trained(replace(config, compute=Compute("bf16", compile=True)))
    expected, _ = trained(plain)
    assert found[0].metrics["loss"] == pytest.approx(expected[0].metrics["loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_follows_the_weights_and_has_no_gradient_of_them():
    model, (x, _) = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), batch()
    x, compiled = x.float(), Compiled()
    for _ in range(3):
        with torch.no_grad():
            model(x)
            next(model.parameters()).mul_(0.5)
        torch.testing.assert_close(compiled(model)(x), copy.deepcopy(model).eval()(x))
        assert not compiled(model)(x).requires_grad
    assert climbing.Compiled()(model) is not compiled(model)
