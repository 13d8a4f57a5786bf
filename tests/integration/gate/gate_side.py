"""A gate's surroundings for tests: an auth service that follows a script, the gate's process, Envoy's configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import grpc
import httpx2
from google.protobuf.timestamp_pb2 import Timestamp
from ibex.auth.v1 import auth_pb2
from redis import Redis

from extproc.stack import envoy
from extproc.stack.child import die_with_parent
from extproc.stack.envoy import Address
from tests.integration.conftest import AGENT, ORG, UP_S, answers
from tests.integration.http_side import TOKEN
from tests.integration.turns.valkey_side import eventually, valkey

CHAT = 196609
READ_ONLY = 1 << 0 | 1 << 17
GATE_FILTER = "ibex.gate"
NAMESPACE = "envoy.filters.http.ext_authz"


def new_token() -> str:
    return f"ibex_pat_{uuid4().hex}CANARY"


@dataclass
class Token:
    """What the script knows of a token."""

    org_id: str
    permissions: int = CHAT
    agent_id: str | None = None
    user_id: str | None = None
    token_id: str | None = field(default_factory=lambda: str(uuid4()))
    expires_at: float | None = None
    is_revoked: bool = False


@dataclass
class Call:
    method: str
    subject: str
    metadata: dict[str, str]


class ScriptedAuth:
    """Tokens and agents as tests put them in; `delay_s` makes it slow, `stop` and `start` kill and restart it."""

    def __init__(self) -> None:
        self.address = Address("127.0.0.1", envoy.free_port())
        self.tokens: dict[str, Token] = {}
        self.agents: dict[str, tuple[str, str]] = {}
        """Id to org and status."""
        self.calls: list[Call] = []
        self.delay_s = 0.0
        self.behaviour: Callable[[str, str], Any] | None = None
        """Of a method and its subject: an answer instead of the script's, or None."""
        self._server: grpc.Server | None = None

    def start(self) -> None:
        server = grpc.server(ThreadPoolExecutor(32), options=(("grpc.so_reuseport", 0),))
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ValidateToken": grpc.unary_unary_rpc_method_handler(
                self.validate_token, auth_pb2.ValidateTokenRequest.FromString, _encode
            ),
            "ValidateAgent": grpc.unary_unary_rpc_method_handler(
                self.validate_agent, auth_pb2.ValidateAgentRequest.FromString, _encode
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ibex.auth.v1.AuthService", handlers),))
        for _ in range(100):
            try:
                server.add_insecure_port(str(self.address))
                break
            except RuntimeError:
                time.sleep(0.05)
        server.start()
        self._server = server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait(5)
            self._server = None

    def add(self, org_id: str, **changes: Any) -> str:
        """A new token."""
        token = new_token()
        self.tokens[token] = Token(org_id, **changes)
        return token

    def calls_for(self, subject: str) -> list[Call]:
        return [call for call in self.calls if call.subject == subject]

    def validate_token(self, request: auth_pb2.ValidateTokenRequest, context: Any) -> Any:
        answer = self._begin("ValidateToken", request.access_token, context)
        if answer is not None:
            return answer
        token = self.tokens.get(request.access_token)
        is_expired = token is not None and token.expires_at is not None and token.expires_at <= time.time()
        if token is None or token.is_revoked or is_expired:
            _abort(context, grpc.StatusCode.UNAUTHENTICATED, f"no such token {request.access_token}")
        return auth_pb2.ValidateTokenResponse(
            org_id=token.org_id,
            permissions=token.permissions,
            agent_id=token.agent_id,
            user_id=token.user_id,
            token_id=token.token_id,
            expires_at=None if token.expires_at is None else _timestamp(token.expires_at),
        )

    def validate_agent(self, request: auth_pb2.ValidateAgentRequest, context: Any) -> Any:
        answer = self._begin("ValidateAgent", request.agent_id, context)
        if answer is not None:
            return answer
        org_id, status = self.agents.get(request.agent_id, ("", ""))
        if org_id != request.org_id:
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, "agent not authorized")
        if status != "active":
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, f"agent is not active: {status}")
        return auth_pb2.ValidateAgentResponse(agent_id=request.agent_id, org_id=org_id, status=status)

    def _begin(self, method: str, subject: str, context: Any) -> Any:
        self.calls.append(Call(method, subject, {key: str(value) for key, value in context.invocation_metadata()}))
        if self.delay_s:
            time.sleep(self.delay_s)
        return None if self.behaviour is None else self.behaviour(method, subject)


