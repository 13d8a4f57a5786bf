"""Answers of each provider, written after the public API references, and what is to be read in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from extproc.chat import (
    ChatFormat,
    Completion,
    ToolCall,
    Usage,
    anthropic_messages,
    gemini,
    openai_chat,
    openai_responses,
)

TEXT = 'Grüße aus Köln 😀 中文, "ja"\n'
"""Characters of one to four bytes, and some that JSON escapes."""
HALVES = "Grüße aus ", 'Köln 😀 中文, "ja"\n'


@dataclass(frozen=True)
class Transcript:
    name: str
    chat: ChatFormat
    is_sse: bool
    body: bytes
    expected: Completion


def compact(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()


def sse(*events: Any, named: bool = False, end: bytes = b"\n") -> bytes:
    """Each event an object, or bytes that stand as they are."""
    return b"".join(_event(event, named, end) for event in events)


def _event(event: Any, named: bool, end: bytes) -> bytes:
    if isinstance(event, bytes):
        return event
    name = b"event: " + event["type"].encode() + end if named else b""
    return name + b"data: " + compact(event) + end + end


DONE = b"data: [DONE]\n\n"


# OpenAI Chat Completions


def chunk(delta: Any = None, *, finish: str | None = None, usage: Any = None, index: int = 0, **more: Any) -> Any:
    choices = [] if delta is None else [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {
        "id": "chatcmpl-123",
        "object": "chat.completion.chunk",
        "created": 1753700000,
        "model": "gpt-4o-mini-2024-07-18",
        "system_fingerprint": "fp_44709d6fcb",
        "choices": choices,
        "usage": usage,
        **more,
    }


def chat_body(message: Any, finish: str = "stop", **more: Any) -> bytes:
    return compact(
        {
            "id": "chatcmpl-123",
            "object": "chat.completion",
            "model": "gpt-4o-mini-2024-07-18",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            **more,
        }
    )


CHAT_USAGE = {
    "prompt_tokens": 1200,
    "completion_tokens": 40,
    "total_tokens": 1240,
    "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 16, "audio_tokens": 0},
}
CHAT_COUNTS = Usage(1200, 40, 1024, 16)


def chat_answer(**more: Any) -> Completion:
    given: dict[str, Any] = {
        "text": TEXT,
        "finish_reason": "stop",
        "model": "gpt-4o-mini-2024-07-18",
        "response_id": "chatcmpl-123",
        "has_ended": True,
        **more,
    }
    return Completion(**given)


def call_delta(index: int, arguments: str, **first: Any) -> Any:
    function = {"arguments": arguments} | ({"name": first.pop("name")} if "name" in first else {})
    return {"tool_calls": [{"index": index, **first, "function": function}]}


def _chat() -> Iterable[Transcript]:
    def stream(name: str, expected: Completion, *events: Any, end: bytes = b"\n") -> Transcript:
        return Transcript(f"chat-{name}", openai_chat, True, sse(*events, end=end), expected)

    def body(name: str, expected: Completion, content: bytes, is_sse: bool = False) -> Transcript:
        return Transcript(f"chat-{name}", openai_chat, is_sse, content, expected)

    first, second = HALVES
    role = chunk({"role": "assistant", "content": "", "refusal": None})
    texts = [role, chunk({"content": first}), chunk({"content": second})]
    stop = chunk({}, finish="stop")
    yield stream("stream", chat_answer(), *texts, stop, DONE)
    yield stream("stream-crlf", chat_answer(), *texts, stop, DONE, end=b"\r\n")
    yield stream("stream-cr", chat_answer(), *texts, stop, DONE, end=b"\r")
    yield stream("byte-order-mark", chat_answer(), b"\xef\xbb\xbf", *texts, stop, DONE)
    yield stream("no-newline-at-the-end", chat_answer(finish_reason=""), *texts, b"data: [DONE]")
    yield stream("no-done", chat_answer(), *texts, stop)
    yield stream("usage-chunk", chat_answer(usage=CHAT_COUNTS), *texts, stop, chunk(usage=CHAT_USAGE), DONE)
    yield stream(
        "usage-in-every-chunk",
        chat_answer(usage=Usage(7, 3)),
        chunk({"content": first}, usage={"prompt_tokens": 7, "total_tokens": 8, "completion_tokens": 1}),
        chunk({"content": second}, usage={"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2}),
        chunk({}, finish="stop", usage={"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": 3}),
        DONE,
    )
    yield stream(
        "azure-filter-results-first",
        chat_answer(),
        {
            "choices": [],
            "created": 0,
            "id": "",
            "model": "",
            "object": "",
            "prompt_filter_results": [{"prompt_index": 0}],
        },
        *texts,
        {**stop, "choices": [{**stop["choices"][0], "content_filter_results": {"hate": {"filtered": False}}}]},
        DONE,
    )
    yield stream(
        "comments", chat_answer(), b": OPENROUTER PROCESSING\n\n", *texts, b": OPENROUTER PROCESSING\n\n", stop, DONE
    )
    yield stream(
        "reasoning-apart",
        chat_answer(),
        chunk({"reasoning_content": "Let me think", "content": None}),
        chunk({"reasoning": "more"}),
        *texts,
        stop,
        DONE,
    )
    yield stream(
        "content-in-parts",
        chat_answer(),
        chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}),
        chunk({"content": [{"type": "text", "text": TEXT}, {"type": "other", "text": "no"}]}),
        stop,
        DONE,
    )
    yield stream("other-choices", chat_answer(), *texts, chunk({"content": "no"}, index=1, finish="length"), stop, DONE)
    yield stream(
        "refusal",
        chat_answer(text="", refusal="I can’t."),
        role,
        chunk({"refusal": "I "}),
        chunk({"refusal": "can’t."}),
        stop,
        DONE,
    )
    yield stream("length", chat_answer(finish_reason="length"), *texts, chunk({}, finish="length"), DONE)
    yield stream(
        "tool-calls",
        chat_answer(
            text="",
            finish_reason="tool_calls",
            tool_calls=(ToolCall("call_1", "weather", '{"city":"Köln"}'), ToolCall("call_2", "time", "{}")),
        ),
        chunk({"role": "assistant", "content": None}),
        chunk(call_delta(0, "", id="call_1", type="function", name="weather")),
        chunk(call_delta(0, '{"city":')),
        chunk(call_delta(0, '"Köln"}')),
        chunk(call_delta(1, "", id="call_2", type="function", name="time")),
        chunk(call_delta(1, "{}")),
        chunk({}, finish="tool_calls"),
        DONE,
    )
    yield stream(
        "tool-calls-all-at-index-0",
        chat_answer(text="", tool_calls=(ToolCall("a", "f", "{}"), ToolCall("b", "g", "[]"))),
        chunk(call_delta(0, "{}", id="a", name="f")),
        chunk(call_delta(0, "[]", id="b", name="g")),
        stop,
        DONE,
    )
    yield stream(
        "tool-calls-without-index",
        chat_answer(text="", tool_calls=(ToolCall("a", "f", '{"x":1}'), ToolCall("b", "g", '{"y":2}'))),
        chunk({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"x"'}}]}),
        chunk({"tool_calls": [{"function": {"arguments": ":1}"}}]}),
        chunk({"tool_calls": [{"id": "b", "function": {"name": "g", "arguments": {"y": 2}}}]}),
        stop,
        DONE,
    )
    yield stream(
        "function-call",
        chat_answer(text="", finish_reason="function_call", tool_calls=(ToolCall("", "weather", '{"city":"Bonn"}'),)),
        chunk({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ""}}),
        chunk({"function_call": {"arguments": '{"city":'}}),
        chunk({"function_call": {"arguments": '"Bonn"}'}}),
        chunk({}, finish="function_call"),
        DONE,
    )
    yield stream(
        "error-in-mid-stream",
        chat_answer(text=first, finish_reason="", error="server_error", has_ended=False),
        role,
        chunk({"content": first}),
        {"error": {"message": "The server had an error", "type": "server_error", "param": None, "code": None}},
    )
    yield stream(
        "error-event",
        chat_answer(text=first, finish_reason="", error="overloaded", has_ended=False),
        chunk({"content": first}),
        b'event: error\ndata: {"code":"overloaded","message":"Try again"}\n\n',
    )
    yield stream(
        "broken-off", chat_answer(text=first, finish_reason="", has_ended=False), *texts[:2], b'data: {"id":"chatc'
    )
    yield stream(
        "nothing-but-garbage", Completion(), b"<html><body>502 Bad Gateway</body></html>\r\n", b"data: keep-alive\n\n"
    )
    yield stream(
        "an-event-nobody-can-read",
        chat_answer(was_cut=True),
        *texts,
        b'data: {"choices": oops}\n\n',
        b"data:\n\n",
        stop,
    )
    message: Any = {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []}
    yield body("body", chat_answer(usage=CHAT_COUNTS), chat_body(message, usage=CHAT_USAGE, service_tier="default"))
    yield body("body-after-blank-lines", chat_answer(), b"\n\n \n" + chat_body(message) + b"\n")
    yield body("body-with-byte-order-mark", chat_answer(), b"\xef\xbb\xbf" + chat_body(message))
    yield body("body-called-a-stream", chat_answer(), chat_body(message), is_sse=True)
    yield body("stream-called-json", chat_answer(), sse(*texts, stop, DONE))
    yield body(
        "body-deepseek",
        chat_answer(usage=Usage(100, 5, 64, 3)),
        chat_body(
            {**message, "reasoning_content": "hm"},
            usage={
                "prompt_tokens": 100,
                "completion_tokens": 5,
                "prompt_cache_hit_tokens": 64,
                "prompt_cache_miss_tokens": 36,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
        ),
    )
    yield body(
        "body-tool-calls",
        chat_answer(
            text="", finish_reason="tool_calls", tool_calls=(ToolCall("c1", "f", "{}"), ToolCall("", "g", "[]"))
        ),
        chat_body(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"type": "function", "function": {"name": "g", "arguments": "[]"}},
                ],
            },
            "tool_calls",
        ),
    )
    yield body(
        "body-error",
        Completion(error="invalid_api_key", has_ended=True),
        compact({"error": {"message": "Wrong key", "type": "invalid_request_error", "code": "invalid_api_key"}}),
    )
    yield body(
        "body-error-without-code",
        Completion(error="invalid_request_error", has_ended=True),
        compact({"error": {"message": "No", "type": "invalid_request_error", "param": None, "code": None}}),
    )
    yield body("body-error-number", Completion(error="502", has_ended=True), compact({"error": {"code": 502}}))
    yield body(
        "body-error-sentence", Completion(error="error", has_ended=True), compact({"error": "model 'x' not found"})
    )
    yield body(
        "body-error-vllm",
        Completion(error="BadRequestError", has_ended=True),
        compact({"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400}),
    )
    yield body("body-broken-off", Completion(), chat_body(message)[:-20])
    yield body("body-not-json", Completion(), b"upstream connect error")
    yield body("nothing", Completion(), b"")


# OpenAI Responses


def response(status: str, output: Any = (), **more: Any) -> Any:
    return {
        "id": "resp_67c9fdcecf488190",
        "object": "response",
        "created_at": 1741290958,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": "You are helpful.",
        "model": "gpt-4.1-2025-04-14",
        "output": list(output),
        "tools": [],
        "usage": None,
        **more,
    }


RESPONSE_USAGE = {
    "input_tokens": 37,
    "input_tokens_details": {"cached_tokens": 12},
    "output_tokens": 11,
    "output_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 48,
}


def response_message(text: str = TEXT) -> Any:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": content}


def response_answer(**more: Any) -> Completion:
    given: dict[str, Any] = {
        "text": TEXT,
        "finish_reason": "completed",
        "model": "gpt-4.1-2025-04-14",
        "response_id": "resp_67c9fdcecf488190",
        "usage": Usage(37, 11, 12, 4),
        "has_ended": True,
        **more,
    }
    return Completion(**given)


def _responses() -> Iterable[Transcript]:
    def stream(name: str, expected: Completion, *events: Any) -> Transcript:
        return Transcript(f"responses-{name}", openai_responses, True, sse(*events, named=True), expected)

    def body(name: str, expected: Completion, tree: Any) -> Transcript:
        return Transcript(f"responses-{name}", openai_responses, False, compact(tree), expected)

    def text(delta: str) -> Any:
        at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        return {"type": "response.output_text.delta", **at, "delta": delta, "logprobs": [], "obfuscation": "x1y2"}

    def arguments(at: int, delta: str) -> Any:
        return {"type": "response.function_call_arguments.delta", "item_id": "fc", "output_index": at, "delta": delta}

    def call(name: str, given: str) -> Any:
        return {"type": "function_call", "id": "fc_1", "call_id": f"call_{name}", "name": name, "arguments": given}

    def item(kind: str, at: int, value: Any) -> Any:
        return {"type": f"response.output_item.{kind}", "output_index": at, "item": value}

    created = {"type": "response.created", "response": response("in_progress")}
    begin = [created, {"type": "response.in_progress", "response": response("in_progress")}]
    message = {"type": "message", "id": "msg_1", "status": "in_progress", "role": "assistant", "content": []}
    texts = [
        item("added", 0, message),
        {"type": "response.content_part.added", "output_index": 0, "part": {"type": "output_text", "text": ""}},
        *map(text, HALVES),
        {"type": "response.output_text.done", "output_index": 0, "content_index": 0, "text": TEXT},
        item("done", 0, response_message()),
    ]
    completed = response("completed", [response_message()], usage=RESPONSE_USAGE)
    yield stream("stream", response_answer(), *begin, *texts, {"type": "response.completed", "response": completed})
    yield Transcript(
        "responses-stream-without-types",
        openai_responses,
        True,
        b"event: response.output_text.delta\ndata: " + compact({"delta": TEXT}) + b"\n\n"
        b"event: response.completed\ndata: " + compact({"response": completed}) + b"\n\n",
        response_answer(),
    )
    yield stream("only-its-end", response_answer(), created, {"type": "response.completed", "response": completed})
    yield stream(
        "unknown-events",
        response_answer(),
        *begin,
        {"type": "response.reasoning_summary_text.delta", "delta": "hm", "output_index": 0},
        {"type": "response.something.delta", "delta": {"deep": [1]}, "output_index": 0},
        item("added", 0, {"type": "reasoning", "content": 5}),
        *texts,
        {"type": "response.completed", "response": completed},
        DONE,
    )
    yield stream(
        "refusal",
        response_answer(text="", refusal="No, sorry."),
        *begin,
        {"type": "response.refusal.delta", "output_index": 0, "content_index": 0, "delta": "No, "},
        {"type": "response.refusal.delta", "output_index": 0, "content_index": 0, "delta": "sorry."},
        {"type": "response.completed", "response": completed},
    )
    calls = (ToolCall("call_f", "f", '{"a":1}'), ToolCall("call_g", "g", '{"b":2}'), ToolCall("call_h", "h", "plain"))
    yield stream(
        "tool-calls",
        response_answer(text="", tool_calls=calls),
        *begin,
        item("added", 0, call("f", "")),
        arguments(0, '{"a"'),
        arguments(0, ":1}"),
        {"type": "response.function_call_arguments.done", "output_index": 0, "arguments": '{"a":1}'},
        item("done", 0, call("f", '{"a":1}')),
        item("added", 1, call("g", "")),
        {"type": "response.function_call_arguments.done", "output_index": 1, "arguments": '{"b":2}'},
        item("done", 2, {"type": "custom_tool_call", "call_id": "call_h", "name": "h", "input": "plain"}),
        {"type": "response.completed", "response": completed},
    )
    yield stream(
        "incomplete",
        response_answer(finish_reason="max_output_tokens"),
        *begin,
        *texts,
        {
            "type": "response.incomplete",
            "response": response(
                "incomplete", usage=RESPONSE_USAGE, incomplete_details={"reason": "max_output_tokens"}
            ),
        },
    )
    yield stream(
        "failed",
        response_answer(text=HALVES[0], finish_reason="failed", error="server_error", usage=Usage()),
        *begin,
        text(HALVES[0]),
        {
            "type": "response.failed",
            "response": response("failed", error={"code": "server_error", "message": "The model failed"}),
        },
    )
    unfinished = response_answer(text=HALVES[0], finish_reason="", usage=Usage(), has_ended=False)
    yield stream("broken-off", unfinished, *begin, text(HALVES[0]), b"event: response.output_te")
    yield stream(
        "error-in-mid-stream",
        Completion(
            text=HALVES[0], model=unfinished.model, response_id=unfinished.response_id, error="rate_limit_exceeded"
        ),
        *begin,
        text(HALVES[0]),
        {"type": "error", "code": "rate_limit_exceeded", "message": "Slow down", "param": None, "sequence_number": 5},
    )
    yield stream(
        "error-within-error",
        Completion(error="server_error"),
        {"type": "error", "error": {"type": "server_error", "code": None, "message": "x"}},
    )
    yield body(
        "body",
        response_answer(tool_calls=(ToolCall("call_f", "f", "{}"),), refusal="But no."),
        response(
            "completed",
            [
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": "odd"},
                response_message(),
                call("f", "{}"),
                {"type": "message", "content": [{"type": "refusal", "refusal": "But no."}]},
            ],
            usage=RESPONSE_USAGE,
        ),
    )
    yield body(
        "body-error",
        Completion(error="model_not_found", has_ended=True),
        {
            "error": {
                "message": "The model `x` does not exist",
                "type": "invalid_request_error",
                "code": "model_not_found",
            }
        },
    )


# Anthropic Messages


def anthropic_answer(**more: Any) -> Completion:
    given: dict[str, Any] = {
        "text": TEXT,
        "finish_reason": "end_turn",
        "model": "claude-sonnet-4-20250514",
        "response_id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "usage": Usage(25, 15),
        "has_ended": True,
        **more,
    }
    return Completion(**given)


def anthropic_message(content: Any = (), stop: str | None = None, **usage: int) -> Any:
    return {
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-20250514",
        "content": list(content),
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": usage,
    }


def _anthropic() -> Iterable[Transcript]:
    def stream(name: str, expected: Completion, *events: Any) -> Transcript:
        return Transcript(f"anthropic-{name}", anthropic_messages, True, sse(*events, named=True), expected)

    def body(name: str, expected: Completion, tree: Any) -> Transcript:
        return Transcript(f"anthropic-{name}", anthropic_messages, False, compact(tree), expected)

    def start(at: int, **block: Any) -> Any:
        return {"type": "content_block_start", "index": at, "content_block": block}

    def delta(at: int, kind: str, **value: Any) -> Any:
        return {"type": "content_block_delta", "index": at, "delta": {"type": kind, **value}}

    def stop(at: int) -> Any:
        return {"type": "content_block_stop", "index": at}

    def end(reason: str = "end_turn", **usage: int) -> list[Any]:
        last = {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage}
        return [last, {"type": "message_stop"}]

    begin = {"type": "message_start", "message": anthropic_message(input_tokens=25, output_tokens=1)}
    ping = {"type": "ping"}
    first, second = HALVES
    text = [
        start(0, type="text", text=""),
        ping,
        delta(0, "text_delta", text=first),
        delta(0, "text_delta", text=second),
    ]
    yield stream("stream", anthropic_answer(), begin, *text, stop(0), *end(output_tokens=15))
    yield Transcript(
        "anthropic-stream-without-types",
        anthropic_messages,
        True,
        b"event: content_block_delta\ndata: " + compact({"delta": {"type": "text_delta", "text": TEXT}}) + b"\n\n"
        b"event: message_stop\ndata: {}\n\n",
        Completion(text=TEXT, has_ended=True),
    )
    yield stream(
        "cached",
        anthropic_answer(usage=Usage(25 + 1000 + 200, 15, 1000)),
        {
            "type": "message_start",
            "message": anthropic_message(
                input_tokens=25, cache_read_input_tokens=1000, cache_creation_input_tokens=200, output_tokens=1
            ),
        },
        *text,
        stop(0),
        *end(output_tokens=15),
    )
    yield stream(
        "usage-only-at-the-end",
        anthropic_answer(usage=Usage(30, 15, 5)),
        {"type": "message_start", "message": anthropic_message(input_tokens=0, output_tokens=0)},
        *text,
        stop(0),
        *end(input_tokens=25, cache_read_input_tokens=5, output_tokens=15),
    )
    yield stream(
        "thinking-and-citations",
        anthropic_answer(),
        begin,
        start(0, type="thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking="Let me see"),
        delta(0, "signature_delta", signature="EqQB"),
        stop(0),
        start(1, type="text", text=""),
        delta(1, "text_delta", text=first),
        stop(1),
        start(2, type="text", text="", citations=[]),
        delta(2, "citations_delta", citation={"type": "char_location", "cited_text": "x", "text": "no"}),
        delta(2, "text_delta", text=second),
        stop(2),
        *end(output_tokens=15),
    )
    yield stream(
        "tool-use",
        anthropic_answer(
            text="Let me look.",
            finish_reason="tool_use",
            tool_calls=(ToolCall("toolu_1", "weather", '{"city": "Köln"}'), ToolCall("toolu_2", "time", "")),
        ),
        begin,
        start(0, type="text", text="Let me "),
        delta(0, "text_delta", text="look."),
        stop(0),
        start(1, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
        delta(1, "input_json_delta", partial_json='{"query":"x"}'),
        stop(1),
        start(2, type="tool_use", id="toolu_1", name="weather", input={}),
        delta(2, "input_json_delta", partial_json=""),
        delta(2, "input_json_delta", partial_json='{"city": '),
        delta(2, "input_json_delta", partial_json='"Köln"}'),
        stop(2),
        start(3, type="tool_use", id="toolu_2", name="time", input={}),
        stop(3),
        *end("tool_use", output_tokens=15),
    )
    yield stream(
        "max-tokens",
        anthropic_answer(finish_reason="max_tokens"),
        begin,
        *text,
        stop(0),
        *end("max_tokens", output_tokens=15),
    )
    unfinished = anthropic_answer(text=first, finish_reason="", usage=Usage(25), has_ended=False)
    yield stream("broken-off", unfinished, begin, *text[:3], b'event: content_block_delta\ndata: {"type":"cont')
    yield stream(
        "overloaded-in-mid-stream",
        anthropic_answer(text=first, finish_reason="", usage=Usage(25), has_ended=False, error="overloaded_error"),
        begin,
        *text[:3],
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    )
    yield body(
        "body",
        anthropic_answer(
            usage=Usage(1225, 15, 1000), tool_calls=(ToolCall("toolu_1", "weather", '{"city":"Köln"}'),), text=TEXT
        ),
        anthropic_message(
            [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": first},
                {"type": "text", "text": second, "citations": []},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
            ],
            "end_turn",
            input_tokens=25,
            cache_read_input_tokens=1000,
            cache_creation_input_tokens=200,
            output_tokens=15,
        ),
    )
    yield body(
        "body-error",
        Completion(error="not_found_error", has_ended=True),
        {"type": "error", "error": {"type": "not_found_error", "message": "model: x"}, "request_id": "req_1"},
    )


# Google Gemini


def generated(*parts: Any, finish: str | None = None, usage: Any = None, **more: Any) -> Any:
    candidate: Any = {"content": {"parts": list(parts), "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    answer = {"candidates": [candidate], "modelVersion": "gemini-2.5-flash", "responseId": "mAitaLmkHPPlz7IP", **more}
    return answer | ({"usageMetadata": usage} if usage else {})


GEMINI_USAGE = {
    "promptTokenCount": 500,
    "candidatesTokenCount": 20,
    "cachedContentTokenCount": 400,
    "thoughtsTokenCount": 30,
    "toolUsePromptTokenCount": 7,
    "totalTokenCount": 557,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 500}],
}


def gemini_answer(**more: Any) -> Completion:
    given: dict[str, Any] = {
        "text": TEXT,
        "finish_reason": "STOP",
        "model": "gemini-2.5-flash",
        "response_id": "mAitaLmkHPPlz7IP",
        "usage": Usage(507, 50, 400, 30),
        "has_ended": True,
        **more,
    }
    return Completion(**given)


def _gemini() -> Iterable[Transcript]:
    def made(name: str, expected: Completion, body: bytes, is_sse: bool = False) -> Transcript:
        return Transcript(f"gemini-{name}", gemini, is_sse, body, expected)

    def array(*events: Any) -> bytes:
        return b"[" + b"\n,\r\n".join(json.dumps(event, indent=2).encode() for event in events) + b"\n]\n"

    first, second = HALVES
    events = [
        generated(
            {"text": "Thinking about it", "thought": True}, usage={"promptTokenCount": 500, "totalTokenCount": 500}
        ),
        generated({"text": first}, usage={"promptTokenCount": 500, "candidatesTokenCount": 9}),
        generated({"text": second}, finish="STOP", usage=GEMINI_USAGE),
    ]
    yield made("stream", gemini_answer(), sse(*events, end=b"\r\n"), is_sse=True)
    yield made("array", gemini_answer(), array(*events))
    yield made("array-on-one-line", gemini_answer(), compact(events))
    yield made(
        "array-broken-off",
        gemini_answer(text=first, finish_reason="", has_ended=False, usage=Usage(500, 9)),
        array(*events)[:-150],
    )
    yield made("empty-array", Completion(), b"[]")
    yield made(
        "tool-calls",
        gemini_answer(
            text="",
            tool_calls=(ToolCall("", "weather", '{"city":"Köln ]}"}'), ToolCall("fc_2", "time", "")),
        ),
        sse(
            generated({"functionCall": {"name": "weather", "args": {"city": "Köln ]}"}}, "thoughtSignature": "Cv=="}),
            generated({"functionCall": {"id": "fc_2", "name": "time"}}, finish="STOP", usage=GEMINI_USAGE),
        ),
        is_sse=True,
    )
    yield made(
        "blocked-prompt",
        Completion(finish_reason="SAFETY", model="gemini-2.5-flash", usage=Usage(8), has_ended=True),
        compact(
            {
                "promptFeedback": {"blockReason": "SAFETY", "safetyRatings": []},
                "usageMetadata": {"promptTokenCount": 8, "totalTokenCount": 8},
                "modelVersion": "gemini-2.5-flash",
            }
        ),
    )
    yield made(
        "length",
        gemini_answer(finish_reason="MAX_TOKENS"),
        sse(*events[:2], generated({"text": second}, finish="MAX_TOKENS", usage=GEMINI_USAGE)),
        is_sse=True,
    )
    other = {"content": {"parts": [{"text": "no"}]}, "index": 1, "finishReason": "OTHER"}
    both = generated({"text": TEXT}, finish="STOP", usage=GEMINI_USAGE)
    yield made("body", gemini_answer(), compact({**both, "candidates": [*both["candidates"], other]}))
    error = {"error": {"code": 429, "message": "Quota of you@example.org", "status": "RESOURCE_EXHAUSTED"}}
    yield made("body-error", Completion(error="RESOURCE_EXHAUSTED", has_ended=True), compact(error))
    yield made("array-error", Completion(error="RESOURCE_EXHAUSTED"), array(error))
    yield made(
        "error-in-mid-stream",
        gemini_answer(text=first, finish_reason="", has_ended=False, usage=Usage(500, 9), error="RESOURCE_EXHAUSTED"),
        sse(*events[:2], error),
        is_sse=True,
    )


TRANSCRIPTS = (*_chat(), *_responses(), *_anthropic(), *_gemini())
