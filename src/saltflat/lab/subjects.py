"""What is measured: a network, the data it is shown, the threat it is held against, and where the findings go.

A run folder knows all of it. A checkpoint of somebody else's is told its network, its data and its threat.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saltflat import data as datasets
from saltflat.balls import Weights
from saltflat.data import Images, Stored, stratified_subset
from saltflat.evaluation.suite import prepared
from saltflat.lab import build, checkpoints, memory, record
from saltflat.lab.config import BadInput, Data, Train, checked
from saltflat.lab.threat import Threat, trained_against
from saltflat.models import published
from saltflat.objectives import AT, Objective

STEP = 0.25  # of PGD, in radii, where nobody says otherwise: AWP's tables


@dataclass(frozen=True)
class Subject:
    """A network in eval mode on its device, ready to be measured.

    Attributes:
        folder: where what is found is written.
        checkpoint: its name; for a file of others, the path.
        sha256: the first characters of the file's.
        weights: which weights they are, in words.
        splits: (x, y) by name.
        objective: what it was trained with, where that is known; else plain cross-entropy.
        initial: () -> the weights before training, where they are known.
        network: as what a file of others was read: which network, mean, std and key.
    """

    folder: Path
    checkpoint: str
    sha256: str
    weights: str
    model: nn.Module
    splits: Mapping[str, tuple[Tensor, Tensor]]
    threat: Threat
    objective: Objective = field(default_factory=AT)
    initial: Callable[[], Weights] | None = None
    network: str = "the run's"


def from_run(
    path: Path, checkpoint: str, device: str = "auto", weights: Path | None = None, data_path: Path | None = None
) -> Subject:
    """A run folder and the name of one of its checkpoints, or the path of a checkpoint in a run folder.

    `weights` is a file whose weights are taken instead; its path then stands for the checkpoint's name. `data_path` is
    where the run's data are now.
    """
    if path.suffix == ".safetensors":
        path, checkpoint = path.absolute().parent.parent, path.stem
    config = record.read_config(path)
    if data_path is not None:
        config = checked(replace(config, data=replace(config.data, path=data_path)))
    file = weights or path / "checkpoints" / f"{checkpoint}.safetensors"
    if weights is None and not file.is_file():
        there = sorted(found.stem for found in (path / "checkpoints").glob("*.safetensors"))
        if not there:
            raise BadInput(f"checkpoint: there is no checkpoint in {path} yet")
        raise BadInput(f"checkpoint: expected one of {', '.join(there)} in {path}, got {checkpoint!r}")
    found = _on(device)
    sets = build.sets(config)
    model = build.network(config, sets.train)
    checkpoints.load_weights(file, model)
    sha256 = None
    while sha256 != (sha256 := checkpoints.digest(file)):  # a training that goes on may put another in its place
        checkpoints.load_weights(file, model)
    return Subject(
        folder=path,
        checkpoint=checkpoint if weights is None else str(weights),
        sha256=sha256,
        weights=build.weights_in_words(config),
        model=model.to(found).eval(),
        splits={
            name: (images.images, images.labels)
            for name, images in (
                ("test", sets.test),
                ("train", sets.train if isinstance(sets.train, Images) else sets.measured["train"]),
                ("validation", sets.measured["validation"]),
            )
        },
        threat=trained_against(config.attack),
        objective=build.losses(config),
        initial=lambda: _initial(path, config, sets.train),
    )


def _on(device: str) -> torch.device:
    """The device of that name, where networks are about to be asked."""
    found = build.device(device)
    if found.type == "cpu":
        memory.keep()
    return found


def _initial(run: Path, config: Train, like: Images | Stored) -> Weights:
    """The weights that training began with: kept in the run if they were read, else drawn again."""
    model, kept = build.network(config, like), run / "checkpoints" / "initial.safetensors"
    if config.model.initial is not None:
        checkpoints.load_weights(kept, model)
    return model.state_dict()


@dataclass(frozen=True)
class Foreign:
    """What a checkpoint of others does not say of itself.

    network: see `models.published.named`. data: digits, cifar10, cifar100, svhn, parquet, folder, tiny-imagenet or npz,
    read from data_path. mean, std, key: see `models.published.load`.
    """

    network: str
    data: str | None
    data_path: Path | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    key: str | None = None


def from_file(file: Path, about: Foreign, threat: Threat, device: str, out: Path) -> Subject:
    """A checkpoint of others, whose findings go to the folder `out`."""
    if not file.is_file():
        raise BadInput(f"run: expected the file of a checkpoint beside --model, got {str(file)!r}")
    found, splits = _on(device), _splits(about)
    x, y = splits["test"]
    channels = x.shape[1] if x.ndim == 4 else 3
    try:
        model = published.load(
            file,
            about.network,
            in_channels=channels,
            mean=about.mean or None,
            std=about.std or None,
            key=about.key,
        )
    except (ValueError, OSError) as error:
        raise BadInput(f"model: {error}") from None
    _check_answers(model, x, y)
    network = ", ".join(
        [about.network, *(f"{k} {v}" for k in ("mean", "std", "key") if (v := getattr(about, k)) not in (None, ()))]
    )
    own = model.to(found).eval()
    return Subject(out, str(file), checkpoints.digest(file), "as in the file", own, splits, threat, network=network)


def _splits(about: Foreign) -> dict[str, tuple[Tensor, Tensor]]:
    kinds = ("digits", "cifar10", "cifar100", "svhn", "parquet", "folder", "tiny-imagenet", "npz")
    if about.data not in kinds:
        raise BadInput(f"data: expected one of {', '.join(kinds)} beside --model, got {about.data or 'none'}")
    if about.data == "digits" and about.data_path is not None:
        raise BadInput(f"data_path: the digits are bundled, expected none, got {str(about.data_path)!r}")
    if about.data != "digits" and about.data_path is None:
        raise BadInput(f"data_path: expected where the data are (--data {about.data}), got none")
    try:
        if about.data == "npz" and about.data_path is not None and not _has_splits(about.data_path):
            return {"test": datasets.arrays(about.data_path)}
        read = build.splits(Data(name=about.data, path=about.data_path))  # type: ignore[arg-type]
    except ValueError as error:
        raise BadInput(f"data_path: {str(error).removeprefix('data.path: ')}") from None
    except OSError as error:
        raise BadInput(f"data_path: {error}") from None
    return {"test": _pair(read.test), "train": _pair(read.train)}


def _has_splits(path: Path) -> bool:
    """Whether an npz file is one that networks are trained on, with `x_train` and the rest."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "x_train.npy" in archive.namelist()
    except Exception:  # a damaged archive can fail in any of its parts; its reader says so
        return False


