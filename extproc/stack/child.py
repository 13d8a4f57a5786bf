"""A child process of the stack: its output goes to a file, its end is noticed, and it never outlives its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Child", "die_with_parent"]

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when its parent ends, even by SIGKILL."""


def die_with_parent() -> None:
    """For `preexec_fn`. Without it, killing the parent would leave servers behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(slots=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @classmethod
    def start(cls, name: str, command: Sequence[str], log_file: Path, environment: dict[str, str]) -> Child:
        """A session of its own: Ctrl-C reaches the parent only, which then stops its children in order."""
        with log_file.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        return cls(name, process, log_file)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def log_end(self, lines: int = 10) -> str:
        """The last lines of its output."""
        try:
            return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` seconds. A stopped process (SIGSTOP) is ended too."""
        self.ask_to_end()
        self.end(grace_s)

    def ask_to_end(self) -> None:
        """SIGTERM. Does not wait."""
        if not self.has_ended():
            self.process.send_signal(signal.SIGTERM)

    def end(self, grace_s: float) -> None:
        """Wait for it; SIGKILL after `grace_s` seconds."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
