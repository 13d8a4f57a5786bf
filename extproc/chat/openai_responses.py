"""OpenAI Responses: `POST …/responses`."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from extproc.chat._conversation import Conversation, Turn, read_conversation
from extproc.chat._json import ABSENT, decode, is_string, read_count
from extproc.chat._request import ChatRequest, EditPoints, Place, Placement, ReadLimits, UnreadableBody
from extproc.chat._route import segments
from extproc.chat._splice import ArrayOf, MessageFrame, key_place, prefix_place, splice_block
from extproc.chat._text import is_text, read_text

__all__ = ["name", "read_request", "recognise", "splice"]

name = "openai_responses"


class _Item(Turn, gc=False):
    """A message, or something else, without a role: a call, its output, a reasoning item."""

    role: str | None = None
    output: Raw = ABSENT


class _Common(msgspec.Struct, gc=False, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    instructions: Raw = ABSENT
    max_output_tokens: Raw = ABSENT


class _ItemsBody(_Common, gc=False):
    input: list[_Item]


class _AnyBody(_Common, gc=False):
    input: Raw


class _Array(ArrayOf):
    array: Raw = msgspec.field(name="input")


_items_decoder = msgspec.json.Decoder(_ItemsBody)
_any_decoder = msgspec.json.Decoder(_AnyBody)
_TEXT_TYPES: frozenset[str | None] = frozenset({"input_text", "output_text"})
_FRAME = MessageFrame(msgspec.json.Decoder(_Array), b'{"role":"user","content":"', b'"}')


def recognise(method: str, path: str) -> bool:
    return method == "POST" and segments(path)[-1] == "responses"


def read_request(body: bytes, path: str, limits: ReadLimits) -> ChatRequest:  # noqa: ARG001 - same for all formats
    read = _decode(body)
    system = _system_place(body, read.instructions)
    if isinstance(read, _ItemsBody):
        outputs = (item.output for item in read.input)
        found = read_conversation(body, read.input, _TEXT_TYPES, limits, system, outputs)
    else:
        found = _read_string(body, read.input, limits, system)
    return ChatRequest(
        format=name,
        model=read.model or "",
        query=found.query,
        recent=found.recent,
        content_bytes=found.content_bytes,
        max_output_tokens=read_count(read.max_output_tokens),
        is_streaming=read.stream is True,
        edits=found.edits,
    )


def splice(body: bytes, request: ChatRequest, text: str, placement: Placement) -> bytes:
    """`SYSTEM_FIRST` is the beginning of `instructions`, or that key.

    It is LAST_USER where `instructions` is `null`, which cannot be kept. So is `BEFORE_LAST_USER` where `input` is a
    string.
    """
    return splice_block(body, request.edits, text, placement, _FRAME)


def _decode(body: bytes) -> _ItemsBody | _AnyBody:
    """Items first: that is what long bodies have, and a string is refused as soon as it is met."""
    try:
        return decode(_items_decoder, body)
    except UnreadableBody as error:
        if error.reason != "wrong_type":
            raise
    read = decode(_any_decoder, body)
    if not is_string(read.input):
        raise UnreadableBody("wrong_type")
    return read


def _read_string(body: bytes, text: Raw, limits: ReadLimits, system: Place | None) -> Conversation:
    if not is_text(text):
        return Conversation("", (), len(body), EditPoints(system=system))
    edits = EditPoints(last_user=prefix_place(body, text), system=system)
    return Conversation(read_text([text], limits.query_bytes), (), len(body), edits)


def _system_place(body: bytes, instructions: Raw) -> Place | None:
    if instructions is ABSENT:
        return key_place(body, b'"instructions":"', b'"')
    return prefix_place(body, instructions) if is_string(instructions) else None
