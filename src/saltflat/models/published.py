"""Other people's checkpoints: weights out of a file that nobody has to trust, into a network of a known name.

    read_state   file                -> {name: tensor}      no code in the file is ever run
    fitted       {name: tensor}      -> the names, dtypes and shapes of a network, and its input normalisation
    named        "wide-resnet-34-10" -> a network
    load         all three

Published files differ in what they wrap the weights in, not in the weights: `module.` comes from DataParallel, `model.`
or `1.` from a module that normalises first, `mu` and `sigma` (or `mean` and `std`) are that module's constants, and
`sub_block1` is a stage that the TRADES code builds and never runs. Names and layouts are those that the official AWP
code (Wu, Xia, Wang 2020, arXiv 2004.05884) and RobustBench (Croce et al. 2021, arXiv 2010.09670) write and read.
"""

import importlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saltflat.models.normalise import Normalise, input_layer
from saltflat.models.preact_resnet import preact_resnet18
from saltflat.models.vgg import vgg19_bn
from saltflat.models.wide_resnet import wide_resnet

# Where a file keeps its state dict, the likeliest first. A moving average comes last: it is asked for, or all there is.
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights",
    "ema_state_dict", "state_dict_ema", "model_ema", "ema",
)  # fmt: skip

NAMES = "preact-resnet18, wide-resnet-DEPTH-WIDEN (such as wide-resnet-34-10), vgg19-bn or module:factory"


@dataclass(frozen=True)
class Normalisation:
    """The constants of (x - mean) / std, one per channel or one for all, in the units of x."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_state(path: str | PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, by the names that they have there, on the CPU.

    Args:
        path: `.safetensors`, or anything that `torch.save` wrote, now or in old releases.
        key: which entry of the file holds the weights; by default it is a state dict itself, or keeps one under the
            first of `WRAPPERS` that it has. Entries within entries are joined by a dot.

    Raises ValueError, in one line, for a file that is missing, cut or holds no weights, and for a pickle that names
    anything besides tensors, plain containers and a few kinds of bookkeeping, which are not looked at. Nothing that a
    pickle names is called: it is compared with lists of torch's and of this file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.pth"
    >>> torch.save({"state_dict": {"module.fc.weight": torch.zeros(2, 3)}, "epoch": 7}, path)
    >>> read_state(path)
    {'module.fc.weight': tensor([[0., 0., 0.],
            [0., 0., 0.]])}
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of weights, there is none")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = {name: tensor.detach() for name, tensor in _state_dict(content, key, path).items()}
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(
                f"{path}: {name!r} is not a plain tensor: {tensor.layout}, {tensor.dtype}, {tensor.device}"
            )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {_line(error)}") from None


class _Ignored:
    """Takes the place of bookkeeping: is built from anything, and is nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _stand_in(module: str, name: str) -> Any:
    """A class that torch's unpickler finds under this name; the real one is never touched."""
    return type(name, (_Ignored,), {"__module__": module})


# Old scripts keep an accuracy as a numpy number and their arguments as a namespace beside the weights. numpy's own
# classes would take their state from the pickle in C, all but unchecked.
_BOOKKEEPING = [
    _stand_in(module, name)
    for module, name in (
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("argparse", "Namespace"),
    )
]


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_BOOKKEEPING), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it takes the file for
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its readers do
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise ValueError(f"{path}: not a whole file of weights ({_line(error)}); no code in it was run") from None
        raise ValueError(
            f"{path}: refused, it holds code: the pickle names {named[1]!r}; nothing was run. A state dict alone, or "
            "safetensors, can be read"
        ) from None


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _state_dict(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    found = _entries(content, "")
    if key is not None:
        if key not in found:
            raise ValueError(f"{path}: expected weights under {key!r}, there are {_listed(found) or 'none'}")
        return found[key]
    places = [place for place in ("", *WRAPPERS) if place in found]
    places += [place for place in found if place.split(".")[0] in WRAPPERS and place not in places]
    inner = [place for place in places if place]  # a dictionary that holds another is not itself the state dict
    if not places:
        hint = f"say which: there are {_listed(found)}" if found else "there are none"
        raise ValueError(f"{path}: expected a state dict, or one under {', '.join(WRAPPERS[:5])} ...; {hint}")
    return found[inner[0] if inner else places[0]]


def _entries(content: Any, place: str) -> dict[str, dict[str, Tensor]]:
    """All dictionaries with tensors in them, by where they are, two deep."""
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, dict[str, Tensor]] = {}
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if any(tensor.ndim for tensor in tensors.values()):  # and not only a best accuracy
        found[place] = tensors
    if place.count(".") == 0:
        for name, value in named.items():
            found |= _entries(value, f"{place}.{name}" if place else name)
    return found


