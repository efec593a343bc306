"""The config of a training run: frozen dataclasses with a unit under every field, checked before any work.

A config is written to `config.yaml` and read back from it; the command line overrides single fields. Everything here
is plain data: `build` turns it into objects, and nothing below the lab ever sees it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import tyro
import yaml
from pydantic import BeforeValidator, ConfigDict, Field


class BadInput(ValueError):
    """What a person gave cannot be used: one line that names field, value and what is allowed."""


class Interrupted(Exception):
    """A signal told to stop, and all that is needed to go on is saved."""


STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
MOST = 10**9  # of anything that is counted: what is beyond is a slip, and would not fit where it goes
LONGEST = 200_000  # characters of YAML: some thousand checkpoints in a listing; a config has a fiftieth


def number(value: object) -> float:
    """A number, or a fraction written as text: `8/255` -> 0.03137...

    >>> number("8/255") == 8 / 255, number("0.5"), number(3)
    (True, 0.5, 3.0)
    """
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            return float(numerator) / float(denominator)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, ArithmeticError):
        pass
    raise ValueError(f"{told(value)} is not a number or a fraction such as 8/255")


def whole(value: object) -> object:
    """What may be a whole number: not True, which YAML makes of `yes`, and Python takes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def told(value: object) -> str:
    """A value as messages have it, cut where it is long.

    >>> told("a" * 300)[-4:]
    'aaa…'
    """
    try:
        words = repr(value)
    except ValueError:  # Python writes no number of so many digits
        words = "a number of thousands of digits"
    return words if len(words) <= 200 else f"{words[:199]}…"


def one_line(text: str) -> str:
    """A message as a line of a terminal, whatever names are in it: nothing moves the cursor or turns the writing.

    >>> one_line("no run: a\\x1b[2J\\nb")
    'no run: a\\\\x1b[2J b'
    """
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """The same, with blanks as they are: what cannot be printed is written as Python writes it.

    >>> print(escaped("a  b\\x1b[31m"))
    a  b\\x1b[31m
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shown(value: float) -> str:
    """A number as people write it: as a fraction of 255 if it is one.

    >>> shown(8 / 255), shown(0.5)
    ('8/255', '0.5')
    """
    over = round(value * 255) if 0 < value < 1 else 0
    return f"{over}/255" if 0 < over < 255 and value == over / 255 and f"{value:g}" != f"{value!r}" else f"{value:g}"


_SPEC = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FLOAT|A/B",
    instance_from_str=lambda words: number(words[0]),
    is_instance=lambda value: isinstance(value, int | float),
    str_from_instance=lambda value: [shown(value)],
)
Number = Annotated[float, _SPEC, BeforeValidator(number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Whole = Annotated[int, BeforeValidator(whole)]
Count = Annotated[Whole, Field(ge=1, le=MOST)]
CountOrZero = Annotated[Whole, Field(ge=0, le=MOST)]


FETCHED = ("cifar10", "cifar100", "svhn")
DataName = Literal["digits", "cifar10", "cifar100", "svhn", "parquet", "folder", "tiny-imagenet", "npz", "shards"]
STORED = ("parquet", "folder", "shards")  # may stay on disk
Adversary = Literal["awp", "robust-wp", "random-wp", "m-rwp", "arwp", "sam", "asam", "kaggle", "fast"]
DRAWN = ("random-wp", "m-rwp", "arwp")  # they climb no loss
STEPPED = ("awp", "robust-wp", "sam", "asam", "kaggle")  # with any number of steps
AMORTISED = ("awp", "sam", "asam")  # whose one step may go along a gradient that is there anyway
ACCUMULATED = ("awp", "sam", "asam")  # whose ascent may be summed over parts of a batch
ALTERNATED = ("awp", "sam", "asam", "kaggle")  # they go on from a v


@dataclass(frozen=True)
class Data:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: DataName = "digits"
    """Which data: the bundled digits, an official CIFAR archive, a folder with SVHN's .mat files, a folder of parquet
    files in hub layout, a folder of image folders by class, Tiny ImageNet's folder, an npz file of your own, or a
    folder of WebDataset's tar files, which need stored."""
    path: Path | None = None
    """The archive, the folder it unpacks to, or the folder or file of the others. The digits need none."""
    stored: bool = False
    """Training images stay on disk and are read batch by batch (parquet, folder, shards); else all are in memory."""
    workers: CountOrZero = 0
    """Processes that read stored images ahead, in each process of a training; 0 reads them in it."""
    examples: CountOrZero = 0
    """Training examples, a stratified subset; 0 takes all that validation leaves."""
    validation_examples: Count = 200
    """Examples held out of the training set, stratified, to choose the best epoch on."""
    augment: Literal["none", "crop-flip"] = "none"
    """Random crop of the padded image and horizontal flip, or nothing."""
    padding: CountOrZero = 4
    """Pixels on each side before the crop."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """What the padding holds."""
    rotation: Annotated[Number, Field(ge=0, le=180)] = 0.0
    """Degrees, either way, that images are turned by at random, after the crop."""
    cutout: CountOrZero = 0
    """Side in pixels of a square that is blackened at random, after that."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Two images and their labels in one, before the attack, so that all adversaries see the same."""
    mix_alpha: Positive = 1.0
    """Their shares are drawn from Beta(alpha, alpha)."""
    label_smoothing: Share = 0.0
    """Part of every label's probability that is spread over all classes."""


