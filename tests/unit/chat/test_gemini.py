"""Facts of Gemini; what holds for every format is in test_properties."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.chat import ChatRequest, Message, Placement, ReadLimits, gemini

PATH = "/v1beta/models/gemini-2.5-flash:generateContent"
USER = {"role": "user", "parts": [{"text": "Hello?"}]}


def body_of(*contents: Any, **more: Any) -> bytes:
    return json.dumps({"contents": contents, **more}).encode()


def read(body: bytes, path: str = PATH) -> ChatRequest:
    return gemini.read_request(body, path, ReadLimits())


def spliced(body: bytes, placement: Placement) -> Any:
    return json.loads(gemini.splice(body, read(body), "BLOCK", placement))


def test_the_path_names_the_model_and_whether_it_streams() -> None:
    assert read(body_of(USER)).model == "gemini-2.5-flash"
    assert not read(body_of(USER)).is_streaming
    streaming = read(body_of(USER), "/v1beta/models/tuned%2Fone:streamGenerateContent?alt=sse")
    assert streaming.model == "tuned/one"
    assert streaming.is_streaming


@pytest.mark.parametrize(
    "config",
    [
        {"generationConfig": {"maxOutputTokens": 7}},
        {"generation_config": {"max_output_tokens": 7}},
        {"generationConfig": None, "generation_config": {"maxOutputTokens": 7}},
    ],
)
def test_the_output_limit_has_two_spellings(config: Any) -> None:
    assert read(body_of(USER, **config)).max_output_tokens == 7


def test_a_message_without_a_role_is_the_users() -> None:
    model = {"role": "model", "parts": [{"text": "Yes?"}]}
    request = read(body_of({"parts": [{"text": "Hi"}]}, model, {"parts": [{"inlineData": {}}, {"text": "So"}]}))
    assert request.query == "So"
    assert request.recent == (Message("user", "Hi"), Message("assistant", "Yes?"))


def test_contents_and_parts_may_lack_their_arrays() -> None:
    body = b'{"contents":{"parts":{"text":"Hello?"}}}'
    assert read(body).query == "Hello?"
    for placement in (Placement.LAST_USER, Placement.BEFORE_LAST_USER):
        assert spliced(body, placement) == {"contents": {"parts": {"text": "BLOCK\n\nHello?"}}}


def test_nothing_comes_between_a_call_and_its_response() -> None:
    body = body_of({"role": "user", "parts": [{"functionResponse": {}}, {"text": "So?"}]})
    assert spliced(body, Placement.BEFORE_LAST_USER)["contents"][0]["parts"][1] == {"text": "BLOCK\n\nSo?"}


def test_a_content_of_its_own_comes_right_before() -> None:
    contents = spliced(body_of(USER, USER), Placement.BEFORE_LAST_USER)["contents"]
    assert contents == [USER, {"role": "user", "parts": [{"text": "BLOCK"}]}, USER]


@pytest.mark.parametrize("key", ["systemInstruction", "system_instruction"])
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], [{"text": "BLOCK"}]),
        ([{"text": "x"}], [{"text": "BLOCK"}, {"text": "x"}]),
        ({"text": "x"}, {"text": "BLOCK\n\nx"}),
    ],
)
def test_the_system_instruction_gets_the_block_first(key: str, parts: Any, expected: Any) -> None:
    assert spliced(body_of(USER, **{key: {"parts": parts}}), Placement.SYSTEM_FIRST)[key] == {"parts": expected}


def test_a_system_instruction_is_added() -> None:
    result = spliced(body_of(USER), Placement.SYSTEM_FIRST)
    assert result == {"systemInstruction": {"parts": [{"text": "BLOCK"}]}, "contents": [USER]}


@pytest.mark.parametrize("instruction", [None, {}, {"parts": None}, {"parts": {}}, "x"])
def test_an_instruction_that_takes_no_text_is_kept(instruction: Any) -> None:
    result = spliced(body_of(USER, systemInstruction=instruction), Placement.SYSTEM_FIRST)
    assert result["systemInstruction"] == instruction
    assert result["contents"] == [{"role": "user", "parts": [{"text": "BLOCK\n\nHello?"}]}]
