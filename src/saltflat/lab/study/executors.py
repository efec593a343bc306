"""Where a study's work is done, by name: `--executor local | tcp://HOST:PORT | package.module:function`.

local                     processes of this machine
tcp://HOST:PORT           workers of a Dask scheduler; tls:// and Dask's other protocols likewise
package.module:function   code of a person's own, called for an executor: whatever submits as `concurrent.futures` does
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from saltflat import parallel
from saltflat.lab import build
from saltflat.lab.config import BadInput
from saltflat.lab.console import say
from saltflat.lab.study.workers import Engine, Executor, processes

LOCAL = "local"
PATIENCE = 10  # seconds until a scheduler has to answer


def named(name: str, workers: int, device: str, threads: int = 0) -> Engine:
    """The engine of that name. Opening it raises BadInput if it cannot be had.

    Args:
        workers: processes here; 0 takes as many as there are cores for, or one for a GPU. Others have their own.
        device: that models are worked on; of other machines nothing is known, and nothing is checked.
        threads: of each worker, if the models' configs say so.
    """
    if parallel.launched():
        raise BadInput(
            f"executor: expected a process by itself, got one of torchrun's {os.environ['WORLD_SIZE']}: models are "
            "worked on side by side through --workers or --executor, each by one process"
        )
    if name == LOCAL:
        fitting = max(1, build.workers(device) // max(1, threads))
        return partial(processes, workers or fitting)
    if workers:
        raise BadInput(f"workers: expected none beside the executor {name!r}, which has its own, got {workers}")
    if "://" in name:
        return partial(_dask, name)
    return partial(_made, name, _imported(name))


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Executor]:
    """The workers of a Dask scheduler. Work whose worker dies goes on with another, three times.

    pure=False: what was asked before is asked again, since the folders may have changed in between.
    """
    try:
        dask: Any = importlib.import_module("distributed")  # its types are half there
    except ImportError:
        raise BadInput("executor: Dask is not installed; pip install distributed, or saltflat[cluster]") from None
    try:
        client = dask.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise BadInput(f"executor: expected a Dask scheduler at {address!r}, got none: {why}") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what is lost is told in one line, ours
    with client:
        threads = list(client.nthreads().values())
        say(f"{len(threads)} Dask workers at {address}")
        if any(number > 1 for number in threads):
            say(
                "a worker of several threads takes one model at a time all the same; --nthreads 1 lets others have them"
            )
        executor: Executor = client.get_executor(pure=False)
        yield executor


def _imported(name: str) -> Callable[[], Any]:
    module, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise BadInput(
            f"executor: expected local, tcp://HOST:PORT of a Dask scheduler, or package.module:function, got {name!r}"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # it may lie in the current folder, as for `python -m`
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # it is a person's own code
        raise BadInput(f"executor: cannot import {name!r}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise BadInput(f"executor: expected a function at {name!r}, got {type(function).__name__}")
    found: Callable[[], Any] = function
    return found


@contextlib.contextmanager
def _made(name: str, function: Callable[[], Any]) -> Iterator[Executor]:
    try:
        made = function()
    except Exception as error:
        raise BadInput(f"executor: {name}() failed: {type(error).__name__}: {error}") from None
    if not callable(getattr(made, "submit", None)):
        raise BadInput(f"executor: expected something with `submit` from {name}(), got {type(made).__name__}")
    with contextlib.ExitStack() as stack:
        if isinstance(made, contextlib.AbstractContextManager):
            stack.enter_context(made)
        yield made
