import os
import platform
import subprocess
import sys

import pytest

from saltflat.lab import memory

GLIBC = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
SCRIPT = """
import resource, sys
import numpy as np
from saltflat.lab import memory
if sys.argv[1] == "keep":
    assert memory.keep()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (2**20, 2**23, 2**24):  # 4, 32 and 64 MiB
        np.full(size, 1.0, np.float32)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def page_faults(word):
    done = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_what_was_freed_is_taken_again_without_a_page_fault(unset):
    assert page_faults("keep")[-1] < 10
    assert page_faults("leave")[-1] > 20  # 24 000 of 4 KiB, or 48 of 2 MiB


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"])
def test_what_a_person_has_set_stays(unset, name):
    unset.setenv(name, "2")
    assert not memory.keep()


def test_tunables_stay_as_well(unset):
    unset.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=128")
    assert not memory.keep()


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_nothing_is_done(unset, system):
    unset.setattr(platform, "system", lambda: system)
    assert not memory.keep()


def test_with_another_c_library_nothing_is_done(unset):
    unset.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep()
