"""From a config to the objects that `fit` takes: data, network, optimiser, plan. Names become things here, those of
attacks in `threat`, and those of weight adversaries in `adversaries`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saltflat import data as datasets
from saltflat import models, parallel
from saltflat.data import Images, Splits, Stored, shape_of
from saltflat.inputs import PGD, gaussian, uniform, zero
from saltflat.lab import adversaries
from saltflat.lab.config import BadInput, Data, Train
from saltflat.lab.precision import searched
from saltflat.lab.threat import trained_against
from saltflat.lean import leaner
from saltflat.neighbours.l1 import L1
from saltflat.neighbours.logit_pairing import ALP
from saltflat.objectives import AT, MART, TRADES, Natural, Objective, Value
from saltflat.random import Generator, derived_seed
from saltflat.schedules import constant, cosine, cyclic, piecewise, warm_up
from saltflat.step import itself
from saltflat.train import Plan, as_it_is, unmixed

VALIDATION_SEED = 2020  # one split for all seeds, so that their best epochs are chosen on the same examples
DROPS = {0.5: 0.1, 0.75: 0.1}  # of the piecewise schedule: progress, and what the rate is multiplied by
WEIGHTS = 1  # the stream of random numbers that initial weights come from


@dataclass(frozen=True)
class Sets:
    """What a run trains on, and what it is measured on, by name."""

    train: Images | Stored
    measured: dict[str, Images]
    test: Images
    extra: Images | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return shape_of(self.train)


def device(name: str) -> torch.device:
    """The device of that name; BadInput if this machine has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and parallel.launched():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise BadInput(f"device: expected a GPU for each of this machine's {here} processes, got {gpus}")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        found = torch.device(name)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        has = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise BadInput(f"device: expected auto or one of {', '.join(has)} on this machine, got {name!r}") from None
    return found


def device_type(name: str) -> str:
    """cpu or cuda, of a device that there may be: what processes talk through."""
    return device(name).type


def workers(name: str) -> int:
    """How many processes work side by side on that device: one a core, or one on a GPU."""
    return 1 if device(name).type == "cuda" else os.cpu_count() or 1


def splits(data: Data) -> Splits:
    """The training and the test set, read whole."""
    path = data.path
    if data.name == "shards":
        raise BadInput("data.name: shards are read batch by batch, by a training; expected another here, got 'shards'")
    if data.name == "digits":
        return datasets.digits()
    assert path is not None  # `checked` made sure
    readers = {
        "cifar10": datasets.cifar10,
        "cifar100": datasets.cifar100,
        "svhn": datasets.svhn,
        "parquet": datasets.parquet,
        "folder": datasets.folder,
        "tiny-imagenet": datasets.tiny_imagenet,
        "npz": datasets.image_arrays,
    }
    try:
        return readers[data.name](path)
    except (OSError, ValueError) as error:
        raise BadInput(f"data.path: {' '.join(str(error).split())}") from None


def sets(config: Train) -> Sets:
    """The training examples, and the fixed sets of the measurements: a training subset, validation, test."""
    train, test = stored_splits(config.data) if config.data.stored else _pair(splits(config.data))
    total, held = len(train), config.data.validation_examples
    if held >= total:
        raise BadInput(f"data.validation_examples: expected fewer than the {total} training examples, got {held}")
    if config.data.examples > total - held:
        left = f"{total - held}, which validation leaves of {total}"
        raise BadInput(f"data.examples: expected at most {left}, got {config.data.examples}")
    size = min(shape_of(train)[1:])
    if config.data.augment == "crop-flip" and config.data.padding_mode == "reflect" and config.data.padding >= size:
        raise BadInput(
            f"data.padding: expected fewer pixels than the image's {size} to reflect, got {config.data.padding}"
        )
    if config.data.cutout >= 2 * size:
        raise BadInput(
            f"data.cutout: expected less than twice the image's {size} pixels, of which nothing would be left, got "
            f"{config.data.cutout}"
        )
    rest, validation = datasets.stratified_split(train.labels, held, VALIDATION_SEED)
    own = _part(train, rest)
    if 0 < config.data.examples < len(own):
        own = _part(own, datasets.stratified_subset(own.labels, config.data.examples, VALIDATION_SEED))
    measured = {
        "train": _subset(own, config.evaluation.examples),
        "validation": train.subset(validation),
        "test": _subset(test, config.evaluation.examples),
    }
    return Sets(own, measured, test)


