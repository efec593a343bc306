"""Other people's checkpoints: the weights of a file in a network of a known name.

    named    "wide-resnet-34-10" -> a network
    fitted   {name: tensor}      -> the names, dtypes and shapes of a network, and its input normalisation
    load     file, name          -> the network that was published

Published files differ in what stands around the weights, not in the weights: `module.` comes from DataParallel,
`model.` or `1.` from a module that normalises first, `mu` and `sigma` (or `mean` and `std`) are that module's
constants, and `sub_block1` is a stage that the TRADES code builds and never runs. Names and layouts are those that the
official AWP code (Wu, Xia, Wang 2020, arXiv 2004.05884) and RobustBench (Croce et al. 2021, arXiv 2010.09670) write and
read.
"""

import importlib
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saltflat.models.normalise import Normalise, input_layer
from saltflat.models.preact_resnet import preact_resnet18, small_resnet
from saltflat.models.small import small_cnn
from saltflat.models.state_dicts import listed, read_state
from saltflat.models.vgg import vgg19_bn
from saltflat.models.wide_resnet import wide_resnet

NAMES = (
    "preact-resnet18, wide-resnet-DEPTH-WIDEN (such as wide-resnet-34-10), vgg19-bn, small-resnet-WIDTH, "
    "small-cnn-WIDTH or module:factory"
)
CONSTANTS = {"mu": "sigma", "mean": "std"}
UNUSED = {"sub_block1", "num_batches_tracked", "n_averaged"}  # a stage that never runs, counters of two kinds


class Normalisation(NamedTuple):
    """The constants of (x - mean) / std, one per channel or one for all, in the units of x."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def named(
    name: str,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A network by its name, with weights as they are before training.

    `name` is `preact-resnet18`, `wide-resnet-DEPTH-WIDEN` such as `wide-resnet-34-10`, `vgg19-bn`, `small-resnet-WIDTH`
    or `small-cnn-WIDTH` (channels of the first stage), or `module:factory`: an importable module, and what in it
    returns an `nn.Module` when called without arguments. That is code of one's own, which is run, and for which
    `num_classes` and `in_channels` are not used; never take such a name from a stranger's file. `mean` and `std`: see
    `Normalise`.

    Raises ValueError, in one line, for a name that stands for nothing and for numbers that cannot be.

    >>> named("wide-resnet-10-1", num_classes=100)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    >>> named("torch.nn:Identity")
    Identity()
    """
    if ":" in name:
        return _normalising(_made(name), mean, std)
    for field, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{field}: expected at least 1, got {value}")
    return _normalising(_built(name, num_classes, in_channels), mean, std, in_channels)


def _built(name: str, num_classes: int, in_channels: int) -> nn.Module:
    parts = re.fullmatch(r"(.+?)((?:-[1-9][0-9]{0,2})*)", name)
    kind, sizes = (parts[1], parts[2].split("-")[1:]) if parts else (name, [])
    match kind, [int(size) for size in sizes]:
        case "preact-resnet18", []:
            return preact_resnet18(num_classes, in_channels=in_channels)
        case "vgg19-bn", []:
            return vgg19_bn(num_classes, in_channels=in_channels)
        case "wide-resnet", [depth, widen_factor]:
            return wide_resnet(depth, widen_factor, num_classes, in_channels=in_channels)
        case "small-resnet", [width]:
            return small_resnet(num_classes, widths=(width, 2 * width, 4 * width), in_channels=in_channels)
        case "small-cnn", [width]:
            return small_cnn(num_classes, width=width, in_channels=in_channels)
    raise ValueError(f"network: expected {NAMES}, got {name!r}")


