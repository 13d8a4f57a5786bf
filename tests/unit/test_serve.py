"""What a process of ours asks of the C library. In processes of their own: it is asked once for all."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

LARGE_BODIES = """
import resource
from extproc.serve import _keep_freed_memory

{first}

def copies():
    return len([b"x" * (5_000_000 + n) for n in range(5)])

for _ in range(3):
    copies()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    copies()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_made_anew(first: str) -> int:
    command = [sys.executable, "-c", LARGE_BODIES.format(first=first)]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")
def test_the_memory_of_large_bodies_stays_with_the_process() -> None:
    assert 5 * pages_made_anew("_keep_freed_memory()") < pages_made_anew("")
