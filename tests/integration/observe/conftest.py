"""A real Envoy with an observer first in its chain, and a provider whose every byte the test chooses."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration.conftest import (
    AGENT,
    DROPIN_IDENTITY,
    ORG,
    File,
    Gateway,
    keep_pinging,
    patient,
    running,
    trust_gate,
)
from tests.integration.http_side import AUTHORIZED
from tests.integration.observe.transcript_provider import Provider, Script, provide
from tests.integration.processor import Processor

WAIT_S = 45


@dataclass
class Observed:
    """What one line of the observer's file says."""

    turn: dict[str, Any]
    text: dict[str, str] | None


@dataclass
class Watched:
    """A gateway whose exchanges are observed."""

    gateway: Gateway
    provider: Provider
    observer: subprocess.Popen[bytes]
    file: Path
    _read: int = 0

    def answer_with(self, *pieces: bytes, **how: Any) -> None:
        self.provider.script = Script(pieces, **how)

    def turns(self) -> list[Observed]:
        """All of them so far."""
        lines = self.file.read_bytes().split(b"\n")[:-1] if self.file.exists() else []
        return [Observed(**msgspec.json.decode(line)) for line in lines]

    def next_turn(self, request_id: str) -> Observed:
        """The turn of one request; waits for it, and makes sure that it is the only one."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            found = [one for one in self.turns() if one.turn["request_id"] == request_id]
            if found:
                assert len(found) == 1
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no turn of {request_id} within {WAIT_S} s")


def is_serving(address: Address) -> bool:
    """By gRPC health, as Envoy asks."""
    with grpc.insecure_channel(str(address), options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            check: Any = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # made at run time
            answer = check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def watched(
    binary: Path,
    file: File,
    directory: Path,
    filters: list[Address],
    provider: Provider,
    change: Any = None,
    gate: Address | None = None,
) -> Iterator[Watched]:
    observer = Address("127.0.0.1", envoy.free_port())
    turns = directory / "turns.jsonl"
    command = [] if gate is not None else [*DROPIN_IDENTITY]
    command += [sys.executable, "-m", "tests.integration.observe.observer_side", str(observer), str(turns)]
    with running(command, lambda: is_serving(observer), cwd=Path(__file__).parents[3]) as process:
        plan = envoy.Plan(
            listen=Address("127.0.0.1", envoy.free_port()),
            admin=Address("127.0.0.1", envoy.free_port()),
            filters=filters,
            observers=[observer],
            gates=[gate] if gate is not None else [],
            provider=envoy.Provider(provider.address),
            org_id=ORG if gate is None else None,
            agent_id=AGENT if gate is None else None,
        )
        config = envoy.render(envoy.load(envoy.shipped(file)), plan)
        patient(config)
        if gate is not None:
            trust_gate(config)
        if change is not None:
            change(config)
        proxy = envoy.start(binary, envoy.write(config, directory / "envoy.yaml"), plan.admin, state_dir=directory)
        try:
            proxy.wait_ready(45)
            url = f"http://{plan.listen}"
            with httpx2.Client(base_url=url, timeout=20, headers=AUTHORIZED) as client:
                gateway = Gateway(url, plan.listen, plan.admin, proxy, client)
                _await_observer(gateway)
                yield Watched(gateway, provider, process, turns)
        finally:
            proxy.stop()


def _await_observer(gateway: Gateway) -> None:
    """Until Envoy's health check has seen the observer."""
    for _ in range(200):
        if gateway.stat("cluster.extproc_observer.membership_healthy"):
            return
        time.sleep(0.05)
    raise AssertionError("Envoy does not find the observer healthy")


@pytest.fixture(scope="session")
def transcript_provider() -> Iterator[Provider]:
    with provide() as provider:
        yield provider


@pytest.fixture(scope="session", params=["envoy.yaml", "dropin.yaml"])
def shared_watched(
    request: pytest.FixtureRequest,
    envoy_binary: Path,
    processor_server: Processor,
    processor_address: Address,
    transcript_provider: Provider,
    gate_address: Address,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    directory, filters = tmp_path_factory.mktemp("watched"), [processor_address]
    gate = gate_address if request.param == "envoy.yaml" else None
    with watched(envoy_binary, request.param, directory, filters, transcript_provider, trusting, gate) as one:
        yield one


def trusting(config: envoy.Node) -> None:
    """On a busy machine a healthy observer may miss a health check or a ping, and a stream would pass unobserved."""
    cluster = envoy._cluster(config, envoy.OBSERVER_CLUSTER)
    cluster["health_checks"][0]["unhealthy_threshold"] = 100
    keep_pinging(cluster, "20s")


@pytest.fixture
def watching(shared_watched: Watched, processor: Processor) -> Watched:
    """Both shipped configurations, one after the other, with a healthy context filter."""
    shared_watched.provider.bodies.clear()
    return shared_watched
