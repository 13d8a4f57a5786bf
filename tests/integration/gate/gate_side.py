"""A gate's surroundings for tests: an auth service that follows a script, the gate's process, Envoy's configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

CHAT = 196609
READ_ONLY = 1 << 0 | 1 << 17
GATE_CLUSTER = "extproc_gate"
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
                [sys.executable, "-m", "extproc", "gate"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{root}:{root / 'proto'}", **self.environment},
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        for _ in range(200):
            assert self.process.poll() is None, self.log_file.read_text()
            try:
                if httpx2.get(f"http://{self.admin}/health", timeout=1).is_success:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(self.log_file.read_text())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def metric(self, name: str) -> float:
        for line in httpx2.get(f"http://{self.admin}/metrics").text.splitlines():
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


def gate_filter(timeout_s: float) -> envoy.Node:
    """The HTTP filter as the full gateway has it, in place of `identity`."""
    names = ("authorization", "x-api-key", "x-goog-api-key", "api-key", "x-ibex-agent-id", "x-ibex-user-id")
    return {
        "name": GATE_FILTER,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "stat_prefix": "gate",
            "transport_api_version": "V3",
            "failure_mode_allow": False,
            "status_on_error": {"code": "ServiceUnavailable"},
            "validate_mutations": True,
            "encode_raw_headers": True,
            "allowed_headers": {
                "patterns": [{"exact": name, "ignore_case": True} for name in (*names, "x-request-id", "traceparent")]
            },
            "grpc_service": {"envoy_grpc": {"cluster_name": GATE_CLUSTER}, "timeout": f"{timeout_s}s"},
        },
    }


def gate_cluster(address: Address) -> envoy.Node:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": GATE_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "0.05s",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {
            "thresholds": [{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}]
        },
        "typed_extension_protocol_options": {
            options: {
                "@type": f"type.googleapis.com/{options}",
                "explicit_http_config": {
                    "http2_protocol_options": {"connection_keepalive": {"interval": "1s", "timeout": "1s"}}
                },
            }
        },
        "load_assignment": {
            "cluster_name": GATE_CLUSTER,
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "address": {"socket_address": {"address": address.host, "port_value": address.port}}
                            }
                        }
                    ]
                }
            ],
        },
    }


def local_replies(reply_headers: Any) -> list[envoy.Node]:
    """First of the mappers: the gate's own envelope as it is, and one for when the gate does not answer."""
    degraded = {
        "code": "SERVICE_DEGRADED",
        "message": "The request cannot be authorised at the moment. Try again shortly.",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "timestamp": "%START_TIME%",
    }
    decision = {
        "filter": NAMESPACE,
        "path": [{"key": "decision"}],
        "value": {"string_match": {"exact": "denied"}},
    }
    is_gate = {"response_flag_filter": {"flags": ["UAEX"]}}
    said = {"metadata_filter": {"matcher": decision, "match_if_key_not_found": False}}
    return [
        {
            "filter": {"and_filter": {"filters": [is_gate, said]}},
            "headers_to_add": reply_headers,
            "body_format_override": {
                "text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"},
                "content_type": "application/json",
            },
        },
        {
            "filter": is_gate,
            "headers_to_add": [
                *reply_headers,
                {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD", "header": {"key": "retry-after", "value": "1"}},
            ],
            "body_format_override": {"json_format": {"error": degraded}},
        },
    ]


def with_gate(address: Address, timeout_s: float = 5.0) -> Callable[[envoy.Node], None]:
    """Put the gate into the rendered envoy.yaml. `timeout_s`: shipped 0.3; here machines are busy."""

    def change(config: envoy.Node) -> None:
        [manager] = envoy._http_managers(config)
        filters = manager["http_filters"]
        at = next(index for index, entry in enumerate(filters) if entry["name"] == envoy.IDENTITY_FILTER)
        filters[at] = gate_filter(timeout_s)
        config["static_resources"]["clusters"].append(gate_cluster(address))
        mappers = manager["local_reply_config"]["mappers"]
        mappers[:0] = local_replies(mappers[0]["headers_to_add"])
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
