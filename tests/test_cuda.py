"""What only a GPU can show: no step waits for it, and it finds what the CPU finds. Skipped where there is none."""

import copy

import pytest
import torch
from commands import QUICK, run
from family import DRAWN, MEMBERS, sgd, taking
from networks import batch, convolutional, equal_states, state

from examples.amp_accumulate import train as amp_accumulate
from saltflat import AT, PGD, Layerwise, Linf, displaced, gradient, perturbed
from saltflat.data import cutmix, digits, smoothed, stratified_subset
from saltflat.evaluation import outcomes, suite
from saltflat.lab import adversaries
from saltflat.landscape import afresh, average_case, frozen, hessian, random_direction, top_eigenvalues, total, within
from saltflat.models import small_resnet
from saltflat.neighbours.free import NAME
from saltflat.neighbours.random_wp import random_wp
from saltflat.random import seeded
from saltflat.schedules import constant
from saltflat.train import Plan, fit

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


class Quiet:
    """A block in which waiting for the device is an error."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


def on_gpu():
    x, y = batch()
    return convolutional().train().cuda(), x.cuda(), y.cuda()


def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="synchronizing"), Quiet():
        torch.ones(3, device="cuda").sum().item()


@pytest.mark.parametrize("name", MEMBERS)
def test_no_step_waits_for_the_device(name):
    model, x, y = on_gpu()
    memory, optimizer = {}, sgd(model)
    config, generator = MEMBERS[name], torch.Generator("cuda").manual_seed(7)
    step = adversaries.step(config, memory)

    def take():
        return step(
            model, x, y, objective=AT(), attack=PGD(Linf(8 / 255), 2 / 255, 2), ball=adversaries.ball(config)(0.5),
            optimizer=optimizer, generator=generator,
        )  # fmt: skip

    take()  # kernels are loaded and buffers made
    with Quiet():
        found = take()
    assert found.dropped.device.type == found.loss.device.type == "cuda"
    assert int(found.dropped) == 0


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in DRAWN])
@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_steps_end_where_they_end_on_the_cpu(name, objective):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model, (x, y) = convolutional().train(), batch()
    other = copy.deepcopy(model).cuda()
    apart = PGD(Linf(8 / 255), 4 / 255, 2, start=lambda ball, x, _: 0.01 * (x - 0.5))  # TRADES is flat at x itself
    memories = [{NAME: 0.01 * (x - 0.5)}, {NAME: 0.01 * (x - 0.5).cuda()}]
    here, there = (
        taking(name, of, sgd(of), memory, objective=objective, attack=apart)
        for of, memory in zip((model, other), memories, strict=True)
    )
    for _ in range(3):
        here(x, y)
        there(x.cuda(), y.cuda())
    for key, value in state(model).items():
        torch.testing.assert_close(state(other)[key].cpu(), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in DRAWN])
def test_a_batch_that_is_not_finite_is_dropped_there_too(name):
    model, x, y = on_gpu()
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    assert int(taking(name, model, sgd(model), {})(x * torch.nan, y).dropped) >= 1
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_weights_come_back_to_the_bit():
    model, x, y = on_gpu()
    loss = lambda: AT().outer(model, x, x, y)
    before = copy.deepcopy(state(model))
    with perturbed(model, loss, Layerwise(0.1)):
        assert not equal_states(state(model), before)
    with displaced(model, gradient(model, loss)):
        pass
    after = state(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_training_waits_at_the_ends_of_epochs_only():
    read = digits()
    images = read.train.subset(stratified_subset(read.train.labels, 200, 0))
    torch.manual_seed(0)
    model = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1).cuda()
    attack = PGD(Linf(0.15), 0.0375, 2)
    plan = Plan(
        epochs=2, batch_size=50, learning_rate=constant(0.1), objective=lambda t: AT(), attack=lambda t: attack,
        ball=lambda t: Layerwise(0.01), measure=attack, average=0.9, extra_share=0.5,
        mix=lambda x, y, generator: cutmix(x, smoothed(y, 10, 0.1), 1.0, generator),
    )  # fmt: skip
    events = fit(model, images, {"test": read.test}, plan, sgd(model), extra=read.test)
    for _ in range(2):
        next(events)
    with Quiet():
        for _ in range(2):
            next(events)
    *_, last = events
    assert last.metrics["dropped"] == 0


def test_mixed_precision_with_a_scaler_trains():
    model = amp_accumulate(epochs=1, device="cuda")
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert next(model.parameters()).is_cuda


def test_evaluations_and_landscapes_find_what_the_cpu_finds():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    read = digits().test
    data = read.subset(stratified_subset(read.labels, 100, 0))
    torch.manual_seed(0)
    model = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1).eval()
    attack, found = PGD(Linf(0.05), 0.0125, 5), {}
    x, y = data.images / 255, data.labels
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        losses = afresh(there, x.to(device), y.to(device), attack)
        with displaced(there, {k: 0.5 * v for k, v in random_direction(there, seed=0).items()}):
            away = float(total(losses))
        *_, last = suite.evaluate(there, x, y, [suite.standard(Linf(0.05), steps=5, queries=20)])
        found[device] = [
            outcomes(there, data, attack).mean_loss,
            float(total(losses)),
            away,
            float(average_case(there, losses, within(Layerwise(0.1)), draws=2).value),
            float(top_eigenvalues(hessian(there, frozen(there, x.to(device), y.to(device), attack)), k=1).values[0]),
            last.verdicts["standard"].robust().float().mean().item(),
        ]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=2e-3, abs=0.011)


def test_lab_runs_there(tmp_path):
    run("train", "at-robust-wp", *QUICK, "--device", "cuda", "--out", tmp_path / "run")
    run("train", "--resume", tmp_path / "run")
    run("evaluate", tmp_path / "run", "--examples", "20", "--suite", "fast", "--precision", "bf16")


def test_equal_seeds_give_equal_draws_there():
    model, draws = convolutional().cuda(), []
    for _ in range(2):
        with random_wp(model, 0.01, seeded(3, device="cuda")) as found:
            draws.append(found.displacement)
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    assert any(bool((v != 0).any()) for v in draws[0].values())
