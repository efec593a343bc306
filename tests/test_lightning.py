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
from saltflat.inputs import zero
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


def plain(
    network, *, attack=None, ball_at=lambda epoch: Layerwise(0.05), accumulate=1, clip=None, mode="eval", seed=0,
    rank=0, left_out=(), **options,
):  # fmt: skip
    """The loop that the trainer is to be equal to, one ascent a micro-batch, without those that are left out."""
    network = copy.deepcopy(network).train()
    optimizer = sgd(network.parameters())
    for epoch in range(EPOCHS):
        for index, (x, y) in enumerate(loader()):
            if attack is not None:
                with in_mode(network, mode):
                    x = attack(AT().inner(network, x, y), x, generator=seeded(seed, epoch, index, rank))

            def loss():
                return F.cross_entropy(network(x), y)  # noqa: B023  # called at once, below

            if index % accumulate == 0:
                optimizer.zero_grad(set_to_none=index == 0 and epoch == 0)
            if index not in left_out:
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
    assert callback.dropped == 0


@pytest.mark.parametrize("given", [{"seed": 1}, {"mode": "train"}, {"seed": 1, "mode": "train"}], ids=str)
def test_seed_and_mode_of_the_attack_are_those_that_were_asked_for(given):
    network = convolutional()
    expected, otherwise = plain(network, attack=ATTACK, **given), plain(network, attack=ATTACK)
    callback = DoublePerturbation(Classifier.loss, Layerwise(0.05), attack=on_images(AT(), ATTACK, **given))
    assert equal_states(fitted(Classifier(network), callback), expected)
    assert not equal_states(expected, otherwise)


def test_every_rank_draws_its_own_starts():
    class Second(Classifier):
        global_rank = 1

    network = convolutional()
    first, second = plain(network, attack=ATTACK), plain(network, attack=ATTACK, rank=1)
    callback = DoublePerturbation(Classifier.loss, Layerwise(0.05), attack=on_images(AT(), ATTACK))
    found = fitted(Second(network), callback)
    assert equal_states(found, second)
    assert not equal_states(found, first)


def test_an_incomplete_accumulation_is_clipped_stepped_and_scheduled_as_in_the_loop():
    """Four batches in threes: the last one of an epoch is a step of its own, of a third of its gradient."""

    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    network = convolutional()
    expected = copy.deepcopy(network).train()
    optimizer = sgd(expected.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(EPOCHS):
        for part in ([0, 1, 2], [3]):
            optimizer.zero_grad()
            for index in part:
                x, y = (tensor[8 * index : 8 * index + 8] for tensor in data())
                with perturbed(expected, lambda: F.cross_entropy(expected(x), y), Layerwise(0.05)):  # noqa: B023
                    (F.cross_entropy(expected(x), y) / 3).backward()
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
    callback = DoublePerturbation(Classifier.loss, Layerwise(0.05))
    found = fitted(Scheduled(network), callback, accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert equal_states(found, state(expected))


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


def test_an_attack_may_edit_its_dictionary_and_hand_it_back():
    def attack(module, batch):
        batch["x_adv"] = batch["x"] + 1 / 255
        return batch

    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(torch.equal(batch["x_adv"], batch["x"] + 1 / 255))

    batches = Kept([{"x": x, "y": y} for x, y in loader()])
    callback = DoublePerturbation(Dictionaries.loss, None, attack=attack)
    fitted(Dictionaries(convolutional()), [callback, Watch()], batches)
    assert seen == [True] * (EPOCHS * BATCHES)


@pytest.mark.parametrize("kind", [dict, lambda batch: [*batch.items()], set, lambda batch: batch["x"]])
def test_on_images_takes_pairs_only(kind):
    batch = {"x": torch.rand(2, 3), "y": torch.tensor([0, 1]), **({} if kind is dict else {"z": 0})}
    with pytest.raises(ValueError, match=r"batch: expected a pair \(x, y\), got "):
        on_images(AT(), ATTACK)(Classifier(convolutional()), kind(batch))


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


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("attack", [None, ATTACK], ids=["clean", "attacked"])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(attack, accumulate):
    """Weights, momentum and BatchNorm's statistics are those of the loop that never saw it, to the bit."""
    network, batches = convolutional(), [[x.clone(), y] for x, y in loader()]
    batches[1][0][3, 0, 0, 0] = torch.nan
    expected = plain(network, attack=attack, accumulate=accumulate, left_out=[1])
    callback = DoublePerturbation(Classifier.loss, Layerwise(0.05), attack=attack and on_images(AT(), attack))
    found = fitted(Classifier(network), callback, Kept(batches), accumulate_grad_batches=accumulate)
    assert equal_states(found, expected)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert callback.dropped == EPOCHS


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_a_scaler_the_step_is_left_out_and_the_scale_lowered(accumulate):
    network, batches = convolutional().float(), [[x.clone(), y] for x, y in loader(torch.float32)]
    batches[1][0][3, 0, 0, 0] = torch.nan
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    callback, seen = DoublePerturbation(Classifier.loss, Layerwise(0.05)), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((state(network), plugin.scaler.get_scale()))

    before = state(network)
    fitted(
        Classifier(network), [callback, Watch()], Kept(batches), plugins=plugin, accumulate_grad_batches=accumulate,
        limit_train_batches=2,
    )  # fmt: skip
    assert callback.dropped == EPOCHS
    assert [scale for _, scale in seen] == [2.0**10, 2.0**9, 2.0**9, 2.0**8, 2.0**8, 2.0**7]
    states = [before] + [found for found, _ in seen]
    for epoch in range(EPOCHS):
        start, good, bad = states[2 * epoch : 2 * epoch + 3]
        assert equal_states(good, bad)  # neither weights nor statistics
        assert torch.equal(start["0.weight"], good["0.weight"]) == (accumulate == 2)


@pytest.mark.parametrize("label", [0, 1], ids=["right", "wrong"])
def test_fp16_gradients_neither_vanish_nor_overflow_in_the_attack(label):
    """Of a network that is sure of itself: where it is right, p - y is 6e-9, and without a scale no input would move;
    where it is wrong, -1, and the scale alone is above fp16's largest number.
    """
    network = convolutional().float()
    x, _ = data(torch.float32)
    with torch.no_grad():
        network[6].bias[0] = 19.0
    batches, shares = [[x[:8], torch.full((8,), label)]], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            shares.append((batch[0] != x[:8]).float().mean().item())

    for precision in ({"precision": "32-true"}, {"plugins": MixedPrecision("16-mixed", "cpu")}):
        attack = on_images(AT(), PGD(Linf(8 / 255, box=None), 2 / 255, 3, zero))
        callback = DoublePerturbation(Classifier.loss, None, attack=attack)
        fitted(Classifier(copy.deepcopy(network)), [callback, Watch()], Kept(batches), **precision)
    assert shares[0] > 0.9
    assert min(shares) > shares[0] - 0.1


def test_a_hook_that_changes_a_weight_at_w_plus_v_is_told_so():
    class Clipping(Classifier):
        @torch.no_grad()
        def on_train_batch_start(self, batch, batch_idx):
            self.network[0].weight.clamp_(-0.01, 0.01)

    module = Clipping(convolutional())
    with pytest.raises(RuntimeError, match=r"a hook changed a weight .* do that in on_train_batch_end"):
        fitted(module, [Keep(), DoublePerturbation(Clipping.loss, Layerwise(0.05))])
    assert all(torch.equal(p, module.w[name]) for name, p in module.named_parameters())


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
