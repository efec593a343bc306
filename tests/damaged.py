"""What tests of readers share: images that are noise, files that would do harm, and readers that refuse in one line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

T = TypeVar("T")


def pixels(seed: int, *shape: int) -> Any:
    """uint8 noise of any shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The ValueError of `read(path)`: one line, with the path in it."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_or_refused(read: Callable[[Path], T], path: Path) -> T | str:
    """What `read(path)` gives, or the one line of its ValueError; any other error ends the test."""
    try:
        return read(path)
    except ValueError as error:
        line = str(error)
    assert "\n" not in line
    return line


class Harmful:
    """An object that makes the folder `harmed` where a pickle of it is read without care."""

    NAME = f"{os.mkdir.__module__}.mkdir"  # what the pickle names

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)
