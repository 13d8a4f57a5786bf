"""Where a directive goes, format by format; what holds for every body is in test_properties."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import pytest

from extproc.chat import (
    ChatFormat,
    ChatRequest,
    Directive,
    InjectionMode,
    Placement,
    ReadLimits,
    UnreadableBody,
    anthropic_messages,
    gemini,
    injection_mode,
    openai_chat,
    openai_responses,
)

FIRST, APPEND, USER_PREPEND = InjectionMode

SYSTEM = {"role": "system", "content": "S"}
DEVELOPER = {"role": "developer", "content": "S"}
USER = {"role": "user", "content": "Hi"}
OTHER = {"role": "user", "content": "Bye"}
ANSWER = {"role": "assistant", "content": "Yes"}
MARKED = {"role": "user", "content": "[DIRECTIVE]: D\n\nHi"}


def splice(
    chat_format: ChatFormat,
    body: bytes,
    mode: InjectionMode,
    text: str = "",
    placement: Placement = Placement.LAST_USER,
) -> bytes:
    request = chat_format.read_request(body, "/models/m:generateContent", ReadLimits())
    return chat_format.splice(body, request, text, placement, Directive("D", mode))


def directed(
    chat_format: ChatFormat,
    body: dict[str, Any],
    mode: InjectionMode,
    text: str = "",
    placement: Placement = Placement.LAST_USER,
) -> Any:
    return json.loads(splice(chat_format, json.dumps(body).encode(), mode, text, placement))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("system_first", FIRST),
        ("system_append", APPEND),
        ("user_prepend", USER_PREPEND),
        ("", FIRST),
        ("SYSTEM_APPEND", FIRST),
        ("system_last\ud800", FIRST),
    ],
)
def test_an_unknown_mode_is_system_first(text: str, expected: InjectionMode) -> None:
    assert injection_mode(text) is expected


def message(role: str) -> dict[str, str]:
    return {"role": role, "content": "D"}


@pytest.mark.parametrize(
    ("mode", "messages", "expected"),
    [
        (FIRST, [], [message("system")]),
        (FIRST, [USER], [message("system"), USER]),
        (FIRST, [SYSTEM, USER], [message("system"), SYSTEM, USER]),
        (FIRST, [DEVELOPER, USER], [message("developer"), DEVELOPER, USER]),
        (APPEND, [], [message("system")]),
        (APPEND, [USER], [message("system"), USER]),
        (APPEND, [USER, SYSTEM], [message("system"), USER, SYSTEM]),
        (APPEND, [SYSTEM], [SYSTEM, message("system")]),
        (APPEND, [SYSTEM, SYSTEM, USER, SYSTEM], [SYSTEM, SYSTEM, message("system"), USER, SYSTEM]),
        (APPEND, [DEVELOPER, ANSWER, USER], [DEVELOPER, message("developer"), ANSWER, USER]),
        (USER_PREPEND, [SYSTEM, USER, ANSWER, OTHER], [SYSTEM, MARKED, ANSWER, OTHER]),
        (USER_PREPEND, [SYSTEM, ANSWER, USER, OTHER], [SYSTEM, ANSWER, MARKED, OTHER]),
        (USER_PREPEND, [SYSTEM, ANSWER], [message("system"), SYSTEM, ANSWER]),
    ],
)
def test_chat_completions(mode: InjectionMode, messages: list[Any], expected: list[Any]) -> None:
    assert directed(openai_chat, {"messages": messages}, mode) == {"messages": expected}


@pytest.mark.parametrize(
    ("mode", "body", "expected"),
    [
        (FIRST, {"input": "Hi"}, {"instructions": "D", "input": "Hi"}),
        (FIRST, {"input": "Hi", "instructions": "I"}, {"input": "Hi", "instructions": "D\n\nI"}),
        (FIRST, {"input": "Hi", "instructions": None}, {"input": "[DIRECTIVE]: D\n\nHi", "instructions": None}),
        (FIRST, {"input": [USER], "instructions": None}, {"input": [message("developer"), USER], "instructions": None}),
        (FIRST, {"input": [SYSTEM], "instructions": 5}, {"input": [message("system"), SYSTEM], "instructions": 5}),
        (APPEND, {"input": "Hi"}, {"instructions": "D", "input": "Hi"}),
        (APPEND, {"input": "Hi", "instructions": "I"}, {"input": "Hi", "instructions": "I\n\nD"}),
        (APPEND, {"input": [USER], "instructions": ""}, {"input": [USER], "instructions": "D\n\n"}),
        (APPEND, {"input": "Hi", "instructions": None}, {"input": "[DIRECTIVE]: D\n\nHi", "instructions": None}),
        (
            APPEND,
            {"input": [DEVELOPER, USER], "instructions": "I"},
            {"input": [DEVELOPER, message("developer"), USER], "instructions": "I"},
        ),
        (APPEND, {"input": [SYSTEM, {"type": "x"}]}, {"input": [SYSTEM, message("system"), {"type": "x"}]}),
        (USER_PREPEND, {"input": "Hi"}, {"input": "[DIRECTIVE]: D\n\nHi"}),
        (USER_PREPEND, {"input": [{"type": "x"}, USER, OTHER]}, {"input": [{"type": "x"}, MARKED, OTHER]}),
        (USER_PREPEND, {"input": " "}, {"instructions": "D", "input": " "}),
    ],
)
def test_responses(mode: InjectionMode, body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert directed(openai_responses, body, mode) == expected


BLOCK = {"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}
OURS = {"type": "text", "text": "D"}


@pytest.mark.parametrize(
    ("mode", "system", "expected"),
    [
        (FIRST, "S", "D\n\nS"),
        (FIRST, [BLOCK], [OURS, BLOCK]),
        (FIRST, [], [OURS]),
        (APPEND, "S", "S\n\nD"),
        (APPEND, "", "D\n\n"),
        (APPEND, [BLOCK], [BLOCK, OURS]),
        (APPEND, [], [OURS]),
    ],
)
def test_anthropic_system(mode: InjectionMode, system: Any, expected: Any) -> None:
    body = {"messages": [USER], "system": system}
    assert directed(anthropic_messages, body, mode) == {"messages": [USER], "system": expected}


@pytest.mark.parametrize("mode", [FIRST, APPEND])
def test_anthropic_without_a_place_in_system(mode: InjectionMode) -> None:
    assert directed(anthropic_messages, {"messages": [USER]}, mode) == {"system": "D", "messages": [USER]}
    for system in ("null", "5", "{}"):
        body = {"messages": [USER, OTHER], "system": json.loads(system)}
        assert directed(anthropic_messages, body, mode) == {**body, "messages": [MARKED, OTHER]}


def test_anthropic_tool_results_stay_first_in_their_message() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "42"}]}
    text = {"type": "text", "text": "Hi"}
    body = {"messages": [{"role": "user", "content": [result]}, {"role": "user", "content": [result, text]}, OTHER]}
    found = directed(anthropic_messages, body, USER_PREPEND)["messages"]
    assert found[0] == body["messages"][0]
    assert found[1]["content"] == [result, {"type": "text", "text": "[DIRECTIVE]: D\n\nHi"}]
    assert found[2] == OTHER


CONTENTS = [{"role": "user", "parts": [{"inlineData": {}}, {"text": "Hi"}, {"text": "You"}]}]
MARKED_CONTENTS = [{"role": "user", "parts": [{"inlineData": {}}, {"text": "[DIRECTIVE]: D\n\nHi"}, {"text": "You"}]}]


@pytest.mark.parametrize("key", ["systemInstruction", "system_instruction"])
@pytest.mark.parametrize(
    ("mode", "parts", "expected"),
    [
        (FIRST, [{"text": "S"}], [{"text": "D"}, {"text": "S"}]),
        (FIRST, {"text": "S"}, {"text": "D\n\nS"}),
        (APPEND, [{"text": "S"}], [{"text": "S"}, {"text": "D"}]),
        (APPEND, {"text": "S"}, {"text": "S\n\nD"}),
        (APPEND, [], [{"text": "D"}]),
    ],
)
def test_gemini_system_instruction(key: str, mode: InjectionMode, parts: Any, expected: Any) -> None:
    body = {"contents": CONTENTS, key: {"parts": parts}}
    assert directed(gemini, body, mode) == {"contents": CONTENTS, key: {"parts": expected}}


@pytest.mark.parametrize("mode", [FIRST, APPEND])
def test_gemini_without_a_place_in_its_instruction(mode: InjectionMode) -> None:
    added = {"systemInstruction": {"parts": [{"text": "D"}]}, "contents": CONTENTS}
    assert directed(gemini, {"contents": CONTENTS}, mode) == added
    for instruction in ("null", "{}", '{"parts":null}', '{"parts":{}}', '"x"'):
        body = {"contents": CONTENTS, "systemInstruction": json.loads(instruction)}
        assert directed(gemini, body, mode) == {**body, "contents": MARKED_CONTENTS}


def test_gemini_single_content() -> None:
    parts = [{"text": "Hi"}, {"text": "You"}]
    found = directed(gemini, {"contents": {"parts": parts}}, USER_PREPEND)
    assert found == {"contents": {"parts": [{"text": "[DIRECTIVE]: D\n\nHi"}, {"text": "You"}]}}


# Together with memories.


@pytest.mark.parametrize("mode", [FIRST, APPEND])
def test_a_key_is_added_once_for_both(mode: InjectionMode) -> None:
    for chat_format, key in ((anthropic_messages, "system"), (openai_responses, "instructions")):
        body = {"messages": [USER], "input": [USER]}
        found = splice(chat_format, json.dumps(body).encode(), mode, "M", Placement.SYSTEM_FIRST)
        assert found.startswith(b'{"%b":"D\\n\\nM",' % key.encode())
    found = splice(gemini, json.dumps({"contents": CONTENTS}).encode(), mode, "M", Placement.SYSTEM_FIRST)
    assert found.startswith(b'{"systemInstruction":{"parts":[{"text":"D\\n\\nM"}]},')


def test_of_two_new_elements_the_directive_comes_first() -> None:
    memories = {"role": "system", "content": "M"}
    for messages in ([], [SYSTEM, USER]):
        found = directed(openai_chat, {"messages": messages}, FIRST, "M", Placement.SYSTEM_FIRST)
        assert found["messages"] == [message("system"), memories, *messages]
    found = directed(anthropic_messages, {"messages": [], "system": []}, APPEND, "M", Placement.SYSTEM_FIRST)
    assert found["system"] == [OURS, {"type": "text", "text": "M"}]


def test_in_one_text_the_directive_comes_first() -> None:
    found = directed(openai_chat, {"messages": [USER]}, USER_PREPEND, "M")
    assert found["messages"] == [{"role": "user", "content": "[DIRECTIVE]: D\n\nM\n\nHi"}]


def test_memories_right_before_the_user_come_after_an_appended_directive() -> None:
    body = {"messages": [SYSTEM, USER]}
    found = directed(openai_chat, body, APPEND, "M", Placement.BEFORE_LAST_USER)
    assert found["messages"] == [SYSTEM, message("system"), {"role": "user", "content": "M"}, USER]


@pytest.mark.parametrize("mode", InjectionMode)
def test_the_directive_stays_put_while_a_conversation_goes_on(mode: InjectionMode) -> None:
    talk = [SYSTEM, USER]
    before = directed(openai_chat, {"messages": talk}, mode)["messages"]
    after = directed(openai_chat, {"messages": [*talk, ANSWER, OTHER]}, mode)["messages"]
    assert after == [*before, ANSWER, OTHER]


# Odd bodies.


def test_a_body_without_any_place_comes_back_itself() -> None:
    body = b'{"messages":[],"system":null}'
    for mode in InjectionMode:
        assert splice(anthropic_messages, body, mode, "M", Placement.SYSTEM_FIRST) is body


@pytest.mark.parametrize("mode", InjectionMode)
def test_an_empty_directive_is_none(mode: InjectionMode) -> None:
    body = json.dumps({"messages": [USER]}).encode()
    request = openai_chat.read_request(body, "/", ReadLimits())
    assert openai_chat.splice(body, request, "", Placement.LAST_USER, Directive("", mode)) is body


@pytest.mark.parametrize("content", [b"[5]", b'[{"type":5}]', b"{}", b"[]", b"null"])
@pytest.mark.parametrize("size", [1, 40_000])
def test_a_first_message_that_nobody_reads_is_passed_over(content: bytes, size: int) -> None:
    answers = b'{"role":"assistant","content":"%b"},' % (b"y" * size) * 5
    later = b'{"role":"user","content":"Hi"},%b{"role":"user","content":"Bye"}' % answers
    body = b'{"messages":[{"role":"user","content":%b},%b]}' % (content, later)
    assert splice(openai_chat, body, USER_PREPEND) == body.replace(b'"Hi"', b'"[DIRECTIVE]: D\\n\\nHi"')


@pytest.mark.parametrize("mode", InjectionMode)
def test_a_body_that_nests_up_to_the_limit_still_takes_both(mode: InjectionMode) -> None:
    """The stack is deeper at the splice than at the reading, which decides what is too deep."""
    body, request = deepest_body()

    def splice_deeper(levels: int) -> bytes:
        if levels:
            return splice_deeper(levels - 1)
        return openai_chat.splice(body, request, "M", Placement.BEFORE_LAST_USER, Directive("D", mode))

    assert splice_deeper(50) == body.replace(b'"Hi"', b'"[DIRECTIVE]: D\\n\\nM\\n\\nHi"')


def deepest_body() -> tuple[bytes, ChatRequest]:
    for depth in range(sys.getrecursionlimit(), 0, -1):
        body = b'{"messages":[{"x":1,"role":"user","content":"Hi"}],"x":%b}' % (b"[" * depth + b"]" * depth)
        with contextlib.suppress(UnreadableBody):
            return body, openai_chat.read_request(body, "/", ReadLimits())
    raise AssertionError("no depth can be read")
