"""What the security tests send, and as whom: callers of two organisations, raw connections, secrets."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2

from extproc.auth.hashing import hash_token
from extproc.auth.new_token import new_token
from extproc.auth.store import IdentityStore
from extproc.auth.token import CHAT
from extproc.memory.database import Database
from extproc.stack.envoy import Address
from tests.integration import commands_side
from tests.integration.conftest import Received, StandIn
from tests.integration.http_side import CONTEXT_HEADERS, UUID

MODEL = "gpt-4o-mini"
PATH = "/v1/chat/completions"
QUESTION = "Which colour does the lighthouse keeper paint the boat?"
TRIES = 9
ONE_MINUTE = timedelta(minutes=1)
_TOKEN = re.compile("ibex_pat_[A-Za-z0-9]")
""""ibex_pat_..." in a message is no token."""


def eventually(is_so: Callable[[], Any], limit_s: float = 45.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {limit_s} s"
        time.sleep(0.03)


def memory_of(name: str) -> str:
    """The best match for QUESTION, and who sees it knows whose it is."""
    return f"The lighthouse keeper paints the boat in the colour canary-memory-{name}."


@dataclass
class Secrets:
    """Everything that must be nowhere, by what it is. What the tests make, they put here."""

    tokens: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Provider keys, prompts, completions, directives, memories."""

    def token(self, plaintext: str) -> str:
        self.tokens.append(plaintext)
        return plaintext


@dataclass(frozen=True)
class Commands:
    """Of the installation whose data is here."""

    data: Path
    redis_url: str
    secrets: Secrets

    def run(self, *arguments: str) -> Any:
        environment = {"IBEX_REDIS_URL": self.redis_url, "IBEX_DATABASE_URL": ""}
        return commands_side.run(*arguments, "--data", str(self.data), **environment)

    def org(self, name: str, limit: int = 0) -> str:
        return str(self.run("org", "create", name, "--limit", str(limit))["id"])

    def agent(self, org_id: str, agent_id: str = "") -> str:
        chosen = ["--id", agent_id] if agent_id else []
        return str(self.run("agent", "create", "agent", "--org", org_id, *chosen)["id"])

    def token(self, org_id: str, *options: str) -> tuple[str, str]:
        """The token and its id."""
        made = self.run("token", "create", "token", "--org", org_id, *options)
        return self.secrets.token(made["token"]), made["id"]

    def remember(self, text: str, org_id: str, agent_id: str, user: str = "") -> None:
        owner = ["--org", org_id, "--agent", agent_id, *(["--user", user] if user else [])]
        self.run("memory", "add", text, *owner)

    def token_until(self, org_id: str, agent_id: str, expires_at: datetime) -> str:
        """The command counts in minutes."""
        made, plaintext = new_token(
            id=str(uuid4()),
            now=datetime.now(UTC),
            hash_of=hash_token,
            org_id=org_id,
            name="short",
            permissions=CHAT,
            agent_id=agent_id,
            expires_at=expires_at,
        )
        with self.store() as store:
            store.add_token(made)
        return self.secrets.token(plaintext)

    @contextmanager
    def store(self) -> Iterator[IdentityStore]:
        from extproc.memory.store import store_url
        from extproc.settings import StoreSettings, load

        database = Database(store_url(load(StoreSettings, data=self.data, database_url="")))
        try:
            yield IdentityStore(database)
        finally:
            database.close()


@dataclass(frozen=True)
class Caller:
    """A token and an agent at one gateway."""

    gateway: Gateway
    org_id: str
    agent_id: str
    token: str
    token_id: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}", "x-ibex-agent-id": self.agent_id}

    def chat(self, headers: Mapping[str, str] | None = None, **arguments: Any) -> httpx2.Response:
        """As often as the gate asks to come again: on a busy machine it may miss its 0.3 s."""
        return self.gateway.patiently(
            lambda: self.gateway.chat(headers=self.headers | dict(headers or {}), **arguments)
        )

    def once(self, headers: Mapping[str, str] | None = None) -> httpx2.Response:
        return self.gateway.chat(headers=self.headers | dict(headers or {}))

    def asked(
        self, headers: Mapping[str, str] | None = None, question: str = QUESTION
    ) -> tuple[httpx2.Response, Received]:
        """The answer, and what the provider got: with memories that were looked for in time, within a few tries."""
        self.gateway.provider.clear()
        response = self.chat(headers, question=question)
        for _ in range(TRIES):
            assert response.status_code == 200, response.text
            if response.headers["x-ibex-context-fallback"] == "false":
                break
            response = self.chat(headers, question=question)
        return response, self.gateway.provider.last()


