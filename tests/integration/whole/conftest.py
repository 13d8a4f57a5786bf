"""`extproc up` as a user starts it; and a real filter between a real Envoy and an engine that misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typing_extensions import override

from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration import commands_side
from tests.integration.conftest import DROPIN_IDENTITY, Gateway, StandIn, answers, running, started
from tests.integration.otlp import Receiver, receive_spans
from tests.integration.patient_stack import patience
from tests.integration.whole.engine_side import StubEngine, serve_engine

STOP_LIMIT_S = 120


class _Patient(httpx2.HTTPTransport):
    """On a busy machine the gate may miss its 300 ms, which is a 503 and no error."""

    @override
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        for _ in range(9):
            response = super().handle_request(request)
            if response.status_code != 503 or b"SERVICE_DEGRADED" not in response.read():
                return response
            time.sleep(0.3)
        return super().handle_request(request)


@dataclass(frozen=True)
class Stack:
    """A running `extproc up`."""

    described: dict[str, Any]
    spans: Receiver

    @property
    def gateway(self) -> str:
        return str(self.described["gateway"])

    @property
    def token(self) -> str:
        return str(self.described["token"])

    def client(self, **arguments: Any) -> httpx2.Client:
        """Sends the token, and a request again that the gate could not decide in time, as it says one may."""
        headers = {"authorization": f"Bearer {self.token}", **arguments.pop("headers", {})}
        return httpx2.Client(
            base_url=self.gateway, timeout=30, headers=headers, transport=_Patient(**arguments), trust_env=False
        )

    @property
    def provider(self) -> StandIn:
        return StandIn(Address.parse(self.described["provider"].removeprefix("http://")))

    def remember(self, text: str, user: str) -> str:
        """Through the command, as a user does; returns the memory's id."""
        owner = ["--org", self.described["org_id"], "--agent", self.described["agent_id"], "--user", user]
        command = ["memory", "add", text, *owner, "--data", self.described["state_dir"]]
        return str(commands_side.run(*command, IBEX_DATABASE_URL="")["id"])


@pytest.fixture(scope="session")
def whole_stack(envoy_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Without a worker: what it would take away is looked at."""
    with running_stack(envoy_binary, tmp_path_factory.mktemp("up"), "--no-worker") as stack:
        yield stack


@contextmanager
def running_stack(binary: Path, state: Path, *options: str) -> Iterator[Stack]:
    with receive_spans() as spans:
        listen = f"127.0.0.1:{envoy.free_port()}"
        command = ["up", "--json", "--listen", listen, "--data", str(state), "--otlp", spans.url, *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "extproc", *command],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **patience(binary, state.with_name(f"{state.name}-envoy")),
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
                # Which is not asked for our own addresses: nobody is there.
                **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9"),
            },
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "extproc up ended"
            yield Stack(json.loads(line), spans)
        finally:
            process.terminate()
            code = process.wait(STOP_LIMIT_S)
            if process.stdout is not None:
                process.stdout.close()
            assert code == 0


@pytest.fixture
def stack(whole_stack: Stack) -> Stack:
    whole_stack.provider.clear()
    return whole_stack


@pytest.fixture
def user() -> str:
    """An end user of this test alone: its memories are nobody else's."""
    return f"user-{uuid.uuid4()}"


@dataclass
class Drill:
    """dropin.yaml, a filter process of its own, and an engine that does what the test says."""

    gateway: Gateway
    engine: StubEngine
    filter: subprocess.Popen[bytes]
    provider: StandIn
    admin: str

    def outcomes(self, outcome: str) -> float:
        """How often the filter counted it."""
        name = f'ibex_extproc_requests_total{{outcome="{outcome}"}} '
        lines = httpx2.get(f"{self.admin}/metrics", timeout=20).text.splitlines()
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@contextmanager
def drill(binary: Path, provider: StandIn, directory: Path, *settings: str, is_patient: bool = True) -> Iterator[Drill]:
    """`settings` of the filter, as in "IBEX_BUDGET_MS=1000". `is_patient`: Envoy, with the filter."""
    engine = StubEngine()
    filter_address, admin = Address("127.0.0.1", envoy.free_port()), Address("127.0.0.1", envoy.free_port())
    with serve_engine(engine) as engine_address:
        command = ["filter", "--listen", str(filter_address), "--admin", str(admin), "--engine", engine_address]
        # A window that no body of these tests fills.
        environment = [*DROPIN_IDENTITY, "IBEX_CONTEXT_WINDOW_TOKENS=100000000", *settings]
        with (
            running(
                [*environment, sys.executable, "-m", "extproc", *command], answers(f"http://{admin}/ready")
            ) as process,
            started(
                binary, "dropin.yaml", directory, [filter_address], provider.address, is_patient=is_patient
            ) as gateway,
        ):
            yield Drill(gateway, engine, process, provider, f"http://{admin}")


@pytest.fixture
def fresh_drill(envoy_binary: Path, provider: StandIn, tmp_path: Path) -> Iterator[Drill]:
    """For tests that kill the filter."""
    with drill(envoy_binary, provider, tmp_path, is_patient=False) as running_drill:
        yield running_drill


@pytest.fixture(scope="session")
def shared_drill(
    envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drill]:
    with drill(envoy_binary, provider_process, tmp_path_factory.mktemp("drill")) as running_drill:
        yield running_drill


@pytest.fixture(scope="session")
def shared_patient_drill(
    envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drill]:
    directory = tmp_path_factory.mktemp("patient")
    with drill(envoy_binary, provider_process, directory, "IBEX_BUDGET_MS=1000") as running_drill:
        yield running_drill


@pytest.fixture
def patient_drill(shared_patient_drill: Drill, provider: StandIn) -> Drill:
    """For tests in which nothing misbehaves: the filter may take a second, on a busy machine."""
    shared_patient_drill.engine.reset()
    return shared_patient_drill


@pytest.fixture
def engine_drill(shared_drill: Drill, provider: StandIn) -> Drill:
    """For tests that only make the engine misbehave."""
    shared_drill.engine.reset()
    return shared_drill
