"""Odd bodies through a real Envoy and the real filter: no error of ours, and no bytes but the client's."""

from __future__ import annotations

import gzip
import json

import httpx2
import pytest

from tests.integration.http_side import check_envelope, context
from tests.integration.whole.conftest import Drill, Stack
from tests.integration.whole.engine_side import BLOCK

HEADERS = {"content-type": "application/json"}
USER = b'{"role":"user","content":"What is my name?"}'
INSERTED = BLOCK.encode().replace(b'"', b'\\"') + b"\\n\\n"
IMAGE = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,' + b"iVBORw0K" * 786_432 + b'"}}'


def chat(messages: bytes = USER, rest: bytes = b"") -> bytes:
    return b'{"model":"gpt-4o","messages":[' + messages + b"]" + rest + b"}"


READABLE = {
    "1,000 messages": chat(b",".join([b'{"role":"assistant","content":"hm"}'] * 999 + [USER])),
    "6 MB image": chat(b'{"role":"user","content":[' + IMAGE + b',{"type":"text","text":"What is my name?"}]}'),
    "duplicate keys": b'{"messages":[],"model":"x","model":"gpt-4o","messages":[' + USER + b'],"a":1,"a":2}',
    "80-digit integers": chat(rest=b',"seed":' + b"9" * 80),
    "exponent": chat(rest=b',"x":1.0e-7,"y":1E400'),
    "white space": b"\r\n\t " + chat().replace(b":", b" :\n ").replace(b",", b" ,\t") + b"\n",
    "escapes": chat(rb'{"role":"\u0075ser","content":"What is my n\u0061me? \ud83d\ude00\/"}'),
    "null contents": chat(b'{"role":"assistant","content":null,"tool_calls":[]},' + USER),
}
UNREADABLE = {
    "not JSON": b"model=gpt-4o",
    "empty": b"",
    "truncated": chat()[:-10],
    "messages of the wrong type": b'{"model":"gpt-4o","messages":"hello"}',
    "a message of the wrong type": b'{"model":"gpt-4o","messages":[1]}',
    "nested 10,000 deep": chat(rest=b',"x":' + b"[" * 10_000 + b"]" * 10_000),
    "invalid UTF-8": chat(b'{"role":"user","content":"What is my name? \xff\xfe"}'),
    "lone surrogate": chat(rb'{"role":"user","content":"What is my name? \ud800"}'),
    "NaN": chat(rest=b',"temperature":NaN'),
    "byte-order mark": b"\xef\xbb\xbf" + chat(),
    "UTF-16": chat().decode().encode("utf-16"),
}


def post(drill: Drill, body: bytes, **headers: str) -> httpx2.Response:
    return drill.gateway.post("/v1/chat/completions", content=body, headers=HEADERS | headers)


@pytest.mark.parametrize("name", READABLE)
def test_what_can_be_read_gets_its_block_and_keeps_its_bytes(patient_drill: Drill, name: str) -> None:
    body = READABLE[name]
    assert context(post(patient_drill, body)) == ("1", "9", "false")
    received = patient_drill.provider.last().body
    assert received.count(INSERTED) == 1
    assert received.replace(INSERTED, b"") == body


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_goes_on_as_it_came(patient_drill: Drill, name: str) -> None:
    response = post(patient_drill, UNREADABLE[name])
    assert context(response) == ("0", "0", "true")
    assert response.status_code < 500
    assert patient_drill.provider.last().body == UNREADABLE[name]


def test_a_compressed_body_goes_on_as_it_came(patient_drill: Drill) -> None:
    body = gzip.compress(chat(), mtime=0)
    response = post(patient_drill, body, **{"content-encoding": "gzip"})
    assert context(response) == ("0", "0", "true")
    assert patient_drill.provider.last().body == body


def test_a_chunked_body_stays_chunked(patient_drill: Drill) -> None:
    def pieces() -> list[bytes]:
        return [chat()[:30], chat()[30:]]

    response = patient_drill.gateway.client.post("/v1/chat/completions", content=iter(pieces()), headers=HEADERS)
    assert context(response) == ("1", "9", "false")
    received = patient_drill.provider.last()
    assert received.body.replace(INSERTED, b"") == chat()


@pytest.mark.parametrize("name", [*READABLE, *UNREADABLE])
def test_the_full_gateway_answers_them_all(stack: Stack, name: str, user: str) -> None:
    body = (READABLE | UNREADABLE)[name]
    with stack.client() as client:
        response = client.post("/v1/chat/completions", content=body, headers={**HEADERS, "x-ibex-user-id": user})
    injected, tokens, fallback = context(response)
    assert (injected, tokens) == ("0", "0")
    received = stack.provider.received()
    if received:
        assert received[-1].body == body
        assert response.status_code < 500
        assert fallback == "true" or name in READABLE
        assert fallback == "false" or name in UNREADABLE or len(body) > 1_000_000, "which a busy machine may cut off"
    else:
        assert response.status_code in {400, 501}
        code = response.json()["error"]["code"]
        assert code in {"INVALID_JSON", "VALIDATION_ERROR", "PROVIDER_NOT_CONFIGURED"}
        check_envelope(response, response.status_code, code)


def test_a_body_over_the_limit(stack: Stack) -> None:
    body = chat(json.dumps({"role": "user", "content": "x" * (10 * 1024 * 1024)}).encode())
    with stack.client() as client:
        response = client.post("/v1/chat/completions", content=body, headers=HEADERS)
    check_envelope(response, 413, "PAYLOAD_TOO_LARGE")
    assert context(response) == ("0", "0", "true")
    assert stack.provider.received() == []


def test_no_ibex_header_of_a_client_or_a_provider_is_passed_on(stack: Stack, user: str) -> None:
    with stack.client() as client:
        response = client.post(
            "/v1/chat/completions",
            content=chat(),
            headers=[
                *HEADERS.items(),
                ("x-ibex-user-id", user),
                ("x-ibex-memories-injected", "99"),
                ("X-Ibex-Anything", "1"),
                ("x-standin-response-header", "x-ibex-memories-injected: 98"),
                ("x-standin-response-header", "x-ibex-secret: 1"),
            ],
        )
    assert context(response) == ("0", "0", "false")
    assert "x-ibex-secret" not in response.headers
    assert not any(name.startswith("x-ibex-") for name in stack.provider.last().names)
