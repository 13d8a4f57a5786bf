"""What the observer writes down of an exchange, behind both shipped configurations."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli
import httpx2
import pytest
from backports import zstd

from tests.integration.conftest import AGENT, ORG, Gateway
from tests.integration.http_side import AUTHORIZED
from tests.integration.observe.conftest import Watched

CHAT = "/v1/chat/completions"
QUESTION = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "What is new?"}]}


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return event(id="chatcmpl-7", object="chat.completion.chunk", model="gpt-4o-mini-2024", choices=[choice])


USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
STREAM = (
    delta("Nothing "),
    delta("much, "),
    delta("café."),
    delta("", "stop"),
    event(id="chatcmpl-7", object="chat.completion.chunk", model="gpt-4o-mini-2024", choices=[], usage=USAGE),
    b"data: [DONE]\n\n",
)


def ask(gateway: Gateway, **arguments: Any) -> httpx2.Response:
    return gateway.post(CHAT, json=QUESTION, **arguments)


def test_a_streamed_answer_is_one_complete_turn(watching: Watched) -> None:
    watching.answer_with(*STREAM, pause_s=0.02)
    response = ask(watching.gateway, headers={"x-ibex-session-id": "tuesday", "x-ibex-user-id": "ada"})
    assert response.content == b"".join(STREAM)
    one = watching.next_turn(response.headers["x-request-id"])
    turn = one.turn
    assert (turn["org_id"], turn["agent_id"], turn["user_id"]) == (ORG, AGENT, "ada")
    assert turn["external_id"] == "tuesday"
    assert (turn["end"], turn["status_code"], turn["is_complete"]) == ("complete", 200, True)
    assert turn["is_streaming"] is True
    assert (turn["chat_format"], turn["model"], turn["finish_reason"]) == ("openai_chat", "gpt-4o-mini-2024", "stop")
    assert turn["provider_request_id"] == "chatcmpl-7"
    assert (turn["input_tokens"], turn["output_tokens"], turn["cached_input_tokens"]) == (11, 3, 8)
    assert "reasoning_tokens" not in turn  # unknown, which is not zero
    assert (turn["outcome"], turn["memories_injected"], turn["context_tokens"]) == ("injected", 7, 70)
    assert turn["chunks"] >= 2
    assert 0 < turn["ttfb_ms"] <= turn["total_ms"]
    assert turn["longest_gap_ms"] >= 5
    assert one.text == {"user_text": "What is new?", "assistant_text": "Nothing much, café."}


def test_a_json_answer_is_a_turn_too(watching: Watched) -> None:
    body = {
        "id": "chatcmpl-8",
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1},
    }
    watching.answer_with(json.dumps(body).encode(), content_type="application/json")
    response = watching.gateway.post(CHAT, json={**QUESTION, "stream": False})
    one = watching.next_turn(response.headers["x-request-id"])
    assert (one.turn["end"], one.turn.get("is_streaming", False)) == ("complete", False)
    assert one.text is not None
    assert one.text["assistant_text"] == "Yes."


@pytest.mark.parametrize(
    ("coding", "encode"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress), ("zstd", zstd.compress)],
)
def test_a_compressed_answer_is_read_and_passes_as_it_is(
    watching: Watched, coding: str, encode: Callable[[bytes], bytes]
) -> None:
    body = encode(b"".join(STREAM))
    pieces = [body[at : at + 40] for at in range(0, len(body), 40)]
    watching.answer_with(*pieces, headers={"content-encoding": coding}, pause_s=0.005)
    with watching.gateway.client.stream("POST", CHAT, json=QUESTION) as response:
        assert b"".join(response.iter_raw()) == body
    one = watching.next_turn(response.headers["x-request-id"])
    assert one.text is not None
    assert (one.turn["end"], one.text["assistant_text"]) == ("complete", "Nothing much, café.")


def test_a_client_that_leaves_in_the_middle_leaves_what_it_got(watching: Watched) -> None:
    watching.answer_with(*STREAM, pause_s=0.3)
    with watching.gateway.client.stream("POST", CHAT, json=QUESTION) as response:
        next(response.iter_raw())
    one = watching.next_turn(response.headers["x-request-id"])
    assert (one.turn["end"], one.turn.get("is_complete", False)) == ("client_gone", False)
    assert one.text is not None
    assert one.text["assistant_text"].startswith("Nothing ")
    assert one.text["assistant_text"] != "Nothing much, café."


def test_a_client_that_leaves_before_the_answer_leaves_a_turn_without_a_status(watching: Watched) -> None:
    request_id = str(uuid.uuid4())
    watching.answer_with(*STREAM, waits_s=5.0)
    body = json.dumps(QUESTION).encode()

    def slowly() -> Iterator[bytes]:
        """The observer stands before the gate: it is told whose request it is with what comes after the answer."""
        yield body[:5]
        time.sleep(1.0)
        yield body[5:]

    headers = {"x-request-id": request_id, "content-type": "application/json"}
    with pytest.raises(httpx2.TimeoutException):
        watching.gateway.post(CHAT, content=slowly(), headers=headers, timeout=3.0)
    one = watching.next_turn(request_id)
    assert (one.turn["end"], one.turn.get("status_code", 0)) == ("client_gone", 0)
    assert one.text is None


def test_an_answer_that_the_provider_breaks_off_is_not_complete(watching: Watched) -> None:
    request_id = str(uuid.uuid4())
    watching.answer_with(*STREAM[:2], breaks=True, pause_s=0.05)
    with pytest.raises(httpx2.RemoteProtocolError):
        ask(watching.gateway, headers={"x-request-id": request_id})
    one = watching.next_turn(request_id)
    # Envoy shows the same in both cases; its access log has the flag.
    assert one.turn["end"] == "client_gone"
    assert one.text is not None
    assert one.text["assistant_text"] == "Nothing much, "


def test_an_error_in_the_middle_of_a_stream_is_an_incomplete_turn(watching: Watched) -> None:
    error = event(error={"message": "overloaded", "type": "server_error", "code": "engine_overloaded"})
    watching.answer_with(*STREAM[:2], error)
    response = ask(watching.gateway)
    one = watching.next_turn(response.headers["x-request-id"])
    assert (one.turn["end"], one.turn["error_code"]) == ("incomplete", "engine_overloaded")


def test_a_providers_error_leaves_no_text(watching: Watched) -> None:
    body = json.dumps({"error": {"message": "Slow down.", "type": "tokens", "code": "rate_limit_exceeded"}}).encode()
    watching.answer_with(body, status=429, content_type="application/json")
    response = ask(watching.gateway)
    assert response.content == body
    one = watching.next_turn(response.headers["x-request-id"])
    turn = one.turn
    assert (turn["end"], turn["status_code"], turn["error_code"]) == ("provider_error", 429, "rate_limit_exceeded")
    assert one.text is None


def test_who_asks_not_to_learn_leaves_no_text(watching: Watched) -> None:
    watching.answer_with(*STREAM)
    response = ask(watching.gateway, headers={"x-ibex-skip-extraction": "yes"})
    one = watching.next_turn(response.headers["x-request-id"])
    assert one.turn["skip_extraction"] is True
    assert one.text is None


def test_turns_of_one_session_share_its_row_and_users_do_not(watching: Watched) -> None:
    watching.answer_with(*STREAM)
    rows = []
    for user in ("ada", "ada", "grace"):
        headers = {"x-ibex-session-id": "monday", "x-ibex-user-id": user}
        response = ask(watching.gateway, headers=headers)
        rows.append(watching.next_turn(response.headers["x-request-id"]).turn["session_id"])
    assert rows[0] == rows[1] != rows[2]


def test_what_is_no_chat_is_not_observed(watching: Watched) -> None:
    watching.answer_with(b"{}", content_type="application/json")
    before = len(watching.turns())
    watching.gateway.post(
        "/v1/audio/translations", content=b"x" * 100_000, headers={"content-type": "application/octet"}
    )
    watching.gateway.client.get("/v1/models")
    watching.answer_with(*STREAM)
    last = ask(watching.gateway)
    watching.next_turn(last.headers["x-request-id"])
    assert len(watching.turns()) == before + 1


def test_many_streams_at_once_are_one_turn_each_and_no_byte_changes(watching: Watched) -> None:
    watching.answer_with(*STREAM, pause_s=0.1)
    whole = b"".join(STREAM)

    def one(number: int) -> str:
        with httpx2.Client(base_url=watching.gateway.url, timeout=30, headers=AUTHORIZED) as client:
            headers = {"x-ibex-session-id": f"many-{number}"}
            response = client.post(CHAT, json=QUESTION, headers=headers)
            if response.status_code == 503:  # a machine that is busy with all of them may keep the gate waiting
                response = client.post(CHAT, json=QUESTION, headers=headers)
        assert response.content == whole
        return str(response.headers["x-request-id"])

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        request_ids = list(pool.map(one, range(200)))
    for request_id in request_ids:
        found = watching.next_turn(request_id)
        assert (found.turn["end"], found.turn["output_tokens"]) == ("complete", 3)


def test_the_client_gets_each_event_when_it_is_sent(watching: Watched) -> None:
    """Nothing is held back until the end, which the client's own time-out does not wait for."""
    watching.answer_with(STREAM[0], b"".join(STREAM[1:]), pause_s=60)
    with watching.gateway.client.stream("POST", CHAT, json=QUESTION) as response:
        assert next(response.iter_raw()) == STREAM[0]