@dataclass(frozen=True)
class Extra:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: Path | None = None
    """An npz file of labelled images (`image` and `label`, as published sets of generated images come), the pickle of
    RST's pseudo-labelled images, or the folder of SVHN's extra_32x32.mat."""
    share: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Of every batch, rounded down; 0 takes none."""


@dataclass(frozen=True)
class Model:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Literal["small-cnn", "mlp", "small-resnet", "preact-resnet18", "vgg19-bn", "wide-resnet"] = "small-cnn"
    """Which network."""
    width: CountOrZero = 0
    """Channels of the first stage (small-cnn, small-resnet) or units of a hidden layer (mlp); 0 takes the network's
    default.
    """
    depth: Count = 34
    """Layers (wide-resnet only)."""
    widen_factor: Count = 10
    """Times 16 channels (wide-resnet only)."""
    mean: tuple[Number, ...] = ()
    """Subtracted from the input inside the network, per channel, in pixel units; none leaves it as it is."""
    std: tuple[Positive, ...] = ()
    """What the input is divided by then, per channel, in pixel units."""
    activation: Literal["relu", "silu"] = "relu"
    """Of wide-resnet; the others have ReLU."""
    initial: Path | None = None
    """A checkpoint, of ours or of others, whose weights training begins with. A last layer for another number of
    classes is drawn anew."""


@dataclass(frozen=True)
class Objective:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Literal["natural", "at", "trades", "mart", "alp"] = "at"
    """What training minimises."""
    beta: NotNegative = 6.0
    """Weight of the divergence in TRADES and MART, no unit; of the squared difference of logits in ALP."""


@dataclass(frozen=True)
class Attack:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the threat model."""
    eps: NotNegative = 8 / 255
    """Radius of the threat model, in pixel units (images in [0, 1])."""
    step_size: NotNegative = 2 / 255
    """Length of one step, in pixel units."""
    steps: Count = 10
    """K1, gradient evaluations."""
    start: Literal["uniform", "gaussian", "zero"] = "uniform"
    """Where it starts: anywhere in the ball, 0.001 N(0, 1) beside x, or at x."""
    mode: Literal["eval", "train"] = "eval"
    """The network's mode in it: train feeds BatchNorm's running statistics with attacked images."""
    replays: CountOrZero = 0
    """m of free adversarial training: every batch is stepped on m times, each backward moves its attack on by one step
    of step_size; steps, start and mode then say nothing. 0 trains as usual."""
    stop_on_collapse: bool = False
    """End training, with the weights of the epoch before, when robust accuracy on training images falls by more than 20
    points within an epoch: catastrophic overfitting, to which one-step attacks are prone. It is told either way."""
    final_forward: bool = False
    """Run the network once more on the finished attack, as the official AT script does to compare restarts. In train
    mode that feeds the running statistics, too."""


