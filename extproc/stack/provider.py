"""A stand-in for LLM providers: OpenAI Chat Completions and Responses, Anthropic Messages, Gemini; JSON, SSE, no model.

It answers with what reached it, so that a newcomer sees the memory block in the answer, and it remembers the last
requests (`GET /received`, `DELETE /received`), so that a test sees every byte. Whatever a client sends, it gets an
answer in the provider's shape and never a traceback. The event shapes follow the providers' public API references.

Run it: `python -m extproc.stack.provider --listen 127.0.0.1:8081`.

A request may steer its own answer; a real provider ignores these headers:

| header | effect | range |
|---|---|---|
| x-standin-status | answers with this status, as an error in the provider's shape | 400 to 599 |
| x-standin-delay-ms | waits before the answer | 0 to 120000 |
| x-standin-chunk-delay-ms | waits before every event of a stream | 0 to 10000 |
| x-standin-response-header | `name: value`, added to the answer; may be repeated | 32 headers |
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import io
import json
import re
import time
import uuid
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from extproc.stack.envoy import Address

__all__ = ["create_app", "main"]

MAX_REQUESTS = 100
"""Requests that `/received` remembers."""
MAX_REMEMBERED_BYTES = 64 * 1024 * 1024
"""Bodies that `/received` remembers, in total: six of Envoy's largest."""
MAX_BODY_BYTES = 64 * 1024 * 1024
"""Largest body that is read, and largest one after decompression. Far above what Envoy lets through."""
MAX_ECHO_CHARACTERS = 16_384
"""Room for a memory block of the default 1,024 tokens and a message; longer texts are cut."""
CHUNK_CHARACTERS = 24
"""Text in one event of a stream: small enough that a short answer comes in several."""
GEMINI_PATH = re.compile("/v1(?:beta)?/models/(?P<model>[^/:]+):(?P<method>generateContent|streamGenerateContent)")
HEADER_NAME = re.compile("[a-z0-9-]{1,64}")
FRAMING_HEADERS = {"connection", "content-length", "transfer-encoding"}
"""A second one would make an answer that no client can read."""
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class UnreadableBody(Exception):
    """The body is not JSON of the kind a provider takes. The message is for the client."""


@dataclass(slots=True)
class Received:
    """The last requests, oldest first, bounded by number and by bytes."""

    requests: deque[tuple[dict[str, Any], int]] = field(default_factory=deque)
    total_bytes: int = 0

    def add(self, request: Request, body: bytes) -> None:
        entry = {
            "method": request.method,
            "path": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            "headers": {name: ", ".join(request.headers.getlist(name)) for name in request.headers},
            "body": base64.b64encode(body).decode("ascii"),
        }
        self.requests.append((entry, len(body)))
        self.total_bytes += len(body)
        while len(self.requests) > MAX_REQUESTS or self.total_bytes > MAX_REMEMBERED_BYTES:
            _, size = self.requests.popleft()
            self.total_bytes -= size

    def clear(self) -> None:
        self.requests.clear()
        self.total_bytes = 0

    def as_json(self) -> list[dict[str, Any]]:
        """Oldest first. A header that came twice is joined with a comma."""
        return [entry for entry, _ in self.requests]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one request asks for, and the answer to it."""

    model: str
    answer: str
    stream: bool
    wants_usage: bool
    """OpenAI chat only: `stream_options.include_usage`."""
    input_tokens: int
    output_tokens: int

    def pieces(self) -> list[str]:
        return [self.answer[at : at + CHUNK_CHARACTERS] for at in range(0, len(self.answer), CHUNK_CHARACTERS)]


class Shape(Protocol):
    """How one API writes an answer, a stream of events and an error."""

    def answer(self, turn: Turn) -> dict[str, Any]: ...
    def events(self, turn: Turn) -> Iterator[bytes]: ...
    def error(self, status: int, message: str) -> dict[str, Any]: ...


class OpenAIErrors:
    def error(self, status: int, message: str) -> dict[str, Any]:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class ChatCompletions(OpenAIErrors):
    """https://platform.openai.com/docs/api-reference/chat"""

    def answer(self, turn: Turn) -> dict[str, Any]:
        message = {"role": "assistant", "content": turn.answer, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return {**self._head("chat.completion", turn), "choices": [choice], "usage": self._usage(turn)}

    def events(self, turn: Turn) -> Iterator[bytes]:
        head = self._head("chat.completion.chunk", turn)
        if turn.wants_usage:
            head["usage"] = None
        deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": ""}, None)]
        deltas += [({"content": piece}, None) for piece in turn.pieces()]
        deltas.append(({}, "stop"))
        for delta, finish in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            yield sse({**head, "choices": [choice]})
        if turn.wants_usage:
            yield sse({**head, "choices": [], "usage": self._usage(turn)})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str, turn: Turn) -> dict[str, Any]:
        return {"id": new_id("chatcmpl-"), "object": kind, "created": int(time.time()), "model": turn.model}

    def _usage(self, turn: Turn) -> dict[str, int]:
        return {
            "prompt_tokens": turn.input_tokens,
            "completion_tokens": turn.output_tokens,
            "total_tokens": turn.input_tokens + turn.output_tokens,
        }