def _listed(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def fitted(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], Normalisation | None]:
    """The weights under the names of `model`, in its dtypes, and the normalisation that stood among them.

    Prefixes that all names share and the model does not know are taken off. What may be left over: the constants of an
    input normalisation (`mu` and `sigma`, or `mean` and `std`, in whatever submodule), which are returned; stages named
    `sub_block1`, which no published network runs; counters of BatchNorm and of averages. Counters that the file lacks
    are the model's own. The model is not changed.

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
    found = {name: tensor for name, tensor in state.items() if name != "n_averaged"}  # torch's AveragedModel counts
    found = _without_prefix(found, expected)
    constants = _constants(found, expected)
    found = _without_prefix({name: found[name] for name in found if name not in constants}, expected)
    found = {name: tensor for name, tensor in found.items() if name in expected or not _unused(name)}
    counters = {name: own for name, own in expected.items() if name.endswith("num_batches_tracked")}
    found = {**counters, **found}

    complaints = []
    if missing := [name for name in expected if name not in found]:
        complaints.append(f"lacks {_listed(missing)}")
    if left_over := [name for name in found if name not in expected]:
        complaints.append(f"has {_listed(left_over)} left over")
    both = [(name, found[name], own) for name, own in expected.items() if name in found]
    if differ := [(name, given, own) for name, given, own in both if given.shape != own.shape]:
        name, given, own = differ[0]
        more = f" and {len(differ) - 1} more differ" if len(differ) > 1 else ""
        complaints.append(f"{name!r} has shape {tuple(given.shape)}, expected {tuple(own.shape)}{more}")
    if kinds := [
        (name, given, own) for name, given, own in both if given.is_floating_point() != own.is_floating_point()
    ]:
        name, given, own = kinds[0]
        complaints.append(f"{name!r} holds {given.dtype}, expected {own.dtype}")
    if complaints:
        raise ValueError(f"weights of another architecture: {'; '.join(complaints)}")
    weights = {name: given.to(own.dtype) for name, given, own in both}
    if not constants:
        return weights, None
    mean, std = (tuple(tensor.double().flatten().tolist()) for tensor in constants.values())
    return weights, Normalisation(mean, std)


def _without_prefix(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefixes = {name.partition(".")[0] + "." for name in found}
        if len(prefixes) != 1:
            return found
        prefix = prefixes.pop()
        known = any(name.startswith(prefix) for name in expected)
        if known or not all(name.startswith(prefix) for name in found):  # or it is the name of a lone tensor
            return found
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _constants(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two constants, mean first, if there is exactly one such pair that the model does not keep itself."""
    pairs = []
    for name, tensor in found.items():
        parent, dot, last = name.rpartition(".")
        if name in expected or last not in ("mu", "mean"):
            continue
        partner = parent + dot + ("sigma" if last == "mu" else "std")
        if partner in found and found[partner].numel() == tensor.numel():
            pairs.append({name: tensor, partner: found[partner]})
    return pairs[0] if len(pairs) == 1 else {}


def _unused(name: str) -> bool:
    return name.startswith("sub_block1.") or name.endswith("num_batches_tracked")


def classes_in(state: Mapping[str, Tensor]) -> int:
    """How many classes the weights tell apart: the rows of the last matrix among them, which is the last layer.

    >>> classes_in({"fc.weight": torch.zeros(100, 640), "fc.bias": torch.zeros(100)})
    100
    """
    rows = [tensor.shape[0] for tensor in state.values() if tensor.ndim == 2]
    if not rows:
        raise ValueError("expected a linear layer, to count the classes by, there is none")
    return rows[-1]