@dataclass(frozen=True)
class Awp:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    method: Adversary = "awp"
    """Who perturbs the weights: AWP, or one of its neighbours."""
    gamma: Annotated[Number, Field(ge=0, le=1000)] = 0.0
    """Size of the weight perturbation; 0 is none. Relative to the norm of each layer (awp), of all weights (robust-wp),
    of each filter and for every number in it (random-wp, m-rwp, arwp: sigma), to each weight (asam: rho; kaggle, fast:
    eps), or in units of the weights (sam: rho)."""
    warmup: CountOrZero = 0
    """Epochs before it begins."""
    steps: Count = 1
    """K2, gradient evaluations of the weight ascent."""
    step_size: NotNegative = 0.0
    """eta_2, in gamma's unit; 0 takes gamma / steps. For kaggle and fast, the step relative to each layer's norm; 0
    takes 1 and gamma."""
    alternations: Count = 1
    """A, rounds of input and weight ascent."""
    step_inside: bool = False
    """Take the optimiser's step at w + v, as the official code does; else at w."""
    share: Share = 1.0
    """lambda, of the gradient at w + v; the rest is the gradient at w (WT-AWP: of the same batch; m-rwp: of its other
    half)."""
    truncated: bool = False
    """Leave the last layer alone, as WT-AWP does."""
    amortised: bool = False
    """Climb along the weight gradient of the attack's last backward pass, in place of a forward and backward of its own
    (awp, sam, asam): it is the inner loss's, one iterate behind, in the attack's mode."""
    joint_mode: Literal["attack", "outer"] = "attack"
    """The network's mode in that backward pass: the attack's, or the one that it is trained in, whose gradient is much
    nearer to AWP's own with BatchNorm; the attack's last step then sees the batch's statistics."""
    every: Count = 1
    """Steps from one that perturbs the weights to the next, the first of training being one; those between perturb
    inputs alone."""
    c: Positive = 1.7
    """robust-wp climbs on examples whose loss is below this, in nats."""
    increase: NotNegative = 0.0
    """Sigma grows to (1 + increase) times gamma over training, along half a cosine (random-wp, m-rwp, arwp)."""
    eta: NotNegative = 0.1
    """How much less arwp draws where gradients were large; per squared gradient."""
    beta: Share = 0.99
    """What arwp keeps of them from step to step."""
    per_rank: bool = False
    """Each process of torchrun climbs along the gradient of its own rows, without communication; else all along the
    batch's."""
    shrink: Literal["filter", "coordinate"] = "filter"
    """arwp shrinks noise by filters, as its code does, or by coordinates, as its paper does."""
    offset: NotNegative = 0.01
    """What lets asam move weights near 0, in units of the weights."""


@dataclass(frozen=True)
class Optimizer:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    epochs: Count = 60
    """Passes over the training set."""
    batch_size: Count = 100
    """Examples per step, of all processes together."""
    accumulate: Count = 1
    """Parts that every process takes its rows in, one after the other, for memory; both adversaries and the step are
    those of the whole batch, but for BatchNorm's statistics."""
    learning_rate: Positive = 0.1
    """Highest learning rate of SGD."""
    schedule: Literal["constant", "piecewise", "cosine", "cyclic"] = "piecewise"
    """Its course: piecewise divides by 10 at 50 % and at 75 % of training."""
    warmup: CountOrZero = 0
    """Epochs of linear warm-up of the learning rate."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Of SGD; no unit."""
    nesterov: bool = False
    """Nesterov's form of it."""
    weight_decay: NotNegative = 5e-4
    """Per step, of SGD; see decayed."""
    l1: NotNegative = 0.0
    """Times the sum of the absolute values of all weights of more than one dimension, added to the loss that training
    minimises and the weight adversary climbs; robust-wp and amortised ones climb without it."""
    decayed: Literal["all", "weights"] = "all"
    """What decays: all parameters, as in AWP's scripts, or those of more than one dimension."""
    average: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the moving average of weights that is then measured and kept; 0 keeps none."""
    swa_from: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of training after which the weights at the ends of epochs are averaged, measured and kept (SWA); 0 keeps
    no such average."""
    clean_forward: Literal["none", "inside", "after"] = "none"
    """An extra forward on clean images in train mode, for BatchNorm's running statistics alone: inside the loss as in
    the official TRADES script, or after the step as in the official AT script."""


