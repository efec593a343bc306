"""Adversarial examples on record: images that an attack fooled, as `saltflat evaluate` keeps them.

Images are (H, W, C), C = 1 or 3, in [0, 1].
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
LARGEST = 2**24  # numbers in an image


@dataclass(frozen=True, eq=False)
class Example:
    """One image: which of its split, its class, what it is taken for once it was attacked, and by what."""

    example: int
    label: int
    predicted: int
    attack: str
    clean: Image
    attacked: Image


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one evaluation: of which weights, and what the attacker was allowed; at least one."""

    checkpoint: str
    split: str
    n: int
    threat: str
    examples: tuple[Example, ...]


def read_examples(text: bytes) -> Examples:
    """The examples in a record; an error of value, lookup or type if there are none."""
    record = json.loads(text)
    channels, height, width = (int(side) for side in record["shape"])
    if channels not in (1, 3) or min(height, width) < 1 or channels * height * width > LARGEST:
        raise ValueError(f"images have one or three channels, got {record['shape']}")
    examples = tuple(_example(entry, (channels, height, width)) for entry in record["examples"])
    if not examples:
        raise ValueError("expected at least one example")
    place = (str(record["checkpoint"]), str(record["split"]), int(record["n"]))
    return Examples(*place, str(record.get("threat") or "not on record"), examples)


def _example(entry: Mapping[str, Any], shape: tuple[int, int, int]) -> Example:
    return Example(
        int(entry["example"]),
        int(entry["label"]),
        int(entry["predicted"]),
        str(entry["attack"]),
        _image(entry["clean"], shape),
        _image(entry["attacked"], shape),
    )


def _image(text: str, shape: tuple[int, int, int]) -> Image:
    content = base64.b64decode(text, validate=True)
    if len(content) != 4 * math.prod(shape):
        raise ValueError(f"an image of shape {shape} has {4 * math.prod(shape)} bytes, got {len(content)}")
    image = np.frombuffer(content, "<f4").astype(np.float32).reshape(shape)
    if not ((image >= 0) & (image <= 1)).all():  # nor is NaN
        raise ValueError("images lie in [0, 1]")
    return image.transpose(1, 2, 0)
