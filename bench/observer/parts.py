"""The processes around the measurement: readers, the real observer, the memory filter, a provider, Envoys.

All are children that end with this process, also when it is killed; `stop` of `Parts` ends them in order.
"""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from bench.children import ENVOY_THREADS, STOP_LIMIT_S, PartsError, accepts, wait
from bench.observer.recording import Recording, load
from bench.observer.transcript import ANSWER_HEADER, Answer, chunks, question
from extproc import names
from extproc.cli import GRPC_EXPERIMENTS
from extproc.stack import envoy
from extproc.stack.child import Child
from extproc.stack.envoy import Address
from extproc.stack.loopback import fetch

__all__ = ["Parts", "Server", "counters", "envoy_version"]

ORG_ID = "0b6f3c52-6f0e-4a57-9a52-0f3f0c2f7a01"
AGENT_ID = "5d1f7a34-93a8-4a0d-8a3e-6d9f4f1b2c02"
USER_ID = "bench-user"

_ENVOY_STARTS = 3
"""A port that was free may be some connection's before Envoy takes it."""
_RECORDINGS = 3
"""How often an answer is asked for until its chunks came one by one, at most."""


@dataclass(frozen=True, slots=True)
class Server:
    """Something that listens, as a process."""

    name: str
    port: int
    pid: int
    admin: int = 0
    """Port of its admin listener; 0: it has none."""


@dataclass(slots=True)
class Parts:
    directory: Path
    children: list[Child] = field(default_factory=list)

    def stop(self) -> None:
        for child in reversed(self.children):
            child.stop(STOP_LIMIT_S)

    def start_reader(self, kind: str) -> Server:
        """`bare`, `observer` (without outbox) or `recorder`. Raises PartsError, as all of these do."""
        port = envoy.free_port()
        child = self._module(f"reader-{kind}", "bench.observer.reader", kind, _local(port), str(self.directory))
        wait(child, lambda: accepts(port))
        return Server(kind, port, child.process.pid)

    def start_observer(self, name: str) -> Server:
        """`extproc observer` with outbox and SQLite, each a store of its own; broker and ClickHouse are off."""
        port, admin = envoy.free_port(), envoy.free_port()
        place = self.directory / name
        settings = {"IBEX_DATA": str(place), "IBEX_STATE_DIR": str(place)}
        place.mkdir()
        command = ["observer", "--listen", _local(port), "--admin", _local(admin)]
        child = self._module(name, "extproc", *command, settings=settings)
        wait(child, lambda: fetch(f"http://{_local(admin)}/ready") is not None)
        return Server(name, port, child.process.pid, admin)

    def start_filter(self) -> Server:
        """`extproc filter` with `extproc engine` behind it, no memories: so `ibex.context` is what it is in life."""
        ports = [envoy.free_port() for _ in range(4)]
        engine, engine_admin, filter_, filter_admin = map(_local, ports)
        settings = {"IBEX_DATA": str(self.directory / "memories")}
        command = ["engine", "--listen", engine, "--admin", engine_admin]
        child = self._module("engine", "extproc", *command, settings=settings)
        wait(child, lambda: fetch(f"http://{engine_admin}/ready") is not None)
        command = ["filter", "--listen", filter_, "--admin", filter_admin, "--engine", engine]
        child = self._module("filter", "extproc", *command, settings=settings)
        wait(child, lambda: fetch(f"http://{filter_admin}/ready") is not None)
        return Server("filter", ports[2], child.process.pid)

    def start_provider(self) -> Server:
        port = envoy.free_port()
        child = self._module("provider", "bench.observer.provider", _local(port))
        wait(child, lambda: accepts(port))
        return Server("provider", port, child.process.pid)

    def start_envoy(self, name: str, filter_: Server, provider: Server, observer: Server | None) -> Server:
        """With the shipped envoy.yaml, but for addresses; `observer` None: as `extproc up` renders it without one."""
        before = len(self.children)
        for _ in range(_ENVOY_STARTS - 1):
            try:
                return self._start_envoy(name, filter_, provider, observer)
            except PartsError:
                while len(self.children) > before:
                    self.children.pop().stop(STOP_LIMIT_S)
        return self._start_envoy(name, filter_, provider, observer)

    def _start_envoy(self, name: str, filter_: Server, provider: Server, observer: Server | None) -> Server:
        plan = envoy.Plan(
            listen=Address("127.0.0.1", envoy.free_port()),
            admin=Address("127.0.0.1", envoy.free_port()),
            filters=[Address("127.0.0.1", filter_.port)],
            observers=[Address("127.0.0.1", observer.port)] if observer is not None else [],
            provider=envoy.Provider(Address("127.0.0.1", provider.port)),
        )
        place = self.directory / name
        try:
            config = _without_gate(envoy.render(envoy.load(envoy.shipped("envoy.yaml")), plan))
            file = envoy.write(config, place / "envoy.yaml")
            running = envoy.start(_binary(), file, plan.admin, state_dir=place, concurrency=ENVOY_THREADS)
        except envoy.EnvoyError as error:
            raise PartsError(str(error)) from error
        child = Child(name, running.process, running.log_file)
        self.children.append(child)
        wait(child, lambda: fetch(f"http://{plan.admin}/ready") is not None)
        clusters = [envoy.FILTER_CLUSTER] + ([envoy.OBSERVER_CLUSTER] if observer is not None else [])
        for cluster in clusters:
            stat = f"cluster.{cluster}.membership_healthy"
            wait(child, lambda stat=stat: _stat(plan.admin, stat) > 0)  # type: ignore[misc]  # a default is a value
        return Server(name, plan.listen.port, child.process.pid, plan.admin.port)

    def record(self, gateway: Server, answers: list[Answer]) -> dict[Answer, Recording]:
        """What `gateway` shows its recorder of each answer: one chunk, one message. Raises PartsError."""
        found: dict[Answer, Recording] = {}
        for number in range(len(answers) * _RECORDINGS):
            missing = [answer for answer in answers if answer not in found]
            if not missing:
                return found
            _ask(gateway.port, missing[0])
            recording = load(self._await_file(f"{number}.recording")).only(set(chunks(missing[0])))
            if len(recording.chunks) >= missing[0].chunks / 2:
                found[missing[0]] = recording
        if len(found) < len(answers):
            raise PartsError("Envoy joined most chunks of an answer, again and again: this machine is too busy")
        return found

    def _await_file(self, name: str) -> Path:
        file = self.directory / name
        wait(self.children[-1], file.exists)
        return file

    def _module(self, name: str, module: str, *arguments: str, settings: dict[str, str] | None = None) -> Child:
        # The defaults are measured, so a variable of the caller's shell must not reach a process.
        unset = {variable: value for variable, value in os.environ.items() if variable.startswith(("IBEX_", "OTEL_"))}
        for variable in unset:
            del os.environ[variable]
        try:
            environment = {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS, **(settings or {})}
            command = [sys.executable, "-m", module, *arguments]
            child = Child.start(name, command, self.directory / f"{name}.log", environment)
        finally:
            os.environ.update(unset)
        self.children.append(child)
        return child