class Responses(OpenAIErrors):
    """https://platform.openai.com/docs/api-reference/responses and responses-streaming"""

    def answer(self, turn: Turn) -> dict[str, Any]:
        return self._response(turn, new_id("resp_"), "completed", [self._item(turn, new_id("msg_"))])

    def events(self, turn: Turn) -> Iterator[bytes]:
        response_id, item_id = new_id("resp_"), new_id("msg_")
        item = self._item(turn, item_id)
        begun = self._response(turn, response_id, "in_progress", [])
        empty, full = self._part(""), self._part(turn.answer)
        at_item: dict[str, Any] = {"output_index": 0}
        at_part: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0}
        steps: list[tuple[str, dict[str, Any]]] = [
            ("response.created", {"response": begun}),
            ("response.in_progress", {"response": begun}),
            ("response.output_item.added", {**at_item, "item": {**item, "status": "in_progress", "content": []}}),
            ("response.content_part.added", {**at_part, "part": empty}),
            *(("response.output_text.delta", {**at_part, "delta": piece, "logprobs": []}) for piece in turn.pieces()),
            ("response.output_text.done", {**at_part, "text": turn.answer, "logprobs": []}),
            ("response.content_part.done", {**at_part, "part": full}),
            ("response.output_item.done", {**at_item, "item": item}),
            ("response.completed", {"response": self._response(turn, response_id, "completed", [item])}),
        ]
        for number, (kind, rest) in enumerate(steps):
            yield sse({"type": kind, "sequence_number": number, **rest}, kind)

    def _response(self, turn: Turn, response_id: str, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {
            "input_tokens": turn.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": turn.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": turn.input_tokens + turn.output_tokens,
        }
        return {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": turn.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": usage if status == "completed" else None,
        }

    def _item(self, turn: Turn, item_id: str) -> dict[str, Any]:
        content = [self._part(turn.answer)]
        return {"id": item_id, "type": "message", "status": "completed", "role": "assistant", "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Messages:
    """https://docs.anthropic.com/en/api/messages and messages-streaming"""

    def answer(self, turn: Turn) -> dict[str, Any]:
        return self._message(turn, [{"type": "text", "text": turn.answer}], "end_turn", turn.output_tokens)

    def events(self, turn: Turn) -> Iterator[bytes]:
        text_block = {"type": "text", "text": ""}
        steps: list[dict[str, Any]] = [
            {"type": "message_start", "message": self._message(turn, [], None, 1)},
            {"type": "content_block_start", "index": 0, "content_block": text_block},
            {"type": "ping"},
        ]
        steps += [
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
                for piece in turn.pieces()
            ),
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": turn.output_tokens},
            },
            {"type": "message_stop"},
        ]
        for step in steps:
            yield sse(step, step["type"])

    def error(self, status: int, message: str) -> dict[str, Any]:
        kind = {404: "not_found_error", 429: "rate_limit_error", 529: "overloaded_error"}.get(
            status, "api_error" if status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": message}}

    def _message(
        self, turn: Turn, content: list[dict[str, Any]], stop: Literal["end_turn"] | None, output_tokens: int
    ) -> dict[str, Any]:
        return {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": turn.model,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": turn.input_tokens, "output_tokens": output_tokens},
        }


