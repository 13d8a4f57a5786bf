"""Two readers of one connection that disagree where a request ends: Envoy refuses such a request, or reads it in the
one way that RFC 9112 has, and sends the provider what it read. What was smuggled is never a request of its own."""

from __future__ import annotations

import json

import pytest

from tests.integration.conftest import StandIn
from tests.integration.http_side import CONTEXT_HEADERS
from tests.security.conftest import Tenants
from tests.security.security_side import PATH, Caller, RawAnswer, chat_bytes, head, header_lines, send_raw

BODY = chat_bytes("smuggling")
INNER = b"GET /v1/smuggled HTTP/1.1\r\nhost: gateway\r\nx-ibex-smuggled: 1\r\n\r\n"
"""What must not become a request: it has no token, and a connection to the provider would lend it somebody's."""
JSON = "content-type: application/json"


def chunked(body: bytes, extension: bytes = b"", trailer: bytes = b"", end: bytes = b"\r\n") -> bytes:
    size = f"{len(body):x}".encode()
    return size + extension + end + body + end + b"0" + end + trailer + end


LENGTH = f"content-length: {len(BODY)}"
CHUNKED = "transfer-encoding: chunked"
BOTH = chunked(BODY) + INNER

REFUSED: dict[str, tuple[list[str | bytes], bytes]] = {
    "two lengths": ([LENGTH, "content-length: 4"], BODY + INNER),
    "two lengths, the other first": (["content-length: 4", LENGTH], BODY + INNER),
    "list of lengths": ([f"content-length: {len(BODY)}, 4"], BODY + INNER),
    "length and chunks": (["content-length: 4", CHUNKED], BOTH),
    "chunks and length": ([CHUNKED, "content-length: 4"], BOTH),
    "length 0 and chunks": (["content-length: 0", CHUNKED], BOTH),
    "length and odd chunks": (["content-length: 4", "Transfer-Encoding: xchunked"], BOTH),
    "xchunked": (["transfer-encoding: xchunked"], BOTH),
    "chunked twice": (["transfer-encoding: chunked, chunked"], BOTH),
    "chunked in two lines": ([CHUNKED, CHUNKED], BOTH),
    "identity behind": (["transfer-encoding: chunked, identity"], BOTH),
    "identity before": (["transfer-encoding: identity, chunked"], BOTH),
    "quoted": (['transfer-encoding: "chunked"'], BOTH),
    "vertical tab": ([b"transfer-encoding: \x0bchunked"], BOTH),
    "form feed": ([b"transfer-encoding: chunked\x0c"], BOTH),
    "nul": ([b"transfer-encoding: chunked\x00"], BOTH),
    "space before the colon": (["transfer-encoding : chunked"], BOTH),
    "length negative": (["content-length: -1"], BODY),
    "length with a plus": ([f"content-length: +{len(BODY)}"], BODY),
    "length in hexadecimal": ([f"content-length: {len(BODY):#x}"], BODY),
    "length huge": (["content-length: 99999999999999999999999999"], BODY),
    "length beyond 63 bits": (["content-length: 9223372036854775808"], BODY),
    "length empty": (["content-length:"], BODY),
    "length with a space": (["content-length: 1 2"], BODY),
    "length of no digits": (["content-length: ten"], BODY),
    "chunk size negative": ([CHUNKED], b"-1\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with 0x": ([CHUNKED], f"0x{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"),
    "chunk size huge": ([CHUNKED], b"fffffffffffffffff\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size of no digits": ([CHUNKED], b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk longer than it says": ([CHUNKED], b"3\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "name with a space": (["x a: b", LENGTH], BODY),
    "no name": ([": b", LENGTH], BODY),
    "line without a colon": (["nothing", LENGTH], BODY),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_two_could_read_in_two_ways_is_refused(tenants: Tenants, provider: StandIn, name: str) -> None:
    lines, sent = REFUSED[name]
    answer = send(tenants.b, lines, sent, provider)
    assert answer.status == 0 or 400 <= answer.status < 500, answer
    assert answer.answers <= 1, "nothing behind it is answered: the connection is closed"
    if answer.status:
        text, _, body = answer.text.partition(b"\r\n\r\n")
        assert b"connection: close" in text
        error = json.loads(body)["error"]
        assert error["code"] in {"VALIDATION_ERROR", "INVALID_JSON"}  # the latter where it was begun already
        assert f"x-request-id: {error['request_id']}\r\n".encode() in text + b"\r\n"
        assert all(name.encode() in text for name in CONTEXT_HEADERS)
    assert provider.received() == []
    check_the_next_is_untouched(tenants, provider)


READ: dict[str, tuple[list[str | bytes], bytes]] = {
    "chunks": ([CHUNKED], chunked(BODY)),
    "chunks in capitals": (["Transfer-Encoding: CHUNKED"], chunked(BODY)),
    "chunk extension": ([CHUNKED], chunked(BODY, b';x-ibex-org-id=1;a="b"')),
    "chunk size with zeros": ([CHUNKED], f"0000{len(BODY):X}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"),
    "trailers": (
        [CHUNKED, "trailer: x-ibex-org-id"],
        chunked(BODY, trailer=b"x-ibex-org-id: 1\r\nx-ibex-agent-id: 1\r\n"),
    ),
    "same length twice": ([LENGTH, LENGTH], BODY),
    "same length in a list": ([f"{LENGTH}, {len(BODY)}"], BODY),
    "length with zeros": ([f"content-length: 000{len(BODY)}"], BODY),
    "bare line feeds": ([LENGTH + "\nx-a: b"], BODY),
    "bare line feeds in chunks": ([CHUNKED], chunked(BODY, end=b"\n")),
    "folded line": ([LENGTH, "x-a: b", " transfer-encoding: chunked"], BODY),  # one value
    "folded value": (["transfer-encoding:", " chunked"], BOTH),
    "bare carriage return": ([b"x-a: b\rtransfer-encoding: chunked", LENGTH], BODY),  # left out of the value
    "expect": ([LENGTH, "expect: 100-continue"], BODY),
    "upgrade": ([LENGTH, "connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AAAA"], BODY),
    "upgrade to a websocket": ([LENGTH, "connection: upgrade", "upgrade: websocket"], BODY),
    "connection names a length": ([LENGTH, "connection: content-length"], BODY),
    "http/1.0": ([LENGTH], BODY),
}


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_in_one_way_reaches_the_provider_as_one_request(
    tenants: Tenants, provider: StandIn, name: str
) -> None:
    """Some Envoys refuse a few of these."""
    lines, body = READ[name]
    answer = send(tenants.b, [*lines, "x-ibex-skip-memory: 1"], body, provider, "1.0" if name == "http/1.0" else "1.1")
    received = provider.received()
    if answer.status != 200:
        assert answer.status == 0 or 400 <= answer.status < 500, answer
        assert received == []
        return
    assert [one.body for one in received] == [BODY]
    assert received[0].path == PATH
    assert int(dict(received[0].headers)["content-length"]) == len(BODY)
    assert b"MISSING_TOKEN" in answer.text or answer.answers == 1, "what is behind it is a request without a token"
    assert not [one for one in received[0].names if one.startswith("x-ibex") or one in {"transfer-encoding", "upgrade"}]
    check_the_next_is_untouched(tenants, provider)


def test_the_plain_shape_is_read(tenants: Tenants, provider: StandIn) -> None:
    """Else the tests above would show nothing."""
    assert send(tenants.b, [LENGTH], BODY, provider).status == 200
    assert send(tenants.b, [CHUNKED], chunked(BODY), provider).status == 200


def test_a_request_behind_another_is_asked_for_its_own_token(tenants: Tenants, provider: StandIn) -> None:
    """Pipelined on one connection, with the first one's credentials; which request is whose is decided one by one."""
    first = head("POST", PATH, *header_lines(tenants.b.headers), JSON, LENGTH) + BODY
    answer = send_raw(tenants.b.gateway.address, first + INNER, answers=2)
    assert answer.answers == 2, answer
    assert b"MISSING_TOKEN" in answer.text
    assert b"smuggled" not in b"".join(one.path.encode() for one in provider.received())


def test_an_end_in_the_middle_of_a_body_reaches_no_provider(tenants: Tenants, provider: StandIn) -> None:
    for lines, body in (([f"content-length: {len(BODY) + 50}"], BODY), ([CHUNKED], b"fff\r\n" + BODY)):
        sent = head("POST", PATH, *header_lines(tenants.b.headers), JSON, *lines) + body
        assert send_raw(tenants.b.gateway.address, sent, wait_s=0.5).status == 0
    assert provider.received() == []


def send(caller: Caller, lines: list[str | bytes], body: bytes, provider: StandIn, version: str = "1.1") -> RawAnswer:
    """Again while the gate has no time."""
    lines = [*header_lines(caller.headers), JSON, *lines]
    answer = RawAnswer(0, b"")
    for _ in range(9):
        provider.clear()
        sent = head("POST", PATH, *lines).replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1) + body
        answer = send_raw(caller.gateway.address, sent)
        if b"SERVICE_DEGRADED" not in answer.text:
            break
    return answer


def check_the_next_is_untouched(tenants: Tenants, provider: StandIn) -> None:
    """Of the other organisation, on the connection that Envoy holds to the provider."""
    provider.clear()
    assert tenants.a.chat({"x-ibex-skip-memory": "1"}, question="of A").status_code == 200
    assert [one.path for one in provider.received()] == [PATH]
    assert provider.last().body == chat_bytes("of A").replace(b", ", b",").replace(b": ", b":")