@dataclass(frozen=True)
class Evaluation:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    steps: Count = 10
    """Steps of the PGD that measures after every epoch; norm and eps are the attack's, its step size, too, but for at
    most eps / 4."""
    examples: CountOrZero = 0
    """Training, and test, examples that are measured, stratified; 0 takes all. Validation is measured whole."""
    batch_size: Count = 256
    """Examples at a time."""


@dataclass(frozen=True)
class Compute:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Of training's steps. fp32 is strict; tf32 rounds what convolutions and matrix products are given on a GPU to 10
    bits, and is fp32 where there is none; bf16 and fp16 run under autocast, weights and their updates staying in fp32,
    and fp16 with a dynamic loss scale. In bf16, TRADES' attack is weaker: it begins where the KL is below bf16's
    rounding. auto takes tf32 on a GPU that has it, else fp32. Whatever is measured is measured in strict fp32."""
    compile: bool = False
    """Attacks in eval mode climb on the network as torch.compile makes it, which takes a while at first. It was not run
    on a GPU."""
    lean: bool = True
    """Attacks in eval mode, and those that measure an epoch, climb on a lean copy of the network on CPUs, BatchNorm
    folded into convolutions: the same numbers but for rounding, in less time. Where compile is set, those of training
    climb on the compiled network instead."""
    spread: Literal["ddp", "fsdp"] = "ddp"
    """How weights lie on the processes of torchrun: whole on each (DistributedDataParallel), or a shard on each
    (FSDP2). Batches are shared out among them either way."""
    sync_batch_norm: bool = False
    """BatchNorm's statistics are those of the batches of all processes; on GPUs alone. Else each has its own, and the
    running ones are the first's."""


@dataclass(frozen=True)
class Train:
    """Everything that decides what a run does."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    recipe: Annotated[str, tyro.conf.Suppress] = "custom"
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    """Of the initial weights, the order, the augmentation and the attacks."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. Auto takes a GPU if there is one."""
    threads: CountOrZero = 0
    """CPU threads; 0 takes torch's default. Results are bit-equal for equal numbers."""
    checkpoint_minutes: Annotated[Number, Field(ge=0)] = 15.0
    """From one checkpoint to go on from to the next, within an epoch; there is one after every epoch, too. 0 has those
    alone."""
    keep_every: CountOrZero = 0
    """Epochs from one kept checkpoint to the next, epoch-N beside best and last; those before and after each drop of
    the learning rate are kept then, too. 0 keeps none."""
    data: Data = field(default_factory=Data)
    extra: Extra = field(default_factory=Extra)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    attack: Attack = field(default_factory=Attack)
    awp: Awp = field(default_factory=Awp)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    compute: Compute = field(default_factory=Compute)


@functools.cache
def _validator() -> pydantic.TypeAdapter[Train]:
    return pydantic.TypeAdapter(Train)


def checked(config: Train | dict[str, Any]) -> Train:
    """The config, if every field holds what it may.

    Raises: BadInput, one line: the field, what is allowed, and the value.

    >>> checked({"awp": {"gamma": -1}})
    Traceback (most recent call last):
        ...
    saltflat.lab.config.BadInput: awp.gamma: input should be greater than or equal to 0, got -1
    """
    tree = config if isinstance(config, dict) else dataclasses.asdict(config)
    try:
        found = _validator().validate_python(tree)
    except pydantic.ValidationError as error:
        raise refusal(error) from None
    _check_together(found)
    return found


