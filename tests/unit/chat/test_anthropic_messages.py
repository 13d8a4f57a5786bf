"""Facts of Anthropic Messages; what holds for every format is in test_properties."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.chat import ChatRequest, Placement, ReadLimits, anthropic_messages

USER = {"role": "user", "content": "Hello?"}
CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "42"}]}
CACHED = {"type": "ephemeral"}


def body_of(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def read(body: bytes) -> ChatRequest:
    return anthropic_messages.read_request(body, "/v1/messages", ReadLimits())


def spliced(body: bytes, placement: Placement) -> Any:
    return json.loads(anthropic_messages.splice(body, read(body), "BLOCK", placement))


def test_a_request_is_read() -> None:
    request = read(body_of(USER, model="claude", max_tokens=100, stream=False))
    assert (request.model, request.query, request.max_output_tokens) == ("claude", "Hello?", 100)
    assert not request.is_streaming


def test_tool_results_carry_no_text() -> None:
    body = body_of(USER, CALL, {"role": "user", "content": [RESULT]})
    assert read(body).query == "Hello?"
    assert spliced(body, Placement.LAST_USER)["messages"][0]["content"] == "BLOCK\n\nHello?"


def test_text_after_a_tool_result_does_and_nothing_comes_between_call_and_result() -> None:
    body = body_of(USER, CALL, {"role": "user", "content": [RESULT, {"type": "text", "text": "And now?"}]})
    assert read(body).query == "And now?"
    messages = spliced(body, Placement.BEFORE_LAST_USER)["messages"]
    assert messages[2]["content"] == [RESULT, {"type": "text", "text": "BLOCK\n\nAnd now?"}]


def test_a_cached_document_keeps_its_place_in_the_cache() -> None:
    document = {"type": "text", "text": "A long document.", "cache_control": CACHED}
    body = body_of({"role": "user", "content": [document, {"type": "text", "text": "Why?"}]})
    assert spliced(body, Placement.LAST_USER)["messages"][0]["content"] == [
        document,
        {"type": "text", "text": "BLOCK\n\nWhy?"},
    ]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Be brief.", "BLOCK\n\nBe brief."),
        ("", "BLOCK\n\n"),
        ([], [{"type": "text", "text": "BLOCK"}]),
        ([{"type": "text", "text": "x"}], [{"type": "text", "text": "BLOCK"}, {"type": "text", "text": "x"}]),
    ],
)
def test_the_system_prompt_gets_the_block_first(system: Any, expected: Any) -> None:
    assert spliced(body_of(USER, system=system), Placement.SYSTEM_FIRST)["system"] == expected


def test_a_system_prompt_is_added() -> None:
    assert spliced(body_of(USER), Placement.SYSTEM_FIRST) == {"system": "BLOCK", "messages": [USER]}


def test_a_null_system_prompt_is_kept() -> None:
    result = spliced(body_of(USER, system=None), Placement.SYSTEM_FIRST)
    assert result == {"messages": [{"role": "user", "content": "BLOCK\n\nHello?"}], "system": None}
