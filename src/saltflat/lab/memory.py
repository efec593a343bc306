"""Memory that is freed stays in the process, for the next step to take.

glibc gives back to the kernel whatever was larger than 32 MiB, and much of the rest, as soon as it is freed; the next
step asks for it again, and the kernel clears it page by page. A map of 64 images in PreActResNet-18 is 16 MiB and more,
so that a step had half a million page faults. With the two thresholds below it has none after the first; in exchange,
what a process has taken it keeps until it ends.

Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import platform

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # M_... of malloc.h
LARGEST = 2**31 - 1  # of mallopt's int
WHERE = (2**30, 2**25)  # bytes from which a map is the kernel's; older glibc takes 32 MiB at most


def keep() -> bool:
    """Keep freed memory from now on, and say whether that was possible: with glibc, and where nobody has set its
    MALLOC_ environment variables or tunables.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or _set_by_a_person():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    larger = any(mallopt(MMAP_THRESHOLD, size) for size in WHERE)
    return bool(mallopt(TRIM_THRESHOLD, LARGEST)) and larger


def _set_by_a_person() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in os.environ)
