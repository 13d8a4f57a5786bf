"""The door: which requests are chat requests."""

from __future__ import annotations

import pytest

from extproc.chat import is_event_stream, recognise

JSON = "application/json"


def name_of(path: str, method: str = "POST", content_type: str = JSON) -> str | None:
    chat_format = recognise(method, path, content_type)
    return None if chat_format is None else chat_format.name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", "openai_chat"),
        ("/chat/completions", "openai_chat"),
        ("/gateway/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21", "openai_chat"),
        ("/v1/chat/completions/", "openai_chat"),
        ("//v1/chat/completions", "openai_chat"),
        ("/v1/chat/c%6fmpletions", "openai_chat"),
        ("/v1/responses", "openai_responses"),
        ("/v1/messages", "anthropic_messages"),
        ("/v1/messages?beta=true", "anthropic_messages"),
        ("/v1beta/models/gemini-2.5-flash:generateContent", "gemini"),
        ("/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse", "gemini"),
        ("/v1beta/models/gemini-2.5-flash%3AgenerateContent", "gemini"),
        ("/v1/projects/p/locations/l/publishers/google/models/gemini-2.5-pro:generateContent", "gemini"),
    ],
)
def test_a_chat_request_is_known_by_the_end_of_its_path(path: str, expected: str) -> None:
    assert name_of(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/v1/completions",
        "/v1/chat/completions/chatcmpl-1",
        "/v1/chat%2Fcompletions",
        "/v1/Chat/Completions",
        "/v1/xchat/completions",
        "/v1/embeddings?next=/chat/completions",
        "/v1/responses/resp_1",
        "/v1/responses/resp_1/cancel",
        "/v1/messages/count_tokens",
        "/v1/messages/batches",
        "/v1/threads/thread_1/messages",
        "/v1beta/models/gemini-2.5-flash:countTokens",
        "/v1beta/models/gemini-2.5-flash",
        "/v1beta/tunedModels/x:generateContent",
    ],
)
def test_other_paths_are_no_chat(path: str) -> None:
    assert name_of(path) is None


@pytest.mark.parametrize("mark", ["?", "#"])
def test_no_query_is_so_long_that_a_chat_goes_by_unseen(mark: str) -> None:
    known = recognise("POST", f"/v1/chat/completions{mark}{'x' * 100_000}", "application/json")
    assert known is not None
    assert known.name == "openai_chat"


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "DELETE", "post", ""])
def test_only_post_is_chat(method: str) -> None:
    assert name_of("/v1/chat/completions", method=method) is None


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        JSON,
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json ;a=b",
        "application/vnd.x+json",
    ],
)
def test_json_is_read(content_type: str) -> None:
    assert name_of("/v1/messages", content_type=content_type) == "anthropic_messages"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/json",
        "application/jsonl",
        "application/x-ndjson",
        "multipart/form-data; boundary=x",
        "application/+json x",
    ],
)
def test_other_content_types_are_not(content_type: str) -> None:
    assert name_of("/v1/messages", content_type=content_type) is None


@pytest.mark.parametrize(
    "content_type",
    [
        "text/event-stream",
        "Text/Event-Stream",
        "text/event-stream; charset=utf-8",
        " text/event-stream ;x",
        "text/event-stream;",
    ],
)
def test_an_event_stream_is_known_by_its_type(content_type: str) -> None:
    assert is_event_stream(content_type)


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "text/event-streams", "text/plain", "x text/event-stream"]
)
def test_nothing_else_is_an_event_stream(content_type: str) -> None:
    assert not is_event_stream(content_type)