def _pair(read: Splits) -> tuple[Images | Stored, Images]:
    return read.train, read.test


def stored_splits(data: Data) -> tuple[Images | Stored, Images]:
    """The training set where it lies on disk, and the test set read whole."""
    assert data.path is not None  # `checked` made sure
    readers: dict[str, Callable[..., Stored]] = {
        "parquet": datasets.stored_parquet,
        "folder": datasets.stored_folder,
        "shards": datasets.stored_shards,
    }
    try:
        train = readers[data.name](data.path)
        test = readers[data.name](data.path, split="test", like=train)
        return train, test.subset(torch.arange(len(test)))
    except (OSError, ValueError) as error:
        raise BadInput(f"data.path: {' '.join(str(error).split())}") from None


def _part(images: Images | Stored, rows: Tensor) -> Images | Stored:
    return images.part(rows) if isinstance(images, Stored) else images.subset(rows)


def with_extra(sets: Sets, config: Train) -> Sets:
    """The same, with the extra examples that training asks for."""
    path, own = config.extra.path, sets.train
    if path is None:
        return sets
    try:
        if not path.is_dir():
            return replace(sets, extra=datasets.labelled(path, like=sets.measured["train"]))
        extra = datasets.svhn_extra(path)
        if (shape_of(extra), extra.num_classes) != (shape_of(own), own.num_classes):
            shapes = [(*shape_of(of), of.num_classes) for of in (own, extra)]
            raise ValueError(
                f"{extra.name}: expected images and classes as {own.name} has them, {shapes[0]}, got {shapes[1]}"
            )
        return replace(sets, extra=extra)
    except (OSError, ValueError) as error:
        raise BadInput(f"extra.path: {' '.join(str(error).split())}") from None


def _subset(images: Images | Stored, examples: int) -> Images:
    if isinstance(images, Images) and (examples == 0 or examples >= len(images)):
        return images
    return images.subset(datasets.stratified_subset(images.labels, examples, VALIDATION_SEED))


