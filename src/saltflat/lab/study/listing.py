"""A YAML file that lists checkpoints of others for a study: what they do not say of themselves.

- name: trades            # of the model, and of its folder
  file: trades.pt
  network: wide-resnet-34-10          # or module:factory
  data: cifar10
  data_path: cifar-10-python.tar.gz
  eps: 8/255
  norm: Linf              # these and the rest where needed: step_size, mean, std, key, cluster, axes
  axes: {method: trades, seed: 0}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from saltflat.lab.config import STRICT, BadInput, Number, Positive, read_yaml, refusal
from saltflat.lab.study.models import OfOthers, Plan, Task
from saltflat.lab.subjects import STEP, Foreign
from saltflat.lab.threat import Threat

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=200)]
Plain = StrictBool | StrictInt | StrictFloat | StrictStr | None


@dataclass(frozen=True)
class Listed:
    """One entry. cluster: models of one cluster are not independent; by default each is its own."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name
    file: Path
    network: str
    data: Literal["digits", "cifar10", "cifar100", "svhn", "parquet", "folder", "tiny-imagenet"]
    eps: Positive
    norm: Literal["Linf", "L2"] = "Linf"
    step_size: Positive | None = None
    data_path: Path | None = None
    mean: tuple[Number, ...] = ()
    std: tuple[Positive, ...] = ()
    key: str | None = None
    cluster: Name | None = None
    axes: dict[StrictStr, Plain] = field(default_factory=dict)


def read(listing: Path, plan: Plan, out: Path, device: str) -> list[Task]:
    """The models that the file lists; BadInput, in one line, for the first entry that cannot be used."""
    try:
        entries = read_yaml(listing.read_text(), f"listing: {listing}")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"listing: cannot read {listing}: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list):
        raise BadInput(f"listing: expected a list of models in {listing}, got {type(entries).__name__}")
    return [_task(_entry(entry, f"model {i} of {listing}"), plan, out, device) for i, entry in enumerate(entries, 1)]


def _entry(entry: Any, where: str) -> Listed:
    try:
        return pydantic.TypeAdapter(Listed).validate_python(entry)
    except pydantic.ValidationError as error:
        raise BadInput(f"listing: {where}: {refusal(error)}") from None


def _task(entry: Listed, plan: Plan, out: Path, device: str) -> Task:
    threat = Threat(entry.norm, entry.eps, entry.step_size or STEP * entry.eps)
    about = Foreign(entry.network, entry.data, entry.data_path, entry.mean, entry.std, entry.key)
    source = OfOthers(entry.file, about, threat, out / "models" / entry.name, entry.axes, device)
    return Task(entry.name, source, plan, entry.cluster or entry.name)
