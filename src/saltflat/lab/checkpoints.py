"""Checkpoints of a run: weights that cannot carry code (safetensors), and the state to go on from (tensors and numbers
only).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saltflat.lab.config import BadInput
from saltflat.lab.record import replacing

# Of `train.Epoch.state`
KEYS = {"model", "optimizer", "average", "random", "random_cuda", "memory", "step", "epoch", "best", "before"}
KEYS |= {"config"}  # a digest, so that a run does not go on under another one


def save_weights(path: Path, model: nn.Module) -> None:
    """Parameters and buffers, by their names in the model."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill the model; BadInput if the file is missing, damaged, or of another architecture."""
    if not path.is_file():
        raise BadInput(f"checkpoint: expected a file, got {str(path)!r}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is not a whole safetensors file: {error}") from None
    _check_fit(found, model, path)
    model.load_state_dict(found)


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


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of an `Epoch`, with a digest of the run's config."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def epochs_done(path: Path) -> int:
    """How many epochs a state is of, also one that an earlier version wrote; 0 if it cannot be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True)["epoch"])
    except Exception:  # whatever torch's readers raise; `load_state` says what is wrong
        return 0


def load_state(path: Path, model: nn.Module, averaged: bool) -> dict[str, Any]:
    """What `save_state` wrote; no code in it is ever run. BadInput if it cannot be read, or is not of such a run."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises whatever its readers do: for a cut archive and for a pickle with code alike
        raise BadInput(f"run: cannot go on from {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.keys() != KEYS:
        raise BadInput(
            f"run: cannot go on from {path}: expected {', '.join(sorted(KEYS))} in it; perhaps another version wrote it"
        )
    if (state["average"] is not None) != averaged:
        raise BadInput(f"run: cannot go on from {path}: its average of weights does not fit optimizer.average")
    _check_fit(state["model"], model, path)
    return state
