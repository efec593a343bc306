"""Signals by which whoever needs the machine tells a job to stop: heard, and answered where nothing is lost by it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = ("SIGTERM", "SIGUSR1")  # Windows has no second one


@contextmanager
def told_to_stop(*, one_of_many: bool = False) -> Iterator[list[str]]:
    """Signals that arrive inside, by name, in place of what they would do. In the main thread alone.

    Args:
        one_of_many: of many processes, one that fails deafens itself: it is about to end, and says why before
            torchrun's SIGTERM can make it.
    """
    told: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {
        number: signal.signal(number, lambda number, _: told.append(signal.Signals(number).name)) for number in known
    }
    try:
        yield told
    except Exception:
        if one_of_many:
            before = dict.fromkeys(before, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
