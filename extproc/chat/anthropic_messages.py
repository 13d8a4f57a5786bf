"""Anthropic Messages: `POST …/messages`."""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from extproc.chat._answer import AnswerLimits, AnswerReader, Usage
from extproc.chat._conversation import Turn, read_conversation
from extproc.chat._draft import Draft
from extproc.chat._hash import hash_turns
from extproc.chat._json import ABSENT, decode_body, is_array, is_string, read_count
from extproc.chat._loose import Counts, add, is_given, read_arguments, read_code, read_error, read_id, try_decode
from extproc.chat._place import element_place, key_place, prefix_place
from extproc.chat._reader import BodyReader
from extproc.chat._request import ChatRequest, Directive, Place, Placement, ReadLimits
from extproc.chat._route import segments
from extproc.chat._splice import ArrayOf, MessageFrame, splice_texts

__all__ = ["hash_messages", "name", "read_answer", "read_request", "recognise", "splice"]

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
_is_empty_object = re.compile(rb"\{\s*+\}").fullmatch
_TEXT_TYPES: frozenset[str | None] = frozenset({"text"})
_FRAME = MessageFrame(
    decoder=msgspec.json.Decoder(_Array),
    turns=msgspec.json.Decoder(list[Turn]),
    text_types=_TEXT_TYPES,
    user=b'{"role":"user","content":"',
    after=b'"}',
)


def recognise(method: str, path: str) -> bool:
    """OpenAI's Assistants have `…/threads/{id}/messages`, which is something else."""
    parts = segments(path)
    return method == "POST" and parts[-1] == "messages" and parts[-3:-2] != ["threads"]


def read_request(body: bytes, path: str, limits: ReadLimits) -> ChatRequest:  # noqa: ARG001 - same for all formats
    read = decode_body(_decoder, body)
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


def splice(
    body: bytes, request: ChatRequest, text: str, placement: Placement, directive: Directive | None = None
) -> bytes:
    """`SYSTEM_FIRST` is the beginning of a `system` string, a new first block of an array, or that key;
    `SYSTEM_APPEND` the end of the string, a new last block, or that key.

    Neither is there where `system` is `null`, which cannot be kept. Our blocks have no `cache_control`: the provider
    takes four in a request, and the client's own count. Those cache what stands before them too: a directive in front
    is cached with the client's blocks, one at the end is read after them at full price until a later mark.

    There is no BEFORE_LAST_USER where the last user message holds a tool's result too: that must directly follow the
    model's call. USER_PREPEND goes into a text and never before such a result, which has to be first in its message.
    """
    return splice_texts(body, request.edits, text, placement, directive, _FRAME)


def _system_place(body: bytes, system: Raw) -> Place | None:
    if system is ABSENT:
        return key_place(body, b'"system":"', b'"')
    if is_string(system):
        return prefix_place(body, system)
    if is_array(system):
        return element_place(body, system, b'{"type":"text","text":"', b'"}')
    return None


def hash_messages(body: bytes) -> str:
    """Of `messages`; `system` is not one."""
    return hash_turns(decode_body(_decoder, body).messages)


class _Block(msgspec.Struct, gc=False):
    type: str | None = None
    text: str | None = None
    id: Raw = ABSENT
    name: Raw = ABSENT
    input: Raw = ABSENT


class _Delta(msgspec.Struct, gc=False):
    """Of a block, or of the whole message."""

    type: str | None = None
    text: str | None = None
    partial_json: str | None = None
    stop_reason: Raw = ABSENT


class _Message(msgspec.Struct, gc=False):
    """A whole body, or as a stream begins it."""

    content: list[_Block] | None = None
    id: Raw = ABSENT
    model: Raw = ABSENT
    stop_reason: Raw = ABSENT
    usage: Raw = ABSENT


class _Event(msgspec.Struct, gc=False):
    type: str | None = None
    index: int | None = None
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: Raw = ABSENT
    usage: Raw = ABSENT
    error: Raw = ABSENT


_message_decoder = msgspec.json.Decoder(_Message)
_event_decoder = msgspec.json.Decoder(_Event)


def read_answer(is_sse: bool, limits: AnswerLimits) -> AnswerReader:  # noqa: FBT001 - as in the protocol
    """The end is `message_stop`."""
    return BodyReader(is_sse, limits, _Answer(Draft(limits)))


class _Answer:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._first_usage = b""

    def take(self, name: bytes, piece: bytes) -> bool:
        read = try_decode(_event_decoder, piece)
        if read is None:
            return False
        match read.type or name.decode("ascii", "replace"):
            case "content_block_delta":
                self._take_delta(read)
            case "content_block_start":
                if read.content_block:
                    self._take_block(read.index, read.content_block, is_whole=False)
            case "message_start":
                return self._take_message(read.message, is_whole=False)
            case "message_delta":
                self._take_end(read.delta.stop_reason if read.delta else ABSENT)
                self.draft.note_usage(read.usage)
            case "message_stop":
                self.draft.has_ended = True
            case "error" | "":
                self.draft.note_error(read_error(read.error))
            case "message":
                return self._take_message(Raw(piece), is_whole=True)
            case _:
                pass
        return True

    def settle(self) -> None:
        """A stream counts its input in its first event and everything in its last. Where both do, the larger is right:
        counts only grow, and some servers write 0 for what they do not know yet.

        What the first event says of the output is a placeholder, so a stream that broke off has no count of it.
        """
        first, last = Counts(self._first_usage), Counts(self.draft.last_usage)

        def larger(name: str) -> int | None:
            return max((count for count in (first.get(name), last.get(name)) if count is not None), default=None)

        uncached, cached = larger("input_tokens"), larger("cache_read_input_tokens")
        self.draft.usage = Usage(
            input_tokens=None if uncached is None else add(uncached, cached, larger("cache_creation_input_tokens")),
            output_tokens=last.get("output_tokens"),
            cached_input_tokens=cached,
        )

    def _take_delta(self, event: _Event) -> None:
        delta = event.delta
        if delta is None:
            return
        if delta.type == "text_delta":
            self.draft.add_text(delta.text or "")
        elif delta.type == "input_json_delta":
            self.draft.add_arguments(event.index, delta.partial_json or "")

    def _take_block(self, at: object, block: _Block, *, is_whole: bool) -> None:
        if block.type == "text":
            self.draft.add_text(block.text or "")
        elif block.type == "tool_use":
            self.draft.open_call(at, read_id(block.id), read_id(block.name))
            if is_whole or not _is_empty_object(block.input):
                self.draft.add_arguments(at, read_arguments(block.input))
        else:
            self.draft.close_call(at)

    def _take_message(self, raw: Raw, *, is_whole: bool) -> bool:
        message = try_decode(_message_decoder, raw)
        if message is None:
            return False
        for at, block in enumerate(message.content or ()):
            self._take_block(at, block, is_whole=is_whole)
        self.draft.name_answer(message.id, message.model)
        self._take_end(message.stop_reason)
        if is_whole:
            self.draft.note_usage(message.usage)
        else:
            self._first_usage = bytes(message.usage)
        return True

    def _take_end(self, stop_reason: Raw) -> None:
        if is_given(stop_reason):
            self.draft.finish_reason = read_code(stop_reason)
