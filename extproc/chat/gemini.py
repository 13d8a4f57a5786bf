"""Google Gemini, also at Vertex AI: `POST …/models/{model}:generateContent` and `:streamGenerateContent`."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import msgspec
from msgspec import Raw

from extproc.chat._answer import AnswerLimits, AnswerReader, Usage
from extproc.chat._conversation import Turn, find_opening, read_conversation
from extproc.chat._draft import Draft
from extproc.chat._hash import hash_turns
from extproc.chat._json import ABSENT, decode, decode_body, is_array, is_object, is_string, read_count
from extproc.chat._loose import Counts, add, is_given, read_arguments, read_code, read_error, read_id, try_decode
from extproc.chat._place import element_place, key_place, prefix_place
from extproc.chat._reader import BodyReader
from extproc.chat._request import ChatRequest, Directive, Place, Placement, ReadLimits, UnreadableBody
from extproc.chat._route import segments
from extproc.chat._span import locate
from extproc.chat._splice import ArrayOf, MessageFrame, splice_texts

__all__ = ["hash_messages", "name", "read_answer", "read_request", "recognise", "splice"]

name = "gemini"

_STREAMING: Final = {"generateContent": False, "streamGenerateContent": True}
"""Methods of a model, and whether they stream."""


class _Content(Turn, gc=False):
    role: str | None = "user"
    content: Raw = msgspec.field(default=ABSENT, name="parts")


class _Text(msgspec.Struct, gc=False):
    text: Raw = ABSENT


class _Generation(msgspec.Struct, gc=False):
    camel: Raw = msgspec.field(default=ABSENT, name="maxOutputTokens")
    snake: Raw = msgspec.field(default=ABSENT, name="max_output_tokens")


class _Common(msgspec.Struct, gc=False, kw_only=True):
    system_camel: Raw = msgspec.field(default=ABSENT, name="systemInstruction")
    system_snake: Raw = msgspec.field(default=ABSENT, name="system_instruction")
    generation_camel: Raw = msgspec.field(default=ABSENT, name="generationConfig")
    generation_snake: Raw = msgspec.field(default=ABSENT, name="generation_config")


class _Body(_Common, gc=False):
    contents: list[_Content]


class _SingleBody(_Common, gc=False):
    contents: _Content
    """The API takes one content without its array, and its own examples are written so."""


class _Array(ArrayOf):
    array: Raw = msgspec.field(name="contents")


_decoder = msgspec.json.Decoder(_Body)
_single_decoder = msgspec.json.Decoder(_SingleBody)
_parts_decoder = msgspec.json.Decoder(_Content)
_text_decoder = msgspec.json.Decoder(_Text)
_generation_decoder = msgspec.json.Decoder(_Generation)
_TEXT_TYPES: frozenset[str | None] = frozenset({None})
_FRAME = MessageFrame(
    decoder=msgspec.json.Decoder(_Array),
    turns=msgspec.json.Decoder(list[_Content]),
    text_types=_TEXT_TYPES,
    user=b'{"role":"user","parts":[{"text":"',
    after=b'"}]}',
)


def recognise(method: str, path: str) -> bool:
    parts = segments(path)
    return method == "POST" and parts[-2:-1] == ["models"] and _model_and_method(parts)[1] in _STREAMING


def read_request(body: bytes, path: str, limits: ReadLimits) -> ChatRequest:
    """Model and streaming are in the path."""
    model, method = _model_and_method(segments(path))
    read = _decode(body)
    system = _system_place(body, read)
    if isinstance(read, _SingleBody):
        contents = [read.contents]
        found = read_conversation(body, contents, _TEXT_TYPES, limits, system)
        edits = replace(found.edits, user_index=-1, opening=find_opening(body, contents))
    else:
        contents = read.contents
        found = read_conversation(body, contents, _TEXT_TYPES, limits, system)
        edits = found.edits
    return ChatRequest(
        format=name,
        model=model,
        query=found.query,
        recent=found.recent,
        content_bytes=found.content_bytes,
        max_output_tokens=_max_output_tokens(read),
        is_streaming=_STREAMING.get(method, False),
        edits=edits,
    )


def splice(
    body: bytes, request: ChatRequest, text: str, placement: Placement, directive: Directive | None = None
) -> bytes:
    """`SYSTEM_FIRST` is a new first part of the system instruction, the beginning of its only part, or that key;
    `SYSTEM_APPEND` a new last part, the end of the only part, or that key.

    Neither is there where the instruction is `null` or has no parts; nor is BEFORE_LAST_USER where `contents` is no
    array, or where the last user message holds a function's response too: that must directly follow the model's call.
    """
    return splice_texts(body, request.edits, text, placement, directive, _FRAME)


def _model_and_method(parts: list[str]) -> tuple[str, str]:
    model, _, method = parts[-1].rpartition(":")
    return model, method


def _decode(body: bytes) -> _Body | _SingleBody:
    """The array first: a single content is refused as soon as it is met."""
    try:
        return decode_body(_decoder, body)
    except UnreadableBody as error:
        if error.reason != "wrong_type":
            raise
    return decode_body(_single_decoder, body)


def _system_place(body: bytes, read: _Common) -> Place | None:
    """Of two spellings of the key the later one counts, as with any duplicate key."""
    given = [raw for raw in (read.system_camel, read.system_snake) if raw is not ABSENT]
    if not given:
        return key_place(body, b'"systemInstruction":{"parts":[{"text":"', b'"}]}')
    instruction = max(given, key=lambda raw: locate(body, raw))
    parts = decode(_parts_decoder, instruction).content if is_object(instruction) else ABSENT
    if is_array(parts):
        return element_place(body, parts, b'{"text":"', b'"}')
    if is_object(parts):
        text = decode(_text_decoder, parts).text
        return prefix_place(body, text) if is_string(text) else None
    return None


def _max_output_tokens(read: _Common) -> int | None:
    for config in (read.generation_camel, read.generation_snake):
        if is_object(config):
            generation = decode(_generation_decoder, config)
            return read_count(generation.camel, generation.snake)
    return None


def hash_messages(body: bytes) -> str:
    """Of `contents`, whose `parts` are the content; a role that is not there is `user`."""
    contents = _decode(body).contents
    return hash_turns(contents if isinstance(contents, list) else [contents])


class _FunctionCall(msgspec.Struct, gc=False):
    id: Raw = ABSENT
    name: Raw = ABSENT
    args: Raw = ABSENT


class _AnswerPart(msgspec.Struct, gc=False):
    text: str | None = None
    thought: bool | None = None
    call: _FunctionCall | None = msgspec.field(default=None, name="functionCall")


class _AnswerContent(msgspec.Struct, gc=False):
    parts: list[_AnswerPart] | None = None


class _Candidate(msgspec.Struct, gc=False):
    index: int | None = 0
    content: _AnswerContent | None = None
    finish_reason: Raw = msgspec.field(default=ABSENT, name="finishReason")


class _PromptFeedback(msgspec.Struct, gc=False):
    block_reason: Raw = msgspec.field(default=ABSENT, name="blockReason")


class _Generated(msgspec.Struct, gc=False):
    """A body, or an event of a stream."""

    candidates: list[_Candidate] | None = None
    usage: Raw = msgspec.field(default=ABSENT, name="usageMetadata")
    model: Raw = msgspec.field(default=ABSENT, name="modelVersion")
    id: Raw = msgspec.field(default=ABSENT, name="responseId")
    prompt_feedback: Raw = msgspec.field(default=ABSENT, name="promptFeedback")
    error: Raw = ABSENT


_generated_decoder = msgspec.json.Decoder(_Generated)
_feedback_decoder = msgspec.json.Decoder(_PromptFeedback)


def read_answer(is_sse: bool, limits: AnswerLimits) -> AnswerReader:  # noqa: FBT001 - as in the protocol
    """Candidate 0 counts. A stream is events, or without `alt=sse` one JSON array.

    The end is a finish reason, or the reason why the prompt was blocked.
    """
    return BodyReader(is_sse, limits, _Answer(Draft(limits)))


class _Answer:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._calls = 0

    def take(self, name: bytes, piece: bytes) -> bool:  # noqa: ARG002 - the events have no names
        read = try_decode(_generated_decoder, piece)
        if read is None:
            return False
        for candidate in read.candidates or ():
            if not candidate.index:
                self._take_candidate(candidate)
        draft = self.draft
        if not (draft.model and draft.response_id):
            draft.name_answer(read.id, read.model)
        draft.note_usage(read.usage)
        if is_given(read.error):
            draft.note_error(read_error(read.error))
        if is_given(read.prompt_feedback):
            feedback = try_decode(_feedback_decoder, read.prompt_feedback)
            self._take_end(feedback.block_reason if feedback else ABSENT)
        return True

    def settle(self) -> None:
        usage = Counts(self.draft.last_usage)
        answer, thoughts = usage.get("candidatesTokenCount"), usage.get("thoughtsTokenCount")
        prompt = usage.get("promptTokenCount")
        self.draft.usage = Usage(
            input_tokens=None if prompt is None else add(prompt, usage.get("toolUsePromptTokenCount")),
            output_tokens=add(answer, thoughts),
            cached_input_tokens=usage.get("cachedContentTokenCount"),
            reasoning_tokens=thoughts,
        )

    def _take_candidate(self, candidate: _Candidate) -> None:
        for part in (candidate.content.parts or ()) if candidate.content else ():
            if part.text and not part.thought:
                self.draft.add_text(part.text)
            if part.call:
                self._calls += 1
                self.draft.open_call(self._calls, read_id(part.call.id), read_id(part.call.name))
                self.draft.add_arguments(self._calls, read_arguments(part.call.args))
        self._take_end(candidate.finish_reason)

    def _take_end(self, reason: Raw) -> None:
        if is_given(reason):
            self.draft.finish_reason = read_code(reason)
            self.draft.has_ended = True