def _without_gate(config: envoy.Node) -> envoy.Node:
    """The gate has a benchmark of its own; here every request is one user's."""
    owner = {"org_id": ORG_ID, "agent_id": AGENT_ID, "user_id": USER_ID}
    identity = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
        "metadata": [{"metadata_namespace": names.GATE_METADATA, "value": owner}],
    }
    [listener] = config["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    for entry in filters:
        if entry["name"] == "ibex.gate":
            entry["typed_config"] = identity
    return config


def counters(observer: Server) -> dict[str, int]:
    """`ibex_observer_*` of the real observer: streams by end, and those without a turn by reason, where not 0."""
    text = (fetch(f"http://{_local(observer.admin)}/metrics") or b"").decode()
    found = re.findall(r'^ibex_observer_(?:streams|unrecorded)_total\{\w+="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {name: round(float(value)) for name, value in found if float(value)}


def envoy_version() -> str:

    said = subprocess.run([_binary(), "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)/", said)
    return found[1] if found else "unknown"


def _binary() -> Path:
    """Raises PartsError."""
    version = os.environ.get("ENVOY_VERSION", envoy.DEFAULT_VERSION)
    try:
        return envoy.find_envoy(os.environ.get("IBEX_ENVOY"), version)
    except envoy.EnvoyError as error:
        raise PartsError(str(error)) from error


def _ask(port: int, answer: Answer) -> None:
    """One exchange. Request and session have one id, so that a replay changes both."""
    one = str(uuid.uuid4())
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "authorization": "Bearer sk-0000000000000000000000000000000000000000000000",
        "user-agent": "bench",
        "x-request-id": one,
        "x-ibex-session-id": one,
        "x-ibex-user-id": USER_ID,
        ANSWER_HEADER: answer.to_header(),
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    try:
        connection.request("POST", answer.path, question(answer), headers)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        raise PartsError(f"the gateway did not answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise PartsError(f"the gateway answered {response.status}")


def _stat(admin: Address, name: str) -> int:
    text = (fetch(f"http://{admin}/stats?filter=^{name}$") or b"").decode()
    return int(text.rpartition(": ")[2] or 0) if name in text else 0


def _local(port: int) -> str:
    return f"127.0.0.1:{port}"