class GenerateContent:
    """https://ai.google.dev/api/generate-content; the model and whether to stream are in the path."""

    def answer(self, turn: Turn) -> dict[str, Any]:
        return self._response(turn, new_id("gemini-"), turn.answer, is_last=True)

    def events(self, turn: Turn) -> Iterator[bytes]:
        response_id, pieces = new_id("gemini-"), turn.pieces()
        for number, piece in enumerate(pieces, 1):
            yield sse(self._response(turn, response_id, piece, is_last=number == len(pieces)))

    def error(self, status: int, message: str) -> dict[str, Any]:
        kind = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
        return {"error": {"code": status, "message": message, "status": kind.get(status, "INTERNAL")}}

    def _response(self, turn: Turn, response_id: str, text: str, *, is_last: bool) -> dict[str, Any]:
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}
        usage = {"promptTokenCount": turn.input_tokens, "totalTokenCount": turn.input_tokens}
        if is_last:
            candidate["finishReason"] = "STOP"
            usage["candidatesTokenCount"] = turn.output_tokens
            usage["totalTokenCount"] += turn.output_tokens
        return {
            "candidates": [candidate],
            "usageMetadata": usage,
            "modelVersion": turn.model,
            "responseId": response_id,
        }


SHAPES: dict[str, Shape] = {
    "/v1/chat/completions": ChatCompletions(),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
}
MODELS = ("gpt-4o-mini", "gpt-4o", "claude-echo", "stand-in/echo")


def create_app() -> Starlette:
    """The stand-in with an empty memory of its own."""
    received = Received()

    async def show(_: Request) -> Response:
        return json_response(200, received.as_json())

    async def clear(_: Request) -> Response:
        received.clear()
        return Response(status_code=204)

    async def serve(request: Request) -> Response:
        try:
            body = await read_body(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        received.add(request, body)
        await asyncio.sleep(milliseconds(request, "x-standin-delay-ms", 120_000))
        response = respond(request, body)
        for name, value in wanted_headers(request):
            response.headers.append(name, value)
        return response

    return Starlette(
        routes=[
            Route("/received", show, methods=["GET"]),
            Route("/received", clear, methods=["DELETE"]),
            Route("/{path:path}", serve, methods=METHODS),
        ]
    )


async def read_body(request: Request) -> bytes:
    """The body as it came; cut above MAX_BODY_BYTES. Raises ClientDisconnect."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk[: MAX_BODY_BYTES - len(body)]
    return bytes(body)


def respond(request: Request, body: bytes) -> Response:
    path = request.url.path.rstrip("/")
    gemini = GEMINI_PATH.fullmatch(path)
    shape = GenerateContent() if gemini else SHAPES.get(path, ChatCompletions())
    if status := bounded(request.headers.get("x-standin-status"), 400, 599):
        return json_response(status, shape.error(status, f"The request asked for status {status}."))
    if path == "/v1/models" and request.method in {"GET", "HEAD"}:
        return json_response(200, models(for_anthropic="anthropic-version" in request.headers))
    if not (gemini or path in SHAPES) or request.method != "POST":
        return json_response(404, shape.error(404, f"Unknown request URL: {request.method} {request.url.path}."))
    try:
        turn = read_turn(decode(body, request.headers.get("content-encoding", "")))
    except UnreadableBody as error:
        return json_response(400, shape.error(400, str(error)))
    if gemini:
        turn = replace(turn, model=gemini["model"], stream=gemini["method"] == "streamGenerateContent")
    if not turn.stream:
        return json_response(200, shape.answer(turn))
    events = paced(shape.events(turn), milliseconds(request, "x-standin-chunk-delay-ms", 10_000))
    return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def paced(events: Iterator[bytes], delay_s: float) -> AsyncIterator[bytes]:
    for event in events:
        await asyncio.sleep(delay_s)
        yield event


def read_turn(body: Any) -> Turn:
    """Raises UnreadableBody when the body is no object."""
    if not isinstance(body, dict):
        raise UnreadableBody("The request body must be a JSON object.")
    model, options = body.get("model"), body.get("stream_options")
    text = last_user_text(body.get("messages", body.get("input", body.get("contents"))))
    answer = f"This is the stand-in provider. Your last message, as it reached me:\n\n{text[:MAX_ECHO_CHARACTERS]}"
    return Turn(
        model=model if isinstance(model, str) else "unknown",
        answer=answer,
        stream=body.get("stream") is True,
        wants_usage=isinstance(options, dict) and options.get("include_usage") is True,
        input_tokens=estimate_tokens(text),
        output_tokens=estimate_tokens(answer),
    )


def last_user_text(messages: Any) -> str:
    """The text of the last user message that has any; of a bare string (Responses) itself; else empty."""
    if isinstance(messages, str):
        return messages
    if isinstance(messages, list):
        for message in reversed(messages):
            if not isinstance(message, dict) or message.get("role", "user") != "user":
                continue
            if text := plain(message.get("content", message.get("parts"))):
                return text
    return ""


def plain(content: Any) -> str:
    """Text of a content: a string, or the `text` of each of its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))


