"""What integration tests send, and what they expect of every answer."""

from __future__ import annotations

import re
import socket
from datetime import UTC, datetime, timedelta

import httpx2

from extproc.stack.envoy import Address

MIB = 1024 * 1024
LIMIT = 10 * MIB
CONTEXT_HEADERS = ("x-ibex-memories-injected", "x-ibex-context-tokens", "x-ibex-context-fallback")
NOT_ASKED = ("0", "0", "true")
HEALTHY = ("7", "70", "false")
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
JSON = {"content-type": "application/json"}
TOKEN = "ibex_pat_that_the_gate_of_these_tests_lets_pass"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
"""What a request needs that does not come through a gateway's own client."""


def context(response: httpx2.Response) -> tuple[str, ...]:
    """The three context headers; each must be there exactly once."""
    for name in CONTEXT_HEADERS:
        assert len(response.headers.get_list(name)) == 1, (name, response.headers)
    return tuple(response.headers[name] for name in CONTEXT_HEADERS)


def check_envelope(response: httpx2.Response, status: int, code: str) -> None:
    """The error envelope of the gateway, with its headers."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"code", "message", "request_id", "timestamp"}
    assert error["code"] == code
    assert error["message"]
    assert UUID.fullmatch(error["request_id"])
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["timestamp"].endswith("Z")
    assert abs(datetime.fromisoformat(error["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
    context(response)


def padded(size: int) -> bytes:
    """A chat request of exactly this size."""
    head, tail = b'{"model":"gpt-4o","messages":[{"role":"user","content":"', b'"}]}'
    return head + b"a" * (size - len(head) - len(tail)) + tail


def request_bytes(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """An HTTP/1.1 request to the byte, for what a client library would tidy up."""
    lines = [f"{method} {path} HTTP/1.1", "host: gateway", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def raw(address: Address, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send these bytes, read one answer: status, headers, body."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        with connection.makefile("rb") as file:
            status = int(file.readline().split()[1])
            headers = {}
            while line := file.readline().strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            return status, headers, file.read(int(headers.get("content-length", "0")))
