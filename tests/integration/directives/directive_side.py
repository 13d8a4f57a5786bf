"""A filter process between a played Envoy, a real Valkey, a real auth service and an engine in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx2
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as rpc

from extproc.stack.child import die_with_parent
from extproc.stack.envoy import Address, free_port
from tests.integration import commands_side
from tests.integration.conftest import DROPIN_IDENTITY, UP_S
from tests.integration.turns import valkey_side
from tests.integration.whole.engine_side import StubEngine, serve_engine
from tests.unit.filter.envoy_side import request_body, request_headers, response_headers

ROOT = Path(__file__).parents[3]
IDENTITY = dict(setting.split("=", 1) for setting in DROPIN_IDENTITY[1:])
"""As the played Envoy and dropin.yaml say who is asking."""
SOON_S = 20.0
"""For a change to be heard, on a busy machine; unheard it would be seen after 60 s."""


def eventually(is_so: Callable[[], bool], limit_s: float = 45.0) -> float:
    """Returns how long it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < limit_s, f"not so within {limit_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


@dataclass
class Process:
    """One of ours, killed and started again on the same port."""

    command: list[str]
    admin: str
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.launch()
        self.await_up()

    def launch(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.patient_process", *self.command, "--admin", self.admin],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )

    def await_up(self) -> None:
        eventually(self._is_up, UP_S)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def metrics(self) -> str:
        return httpx2.get(f"http://{self.admin}/metrics", timeout=20).text

    def metric(self, name: str) -> float:
        return next((float(one.rpartition(" ")[2]) for one in self.metrics().splitlines() if one.startswith(name)), 0.0)

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx2.get(f"http://{self.admin}/health", timeout=1).is_success
        except httpx2.TransportError:
            return False


@dataclass(frozen=True)
class Seen:
    """What one exchange gave."""

    body: dict[str, Any] | None
    """None: the client's own."""
    headers: dict[str, str]
    metadata: dict[str, Any]

    @property
    def contents(self) -> list[str]:
        return [] if self.body is None else [message["content"] for message in self.body["messages"]]


@dataclass
class Side:
    redis: valkey_side.Server
    auth: Process
    filter: Process
    filter_address: Address
    engine: StubEngine
    data: Path
    environment: dict[str, str]
    stub: Any = None

    def directive(self, org: str, agent: str, *arguments: str, redis: bool = True) -> dict[str, Any]:
        """`extproc directive …`; without `redis` it tells nobody."""
        command = ["directive", *arguments, "--org", org, "--agent", agent, "--data", str(self.data)]
        answer: dict[str, Any] = commands_side.run(*command, IBEX_REDIS_URL=self.redis.url if redis else "")
        return answer

    def ask(self, org: str, agent: str, headers: dict[str, str] | None = None, text: str = "Who am I?") -> Seen:
        """One exchange, as Envoy shows it."""
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
        sent = [
            request_headers({"x-ibex-agent-id": agent, **(headers or {})}, org=org),
            request_body(body),
            response_headers(),
        ]
        _, to_body, to_response = list(self.stub.Process(iter(sent), timeout=30))
        changed = to_body.request_body.response.body_mutation.body
        options = to_response.response_headers.response.header_mutation.set_headers
        metadata = to_body.dynamic_metadata
        return Seen(
            json.loads(changed) if changed else None,
            {option.header.key: option.header.raw_value.decode() for option in options},
            dict(metadata["ibex.context"].items()) if "ibex.context" in metadata else {},
        )

    def first(self, org: str, agent: str) -> str:
        """The content of the first message that reaches the provider."""
        contents = self.ask(org, agent).contents
        return contents[0] if contents else ""

    def is_heard(self) -> bool:
        return self.filter.metric("ibex_extproc_directive_channel_alive ") == 1


@contextmanager
def running(directory: Path, *, with_service: bool = True, **settings: str) -> Iterator[Side]:
    """`settings` of the filter: by their names, as in `directive_stale_s="0"`."""
    with ExitStack() as stack:
        redis = stack.enter_context(valkey_side.valkey(directory / "valkey", "--appendfsync", "no"))
        engine = StubEngine()
        engine_address = stack.enter_context(serve_engine(engine))
        data = directory / "data"
        data.mkdir()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "IBEX_REDIS_URL": redis.url}
        auth_address, address = f"127.0.0.1:{free_port()}", Address("127.0.0.1", free_port())
        auth = Process(
            ["auth", "--listen", auth_address, "--data", str(data)],
            f"127.0.0.1:{free_port()}",
            directory / "auth.log",
            environment,
        )
        given = {
            "directive_address": auth_address if with_service else "",
            # A busy machine may take longer than the shipped 10 and 45 ms; what happens then has tests of its own.
            "directive_wait_ms": "1000",
            "budget_ms": "1000",
            **settings,
        }
        own = Process(
            ["filter", "--listen", str(address), "--engine", engine_address],
            f"127.0.0.1:{free_port()}",
            directory / "filter.log",
            {**environment, **IDENTITY, **{f"IBEX_{name.upper()}": value for name, value in given.items()}},
        )
        for process in (auth, own):
            stack.callback(process.kill)
            process.launch()
        for process in (auth, own):
            process.await_up()
        channel = stack.enter_context(grpc.insecure_channel(str(address)))
        side = Side(redis, auth, own, address, engine, data, environment, rpc.ExternalProcessorStub(channel))
        if given.get("redis_url", redis.url):
            eventually(side.is_heard)
        yield side
