"""Facts of Chat Completions; what holds for every format is in test_properties."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.chat import ChatRequest, Message, Placement, ReadLimits, openai_chat

PATH = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello?"}


def body_of(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def read(body: bytes, path: str = PATH) -> ChatRequest:
    return openai_chat.read_request(body, path, ReadLimits())


def spliced(body: bytes, placement: Placement, text: str = "BLOCK") -> Any:
    return json.loads(openai_chat.splice(body, read(body), text, placement))["messages"]


def test_a_request_is_read() -> None:
    request = read(body_of(SYSTEM, USER, model="gpt-4o", stream=True, max_tokens=100))
    assert (request.format, request.model, request.query) == ("openai_chat", "gpt-4o", "Hello?")
    assert (request.max_output_tokens, request.is_streaming) == (100, True)


def test_max_completion_tokens_comes_before_its_old_name() -> None:
    assert read(body_of(USER, max_tokens=1, max_completion_tokens=2)).max_output_tokens == 2
    assert read(body_of(USER, max_tokens=1, max_completion_tokens=None)).max_output_tokens == 1


@pytest.mark.parametrize("count", [None, "12", 1.5, -1, 10**80])
def test_an_odd_count_is_no_count(count: Any) -> None:
    assert read(body_of(USER, max_tokens=count)).max_output_tokens is None


def test_azure_names_the_model_in_the_path() -> None:
    path = "/openai/deployments/my%20gpt/chat/completions?api-version=1"
    assert read(body_of(USER), path).model == "my gpt"
    assert read(body_of(USER, model="gpt-4o"), path).model == "gpt-4o"
    assert read(body_of(USER)).model == ""


def test_the_query_is_the_last_user_message_with_text() -> None:
    tools = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "user", "content": " \n"},
        {"role": "user", "content": None},
        {"role": "user"},
    ]
    assert read(body_of(SYSTEM, USER, *tools)).query == "Hello?"


def test_no_user_text_is_no_query_and_leaves_the_body_alone() -> None:
    body = body_of(SYSTEM)
    assert read(body).query == ""
    assert spliced(body, Placement.LAST_USER) == [SYSTEM]
    assert spliced(body, Placement.BEFORE_LAST_USER) == [SYSTEM]


def test_recent_messages_are_talk_before_the_query() -> None:
    talk = [{"role": role, "content": f"{n}"} for n in range(4) for role in ("user", "assistant", "tool")]
    assert read(body_of(SYSTEM, *talk, USER, {"role": "assistant", "content": "later"})).recent == (
        Message("user", "2"),
        Message("assistant", "2"),
        Message("user", "3"),
        Message("assistant", "3"),
    )


def test_the_block_goes_before_the_text_of_the_last_user_message() -> None:
    assert spliced(body_of(SYSTEM, USER), Placement.LAST_USER) == [
        SYSTEM,
        {"role": "user", "content": "BLOCK\n\nHello?"},
    ]


def test_of_several_texts_the_last_takes_the_block() -> None:
    """So that a document before the question, often marked as cached, keeps its place in the provider's cache."""
    parts = [{"type": "text", "text": text} for text in ("A long document.", "What is in it?", " ")]
    body = body_of({"role": "user", "content": parts})
    assert read(body).query == "A long document.\nWhat is in it?"
    content = spliced(body, Placement.LAST_USER)[0]["content"]
    assert [part["text"] for part in content] == ["A long document.", "BLOCK\n\nWhat is in it?", " "]


def test_the_block_stays_put_while_a_tool_loop_goes_on() -> None:
    step = [{"role": "assistant", "content": None}, {"role": "tool", "content": "{}"}]
    first, second = body_of(SYSTEM, USER), body_of(SYSTEM, USER, *step)
    assert (
        spliced(first, Placement.LAST_USER)
        == spliced(second, Placement.LAST_USER)[: len(json.loads(first)["messages"])]
    )


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_system_message_comes_first(role: str) -> None:
    first = {"role": role, "content": "x"}
    assert spliced(body_of(first), Placement.SYSTEM_FIRST) == [{"role": "system", "content": "BLOCK"}, first]


def test_a_client_with_a_developer_message_gets_another() -> None:
    first = {"role": "developer", "content": "x"}
    assert spliced(body_of(first), Placement.SYSTEM_FIRST) == [{"role": "developer", "content": "BLOCK"}, first]


@pytest.mark.parametrize("body", [b'{"messages":[]}', b' { "messages" : [ \n ] } '])
def test_a_system_message_may_be_the_only_one(body: bytes) -> None:
    assert spliced(body, Placement.SYSTEM_FIRST) == [{"role": "system", "content": "BLOCK"}]


def test_a_user_message_of_its_own_comes_right_before() -> None:
    assert spliced(body_of(SYSTEM, USER, SYSTEM), Placement.BEFORE_LAST_USER) == [
        SYSTEM,
        {"role": "user", "content": "BLOCK"},
        USER,
        SYSTEM,
    ]


def test_an_empty_block_changes_nothing() -> None:
    body = body_of(SYSTEM, USER)
    for placement in Placement:
        assert openai_chat.splice(body, read(body), "", placement) is body