def _made(name: str) -> nn.Module:
    """What `module:factory` returns."""
    home, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(home)
    except (Exception, SystemExit) as error:  # whatever the module does: training scripts parse arguments, and exit
        raise ValueError(f"network: cannot import the module of {name!r}: {_line(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"network: expected something to call under {name!r}, there is {factory!r}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"network: {name!r} cannot be called without arguments: {_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"network: expected an nn.Module from {name!r}, got {type(made).__name__}")
    return made


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _normalising(
    network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int | None = None
) -> nn.Module:
    """The network behind its input layer: in the place that our networks keep for it, else one after the other."""
    layer = input_layer(mean, std)
    if not isinstance(layer, Normalise):
        return network
    if channels is not None and layer.mean.numel() not in (1, channels):
        raise ValueError(f"mean, std: expected one value, or one for each of {channels} channels, got {mean} and {std}")
    if any(isinstance(module, Normalise) for module in network.modules()):
        raise ValueError("mean, std: the network normalises its input already, expected neither")
    parameter = next(network.parameters(), None)
    if parameter is not None:
        layer = layer.to(parameter.device, parameter.dtype)
    if isinstance(getattr(network, "normalise", None), nn.Identity):
        network.normalise = layer
        return network
    return nn.Sequential(OrderedDict(normalise=layer, network=network))


def fitted(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], Normalisation | None]:
    """The weights under the names of `model`, in its dtypes, and the normalisation that stood among them.

    A prefix of all names is taken off. What may be left over: the constants of one input normalisation (`mu` and
    `sigma`, or `mean` and `std`, in whatever submodule), which are returned; stages named `sub_block1`; counters of
    BatchNorm and of averages. Counters that the file lacks are the model's own. The model is not changed.

    Raises ValueError, in one line, that says what is missing, what is left over, and which shapes differ.

    >>> layer = nn.Sequential(OrderedDict(fc=nn.Linear(1, 1, bias=False)))
    >>> weights = {"module.mu": torch.tensor([0.5]), "module.sigma": torch.tensor([0.25])}
    >>> fitted({**weights, "module.model.fc.weight": torch.tensor([[2.0]], dtype=torch.float16)}, layer)
    ({'fc.weight': tensor([[2.]])}, Normalisation(mean=(0.5,), std=(0.25,)))
    >>> fitted({"fc.bias": torch.tensor([2.0])}, layer)
    Traceback (most recent call last):
    ValueError: weights of another architecture: lacks 'fc.weight'; has 'fc.bias' left over
    """
    expected = model.state_dict()
    prefix = _prefix(state, expected)
    found = {name: state[prefix + name] for name in expected if prefix + name in state}
    fitting = {prefix + name for name in found}
    rest = {name: tensor for name, tensor in state.items() if name not in fitting}
    constants = _constants(rest)
    left_over = [name for name in rest if name not in constants and UNUSED.isdisjoint(name.split("."))]
    if complaints := list(_complaints(found, expected, left_over)):
        raise ValueError(f"weights of another architecture: {'; '.join(complaints)}")
    weights = {name: found.get(name, own).to(own.dtype) for name, own in expected.items()}
    values = [tuple(tensor.double().flatten().tolist()) for tensor in constants.values()]
    return weights, Normalisation(*values) if values else None


def _prefix(state: Iterable[str], expected: Iterable[str]) -> str:
    """What stands before a model's names in a file: the prefix under which most of them are there."""
    known = set(expected)
    prefixes = Counter(name.removesuffix(end) for name in state for end in _ends(name) if end in known)
    return max(prefixes, key=prefixes.__getitem__, default="")


def _ends(name: str) -> Iterator[str]:
    """a.b.c, b.c, c"""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _constants(rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two constants, mean first, if there is exactly one such pair."""
    pairs = []
    for name in rest:
        parent, dot, last = name.rpartition(".")
        partner = parent + dot + CONSTANTS.get(last, "")
        if last in CONSTANTS and partner in rest and rest[partner].shape == rest[name].shape:
            pairs.append({name: rest[name], partner: rest[partner]})
    return pairs[0] if len(pairs) == 1 else {}


def _complaints(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], left_over: Sequence[str]) -> Iterator[str]:
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    if missing:
        yield f"lacks {listed(missing)}"
    if left_over:
        yield f"has {listed(left_over)} left over"
    differ = [name for name, tensor in found.items() if tensor.shape != expected[name].shape]
    if differ:
        name, more = differ[0], f" and {len(differ) - 1} more differ" if len(differ) > 1 else ""
        yield f"{name!r} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}{more}"
    for name, tensor in found.items():
        if _kind(tensor) != _kind(expected[name]):
            yield f"{name!r} holds {tensor.dtype}, expected {expected[name].dtype}"
            break


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def load(
    path: str | PathLike[str],
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    key: str | None = None,
) -> nn.Module:
    """A published network, in eval mode on the CPU, in its own precision whatever the file's.

    Args:
        path, key: see `state_dicts.read_state`.
        name, in_channels: see `named`.
        num_classes: default as many as the file's last layer has.
        mean, std: of the input normalisation, if the authors kept it outside of the network, as the official AWP code
            does; constants in the file are found without them.

    Raises ValueError, in one line, for a file or a name that cannot be used, for weights of another architecture, and
    for a mean and std other than the file's own. torch's global generator is left as it was.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model_best.pth"
    >>> torch.save({"state_dict": nn.DataParallel(wide_resnet(10, 1, 100)).state_dict()}, path)
    >>> load(path, "wide-resnet-10-1", mean=(0.5,) * 3, std=(0.25,) * 3)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    state = read_state(path, key)
    try:
        with torch.random.fork_rng(devices=[]):  # for initial weights that nobody will see
            network = named(name, _classes(state) if num_classes is None else num_classes, in_channels=in_channels)
        weights, inside = fitted(state, network)
        network.load_state_dict(weights)
        mean, std = (mean, std) if inside is None else _agreed(inside, mean, std)
        return _normalising(network, mean, std, None if ":" in name else in_channels).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__


def _classes(state: Mapping[str, Tensor]) -> int:
    """The rows of the only matrix that a convolutional network has; without any, `fitted` will complain."""
    return max((tensor.shape[0] for tensor in state.values() if tensor.ndim == 2), default=10)


def _agreed(inside: Normalisation, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation:
    """The file's constants, if those that were given are the same to the four digits that people write."""
    given = Normalisation(inside.mean if mean is None else tuple(mean), inside.std if std is None else tuple(std))
    for ours, theirs in zip(given, inside, strict=True):
        if len(ours) != len(theirs) or any(abs(a - b) > 1e-3 for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(f"mean, std: expected the file's {inside.mean} and {inside.std}, got {mean} and {std}")
    return inside
