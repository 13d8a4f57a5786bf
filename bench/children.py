"""The processes that a benchmark measures and leans on: waiting until they are up, with their last words if not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from extproc.stack.child import Child

__all__ = ["ENVOY_THREADS", "STOP_LIMIT_S", "PartsError", "accepts", "wait"]

ENVOY_THREADS = 2
"""As `extproc up` starts it."""
STOP_LIMIT_S = 8.0
_READY_LIMIT_S = 30.0


class PartsError(Exception):
    """A process did not start or did not do its work; the message says which, with its last words."""


def wait(child: Child, is_ready: Callable[[], bool]) -> None:
    """Raises PartsError."""
    deadline = time.monotonic() + _READY_LIMIT_S
    while not is_ready():
        if child.has_ended():
            raise PartsError(f"{child.name} ended with code {child.process.returncode}:\n{child.log_end()}")
        if time.monotonic() > deadline:
            raise PartsError(f"{child.name} did not answer within {_READY_LIMIT_S:.0f} s:\n{child.log_end()}")
        time.sleep(0.05)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
