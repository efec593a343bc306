"""Weights out of a file that nobody has to trust: {name: tensor}, and no code in the file is ever run.

A pickle is a program: it may name any importable function and call it. torch's `weights_only` unpickler compares every
name with a list before anything happens, so only tensors and plain containers are made; safetensors holds nothing else
to begin with. Sources: "Serialization semantics" in PyTorch's documentation; the safetensors format.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_state(path: str | PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, by the names that they have there, on the CPU.

    Args:
        path: `.safetensors`, or anything else that `torch.save` wrote, now or in old releases.
        key: which entry of the file is the state dict. By default it is the only entry that is one, whatever its name
            (state_dict, model, net ...), or else the file itself, which "" stands for.

    Raises ValueError, in one line, for a file that is missing, cut, or holds no weights or several; and for a pickle
    that names anything besides tensors, plain containers and a few kinds of bookkeeping, which are not looked at.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.pth"
    >>> torch.save({"state_dict": {"module.fc.weight": torch.zeros(2, 3)}, "epoch": 7}, path)
    >>> read_state(path)
    {'module.fc.weight': tensor([[0., 0., 0.],
            [0., 0., 0.]])}
    """
    path = Path(path)
    _check_is_no_text(path)
    content = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    state = {name: tensor.detach() for name, tensor in _chosen(content, key, path).items()}
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise ValueError(f"{path}: expected plain tensors, got {name!r}: {kind}")
    return state


def _check_is_no_text(path: Path) -> None:
    """Downloads fail by leaving a web page, or a note of where the file is, under the name of the weights."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"{path}: expected a file of weights: {error.strerror}") from None
    if not head:
        raise ValueError(f"{path}: expected a file of weights, it is empty")
    text = head.decode("ascii", errors="replace").strip()
    if all(character.isprintable() or character.isspace() for character in text) and "\ufffd" not in text:
        raise ValueError(f"{path}: expected a file of weights, it is text that begins with {text[:40]!r}")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {_first_sentence(str(error))}") from None


class _Ignored:
    """Takes the place of bookkeeping: is built from anything, and is nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Old scripts keep an accuracy as a numpy number, and their arguments as a namespace, beside the weights. torch's
# unpickler finds these classes under the names of the real ones; numpy's own would take their state from the pickle in
# C, all but unchecked.
_BOOKKEEPING: list[Any] = [
    type(name, (_Ignored,), {"__module__": module})
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


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_BOOKKEEPING), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it takes the file for
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its readers raise
        message = str(error)
    # torch's own advice, to read the file with its code, is kept from the reader
    if named := re.search(r"GLOBAL (\S+)", message):
        raise ValueError(
            f"{path}: refused, the pickle names {named[1]!r}, which is code; nothing was run. Expected tensors in "
            "plain containers, or safetensors"
        )
    reason = _first_sentence(message.rpartition("WeightsUnpickler error:")[2]) or "it ends too early"
    raise ValueError(f"{path}: not a file of weights, or not a whole one: {reason}; nothing in it was run")


def _first_sentence(message: str) -> str:
    first = re.split(r"\.\s|\n", message.strip())[0].rstrip(".")
    return "".join(character for character in first if character.isprintable())[:120]


def _chosen(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    found = {place: tensors for place, entry in _places(content) if (tensors := _tensors(entry))}
    if key is not None:
        if key not in found:
            raise ValueError(f"{path}: expected weights under {key!r}, there are {listed(found) or 'none at all'}")
        return found[key]
    inner = [place for place in found if place]  # a dictionary that holds another is not itself the state dict
    if len(inner) > 1:
        raise ValueError(f"{path}: key: expected one of {listed(inner)}, all of which hold weights, got none")
    if not found:
        raise ValueError(f"{path}: expected a state dict, or one state dict among its entries, there is none")
    return found[inner[0] if inner else ""]


def _places(content: Any) -> Iterable[tuple[str, Any]]:
    """The file itself under the empty name, and the entries in it."""
    yield "", content
    if isinstance(content, Mapping):
        yield from ((name, entry) for name, entry in content.items() if isinstance(name, str) and name)


def _tensors(entry: Any) -> dict[str, Tensor]:
    """The tensors of a state dict; none, if the entry holds at most counters, accuracies, or states of generators."""
    if not isinstance(entry, Mapping):
        return {}
    tensors = {name: value for name, value in entry.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return tensors if any(value.ndim and value.is_floating_point() for value in tensors.values()) else {}


def listed(names: Iterable[str]) -> str:
    """The first three, and how many more.

    >>> listed(["conv1", "bn1", "conv2", "bn2", "fc"])
    "'conv1', 'bn1', 'conv2' and 2 more"
    """
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