def named(
    name: str,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A network by its name, with weights as they are before training.

    `name` is `preact-resnet18`, `wide-resnet-DEPTH-WIDEN` such as `wide-resnet-34-10`, `vgg19-bn`, or `module:factory`,
    the name of an importable module and of something in it that returns an `nn.Module` when called without arguments:
    code of one's own, which is run, and for which `num_classes` and `in_channels` are not used; never take such a name
    from a stranger's file. `mean` and `std`: see `Normalise`.

    Raises ValueError, in one line, for a name that stands for nothing.

    >>> named("wide-resnet-10-1", num_classes=100)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    >>> named("torch.nn:Identity")
    Identity()
    """
    wide = re.fullmatch(r"wide-resnet-([0-9]{1,3})-([1-9][0-9]?)", name)
    if name == "preact-resnet18":
        network = preact_resnet18(num_classes, in_channels=in_channels)
    elif name == "vgg19-bn":
        network = vgg19_bn(num_classes, in_channels=in_channels)
    elif wide is not None:
        network = wide_resnet(int(wide[1]), int(wide[2]), num_classes, in_channels=in_channels)
    elif ":" in name:
        network = _made(name)
    else:
        raise ValueError(f"network: expected {NAMES}, got {name!r}")
    return _behind(input_layer(mean, std), network)


def _made(name: str) -> nn.Module:
    """What `module:factory` returns."""
    home, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(home)
    except Exception as error:  # whatever the module does
        raise ValueError(f"network: cannot import the module of {name!r}: {_line(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"network: expected something to call in {name!r}, there is {factory!r}")
    try:
        made = factory()
    except Exception as error:
        raise ValueError(f"network: {name!r} cannot be called without arguments: {_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"network: expected an nn.Module from {name!r}, got {type(made).__name__}")
    return made


def _behind(layer: nn.Module, network: nn.Module) -> nn.Module:
    """The network behind its input layer: in the place that our networks keep for it, else one after the other."""
    if isinstance(layer, nn.Identity):
        return network
    parameter = next(network.parameters(), None)
    if parameter is not None:
        layer = layer.to(parameter.device, parameter.dtype)
    place = getattr(network, "normalise", None)
    if isinstance(place, Normalise):
        raise ValueError("mean, std: the network normalises its input already, expected neither")
    if isinstance(place, nn.Identity):
        network.normalise = layer
        return network
    return nn.Sequential(OrderedDict(normalise=layer, network=network))


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
        path, key: see `read_state`.
        name, in_channels: see `named`.
        num_classes: default as many as the file's last layer has.
        mean, std: of the input normalisation, if the authors kept it outside of the network, as the official AWP code
            does; constants in the file are found without them.

    Raises ValueError, in one line, for a file or a name that cannot be used, for weights of another architecture, and
    for a mean and std other than the file's own.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model_best.pth"
    >>> torch.save({"state_dict": nn.DataParallel(wide_resnet(10, 1, 100)).state_dict()}, path)
    >>> load(path, "wide-resnet-10-1", mean=(0.5,) * 3, std=(0.25,) * 3)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    state = read_state(path, key)
    try:
        own = ":" in name  # a network that asks for nothing
        network = named(name, 10 if own else num_classes or classes_in(state), in_channels=in_channels)
        weights, inside = fitted(state, network)
        network.load_state_dict(weights)
        if inside is not None and (mean is not None or std is not None):
            _check_agree(inside, mean, std)
        mean, std = (mean, std) if inside is None else (inside.mean, inside.std)
        return _behind(input_layer(mean, std), network).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__


def _check_agree(inside: Normalisation, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    given = (tuple(mean or ()), tuple(std or ()))
    for ours, theirs in zip(given, (inside.mean, inside.std), strict=True):
        # to the four digits that such constants are written with
        if len(ours) != len(theirs) or any(abs(a - b) > 1e-3 for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(f"mean, std: the file holds {inside.mean} and {inside.std}, got {given[0]} and {given[1]}")
