"""Streamed answers as providers send them, from fixed seeds: the same bytes in every process and run. Pure."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["ANSWER_HEADER", "Answer", "chunks", "question"]

ANSWER_HEADER = "x-bench-answer"
"""A request header, `Answer.to_header` its value: what the provider shall answer, and how fast."""

_TEXT = (
    " the of and to in is that for it as was with be by on not he his but at are this have from or had an they which"
    " one you were her all she there would their we him been has when who will more no if out so said what up its"
)
_WORDS = tuple(re.findall(" [a-z]+", _TEXT))
"""As tokens are, with the space before."""

_ID = "chatcmpl-CQ3vX0m1yT8wLbE7kJ2sNfRzUoHaG"
_MODEL = "gpt-4o-mini-2024-07-18"


@dataclass(frozen=True, slots=True)
class Answer:
    chat_format: str
    """`openai` (Chat Completions) or `anthropic` (Messages)."""
    events_per_chunk: int
    chunks: int
    """At least 3: the first holds the opening events, the last the closing ones."""
    pause_ms: int
    """Between two chunks."""

    def to_header(self) -> str:
        return f"{self.chat_format} {self.events_per_chunk} {self.chunks} {self.pause_ms}"

    @classmethod
    def from_header(cls, value: str) -> Answer:
        """Raises ValueError."""
        chat_format, *numbers = value.split()
        events_per_chunk, count, pause_ms = (int(number) for number in numbers)
        if chat_format not in _FORMATS or events_per_chunk < 1 or count < 3 or pause_ms < 0:
            raise ValueError(f"no answer is called {value!r}")
        return cls(chat_format, events_per_chunk, count, pause_ms)

    @property
    def path(self) -> str:
        """Where a client asks for it."""
        return "/v1/messages" if self.chat_format == "anthropic" else "/v1/chat/completions"


@cache
def chunks(answer: Answer) -> tuple[bytes, ...]:
    """What the provider writes at once, in order."""
    opening, delta, closing = _FORMATS[answer.chat_format]
    choose = random.Random(1).choice
    middle = [b"".join(delta(choose(_WORDS)) for _ in range(answer.events_per_chunk)) for _ in range(answer.chunks - 2)]
    return (opening, *middle, closing)


def question(answer: Answer) -> bytes:
    """A request's body of about 2 KB."""
    draw = random.Random(2)
    text = "".join(draw.choices(_WORDS, k=400))
    body: dict[str, Any] = {"stream": True, "messages": [{"role": "user", "content": f"{text[1:]}. Tell me a story."}]}
    if answer.chat_format == "anthropic":
        return json.dumps({"model": "claude-sonnet-4-5", "max_tokens": 4096, **body}).encode()
    return json.dumps({"model": "gpt-4o-mini", "stream_options": {"include_usage": True}, **body}).encode()


def _openai(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
    """About 220 bytes for one word."""
    head = {"id": _ID, "object": "chat.completion.chunk", "created": 1760000000, "model": _MODEL}
    return b"data: " + _json({**head, "choices": choices} | ({"usage": usage} if usage else {})) + b"\n\n"


def _openai_choice(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    return _openai([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])


def _openai_delta(text: str) -> bytes:
    return _openai_choice({"content": text})


def _anthropic(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _json({"type": kind, **fields}) + b"\n\n"


def _anthropic_delta(text: str) -> bytes:
    return _anthropic("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


_OPENAI_USAGE = {"prompt_tokens": 420, "completion_tokens": 200, "total_tokens": 620}
_ANTHROPIC_MESSAGE: dict[str, Any] = {
    "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 420, "output_tokens": 1},
}

_FORMATS = {
    "openai": (
        _openai_choice({"role": "assistant", "content": ""}),
        _openai_delta,
        _openai_choice({}, "stop") + _openai([], _OPENAI_USAGE) + b"data: [DONE]\n\n",
    ),
    "anthropic": (
        _anthropic("message_start", message=_ANTHROPIC_MESSAGE)
        + _anthropic("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        _anthropic_delta,
        _anthropic("content_block_stop", index=0)
        + _anthropic(
            "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 200}
        )
        + _anthropic("message_stop"),
    ),
}
"""Opening events, one delta of a text, closing events."""