def estimate_tokens(text: str) -> int:
    """Four characters a token, the usual rule of thumb for English."""
    return max(1, len(text) // 4)


def decode(body: bytes, encoding: str) -> Any:
    """JSON of a body that may be compressed. Raises UnreadableBody."""
    inflate: dict[str, Callable[[bytes], bytes]] = {"": bytes, "identity": bytes, "gzip": gunzip, "deflate": undeflate}
    try:
        return json.loads(inflate[encoding.strip().lower()](body))
    except KeyError:
        raise UnreadableBody(f"Cannot read content-encoding {encoding!r}.") from None
    except (ValueError, RecursionError, OSError, EOFError, zlib.error):
        raise UnreadableBody("We could not parse the JSON body of your request.") from None


def gunzip(body: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as stream:
        return stream.read(MAX_BODY_BYTES)


def undeflate(body: bytes) -> bytes:
    return zlib.decompressobj().decompress(body, MAX_BODY_BYTES)


def models(*, for_anthropic: bool) -> dict[str, Any]:
    if not for_anthropic:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "stand-in"} for name in MODELS],
        }
    entries = [
        {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"} for name in MODELS
    ]
    return {"data": entries, "first_id": MODELS[0], "last_id": MODELS[-1], "has_more": False}


def wanted_headers(request: Request) -> list[tuple[str, str]]:
    """Headers that the request wants on its answer, as `name: value`; what cannot be a header is left out."""
    wanted = []
    for text in request.headers.getlist("x-standin-response-header")[:32]:
        name, _, value = text.partition(":")
        name = name.strip().lower()
        if HEADER_NAME.fullmatch(name) and name not in FRAMING_HEADERS:
            wanted.append((name, value.strip()))
    return wanted


def milliseconds(request: Request, header: str, most: int) -> float:
    """Seconds, from a header in milliseconds; 0 when it is absent or out of range."""
    return (bounded(request.headers.get(header), 0, most) or 0) / 1000


def bounded(text: str | None, least: int, most: int) -> int | None:
    """None when the text is no integer in the range."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 9:
        return None
    number = int(text)
    return number if least <= number <= most else None


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def encode(value: Any) -> bytes:
    """JSON in ASCII: a lone surrogate that a client sent has no UTF-8 form, but has an escape."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def sse(value: Any, event: str = "") -> bytes:
    """One server-sent event; OpenAI's chat events have no name."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + encode(value) + b"\n\n"


def json_response(status: int, value: Any) -> Response:
    return Response(encode(value), status_code=status, media_type="application/json")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A stand-in for LLM providers.")
    parser.add_argument("--listen", default="127.0.0.1:8081", metavar="HOST:PORT", type=Address.parse)
    listen: Address = parser.parse_args(arguments).listen
    # Longer than Envoy keeps an idle connection (30 s): who closes first never sends into a closed one.
    uvicorn.run(
        create_app(), host=listen.host, port=listen.port, log_level="warning", access_log=False, timeout_keep_alive=75
    )


if __name__ == "__main__":
    main()
