"""Real Valkeys for tests, alone, behind Sentinels, or as a cluster: each on a port that it keeps across restarts."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from extproc.stack.child import die_with_parent
from extproc.stack.envoy import free_port
from extproc.stack.valkey import find_valkey

SLOTS = 16384
MASTER = "mymaster"


def eventually(is_so: Callable[[], bool], limit_s: float = 45.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {limit_s} s"
        time.sleep(0.02)


@dataclass
class Server:
    """A `valkey-server` with an append-only file: what it has answered is there after `kill` and `start`."""

    directory: Path
    port: int
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *, wait: bool = True) -> None:
        """Until it answers, unless not to `wait`."""
        with (self.directory / "valkey.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(find_valkey()), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        if wait:
            eventually(self.answers)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "valkey.log").read_text()
        try:
            return bool(self.execute("PING"))
        except AuthenticationError:
            return True
        except RedisError:
            return False

    def execute(self, *command: Any) -> Any:
        """One command on a connection of its own."""
        with client_of(self) as client:
            return client.execute_command(*command)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """As SIGKILL does. Nothing to do when it does not run."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


def client_of(server: Server) -> Redis:
    return Redis(port=server.port, socket_timeout=20, protocol=2, retry=Retry(NoBackoff(), 0))


def server(directory: Path, *arguments: str, port: int | None = None) -> Server:
    """Not started yet. `arguments` come last and win, as in `"--requirepass", "secret"`."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    common = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory), "--save", ""]
    durable = ["--appendonly", "yes", "--appendfsync", "always"]
    return Server(directory, port, [*common, *durable, *arguments])


@contextmanager
def valkey(directory: Path, *arguments: str) -> Iterator[Server]:
    """One that runs, and is gone at the end."""
    running = server(directory, *arguments)
    try:
        running.start()
        yield running
    finally:
        running.kill()


@dataclass
class Watched:
    """One primary, one replica, and Sentinels that need one vote to promote the replica."""

    primary: Server
    replica: Server
    sentinels: list[Server]

    @property
    def url(self) -> str:
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{addresses}/{MASTER}/0"


@contextmanager
def watched(directory: Path, sentinels: int = 2) -> Iterator[Watched]:
    with ExitStack() as stack:
        primary = stack.enter_context(valkey(directory / "primary"))
        arguments = ["--replicaof", "127.0.0.1", str(primary.port), "--repl-diskless-sync-delay", "0"]
        replica = stack.enter_context(valkey(directory / "replica", *arguments))
        eventually(lambda: b"master_link_status:up" in _replication(replica))
        guards = [_sentinel(directory / f"sentinel-{number}", primary.port) for number in range(sentinels)]
        for guard in guards:
            stack.callback(guard.kill)
            guard.start()
        for guard in guards:
            eventually(lambda guard=guard: _sees(guard, replicas=1, others=sentinels - 1))  # type: ignore[misc]
        yield Watched(primary, replica, guards)


def _replication(of: Server) -> bytes:
    with client_of(of) as client:
        client.response_callbacks.clear()
        answer: bytes = client.execute_command("INFO", "replication")
        return answer


def _sentinel(directory: Path, primary_port: int) -> Server:
    directory.mkdir(parents=True)
    port = free_port()
    file = directory / "sentinel.conf"
    file.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
        f"sentinel monitor {MASTER} 127.0.0.1 {primary_port} 1\n"
        f"sentinel down-after-milliseconds {MASTER} 2000\nsentinel failover-timeout {MASTER} 3000\n"
    )
    return Server(directory, port, [str(file), "--sentinel"])


def _sees(sentinel: Server, replicas: int, others: int) -> bool:
    with client_of(sentinel) as client:
        state: dict[str, Any] = client.sentinel_masters()[MASTER]
        return bool(state["num-slaves"] >= replicas and state["num-other-sentinels"] >= others)


@contextmanager
def cluster(directory: Path, *first_slots: int) -> Iterator[list[Server]]:
    """A node for each of `first_slots`, in order, from that slot to before the next node's."""
    ends = [*first_slots[1:], SLOTS]
    with ExitStack() as stack:
        bus_ports = [free_port() for _ in first_slots]
        nodes = [
            stack.enter_context(
                valkey(directory / f"node-{bus}", "--cluster-enabled", "yes", "--cluster-port", str(bus))
            )
            for bus in bus_ports
        ]
        for number, (node, first, end) in enumerate(zip(nodes, first_slots, ends, strict=True), start=1):
            node.execute("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            node.execute("CLUSTER", "SET-CONFIG-EPOCH", number)
        for node, bus in zip(nodes[1:], bus_ports[1:], strict=True):
            nodes[0].execute("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        eventually(lambda: all(_is_whole(node, len(nodes)) for node in nodes))
        yield nodes


def _is_whole(node: Server, nodes: int) -> bool:
    with client_of(node) as client:
        client.response_callbacks.clear()
        state: bytes = client.execute_command("CLUSTER", "INFO")
        return b"cluster_state:ok" in state and f"cluster_known_nodes:{nodes}\r".encode() in state
