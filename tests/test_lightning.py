"""Lightning's trainer with the callback gives, to the bit, what a plain loop gives."""

import copy
import logging
from contextlib import nullcontext
from functools import partialmethod

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import _TunerExitException
from networks import convolutional, equal_states, state
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.lightning_callback import train as automatically
from examples.lightning_manual import train as manually
from saltflat import AT, PGD, TRADES, Global, Layerwise, Linf, perturbed
from saltflat.integrations.lightning import DoublePerturbation, on_images
from saltflat.random import seeded
from saltflat.step import in_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

ATTACK = PGD(Linf(8 / 255), 2 / 255, 3)
EPOCHS, BATCHES = 3, 4


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data(dtype=torch.float64):
    x = torch.rand(8 * BATCHES, 3, 6, 6, dtype=torch.float64, generator=seeded(1))
    return x.to(dtype), torch.arange(len(x)) % 3


def loader(dtype=torch.float64):
    return DataLoader(TensorDataset(*data(dtype)), batch_size=8)


class Kept:
    """Batches that are handed out as they are, again in every epoch."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Classifier(LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return sgd(self.parameters())


class Keep(Callback):
    """Ahead of the callback under test: w, as `module.w`."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.w = {name: p.detach().clone() for name, p in module.named_parameters()}


def fitted(module, callback, train_on=None, **options):
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, callbacks=callback, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader() if train_on is None else train_on)
    return state(module.network)


def plain(network, *, attack=None, ball_at=lambda epoch: Layerwise(0.05), accumulate=1, clip=None, **options):
    """The loop that the trainer is to be equal to, one ascent a micro-batch."""
    network = copy.deepcopy(network).train()
    optimizer = sgd(network.parameters())
    for epoch in range(EPOCHS):
        for index, (x, y) in enumerate(loader()):
            if attack is not None:
                with in_mode(network, "eval"):
                    x = attack(AT().inner(network, x, y), x, generator=seeded(0, epoch, index))

            def loss():
                return F.cross_entropy(network(x), y)  # noqa: B023  # called at once, below

            if index % accumulate == 0:
                optimizer.zero_grad()
            with perturbed(network, loss, ball_at(epoch), **options):
                (loss() / accumulate).backward()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
    return state(network)


