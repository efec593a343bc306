"""Checkpoints of a run: weights that cannot carry code (safetensors), and the state to go on from (tensors and numbers
only); both say what their content has to be, and are held to it.

    weights    the header holds a digest of all names, types, shapes and numbers
    state      resume-STEP-SHA.pt: SHA are the first 16 characters of the file's SHA-256; the two of most steps are kept
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from saltflat.lab.config import BadInput
from saltflat.lab.record import replacing

# Of `train.Epoch.state`
KEYS = {"model", "optimizer", "average", "ranks", "within", "step", "epoch", "best", "before", "in_a_row"}
KEYS |= {"config"}  # a digest, so that a run does not go on under another one
KEYS |= {"metrics"}  # all lines so far
OURS, SHA = "saltflat", "sha256 "  # in the header of weights, before a digest; either tells that it has to fit
KEPT = 2
NAME = re.compile(r"resume-(\d+)-([0-9a-f]{16})\.pt")


def save_weights(path: Path, model: nn.Module) -> None:
    """Parameters and buffers, by their names in the model."""
    save_tensors(path, model.state_dict())


def measured_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of the network that a state's epoch was measured with: the average, where it had begun."""
    average = state["average"]
    if average is None or int(average["n_averaged"]) == 0:
        return dict(state["model"])
    return {name.removeprefix("module."): of for name, of in average.items() if name.startswith("module.")}


def save_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """{name: tensor} as safetensors, with a digest of the content in its header; the file is there whole, or not."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, {OURS: SHA + _content(tensors)}))


def _content(tensors: Mapping[str, Tensor]) -> str:
    """A digest of all names, types, shapes and numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill the model; BadInput if the file is missing, damaged, or of another architecture."""
    found = whole_weights(path)
    _check_fit(found, model, path)
    model.load_state_dict(found)


def whole_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; BadInput if they are not all there, or, in one of ours, not as they were."""
    if not path.is_file():
        raise BadInput(f"checkpoint: expected a file, got {str(path)!r}")
    try:
        found = load_file(path)
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is not a whole safetensors file: {error}") from None
    ours = any(name == OURS or value.startswith(SHA) for name, value in written.items())
    if ours and written.get(OURS) != SHA + _content(found):
        raise BadInput(f"checkpoint: {path} is damaged: its numbers are not those that were written")
    return found


def check_whole(path: Path) -> None:
    """BadInput if its header cannot be read; weights are not."""
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is not a whole safetensors file: {error}") from None


def _check_fit(found: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            where = "the file lacks" if name not in found else "the model lacks"
            raise BadInput(f"checkpoint: {path} is of another architecture: {where} {name!r}")
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            raise BadInput(f"checkpoint: {path} is of another architecture: {name!r} has shape {shapes}")


def digest(path: Path) -> str:
    """The first 16 characters of the file's SHA-256: which weights a number was measured on."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def save_state(folder: Path, state: dict[str, Any]) -> Path:
    """The state of an `Epoch` or a `Stepped`, with the run's metrics and a digest of its config. One before it stays,
    of fewer steps: which of two of one step is newer, clocks would have to say.
    """
    content = io.BytesIO()  # torch's own writer tells of a full disk in a way of its own
    torch.save(state, content)
    path = folder / f"resume-{state['step']}-{hashlib.sha256(content.getbuffer()).hexdigest()[:16]}.pt"
    for cut in folder.glob(".resume-*.new"):  # off, by a kill in here
        cut.unlink(missing_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    others = [old for old in states(folder) if old != path]
    kept = [old for old in others if _step(old) < state["step"]][: KEPT - 1]
    for old in others:
        if old not in kept:
            old.unlink(missing_ok=True)
    return path


def states(folder: Path) -> list[Path]:
    """Those that there are, the newest first."""
    found = [path for path in folder.glob("resume-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    named = NAME.fullmatch(path.name)
    return int(named[1]) if named else 0


def newest_whole(folder: Path, told: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest state whose content is what its name says; None if there is none, or never was. Of each that is not, a
    line is told, and it is set aside under another name.
    """
    for path in states(folder):
        named = NAME.fullmatch(path.name)
        if named and digest(path) == named[2]:
            return path, read(path)
        aside = path.with_name(f"damaged-{path.name}")
        told(f"{path} is damaged: set aside as {aside.name}; what was saved before it is tried next")
        path.rename(aside)
    return None


def epochs_of_earlier_version(folder: Path) -> int | None:
    """How many epochs a run had done whose state is an earlier version's resume.pt; 0 if it cannot be read."""
    path = folder / "resume.pt"
    if not path.exists():
        return None
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True)["epoch"])
    except Exception:  # whatever torch's readers raise
        return 0


def read(path: Path) -> dict[str, Any]:
    """No code in it is ever run."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises whatever its readers do: for a cut archive and for a pickle with code alike
        raise BadInput(f"run: cannot go on from {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.keys() != KEYS:
        raise BadInput(
            f"run: cannot go on from {path}: expected {', '.join(sorted(KEYS))} in it; perhaps another version wrote it"
        )
    return state


def check_state(path: Path, state: dict[str, Any], model: nn.Module, averaged: bool) -> None:
    """BadInput if the state is not of such a run."""
    if (state["average"] is not None) != averaged:
        raise BadInput(f"run: cannot go on from {path}: its average of weights does not fit optimizer.average")
    _check_fit(state["model"], model, path)
