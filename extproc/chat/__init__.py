"""Chat formats: read a provider's request body, insert one block into it without touching any other byte, and read the
answer.

Pure functions and feed-and-take objects over bytes: no I/O, no clock, no log. The rule of the room: what comes out of a
splice is `body[:p] + inserted + body[p:]`, and whatever a client sends, reading it either works or raises
UnreadableBody; whatever a provider sends, reading it works, as far as it goes.

Each public module is one format: OpenAI Chat Completions, OpenAI Responses, Anthropic Messages, Google Gemini.
"""

from __future__ import annotations

from extproc.chat import anthropic_messages, gemini, openai_chat, openai_responses
from extproc.chat._answer import AnswerLimits, AnswerReader, Completion, ToolCall, Usage
from extproc.chat._encoding import ContentDecoder, content_decoder
from extproc.chat._hash import hash_text
from extproc.chat._request import (
    ChatFormat,
    ChatRequest,
    Directive,
    InjectionMode,
    Message,
    Placement,
    ReadLimits,
    UnreadableBody,
    injection_mode,
)
from extproc.chat._route import is_event_stream, is_json

__all__ = [
    "AnswerLimits",
    "AnswerReader",
    "ChatFormat",
    "ChatRequest",
    "Completion",
    "ContentDecoder",
    "Directive",
    "InjectionMode",
    "Message",
    "Placement",
    "ReadLimits",
    "ToolCall",
    "UnreadableBody",
    "Usage",
    "content_decoder",
    "hash_text",
    "injection_mode",
    "is_event_stream",
    "is_json",
    "recognise",
]

_FORMATS: tuple[ChatFormat, ...] = (openai_chat, anthropic_messages, openai_responses, gemini)


def recognise(method: str, path: str, content_type: str) -> ChatFormat | None:
    """The format by `:method`, `:path` and `content-type` (empty when absent); None: this is no chat request."""
    if not is_json(content_type):
        return None
    return next((chat_format for chat_format in _FORMATS if chat_format.recognise(method, path)), None)