def refusal(error: pydantic.ValidationError) -> BadInput:
    """The first complaint, in one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "too_short":
        return BadInput(f"{place}: expected at least {first['ctx']['min_length']}, got none")
    message = first["msg"].removeprefix("Value error, ")
    given = "" if told(first["input"]) in message else f", got {told(first['input'])}"
    return BadInput(one_line(f"{place}: {message[0].lower() + message[1:]}{given}"))


def _check_stored(config: Train) -> None:
    """What images that stay on disk cannot do."""
    data = config.data
    if data.stored and data.name not in STORED:
        raise BadInput(f"data.stored: expected false with data.name {data.name}, which is read whole, got true")
    if data.name == "shards" and not data.stored:
        raise BadInput("data.stored: expected true with data.name shards, got false")
    if data.workers > 0 and not data.stored:
        raise BadInput(f"data.workers: needs data.stored, expected 0, got {data.workers}")
    if data.stored and config.evaluation.examples == 0:
        raise BadInput("evaluation.examples: expected a number > 0 with data.stored: those are read into memory, got 0")
    if data.stored and config.optimizer.swa_from > 0:
        raise BadInput(
            "optimizer.swa_from: expected 0 with data.stored, since statistics are re-estimated on all images, "
            f"got {config.optimizer.swa_from:g}"
        )


def _check_together(config: Train) -> None:
    """What no field can see alone."""
    if config.data.name != "digits" and config.data.path is None:
        fetched = f"; `saltflat download {config.data.name}` fetches it" if config.data.name in FETCHED else ""
        raise BadInput(f"data.path: expected the archive or folder of {config.data.name}, got none{fetched}")
    if config.data.name == "digits" and config.data.path is not None:
        raise BadInput(f"data.path: the digits are bundled, expected none, got {str(config.data.path)!r}")
    if config.model.name in ("preact-resnet18", "vgg19-bn", "wide-resnet") and config.model.width:
        raise BadInput(f"model.width: {config.model.name} has none, expected 0, got {config.model.width}")
    if config.attack.norm == "Linf" and config.attack.eps > 1:
        raise BadInput(f"attack.eps: pixels lie in [0, 1], expected at most 1 (as in 8/255), got {config.attack.eps:g}")
    _check_stored(config)
    _check_awp(config.awp)
    _check_spread(config)
    if config.awp.amortised:
        _check_amortised(config)
    if config.compute.precision == "fp16" and config.awp.method in ("arwp", "robust-wp"):
        raise BadInput(
            f"compute.precision: {config.awp.method} looks at gradients or losses as they are, and fp16 needs them "
            "scaled; expected another, got 'fp16'"
        )
    for what, holds in (
        ("objective.name natural", config.objective.name == "natural"),
        ("attack.replays", config.attack.replays > 0),
        ("attack.mode train", config.attack.mode == "train"),
    ):
        if config.compute.compile and holds:
            raise BadInput(f"compute.compile: attacks in eval mode are compiled; expected false with {what}, got true")
    if config.attack.replays > 0:
        _check_replays(config)
    _check_labels(config)
    if config.awp.alternations > 1 and config.awp.gamma == 0:
        raise BadInput(f"awp.alternations: needs awp.gamma > 0, got {config.awp.alternations}")
    if config.awp.warmup > 0 and config.awp.alternations > 1:
        raise BadInput(f"awp.alternations: must be 1 with awp.warmup > 0, got {config.awp.alternations}")
    for name, epochs in (("awp.warmup", config.awp.warmup), ("optimizer.warmup", config.optimizer.warmup)):
        if epochs >= config.optimizer.epochs:
            raise BadInput(f"{name}: expected fewer than optimizer.epochs ({config.optimizer.epochs}), got {epochs}")
    if len(config.model.mean) != len(config.model.std):
        raise BadInput(
            f"model.std: expected as many numbers as model.mean ({len(config.model.mean)}), got {len(config.model.std)}"
        )
    if config.model.activation != "relu" and config.model.name != "wide-resnet":
        raise BadInput(f"model.activation: {config.model.name} has relu only, got {config.model.activation!r}")
    if config.awp.method == "fast" and config.optimizer.momentum == 0:
        raise BadInput("optimizer.momentum: awp.method fast goes along it, expected a number > 0, got 0")
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise BadInput("optimizer.nesterov: needs optimizer.momentum > 0, got true")
    if config.optimizer.swa_from > 0 and config.optimizer.average > 0:
        raise BadInput(f"optimizer.swa_from: expected 0 beside optimizer.average, got {config.optimizer.swa_from:g}")
    if config.model.name == "wide-resnet" and (config.model.depth - 4) % 6:
        raise BadInput(f"model.depth: expected 6 n + 4 for a wide-resnet, got {config.model.depth}")
    if config.data.augment == "crop-flip" and config.data.name == "digits":
        raise BadInput("data.augment: digits mean other things when mirrored; expected none, got 'crop-flip'")


def _check_awp(awp: Awp) -> None:
    """What does not go together in the weight adversary."""
    name = awp.method
    if awp.gamma == 0 and (name != "awp" or awp.share < 1 or awp.truncated):
        what = name if name != "awp" else "awp.share" if awp.share < 1 else "awp.truncated"
        raise BadInput(f"awp.gamma: expected a number > 0 for {what}, got 0")
    if awp.joint_mode != "attack" and not awp.amortised:
        raise BadInput(f"awp.joint_mode: needs awp.amortised, expected 'attack', got {awp.joint_mode!r}")
    if awp.every > 1 and awp.gamma == 0:
        raise BadInput(f"awp.every: needs awp.gamma > 0, got {awp.every}")
    if awp.every > 1 and awp.alternations > 1:
        raise BadInput(f"awp.every: expected 1 with awp.alternations, got {awp.every}")
    if awp.share == 1 and name == "m-rwp":
        raise BadInput("awp.share: m-rwp weighs its two halves, expected a number below 1, such as 0.5, got 1")
    if awp.steps > 1 and name not in STEPPED:
        raise BadInput(f"awp.steps: {name} has one, expected 1, got {awp.steps}")
    if awp.step_size > 0 and (name in DRAWN or name == "robust-wp"):
        raise BadInput(f"awp.step_size: {name} has none, expected 0, got {awp.step_size:g}")
    if awp.alternations > 1 and name not in ALTERNATED:
        raise BadInput(
            f"awp.alternations: {name} does not go on from where it stood, expected 1, got {awp.alternations}"
        )
    if awp.step_inside and name == "m-rwp":
        raise BadInput("awp.step_inside: m-rwp steps at w, expected false, got true")
    if awp.share < 1 and awp.step_inside:
        raise BadInput(f"awp.share: expected 1 with awp.step_inside, since the rest is taken at w, got {awp.share:g}")
    if awp.increase > 0 and name not in DRAWN:
        raise BadInput(f"awp.increase: {name} has a gamma that stays, expected 0, got {awp.increase:g}")
    for of, fields in (("robust-wp", ("c",)), ("arwp", ("eta", "beta", "shrink")), ("asam", ("offset",))):
        for leaf in fields:
            value, usual = getattr(awp, leaf), getattr(Awp(), leaf)
            if name != of and value != usual:
                raise BadInput(f"awp.{leaf}: belongs to awp.method {of}; expected {usual!r} with {name}, got {value!r}")


def _check_spread(config: Train) -> None:
    """What many processes, or batches in parts, cannot do."""
    awp, of = config.awp, config.optimizer
    if awp.per_rank and (awp.gamma == 0 or awp.method in DRAWN or awp.amortised):
        raise BadInput("awp.per_rank: expected false without a weight adversary that climbs by itself, got true")
    if awp.per_rank and awp.step_inside:
        raise BadInput("awp.per_rank: expected false with awp.step_inside, or weights would drift apart, got true")
    if awp.per_rank and config.compute.spread == "fsdp":
        raise BadInput(
            "awp.per_rank: expected false with compute.spread fsdp, where no process has a gradient, got true"
        )
    if config.compute.spread == "fsdp" and of.l1 > 0:
        raise BadInput(f"optimizer.l1: expected 0 with compute.spread fsdp, which has no sum of all, got {of.l1:g}")
    if config.compute.spread == "fsdp" and of.average > 0:
        raise BadInput(f"optimizer.average: expected 0 with compute.spread fsdp, got {of.average:g}")
    if config.compute.spread == "fsdp" and config.compute.sync_batch_norm:
        raise BadInput("compute.sync_batch_norm: expected false with compute.spread fsdp, got true")
    if config.compute.spread == "fsdp" and awp.method == "arwp":
        raise BadInput("compute.spread: arwp remembers gradients, which nobody has whole; expected ddp, got 'fsdp'")
    for name, holds in (
        ("awp.method " + awp.method, awp.method not in ACCUMULATED),
        ("awp.share", awp.share < 1),
        ("awp.alternations", awp.alternations > 1),
        ("awp.amortised", awp.amortised),
        ("awp.per_rank", awp.per_rank),
        ("attack.replays", config.attack.replays > 0),
    ):
        if of.accumulate > 1 and holds:
            raise BadInput(f"optimizer.accumulate: expected 1 with {name}, got {of.accumulate}")


def _check_amortised(config: Train) -> None:
    """What the attack's last backward pass cannot give."""
    awp = config.awp
    if awp.method not in AMORTISED:
        raise BadInput(f"awp.amortised: expected awp.method {', '.join(AMORTISED)}, got {awp.method}")
    if awp.gamma == 0:
        raise BadInput("awp.amortised: needs awp.gamma > 0, got true")
    if config.objective.name == "natural":
        raise BadInput(
            "awp.amortised: natural training has no attack to take a gradient from, expected false, got true"
        )
    for name, value, only in (
        ("awp.steps", awp.steps, 1),
        ("awp.step_size", awp.step_size, 0),
        ("awp.alternations", awp.alternations, 1),
        ("awp.share", awp.share, 1),
        ("attack.replays", config.attack.replays, 0),
    ):
        if value != only:
            raise BadInput(f"{name}: expected {only} with awp.amortised, got {value:g}")
    if config.attack.final_forward:
        raise BadInput("attack.final_forward: expected false with awp.amortised, got true")


