"""The server of `server.py` in a process of its own, on a CPU of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "serving"]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    port: str
    warmed: Sequence[tuple[int, int]]
    """Of each size that was warmed: bytes by which the process grew, bytes that the cache counts."""

    def cpu_s(self) -> float:
        """User and system time, of all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")


@contextmanager
def serving(cpu: int, arguments: Sequence[str]) -> Iterator[Process]:
    """Ready to be asked; what is to be warmed is warm."""
    command = [sys.executable, "-m", "bench.engine.server", "--cpu", str(cpu), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            warmed = []
            while (words := server.stdout.readline().split())[0] != "port":
                warmed.append((int(words[2]), int(words[3])))
            yield Process(server.pid, words[1], warmed)
        finally:
            server.terminate()
            server.wait(30)
