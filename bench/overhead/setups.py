"""The three set-ups as running processes, each with an Envoy of its own, and everything around them.

All processes are children that end with this one, also when it is killed; `stop` of `Parts` ends them in order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import uuid_utils

from bench.children import ENVOY_THREADS, STOP_LIMIT_S, PartsError, accepts, wait
from bench.overhead import envoy_config
from bench.overhead.payload import AGENT_ID, MEMORIES, ORG_ID, USER_ID
from extproc.memory.model import Namespace, new_memory
from extproc.memory.store import open_store
from extproc.settings import StoreSettings, load
from extproc.stack import envoy
from extproc.stack.child import Child
from extproc.stack.loopback import fetch

__all__ = ["ROLES", "TITLES", "Parts", "SetUp", "start"]

TITLES = {"A": "Envoy alone", "B": "bare grpc.aio processor", "C": "this filter"}
ROLES = ("envoy", "processor", "engine", "receiver")
"""What a set-up may consist of; `processor` is the echo processor in B and the filter in C."""


@dataclass(frozen=True, slots=True)
class SetUp:
    key: str
    """`A`, `B` or `C`."""
    port: int
    """Of Envoy's listener."""
    pids: dict[str, int]
    """By role."""


@dataclass(slots=True)
class Parts:
    directory: Path
    children: list[Child] = field(default_factory=list)
    set_ups: list[SetUp] = field(default_factory=list)

    def stop(self) -> None:
        for child in reversed(self.children):
            child.stop(STOP_LIMIT_S)

    def spans_received(self) -> int | None:
        """What the OTLP receiver counted; known once it was stopped, None where there is none."""
        for child in self.children:
            if child.name == "C-receiver":
                words = child.log_end().split()
                return int(words[-1]) if words and words[-1].isdigit() else None
        return None


def start(parts: Parts, keys: str, bare_engine_s: float = 0.0) -> None:
    """Start the upstream and the set-ups named by `keys`; B's engine waits so long before it answers.

    Raises PartsError; the caller stops `parts` all the same.
    """
    upstream = envoy.free_port()
    _start_module(parts, "upstream", "bench.overhead.upstream", _address(upstream))
    _wait_for_port(parts.children[-1], upstream)
    starters: dict[str, Callable[[Parts, int], SetUp]] = {
        "A": _start_a,
        "B": partial(_start_b, engine_s=bare_engine_s),
        "C": _start_c,
    }
    try:
        for key in keys:
            parts.set_ups.append(starters[key](parts, upstream))
    except envoy.EnvoyError as error:
        raise PartsError(str(error)) from error


def _start_a(parts: Parts, upstream: int) -> SetUp:
    return _start_envoy(parts, "A", upstream, None, {})


def _start_b(parts: Parts, upstream: int, engine_s: float) -> SetUp:
    engine_port, processor_port = envoy.free_port(), envoy.free_port()
    engine = _start_module(parts, "B-engine", "bench.overhead.echo", "engine", _address(engine_port), str(engine_s))
    _wait_for_port(engine, engine_port)
    addresses = (_address(processor_port), _address(engine_port))
    processor = _start_module(parts, "B-processor", "bench.overhead.echo", "processor", *addresses)
    _wait_for_port(processor, processor_port)
    return _start_envoy(parts, "B", upstream, processor_port, {"processor": processor, "engine": engine})


def _start_c(parts: Parts, upstream: int) -> SetUp:
    ports = [envoy.free_port() for _ in range(5)]
    receiver_port, engine_port, engine_admin, filter_port, filter_admin = ports
    data = parts.directory / "store"
    _remember(data)
    receiver = _start_module(parts, "C-receiver", "bench.overhead.receiver", _address(receiver_port))
    _wait_for_port(receiver, receiver_port)
    settings = {"IBEX_DATA": str(data), "IBEX_OTLP_ENDPOINT": f"http://{_address(receiver_port)}"}
    at = ["--listen", _address(engine_port), "--admin", _address(engine_admin)]
    engine = _start_module(parts, "C-engine", "extproc", "engine", *at, settings=settings)
    wait(engine, lambda: fetch(f"http://{_address(engine_admin)}/ready") is not None)
    at = ["--listen", _address(filter_port), "--admin", _address(filter_admin), "--engine", _address(engine_port)]
    filter_ = _start_module(parts, "C-filter", "extproc", "filter", *at, settings=settings)
    wait(filter_, lambda: fetch(f"http://{_address(filter_admin)}/ready") is not None)
    roles = {"processor": filter_, "engine": engine, "receiver": receiver}
    return _start_envoy(parts, "C", upstream, filter_port, roles)


def _remember(data: Path) -> None:
    """1,000 memories of the benchmark's user."""
    namespace = Namespace.parse(ORG_ID, AGENT_ID, USER_ID)
    now = datetime.now(UTC)
    store = open_store(load(StoreSettings, data=data, database_url=""))
    try:
        store.add_many([new_memory(namespace, text, id=str(uuid_utils.uuid7()), now=now) for text in MEMORIES])
    finally:
        store.close()


def _start_envoy(parts: Parts, key: str, upstream: int, processor_port: int | None, roles: dict[str, Child]) -> SetUp:
    port, admin = envoy.free_port(), envoy.free_port()
    config = envoy_config.config(port, admin, upstream, processor_port)
    file = envoy.write(config, parts.directory / f"envoy-{key}.yaml")
    binary = envoy.find_envoy(os.environ.get("IBEX_ENVOY"), os.environ.get("ENVOY_VERSION", envoy.DEFAULT_VERSION))
    command = [str(binary), "--config-path", str(file), "--disable-hot-restart"]
    command += ["--concurrency", str(ENVOY_THREADS), "--log-level", "error"]
    child = _start_child(parts, f"{key}-envoy", command, {})
    wait(child, lambda: fetch(f"http://{_address(admin)}/ready") is not None)
    return SetUp(key, port, {"envoy": child.process.pid} | {role: part.process.pid for role, part in roles.items()})


def _start_module(parts: Parts, name: str, *arguments: str, settings: dict[str, str] | None = None) -> Child:
    return _start_child(parts, name, [sys.executable, "-m", *arguments], settings or {})


def _start_child(parts: Parts, name: str, command: list[str], settings: dict[str, str]) -> Child:
    # The defaults are measured, so a variable of the caller's shell must not reach a process.
    unset = {variable: value for variable, value in os.environ.items() if variable.startswith(("IBEX_", "OTEL_"))}
    for variable in unset:
        del os.environ[variable]
    try:
        child = Child.start(name, command, parts.directory / f"{name}.log", settings)
    finally:
        os.environ.update(unset)
    parts.children.append(child)
    return child


def _wait_for_port(child: Child, port: int) -> None:
    wait(child, lambda: accepts(port))


def _address(port: int) -> str:
    return f"127.0.0.1:{port}"
