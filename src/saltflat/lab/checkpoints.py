"""Checkpoints of a run: weights that cannot carry code (safetensors), and the state to go on from (tensors and numbers
only).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from saltflat.lab.record import replacing


def save_weights(path: Path, model: nn.Module) -> None:
    """Parameters and buffers, by their names in the model."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill the model; ValueError of one line if the file is missing, damaged, or of another architecture."""
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a file, got {str(path)!r}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} is not a whole safetensors file: {error}") from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            where = "the file lacks" if name not in found else "the model lacks"
            raise ValueError(f"checkpoint: {path} is of another architecture: {where} {name!r}")
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            raise ValueError(f"checkpoint: {path} is of another architecture: {name!r} has shape {shapes}")
    model.load_state_dict(found)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of an `Epoch`."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; no code in it is ever run. ValueError of one line if it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises whatever its readers do: for a cut archive, a pickle with code, a missing file alike
        raise ValueError(f"run: cannot go on from {path}: {str(error).splitlines()[0]}") from None
    return state
