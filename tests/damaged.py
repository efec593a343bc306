"""What tests of readers share: images that are noise, files that would do harm, damage of every kind, and readers that
refuse in one line.
"""

import json
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
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


def damages(data: bytes, number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file's bytes, each with what was done to them."""
    draws = np.random.default_rng(seed)
    size = len(data)
    for _ in range(number):
        at, length = int(draws.integers(size)), int(draws.integers(1, 64))
        flipped, byte = bytearray(data), int(draws.integers(256))
        flipped[at] ^= 1 << int(draws.integers(8))
        yield f"bit flipped at {at}", bytes(flipped)
        yield f"cut at {at}", data[:at]
        yield f"{length} bytes at {at} overwritten", data[:at] + draws.bytes(length) + data[at + length :]
        yield f"zeros from {at}", data[:at] + bytes(size - at)
        yield f"byte at {at} set to 255", data[:at] + b"\xff" + data[at + 1 :]
        yield f"{length} bytes at {at} left out", data[:at] + data[at + length :]
        yield f"{length} times {byte} put in at {at}", data[:at] + bytes([byte]) * length + data[at:]
        yield f"{length} bytes of junk behind", data + draws.bytes(length)
        yield f"random bytes from {at}", data[:at] + draws.bytes(length)
    yield "emptied", b""
    yield "random bytes alone", draws.bytes(size)


def in_child(work: Callable[[], Any], seconds: int = 60, gigabytes: float = 1.0) -> Any:
    """work() in a forked process, whose death, delay, or need for more memory than this fails the test; its result goes
    through JSON.
    """
    reader, writer = os.pipe()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and forks; the child uses none of them
        child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(seconds)
        try:
            words = json.dumps(work())
        except BaseException as error:
            words = json.dumps(f"{type(error).__name__}: {error}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        with os.fdopen(writer, "w") as file:
            file.write(json.dumps([json.loads(words), grown]))
        os._exit(0)
    os.close(writer)
    began = time.perf_counter()
    with os.fdopen(reader) as file:
        words = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"ended by signal {status & 127} after {time.perf_counter() - began:.0f} s"
    result, grown = json.loads(words)
    assert grown < gigabytes, f"took {grown:.1f} GiB more"
    return result
