"""What a client sees when something behind Envoy is down, slow, frozen or wrong: its own request, answered."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable

import grpc
import httpx2
import pytest
from ibex.context.v1 import context_pb2

from tests.integration.http_side import context
from tests.integration.whole.conftest import Drill
from tests.integration.whole.engine_side import ANSWER, BLOCK, Behaviour, answer

FALLBACK = ("0", "0", "true")
BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "What is my name?"}]}).encode()
JSON = {"content-type": "application/json", "x-ibex-session-id": "s"}


def post(drill: Drill, body: bytes = BODY) -> httpx2.Response:
    return drill.gateway.post("/v1/chat/completions", content=body, headers=JSON)


def check_healthy(drill: Drill) -> None:
    """Within a few tries: on a busy machine a single request may miss the budget, which is no error."""
    tries = 50
    while (seen := context(post(drill))) == FALLBACK and (tries := tries - 1):
        time.sleep(0.1)
    assert seen == ("1", "9", "false")
    assert BLOCK.encode() in drill.provider.last().body


def check_fell_back(drill: Drill, response: httpx2.Response, body: bytes = BODY) -> None:
    assert response.status_code == 200
    assert context(response) == FALLBACK
    assert drill.provider.last().body == body, "identical bytes"


def slow(request: context_pb2.AssembleContextRequest, context_: grpc.ServicerContext) -> bytes:
    time.sleep(0.06)
    return answer(request, context_)


def rubbish(_request: context_pb2.AssembleContextRequest, _context: grpc.ServicerContext) -> bytes:
    return b"\xff" * 100


def error(_request: context_pb2.AssembleContextRequest, context_: grpc.ServicerContext) -> bytes:
    context_.abort(grpc.StatusCode.INTERNAL, "told to")
    raise AssertionError("abort raises")


def too_long(_request: context_pb2.AssembleContextRequest, _context: grpc.ServicerContext) -> bytes:
    return context_pb2.AssembleContextResponse(assembled_context="x" * 2_000_000, tokens_used=1).SerializeToString()


@pytest.mark.parametrize("behaviour", [slow, rubbish, error, too_long])
def test_an_engine_that_misbehaves(engine_drill: Drill, behaviour: Behaviour) -> None:
    check_healthy(engine_drill)
    engine_drill.engine.behaviour = behaviour
    response = post(engine_drill)
    check_fell_back(engine_drill, response)
    assert response.headers["x-ibex-session-id"] == "s", "the filter itself answered"
    engine_drill.engine.behaviour = answer
    check_healthy(engine_drill)


def test_an_engine_that_never_answers_is_given_up_within_the_budget(engine_drill: Drill) -> None:
    def hang(_request: context_pb2.AssembleContextRequest, _context: grpc.ServicerContext) -> bytes:
        engine_drill.engine.ended.wait(5)
        return ANSWER.SerializeToString()

    before = engine_drill.outcomes("timeout")
    engine_drill.engine.behaviour = hang
    check_fell_back(engine_drill, post(engine_drill))
    assert engine_drill.outcomes("timeout") == before + 1, "the filter gave up, not Envoy"


def test_an_engine_that_is_down(fresh_drill: Drill) -> None:
    check_healthy(fresh_drill)
    fresh_drill.engine.stop()
    for _ in range(3):
        check_fell_back(fresh_drill, post(fresh_drill))
    assert fresh_drill.outcomes("engine_unavailable") == 3
    ready = httpx2.get(f"{fresh_drill.admin}/ready", timeout=20)
    assert (ready.status_code, ready.json()["dependencies"]) == (200, {"engine": "unavailable"})


Stop = Callable[[Drill], None]


def kill(drill: Drill) -> None:
    drill.filter.kill()
    drill.filter.wait(10)


def freeze(drill: Drill) -> None:
    os.kill(drill.filter.pid, signal.SIGSTOP)


@pytest.mark.parametrize("stop", [kill, freeze])
def test_a_filter_that_is_gone_before_the_request(fresh_drill: Drill, stop: Stop) -> None:
    check_healthy(fresh_drill)
    stop(fresh_drill)
    for _ in range(3):
        started = time.monotonic()
        check_fell_back(fresh_drill, post(fresh_drill))
        assert time.monotonic() - started < 10, "message_timeout is 100 ms; the rest is a busy machine's"


@pytest.mark.parametrize("stop", [kill, freeze])
def test_a_filter_that_goes_while_the_body_is_on_its_way(fresh_drill: Drill, stop: Stop) -> None:
    check_healthy(fresh_drill)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(BODY)}\r\n\r\n"
    )
    with socket.create_connection(fresh_drill.gateway.address, timeout=10) as connection:
        connection.sendall(head.encode() + BODY[:20])
        time.sleep(0.2)
        stop(fresh_drill)
        connection.sendall(BODY[20:])
        answered = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answered.startswith(b"HTTP/1.1 200 ")
    assert b"x-ibex-context-fallback: true\r\n" in answered
    assert fresh_drill.provider.last().body == BODY


@pytest.mark.parametrize("stop", [kill, freeze])
def test_a_filter_that_goes_while_it_waits_for_the_engine(fresh_drill: Drill, stop: Stop) -> None:
    check_healthy(fresh_drill)

    def stop_the_filter(request: context_pb2.AssembleContextRequest, context_: grpc.ServicerContext) -> bytes:
        stop(fresh_drill)
        return answer(request, context_)

    fresh_drill.engine.behaviour = stop_the_filter
    check_fell_back(fresh_drill, post(fresh_drill))


def test_a_filter_that_comes_back_is_used_again(fresh_drill: Drill) -> None:
    check_healthy(fresh_drill)
    freeze(fresh_drill)
    check_fell_back(fresh_drill, post(fresh_drill))
    os.kill(fresh_drill.filter.pid, signal.SIGCONT)
    deadline = time.monotonic() + 45
    while context(post(fresh_drill)) == FALLBACK:
        assert time.monotonic() < deadline, "Envoy does not ask it again"
        time.sleep(0.1)
    check_healthy(fresh_drill)


def test_a_body_that_the_block_would_push_over_the_limit(engine_drill: Drill) -> None:
    """Envoy would answer 413 to it, on our account."""
    limit = 10 * 1024 * 1024
    head, tail = b'{"model":"gpt-4o","messages":[{"role":"user","content":"', b'"}]}'
    body = head + b" a" * ((limit - len(head) - len(tail)) // 2) + tail
    response = post(engine_drill, body)
    check_fell_back(engine_drill, response, body)