def network(config: Train, like: Images | Stored) -> nn.Module:
    """The network for such images, on the CPU, with the initial weights of the config's seed.

    torch's global generator is left as it was. BadInput for one that memory cannot hold.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, WEIGHTS))
            return _network(config, like).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, MemoryError) as error:  # of torch's allocator
        raise BadInput(f"model: expected one that fits into memory: {str(error).splitlines()[0]}") from None


def _network(config: Train, like: Images | Stored) -> nn.Module:
    channels, height, width = shape_of(like)
    of = config.model
    pixels: dict[str, Any] = {"mean": of.mean or None, "std": of.std or None}
    if of.mean and len(of.mean) not in (1, channels):
        raise BadInput(f"model.mean: expected {channels} numbers, one per channel, got {len(of.mean)}")
    classes = like.num_classes
    if of.name == "mlp":
        hidden = (of.width or 256,) * 2
        return models.mlp(classes, in_features=channels * height * width, hidden=hidden, **pixels)
    if of.name == "small-cnn":
        return models.small_cnn(classes, in_channels=channels, width=of.width or 32, **pixels)
    if of.name == "small-resnet":
        first = of.width or 24
        return models.small_resnet(classes, in_channels=channels, widths=(first, 2 * first, 4 * first), **pixels)
    if of.name == "vgg19-bn":
        return models.vgg19_bn(classes, in_channels=channels, **pixels)
    if of.name == "preact-resnet18":
        return models.preact_resnet18(classes, in_channels=channels, **pixels)
    return models.wide_resnet(
        of.depth, of.widen_factor, classes, in_channels=channels, activation=of.activation, **pixels
    )


def optimizer(config: Train, model: nn.Module) -> torch.optim.Optimizer:
    """SGD over all parameters, in one kernel (torch's fused form, which shards have not); the plan sets its rate."""
    of = config.optimizer
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if of.decayed == "weights":
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.SGD(
        groups,
        of.learning_rate,
        momentum=of.momentum,
        weight_decay=of.weight_decay,
        nesterov=of.nesterov,
        # on CPUs and GPUs alike; gradients have to lie in memory as weights do, which .backward() sees to
        fused=not parallel.is_sharded(model),
    )


def parts(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time where weights are sharded: the layers of a network, as its Sequential has them."""
    return [part for part in model.children() if any(True for _ in part.parameters())]


def losses(config: Train) -> Objective:
    """The pair of losses, as published."""
    beta = config.objective.beta
    by_name: dict[str, Objective] = {
        "natural": Natural(),
        "at": AT(),
        "trades": TRADES(beta),
        "mart": MART(beta),
        "alp": ALP(beta),
    }
    return by_name[config.objective.name]


def objective(config: Train) -> Objective:
    """The pair of losses, as training asks for it."""
    found = losses(config)
    if config.optimizer.l1:
        found = L1(found, config.optimizer.l1)
    return CleanForwardToo(found) if config.optimizer.clean_forward == "inside" else found


@dataclass(frozen=True)
class CleanForwardToo:
    """AWP official (TRADES): the loss computes the clean logits twice; only BatchNorm's running statistics notice."""

    objective: Objective

    def inner(self, model: nn.Module, x: Tensor, y: Tensor) -> Value:
        return self.objective.inner(model, x, y)

    def outer(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        value = self.objective.outer(model, x, x_adv, y)
        with torch.no_grad():
            model(x)
        return value

    def each(self, model: nn.Module, x: Any, x_adv: Any, y: Tensor) -> Tensor:
        found: Tensor = self.objective.each(model, x, x_adv, y)  # type: ignore[attr-defined]  # all of ours have it
        return found


@dataclass(frozen=True)
class FinalForwardToo:
    """AWP official (AT): the attack looks at its result once more; only running statistics in train mode notice."""

    attack: PGD

    def __call__(self, f: Value, x: Tensor, *, start: Tensor | None = None, generator: Generator = None) -> Tensor:
        x_adv = self.attack(f, x, start=start, generator=generator)
        with torch.no_grad():
            f(x_adv)
        return x_adv


def weights_in_words(config: Train) -> str:
    """Which weights are measured and kept."""
    of = config.optimizer
    if of.swa_from:
        return f"mean of w at the ends of epochs after {of.swa_from:.0%} of training, BatchNorm re-estimated"
    return f"moving average of w, decay {of.average:g}" if of.average else "w"


def plan(config: Train, classes: int) -> Plan:
    """What `fit` does, on images of so many classes."""
    of, memory = config.optimizer, dict[str, Tensor]()
    rate = {
        "constant": constant(of.learning_rate),
        "piecewise": piecewise(of.learning_rate, DROPS),
        "cosine": cosine(of.learning_rate),
        "cyclic": cyclic(of.learning_rate),
    }[of.schedule]
    starts = {"uniform": uniform, "gaussian": gaussian(1e-3), "zero": zero}
    ball = trained_against(config.attack).ball
    pgd = PGD(ball, config.attack.step_size, config.attack.steps, starts[config.attack.start])
    attacker = FinalForwardToo(pgd) if config.attack.final_forward else pgd
    pair = objective(config)
    return Plan(
        epochs=of.epochs,
        batch_size=of.batch_size,
        learning_rate=warm_up(rate, of.warmup / of.epochs) if of.warmup else rate,
        objective=lambda t: pair,
        attack=lambda t: None if config.objective.name == "natural" else attacker,
        ball=adversaries.ball(config),
        perturb_every=config.awp.every,
        measure=trained_against(config.attack).pgd(config.evaluation.steps),
        measure_on=leaner() if config.compute.lean else itself,
        step=adversaries.step(config, memory),
        excused=lambda: searched(memory),
        memory=memory,
        clean_forward=of.clean_forward == "after",
        augment=_augmentation(config),
        mix=_mixing(config, classes),
        extra_share=config.extra.share,
        average=of.average or None,
        swa_from=of.swa_from or None,
        measure_batch_size=config.evaluation.batch_size,
        readers=config.data.workers,
        seed=config.seed,
    )


def _augmentation(config: Train) -> Any:
    data = config.data

    def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
        if data.augment == "crop-flip":
            images = datasets.crop_flip(images, padding=data.padding, mode=data.padding_mode, generator=generator)
        images = datasets.rotate(images, degrees=data.rotation, generator=generator)
        return datasets.cutout(images, side=data.cutout, generator=generator)

    return as_it_is if data.augment == "none" and data.rotation == 0 and data.cutout == 0 else augmented


def _mixing(config: Train, classes: int) -> Any:
    data = config.data

    def mixed(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = datasets.smoothed(y, classes, data.label_smoothing)
        if data.mix == "mixup":
            return datasets.mixup(x, y, data.mix_alpha, generator)
        return datasets.cutmix(x, y, data.mix_alpha, generator) if data.mix == "cutmix" else (x, y)

    return unmixed if data.mix == "none" and data.label_smoothing == 0 else mixed