@pytest.mark.parametrize("attack", [None, ATTACK], ids=["clean", "attacked"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_equals_the_plain_loop_to_the_bit(attack, accumulate, clip):
    """Three epochs in float64 with momentum, weight decay and BatchNorm, whose statistics are compared, too."""
    network = convolutional()
    expected = plain(network, attack=attack, accumulate=accumulate, clip=clip)
    assert not equal_states(expected, state(network))
    callback = DoublePerturbation(
        Classifier.loss, Layerwise(0.05), attack=None if attack is None else on_images(AT(), attack)
    )
    found = fitted(
        Classifier(network), callback, accumulate_grad_batches=accumulate, gradient_clip_val=clip, precision="64-true"
    )
    assert equal_states(found, expected)
    assert callback.ascent.skipped == 0


def test_options_of_the_ascent_arrive():
    network, options = convolutional(), {"steps": 3, "step_size": 0.2}
    expected = plain(network, ball_at=lambda epoch: Global(0.3), **options)
    callback = DoublePerturbation(Classifier.loss, Global(0.3), **options)
    assert equal_states(fitted(Classifier(network), callback), expected)


def test_the_ball_may_change_with_the_epoch():
    network, climbed = convolutional(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            climbed.append(callback.ascent is not None)

    def ball(epoch):
        return [Layerwise(0.05), None, Layerwise(0.0)][epoch]

    expected = plain(network, ball_at=lambda epoch: Layerwise([0.05, 0.0, 0.0][epoch]))
    callback = DoublePerturbation(Classifier.loss, ball)
    assert equal_states(fitted(Classifier(network), [callback, Watch()]), expected)
    assert climbed == [True] * BATCHES + [False] * 2 * BATCHES


def test_w_is_back_before_anyone_looks_at_the_gradients():
    class Watch(Classifier):
        def on_before_backward(self, loss):
            seen.append(all(torch.equal(p, self.w[name]) for name, p in self.named_parameters()))

        on_after_backward = partialmethod(on_before_backward, None)

    seen = []
    fitted(Watch(convolutional()), [Keep(), DoublePerturbation(Classifier.loss, Layerwise(0.05))])
    assert seen == [False, True] * (EPOCHS * BATCHES)


def test_where_sees_the_modules_names():
    class Watch(Callback):
        def on_before_backward(self, trainer, module, loss):
            now = dict(module.named_parameters())
            moved.append([name for name in now if not torch.equal(now[name], module.w[name])])

    moved = []
    callback = DoublePerturbation(
        Classifier.loss, Layerwise(0.05), where=lambda name, parameter: name == "network.6.weight"
    )
    fitted(Classifier(convolutional()), [Keep(), callback, Watch()])
    assert moved == [["network.6.weight"]] * (EPOCHS * BATCHES)


class Manual(Classifier):
    def __init__(self, network, attack):
        super().__init__(network)
        self.automatic_optimization, self.attack = False, attack

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if self.attack is not None:
            batch = self.attack(self, batch)
        optimizer.zero_grad()
        with perturbed(self, lambda: self.loss(batch), Layerwise(0.05)):
            self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("attack", [None, ATTACK], ids=["clean", "attacked"])
def test_manual_optimisation_equals_the_plain_loop_to_the_bit(attack):
    network = convolutional()
    expected = plain(network, attack=attack)
    assert equal_states(fitted(Manual(network, attack and on_images(AT(), attack)), []), expected)


class Dictionaries(Classifier):
    """TRADES on batches that are dicts: the attack adds an entry."""

    def loss(self, batch):
        return TRADES(6.0).outer(self, batch["x"], batch["x_adv"], batch["y"])


def test_trades_on_dictionaries():
    def attack(module, batch):
        with in_mode(module, "eval"):
            inner = TRADES(6.0).inner(module, batch["x"], batch["y"])
            generator = seeded(0, module.current_epoch, module.trainer.fit_loop.batch_idx)
            return {**batch, "x_adv": ATTACK(inner, batch["x"], generator=generator)}

    network, batches = convolutional(), [{"x": x, "y": y} for x, y in loader()]
    expected = copy.deepcopy(network).train()
    optimizer = sgd(expected.parameters())
    for epoch in range(EPOCHS):
        for index, batch in enumerate(batches):
            x, y = batch["x"], batch["y"]
            with in_mode(expected, "eval"):
                x_adv = ATTACK(TRADES(6.0).inner(expected, x, y), x, generator=seeded(0, epoch, index))
            optimizer.zero_grad()
            with perturbed(expected, lambda: TRADES(6.0).outer(expected, x, x_adv, y), Layerwise(0.05)):  # noqa: B023
                TRADES(6.0).outer(expected, x, x_adv, y).backward()
            optimizer.step()
    found = fitted(
        Dictionaries(network), DoublePerturbation(Dictionaries.loss, Layerwise(0.05), attack=attack), Kept(batches)
    )
    assert equal_states(found, state(expected))
    assert all(batch.keys() == {"x", "y"} for batch in batches)


def test_the_data_themselves_are_never_attacked():
    batches = [list(batch) for batch in loader()]
    copies, seen = copy.deepcopy(batches), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(not torch.equal(batch[0], copies[batch_idx][0]))

    callback = DoublePerturbation(Classifier.loss, None, attack=on_images(AT(), ATTACK))
    fitted(Classifier(convolutional()), [callback, Watch()], Kept(batches))
    assert seen == [True] * (EPOCHS * BATCHES)  # later hooks see x_adv
    for batch, kept in zip(batches, copies, strict=True):
        assert torch.equal(batch[0], kept[0])


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_start", "backward", "loss"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, _TunerExitException])
def test_an_exception_gives_w_back(place, error):
    class Failing(Classifier):
        def fails(self, where):
            if where == place and self.trainer.fit_loop.batch_idx == 2:
                reached.append(place)
                raise error("here")

        def loss(self, batch):
            self.fails("loss")
            return super().loss(batch)

        def on_train_batch_start(self, batch, batch_idx):
            self.fails("on_train_batch_start")

        def training_step(self, batch, batch_idx):
            self.fails("training_step")
            return F.cross_entropy(self(batch[0]), batch[1])

        def on_before_backward(self, loss):
            self.fails("backward")

    reached = []
    module = Failing(convolutional())
    raised = {RuntimeError: pytest.raises(RuntimeError, match="here"), KeyboardInterrupt: pytest.raises(SystemExit)}
    with raised.get(error, nullcontext()):  # a tuner's exception ends the fit in silence
        fitted(module, [Keep(), DoublePerturbation(Failing.loss, Layerwise(0.05))])
    assert reached == [place]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, module.w[name])


class Hesitant(Classifier):
    """Leaves batches out: by -1 (and the rest of the epoch), by None, or where the loss is not finite."""

    def __init__(self, network, how):
        super().__init__(network)
        self.how, self.finite, self.at_w = how, [], []

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.how == "-1" and batch_idx == 2 else None

    def training_step(self, batch, batch_idx):
        self.at_w.append(all(torch.equal(p, self.w[name]) for name, p in self.named_parameters()))
        loss = self.loss(batch)
        self.finite.append(bool(loss.isfinite()))
        return None if (self.how == "None" and batch_idx == 2) or not self.finite[-1] else loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["-1", "None"])
@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.:UserWarning")
def test_batches_that_are_left_out_give_w_back(how, accumulate):
    class Watch(Callback):
        def on_train_epoch_end(self, trainer, module):
            kept.append(all(torch.equal(p, module.w[name]) for name, p in module.named_parameters()))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not outputs:
                kept.append(all(torch.equal(p, module.w[name]) for name, p in module.named_parameters()))

    kept, module = [], Hesitant(convolutional(), how)
    callbacks = [Keep(), DoublePerturbation(Classifier.loss, Layerwise(0.05)), Watch()]
    fitted(module, callbacks, accumulate_grad_batches=accumulate)
    assert not any(module.at_w)
    assert kept.count(True) == EPOCHS
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.:UserWarning")
def test_a_batch_that_is_not_finite_gives_no_v_and_training_goes_on():
    batches = [[x.clone(), y] for x, y in loader()]
    batches[1][0][3, 0, 0, 0] = torch.nan
    module, skipped = Hesitant(convolutional(batch_norm=False), "no"), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            skipped.append(callback.ascent.skipped.item())

    callback = DoublePerturbation(Classifier.loss, Layerwise(0.05), attack=on_images(AT(), ATTACK))
    fitted(module, [Keep(), callback, Watch()], Kept(batches))
    assert module.finite == [True, False, True, True] * EPOCHS
    assert module.at_w == [False, True, False, False] * EPOCHS
    assert skipped == [0, 3, 0, 0] * EPOCHS
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16 with a scaler"])
def test_the_ascent_runs_under_the_trainers_precision(dtype):
    """Weights equal to the bit to those of a plain loop under autocast (and with a GradScaler)."""
    half = dtype == torch.float16
    network, seen = convolutional().float(), []

    class Watched(Classifier):
        def loss(self, batch):
            logits = self(batch[0])
            seen.append(logits.dtype)
            return F.cross_entropy(logits.float(), batch[1])

    def from_x(f, x, *, start=None, generator=None):
        return ATTACK(f, x, start=x)

    expected = copy.deepcopy(network).train()
    optimizer, scaler = sgd(expected.parameters()), torch.amp.GradScaler("cpu", enabled=half)
    for _ in range(EPOCHS):
        for x, y in loader(torch.float32):
            autocast = torch.autocast("cpu", dtype, cache_enabled=False)
            with in_mode(expected, "eval"), autocast:
                x = ATTACK(AT().inner(expected, x, y), x, start=x)

            def loss():
                with autocast:  # noqa: B023  # called at once, below
                    return scaler.scale(F.cross_entropy(expected(x).float(), y))  # noqa: B023

            optimizer.zero_grad()
            with perturbed(expected, loss, Layerwise(0.05)):
                loss().backward()
            scaler.step(optimizer)
            scaler.update()

    precision = {"plugins": MixedPrecision("16-mixed", "cpu")} if half else {"precision": "bf16-mixed"}
    callback = DoublePerturbation(Watched.loss, Layerwise(0.05), attack=on_images(AT(), from_x))
    found = fitted(Watched(network), callback, loader(torch.float32), **precision)
    assert set(seen) == {dtype}
    assert equal_states(found, state(expected))
    assert 0 < callback.ascent.value < 3  # the loss, not the scaled one


def test_fp16_gradients_do_not_vanish_in_the_ascent():
    """Gradients below 6e-8, fp16's smallest number, are there with the trainer's scaler."""
    network = convolutional().float()
    torch.nn.init.normal_(network[6].weight, std=1e-7)
    skipped = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            skipped.append(callback.ascent.skipped.item())

    callback = DoublePerturbation(Classifier.loss, Layerwise(0.05), where=lambda name, p: name == "network.3.weight")
    plugin = MixedPrecision("16-mixed", "cpu")
    fitted(Classifier(network), [callback, Watch()], loader(torch.float32), plugins=plugin, limit_train_batches=1)
    assert skipped[0] == 0


def test_what_cannot_be_right_is_refused():
    ball = Layerwise(0.05)
    with pytest.raises(ValueError, match="automatic_optimization: expected True, got False"):
        fitted(Manual(convolutional(), None), DoublePerturbation(Classifier.loss, ball))
    with pytest.raises(ValueError, match=r"batch: expected a list or a dict.*got tuple"):
        callback = DoublePerturbation(Classifier.loss, ball, attack=on_images(AT(), ATTACK))
        fitted(Classifier(convolutional()), callback, Kept([tuple(batch) for batch in loader()]))
    with pytest.raises(TypeError, match="loss: expected the closure to return a tensor without dimensions"):
        fitted(Classifier(convolutional()), DoublePerturbation(lambda module, batch: module(batch[0]), ball))


def test_a_wrapped_module_is_refused(monkeypatch):
    """As DistributedDataParallel wraps it; or several devices."""
    callback, module = DoublePerturbation(Classifier.loss, Layerwise(0.05)), Classifier(convolutional())
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    callback.on_train_start(trainer, module)
    trainer.strategy.model = torch.nn.Sequential(module)
    with pytest.raises(ValueError, match="devices: expected 1 and no wrapper, got 1 under SingleDeviceStrategy"):
        callback.on_train_start(trainer, module)
    trainer.strategy.model = module
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="devices: expected 1 and no wrapper, got 2"):
        callback.on_train_start(trainer, module)


def test_the_two_ways_of_the_example_are_one():
    automatic, manual = automatically(epochs=1), manually(epochs=1)
    assert equal_states(state(automatic), state(manual))
    assert not equal_states(state(automatic), state(automatically(epochs=0)))
