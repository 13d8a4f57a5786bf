"""Anthropic Messages: `POST …/messages`."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from extproc.chat._conversation import Turn, read_conversation
from extproc.chat._json import ABSENT, decode, is_array, is_string, read_count
from extproc.chat._request import ChatRequest, Place, Placement, ReadLimits
from extproc.chat._route import segments
from extproc.chat._splice import ArrayOf, MessageFrame, element_place, key_place, prefix_place, splice_block

__all__ = ["name", "read_request", "recognise", "splice"]

name = "anthropic_messages"


class _Body(msgspec.Struct, gc=False):
    messages: list[Turn]
    model: str | None = None
    stream: bool | None = None
    system: Raw = ABSENT
    max_tokens: Raw = ABSENT


class _Array(ArrayOf):
    array: Raw = msgspec.field(name="messages")


_decoder = msgspec.json.Decoder(_Body)
_TEXT_TYPES: frozenset[str | None] = frozenset({"text"})
_FRAME = MessageFrame(msgspec.json.Decoder(_Array), b'{"role":"user","content":"', b'"}')


def recognise(method: str, path: str) -> bool:
    """OpenAI's Assistants have `…/threads/{id}/messages`, which is something else."""
    parts = segments(path)
    return method == "POST" and parts[-1] == "messages" and parts[-3:-2] != ["threads"]


def read_request(body: bytes, path: str, limits: ReadLimits) -> ChatRequest:  # noqa: ARG001 - same for all formats
    read = decode(_decoder, body)
    system = _system_place(body, read.system)
    found = read_conversation(body, read.messages, _TEXT_TYPES, limits, system)
    return ChatRequest(
        format=name,
        model=read.model or "",
        query=found.query,
        recent=found.recent,
        content_bytes=found.content_bytes,
        max_output_tokens=read_count(read.max_tokens),
        is_streaming=read.stream is True,
        edits=found.edits,
    )


def splice(body: bytes, request: ChatRequest, text: str, placement: Placement) -> bytes:
    """`SYSTEM_FIRST` is the beginning of a `system` string, a new first block of an array, or that key.

    It is LAST_USER where `system` is `null`, which cannot be kept. So is `BEFORE_LAST_USER` where the last user
    message holds a tool's result too: that must directly follow the model's call.
    """
    return splice_block(body, request.edits, text, placement, _FRAME)


def _system_place(body: bytes, system: Raw) -> Place | None:
    if system is ABSENT:
        return key_place(body, b'"system":"', b'"')
    if is_string(system):
        return prefix_place(body, system)
    if is_array(system):
        return element_place(body, system, b'{"type":"text","text":"', b'"}')
    return None
