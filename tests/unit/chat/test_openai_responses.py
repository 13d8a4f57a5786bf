"""Facts of Responses; what holds for every format is in test_properties."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.chat import ChatRequest, Message, Placement, ReadLimits, openai_responses

USER = {"role": "user", "content": [{"type": "input_text", "text": "Hello?"}]}


def body_of(given: Any, **more: Any) -> bytes:
    return json.dumps({"input": given, **more}).encode()


def read(body: bytes) -> ChatRequest:
    return openai_responses.read_request(body, "/v1/responses", ReadLimits())


def spliced(body: bytes, placement: Placement) -> Any:
    return json.loads(openai_responses.splice(body, read(body), "BLOCK", placement))


def test_a_string_is_the_query() -> None:
    body = body_of("Hello?", model="gpt-4o", stream=True, max_output_tokens=9)
    request = read(body)
    assert (request.model, request.query, request.max_output_tokens) == ("gpt-4o", "Hello?", 9)
    assert request.is_streaming
    assert spliced(body, Placement.LAST_USER)["input"] == "BLOCK\n\nHello?"


def test_nothing_goes_before_a_string() -> None:
    assert spliced(body_of("Hello?"), Placement.BEFORE_LAST_USER)["input"] == "BLOCK\n\nHello?"


def test_items_are_messages_with_or_without_a_type_and_others() -> None:
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]}
    others = [{"type": "function_call", "name": "f"}, {"type": "function_call_output", "output": "42"}]
    request = read(body_of([{"role": "user", "content": "Hi"}, answer, {**USER, "type": "message"}, *others]))
    assert request.query == "Hello?"
    assert request.recent == (Message("user", "Hi"), Message("assistant", "Yes?"))


@pytest.mark.parametrize("instructions", ["", "Be brief."])
def test_instructions_get_the_block_first(instructions: str) -> None:
    body = body_of([USER], instructions=instructions)
    assert spliced(body, Placement.SYSTEM_FIRST)["instructions"] == "BLOCK\n\n" + instructions


def test_instructions_are_added() -> None:
    assert spliced(body_of([USER]), Placement.SYSTEM_FIRST) == {"instructions": "BLOCK", "input": [USER]}


@pytest.mark.parametrize("instructions", [None, 5, ["x"]])
def test_instructions_that_take_no_text_are_kept(instructions: Any) -> None:
    result = spliced(body_of("Hello?", instructions=instructions), Placement.SYSTEM_FIRST)
    assert result == {"input": "BLOCK\n\nHello?", "instructions": instructions}
