"""Limits of what is kept of an answer, and of what is looked at."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import AnswerLimits, ChatFormat, Completion, ToolCall, Usage, gemini, openai_chat, openai_responses
from tests.unit.chat.transcripts import DONE, call_delta, chat_body, chunk, compact, generated, response, sse

USAGE = {"prompt_tokens": 3, "completion_tokens": 4}


def read(body: bytes, limits: AnswerLimits, chat: ChatFormat = openai_chat, is_sse: bool = True) -> Completion:
    reader = chat.read_answer(is_sse, limits)
    for at in range(0, len(body), 1000):
        reader.feed(body[at : at + 1000])
    return reader.finish()


def stream(*deltas: Any, finish: str = "stop") -> bytes:
    return sse(*(chunk(delta) for delta in deltas), chunk({}, finish=finish), chunk(usage=USAGE), DONE)


@given(st.lists(st.text("aé中😀\n", max_size=4), max_size=6), st.integers(0, 24))
def test_the_text_is_cut_between_two_characters(pieces: list[str], max_bytes: int) -> None:
    completion = read(stream(*({"content": piece} for piece in pieces)), AnswerLimits(max_text_bytes=max_bytes))
    whole = "".join(pieces).encode()
    assert completion.text == whole[:max_bytes].decode("utf-8", "ignore")
    assert completion.was_cut is (len(whole) > max_bytes)


def test_after_the_cut_the_end_and_the_usage_are_still_read() -> None:
    completion = read(stream(*[{"content": "word "}] * 1000), AnswerLimits(max_text_bytes=10))
    assert completion.text == "word word "
    assert (completion.finish_reason, completion.usage, completion.has_ended) == ("stop", Usage(3, 4), True)


def test_a_refusal_has_the_same_limit() -> None:
    completion = read(stream({"refusal": "I"}, {"refusal": " cannot"}), AnswerLimits(max_text_bytes=4))
    assert (completion.refusal, completion.was_cut) == ("I ca", True)


def test_arguments_of_all_calls_share_it() -> None:
    body = stream(
        call_delta(0, '{"a"', id="x", name="f"), call_delta(0, ":1}"), call_delta(1, '{"b":2}', id="y", name="g")
    )
    completion = read(body, AnswerLimits(max_text_bytes=10))
    assert completion.tool_calls == (ToolCall("x", "f", '{"a":1}'), ToolCall("y", "g", '{"b'))
    assert completion.was_cut


def test_there_is_an_end_to_the_number_of_calls() -> None:
    completion = read(stream(*(call_delta(at, "{}", id=f"call_{at}", name="f") for at in range(1000))), AnswerLimits())
    assert len(completion.tool_calls) == 128
    assert completion.was_cut


@pytest.mark.parametrize("over", [0, 1])
def test_an_event_of_the_limit_is_read_and_a_longer_one_is_not(over: int) -> None:
    event = chunk({"content": "x" * 500})
    limits = AnswerLimits(max_event_bytes=len(compact(event)) + len("data: ") - over)
    completion = read(sse(chunk({"content": "a"}), event, chunk({"content": "b"}, finish="stop")), limits)
    assert completion.text == ("ab" if over else "a" + "x" * 500 + "b")
    assert completion.was_cut is bool(over)
    assert completion.has_ended


@pytest.mark.parametrize("over", [0, 1])
def test_a_body_of_the_limit_is_read_and_of_a_longer_one_nothing(over: int) -> None:
    body = chat_body({"content": "x" * 5000})
    completion = read(body, AnswerLimits(max_json_bytes=len(body) - over), is_sse=False)
    assert completion == Completion(was_cut=True) if over else completion.text == "x" * 5000
    assert completion.was_cut is bool(over)


@pytest.mark.parametrize("is_sse", [True, False])
def test_what_would_take_long_to_build_is_left_out(is_sse: bool) -> None:
    tree = b'{"choices":[' + b"{}," * 200_000 + b"{}]}"
    completion = read(b"data: " + tree + b"\n\n" if is_sse else tree, AnswerLimits(), is_sse=is_sse)
    assert completion == Completion(was_cut=True)


def test_a_picture_in_an_event_does_not_hide_the_usage() -> None:
    picture = {"inlineData": {"mimeType": "image/png", "data": "iVBO" * 700_000}}
    body = sse(generated({"text": "Here: "}, picture, finish="STOP", usage={"promptTokenCount": 5}))
    completion = read(body, AnswerLimits(), gemini)
    assert (completion.text, completion.usage.input_tokens, completion.was_cut) == ("Here: ", 5, False)


@pytest.mark.parametrize("is_sse", [True, False])
@pytest.mark.parametrize("chunk_bytes", [7, 60_000])
@pytest.mark.parametrize(
    "unit", [b"x", b"data: ", b"data: x\n", b'data: {"a":"', b"[{", b" ", b"\n", b'{"x":"y"},', b": c\n\n"]
)
def test_memory_is_bounded_whatever_comes(is_sse: bool, chunk_bytes: int, unit: bytes) -> None:
    limits = AnswerLimits(max_text_bytes=10_000, max_event_bytes=20_000, max_json_bytes=20_000)
    size = 70_000 if chunk_bytes < 100 else 900_000
    reader = gemini.read_answer(is_sse, limits)
    piece = (unit * chunk_bytes)[:chunk_bytes]
    tracemalloc.start()
    try:
        for _ in range(size // chunk_bytes):
            reader.feed(bytes(bytearray(piece)))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 400_000


def test_words_of_the_provider_are_short_and_plain() -> None:
    finish = "<b>" + "long" * 100
    body = compact(
        {"id": "i d\u00e9" + "x" * 500, "model": {"no": 1}, "choices": [{"message": {}, "finish_reason": finish}]}
    )
    completion = read(body, AnswerLimits(), is_sse=False)
    assert completion.finish_reason == ("b" + "long" * 100)[:64]
    assert completion.response_id == ("id" + "x" * 500)[:256]
    assert completion.model == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"code": "context_length_exceeded", "type": "invalid_request_error"}, "context_length_exceeded"),
        ({"code": None, "type": "server_error"}, "server_error"),
        ({"code": 400, "type": "BadRequestError"}, "BadRequestError"),
        ({"code": 503}, "503"),
        ({"code": "You said: my password is x", "type": "odd"}, "odd"),
        ({"message": "only this"}, "error"),
        ({"code": ["x"], "type": {}}, "error"),
        ({"code": "c" * 100}, "c" * 64),
        ({}, "error"),
        ("rate_limited", "rate_limited"),
        ("model 'x' not found", "error"),
        (True, "error"),
        ([], "error"),
        (None, ""),
        (False, ""),
        ("", ""),
    ],
)
def test_an_error_is_named_by_its_code_and_never_by_its_message(error: Any, expected: str) -> None:
    assert read(sse({"error": error}), AnswerLimits()).error == expected


@pytest.mark.parametrize("count", [-1, 1.5, "12", None, True, [], {}, 10**12])
def test_what_is_no_count_is_unknown_and_not_zero(count: Any) -> None:
    body = compact({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": 0}})
    assert read(body, AnswerLimits(), is_sse=False).usage == Usage(None, 0)


@pytest.mark.parametrize("usage", [None, [], 5, "x", {"prompt_tokens_details": 5}])
def test_an_odd_usage_hides_nothing_else(usage: Any) -> None:
    completion = read(chat_body({"content": "a"}, usage=usage), AnswerLimits(), is_sse=False)
    assert (completion.text, completion.usage) == ("a", Usage())


def test_bytes_that_are_not_utf8_and_halves_of_characters_are_replaced() -> None:
    body = b'data: {"choices":[{"delta":{"content":"a\xffb"}}]}\n\n'
    body += rb'data: {"choices":[{"delta":{"content":"\ud83d"}}]}' + b"\n\n"
    body += rb'data: {"choices":[{"delta":{"content":"\ud83d\ude00 \\ud83d \uDE00!"}}]}' + b"\n\n"
    completion = read(body, AnswerLimits())
    assert completion.text == "a\ufffdb\ufffd😀 \\ud83d \ufffd!"
    assert not completion.was_cut


def test_deep_nesting_is_left_out() -> None:
    body = sse(chunk({"content": "a"}), b'data: {"x":' + b"[" * 100_000 + b"\n\n", chunk({"content": "b"}))
    completion = read(body, AnswerLimits())
    assert (completion.text, completion.was_cut) == ("ab", True)


def test_a_final_response_that_repeats_the_text_does_not_double_it() -> None:
    output = [{"type": "message", "content": [{"type": "output_text", "text": "hello"}]}]
    body = sse(
        {"type": "response.output_text.delta", "output_index": 0, "delta": "hello"},
        {"type": "response.completed", "response": response("completed", output)},
    )
    assert read(body, AnswerLimits(), openai_responses).text == "hello"


def test_the_same_limits_hold_for_json_as_it_is_spelled() -> None:
    text = "é😀" * 100
    body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    assert read(body, AnswerLimits(max_text_bytes=600), is_sse=False).text == text