def _check_replays(config: Train) -> None:
    """What does not go together with free adversarial training."""
    awp, replays = config.awp, config.attack.replays
    if awp.method == "m-rwp" or awp.alternations > 1:
        raise BadInput(f"attack.replays: expected 0 with awp.method m-rwp or with alternations, got {replays}")
    if awp.share < 1 or awp.step_inside:
        raise BadInput(
            f"attack.replays: expected 0 with awp.share or awp.step_inside, which replays have none of, got {replays}"
        )
    if config.attack.final_forward:
        raise BadInput("attack.final_forward: expected false with attack.replays, got true")
    if config.objective.name == "natural":
        raise BadInput(f"attack.replays: natural training has no attack, expected 0, got {replays}")


def _check_labels(config: Train) -> None:
    """Extra data, and labels that are no classes."""
    data = config.data
    if config.extra.share > 0 and config.extra.path is None:
        raise BadInput(
            f"extra.path: expected a file of labelled images for a share of {config.extra.share:g}, got none"
        )
    if config.extra.share == 0 and config.extra.path is not None:
        raise BadInput("extra.share: expected a number > 0 for the images of extra.path, got 0")
    if config.extra.path is not None and config.extra.share * config.optimizer.batch_size < 1:
        raise BadInput(
            f"extra.share: expected at least one image of a batch of {config.optimizer.batch_size}, "
            f"got {config.extra.share:g}"
        )
    soft = "data.label_smoothing" if data.label_smoothing > 0 else "data.mix" if data.mix != "none" else None
    if soft is not None and config.objective.name == "mart":
        raise BadInput(f"{soft}: mart needs classes, not probabilities; expected none with it")
    if data.mix == "none" and data.mix_alpha != Data().mix_alpha:
        raise BadInput(f"data.mix_alpha: expected {Data().mix_alpha:g} without data.mix, got {data.mix_alpha:g}")