def _pair(images: Images) -> tuple[Tensor, Tensor]:
    return images.images, images.labels


def _check_answers(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One forward before any work: a network that does not fit the data says so here."""
    try:
        with torch.no_grad():
            z = model(prepared(x[:2], model))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"model: it does not take inputs of shape {tuple(x.shape[1:])}: {line}") from None
    if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(x[:2]):
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise BadInput(f"model: expected logits of shape (N, classes), got {shape}")
    if int(y.max()) >= z.shape[1]:
        raise BadInput(f"model: it tells {z.shape[1]} classes apart, and the data have a class {int(y.max())}")


def with_threat(of: Subject, norm: str | None, eps: float | None, step_size: float | None) -> Subject:
    """The same network under another threat model."""
    threat = of.threat
    if norm is not None and norm != threat.norm:
        if eps is None:
            raise BadInput(f"norm: another norm than the run's {threat.norm} needs its own --eps, got {norm!r}")
        return replace(of, threat=Threat(norm, eps, STEP * eps if step_size is None else step_size))
    if step_size is None:  # another radius takes steps in proportion
        step_size = threat.step_size if eps is None or threat.eps == 0 else threat.step_size * eps / threat.eps
    return replace(of, threat=Threat(threat.norm, threat.eps if eps is None else eps, step_size))


def chosen(of: Subject, split: str, examples: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, and which of the split they are: a stratified part, or all for 0. Equal for all runs on equal data."""
    if split not in of.splits:
        raise BadInput(f"split: expected one of {', '.join(of.splits)}, got {split!r}")
    x, y = of.splits[split]
    if examples > len(y):
        raise BadInput(f"examples: expected at most the {len(y)} of the {split} split, got {examples}")
    rows = stratified_subset(y, examples, build.VALIDATION_SEED) if examples else torch.arange(len(y))
    return x[rows], y[rows], rows


def up_to(of: Subject, split: str, examples: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `chosen`, but more examples than there are, are all."""
    available = len(of.splits[split][1]) if split in of.splits else 0
    return chosen(of, split, examples if examples < available else 0)


def check_sides(about: Foreign) -> None:
    """BadInput unless its data can be read, and have both sides of a gap."""
    if "train" not in _splits(about):
        raise BadInput(f"data: expected training images beside test images, which {about.data} has none of")


def identity(of: Subject, *shown: Tensor) -> dict[str, Any]:
    """Of which weights, in which network, and of which images and labels a finding is: what a question begins with."""
    found = hashlib.sha256()
    for tensor in shown:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "checkpoint": of.checkpoint,
        "sha256": of.sha256,
        "network": of.network,
        "images": found.hexdigest()[:16],
    }


def place(of: Subject, kind: str, split: str, asked: Mapping[str, Any]) -> Path:
    """One file for one question: its name has a digest of the weights and of all settings."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", of.checkpoint)
    return of.folder / kind / f"{name}-{split}-{record.digest(dict(asked))}.json"