def _encode(answer: Any) -> bytes:
    """Of a message; bytes go out as they are."""
    encoded: bytes = answer if isinstance(answer, bytes) else answer.SerializeToString()
    return encoded


def _abort(context: Any, code: grpc.StatusCode, details: str) -> NoReturn:
    context.abort(code, details)
    raise AssertionError("abort raises")


def _timestamp(at: float) -> Timestamp:
    return Timestamp(seconds=int(at // 1), nanos=int(at % 1 * 1e9))


@dataclass
class GateProcess:
    """The gate, killed and started again on the same port."""

    directory: Path
    environment: dict[str, str]
    address: Address
    admin: Address
    process: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        return self.directory / "gate.log"

    def start(self) -> None:
        root = Path(__file__).parents[3]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.patient_process", "gate"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{root}:{root / 'proto'}", **self.environment},
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        is_up, deadline = answers(f"http://{self.admin}/health"), time.monotonic() + UP_S
        while not is_up():
            assert self.process.poll() is None, self.log_file.read_text()
            assert time.monotonic() < deadline, self.log_file.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def metric(self, name: str) -> float:
        for line in httpx2.get(f"http://{self.admin}/metrics", timeout=20).text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextmanager
def gate_process(directory: Path, auth: ScriptedAuth, redis_url: str, **settings: str) -> Iterator[GateProcess]:
    """`settings`: by their names, as in `rate_limit_rpm="5"`."""
    directory.mkdir(parents=True, exist_ok=True)
    address, admin = (Address("127.0.0.1", envoy.free_port()) for _ in range(2))
    given = {
        "gate_listen": str(address),
        "admin_listen": str(admin),
        "auth_address": str(auth.address),
        "redis_url": redis_url,
        # A busy machine may take longer than the shipped 50 ms; what happens then has tests of its own.
        "auth_timeout_ms": "1000",
        **settings,
    }
    environment = {f"IBEX_{name.upper()}": value for name, value in given.items()}
    gate = GateProcess(directory, environment, address, admin)
    try:
        gate.start()
        yield gate
    finally:
        gate.kill()


@contextmanager
def open_gate(directory: Path) -> Iterator[Address]:
    """One that lets `http_side.TOKEN` pass, as ORG and AGENT, as often as it comes."""
    auth = ScriptedAuth()
    auth.tokens[TOKEN] = Token(ORG, agent_id=AGENT)
    auth.agents[AGENT] = (ORG, "active")
    with ExitStack() as stack:
        redis = stack.enter_context(valkey(directory / "valkey", "--appendfsync", "no"))
        stack.callback(auth.stop)
        auth.start()
        settings = {"rate_limit_rpm": "0", "token_cache_s": "300", "agent_cache_s": "5"}
        gate = stack.enter_context(gate_process(directory / "gate", auth, redis.url, **settings))
        eventually(lambda: gate.metric("ibex_gate_revocation_channel_alive") == 1)
        yield gate.address


def with_limits(timeout_s: float, unhealthy_after: int) -> Callable[[envoy.Node], None]:
    """The access log shows all that the gate says. Shipped are 0.3 s and 2 health checks; here machines are busy."""

    def change(config: envoy.Node) -> None:
        envoy._cluster(config, envoy.GATE_CLUSTER)["health_checks"][0]["unhealthy_threshold"] = unhealthy_after
        envoy._http_filter(config, GATE_FILTER)["typed_config"]["grpc_service"]["timeout"] = f"{timeout_s}s"
        [manager] = envoy._http_managers(config)
        log = manager["access_log"][0]["typed_config"]["log_format"]["json_format"]
        log["gate"] = f"%DYNAMIC_METADATA({NAMESPACE})%"

    return change


def publish_revocation(redis_url: str, token: Token) -> None:
    with Redis.from_url(redis_url, protocol=2) as client:
        message = (
            f'{{"v":1,"token_id":"{token.token_id}","revoked_at":"2030-01-01T00:00:00Z","org_id":"{token.org_id}"}}'
        )
        client.publish("ibex:token:revocations", message)


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