def as_text(config: Train) -> str:
    """The config as YAML, with fractions of 255 written as such."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, Path):
            return str(value)
        return shown(value) if isinstance(value, float) and "/" in shown(value) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


class _Plain(yaml.SafeLoader):
    """Plain values, each where it stands and once: aliases, which can unfold without end, and names that stand twice in
    one mapping are errors, as are tags that ask for objects."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"an alias, {event.anchor!r}, is not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                names.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str, of: str) -> Any:
    """The plain values that the YAML says. `of` names them in messages.

    Raises: BadInput, in one line, for anything else: what is no YAML, or longer than any that people write, asks for
    objects, holds aliases, or says one thing twice.

    >>> read_yaml("awp: {gamma: 0.01}", "config")
    {'awp': {'gamma': 0.01}}
    """
    if len(text) > LONGEST:
        raise BadInput(f"{of}: expected at most {LONGEST:,} characters of YAML, got {len(text):,}")
    try:
        return _Plain(text).get_single_data()
    except Exception as error:  # a tag can put any text before any of its readers
        words = one_line(str(error)) if isinstance(error, yaml.YAMLError) else type(error).__name__
        raise BadInput(f"{of}: not YAML of plain values: {words}") from None


def from_text(text: str) -> Train:
    """A config out of YAML; raises BadInput."""
    tree = read_yaml(text, "config")
    if not isinstance(tree, dict):
        raise BadInput(f"config: expected fields and values, got {type(tree).__name__}")
    return checked(tree)