@dataclass(frozen=True)
class Gateway:
    """An Envoy with everything behind it."""

    address: Address
    client: httpx2.Client
    """Sends no credential."""
    provider: StandIn

    def chat(self, question: str = QUESTION, model: str = MODEL, **arguments: Any) -> httpx2.Response:
        return self.client.post(PATH, json=chat_body(question, model), **arguments)

    def patiently(self, ask: Callable[[], httpx2.Response]) -> httpx2.Response:
        for _ in range(TRIES):
            response = ask()
            if response.status_code != 503 or b"SERVICE_DEGRADED" not in response.content:
                return response
            time.sleep(0.35)
        return ask()

    def connect(self, *, http2: bool = False) -> httpx2.Client:
        return httpx2.Client(
            base_url=f"http://{self.address}", timeout=20, http1=not http2, http2=http2, trust_env=False
        )


def chat_body(question: str = QUESTION, model: str = MODEL) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}]}


def chat_bytes(question: str = QUESTION) -> bytes:
    return json.dumps(chat_body(question)).encode()


def check_refused(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Contract section 3: the envelope and nothing else, with the three context headers. Returns the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) <= {"code", "message", "request_id", "timestamp", "detail", "docs_url", "field_errors"}
    assert error["code"] == code
    assert error["message"]
    assert UUID.fullmatch(error["request_id"])
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["timestamp"].endswith("Z")
    assert abs(datetime.fromisoformat(error["timestamp"]) - datetime.now(UTC)) < ONE_MINUTE
    for name in CONTEXT_HEADERS:
        assert len(response.headers.get_list(name)) == 1, name
    told = response.text + str(response.headers)
    assert not _TOKEN.search(told)
    assert "canary" not in told.lower()
    return error


@dataclass(frozen=True)
class RawAnswer:
    status: int
    """0: the connection was closed without one."""
    text: bytes
    """All that came, of all answers."""

    @property
    def answers(self) -> int:
        """Without 100 Continue."""
        return len(re.findall(rb"HTTP/1\.1 [2-5]\d\d ", self.text))


def send_raw(address: Address, sent: bytes, *, wait_s: float = 5.0, answers: int = 1) -> RawAnswer:
    """Bytes as they are, and whatever comes until the other end closes, or is silent for `wait_s` seconds.

    After `answers` whole answers a tenth of a second shows whether there is another one.
    """
    text = b""
    with socket.create_connection(address, timeout=wait_s) as connection:
        try:
            connection.sendall(sent)
            while piece := connection.recv(65536):
                text += piece
                if whole_answers(text) >= answers:
                    connection.settimeout(0.1)
        except OSError:  # silent, or closed while we still sent
            pass
    status = re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", text)
    return RawAnswer(int(status[0]) if status else 0, text)


def whole_answers(text: bytes) -> int:
    """Whole ones at the beginning of `text`, each with a content-length, as the gateway and the stand-in send."""
    number = 0
    while (end := text.find(b"\r\n\r\n")) >= 0:
        length = re.search(rb"content-length: (\d+)", text[:end])
        size = end + 4 + (int(length[1]) if length else 0)
        if len(text) < size:
            break
        number += 1 if length else 0  # 100 has none
        text = text[size:]
    return number


def head(method: str, path: str, *lines: str | bytes) -> bytes:
    """The head of a request, to the byte: no line is added but `host`."""
    encoded = [line if isinstance(line, bytes) else line.encode("latin-1") for line in lines]
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode(), b"host: gateway", *encoded, b"", b""])


def header_lines(headers: Mapping[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in headers.items()]
