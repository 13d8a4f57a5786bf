"""The auth service as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ibex.auth.v1 import auth_pb2 as pb
from ibex.auth.v1 import auth_pb2_grpc

from extproc.auth.demo import ensure_demo
from extproc.auth.service import SERVICE_NAME
from extproc.memory.database import Database
from extproc.stack.child import die_with_parent
from extproc.stack.envoy import free_port
from tests.integration.turns.valkey_side import eventually


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    listen: str
    admin: str
    log: Path
    token: str

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx2.get(f"http://{self.admin}/ready", timeout=2).is_success
        except httpx2.TransportError:
            return False


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    database = Database(f"sqlite:///{tmp_path}/memories.db")
    token = ensure_demo(database, str(uuid.uuid4()), str(uuid.uuid4()))
    assert token is not None
    database.close()
    listen, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "extproc", "auth", "--listen", listen, "--admin", admin, "--data", str(tmp_path)]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=die_with_parent)  # noqa: PLW1509
    try:
        started = Child(process, listen, admin, log, token)
        eventually(started.is_ready)
        yield started
    finally:
        process.kill()
        process.wait(10)


def test_it_is_ready_answers_and_ends_with_0(child: Child) -> None:
    with grpc.insecure_channel(child.listen) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "readiness", "liveness", SERVICE_NAME):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)  # type: ignore[attr-defined]
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = auth_pb2_grpc.AuthServiceStub(channel)
        found = stub.ValidateToken(pb.ValidateTokenRequest(access_token=child.token), timeout=5)
        metadata = (("authorization", f"Bearer {child.token}"),)
        request = pb.ValidateAgentRequest(org_id=found.org_id, agent_id=found.agent_id)
        assert stub.ValidateAgent(request, metadata=metadata, timeout=5).status == "active"
    metrics = httpx2.get(f"http://{child.admin}/metrics").text
    assert 'ibex_auth_requests_total{code="OK",method="ValidateToken"} 1.0' in metrics
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(15) == 0
    assert child.token.rpartition("_")[2] not in child.log.read_text()
