"""OpenAI Responses: `POST …/responses`."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from extproc.chat._answer import AnswerLimits, AnswerReader, Usage
from extproc.chat._conversation import Conversation, Turn, check_count, read_conversation
from extproc.chat._draft import Draft
from extproc.chat._hash import hash_turns
from extproc.chat._json import ABSENT, decode_body, is_string, read_count
from extproc.chat._loose import (
    Counts,
    is_given,
    read_arguments,
    read_code,
    read_error,
    read_id,
    read_string,
    try_decode,
)
from extproc.chat._place import key_place, prefix_place
from extproc.chat._reader import BodyReader
from extproc.chat._request import (
    ChatRequest,
    Directive,
    EditPoints,
    Opening,
    Place,
    Placement,
    ReadLimits,
    UnreadableBody,
)
from extproc.chat._route import segments
from extproc.chat._splice import ArrayOf, MessageFrame, splice_texts
from extproc.chat._text import is_text, read_text

__all__ = ["hash_messages", "name", "read_answer", "read_request", "recognise", "splice"]

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
_CALLS = {"function_call", "custom_tool_call"}
_FRAMES = {
    role: MessageFrame(
        decoder=msgspec.json.Decoder(_Array),
        turns=msgspec.json.Decoder(list[_Item]),
        text_types=_TEXT_TYPES,
        user=b'{"role":"user","content":"',
        after=b'"}',
        system=b'{"role":"%b","content":"' % role.encode(),
    )
    for role in ("system", "developer")
}


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


def splice(
    body: bytes, request: ChatRequest, text: str, placement: Placement, directive: Directive | None = None
) -> bytes:
    """`SYSTEM_FIRST` is the beginning of `instructions`, or that key; where it is `null`, which cannot be kept, a new
    first item of `input`. `SYSTEM_APPEND` is an item after the leading ones of the roles `system` and `developer`,
    which the model reads after `instructions`; without such items the end of `instructions`, or SYSTEM_FIRST.

    Our items are in the role `developer`, but `system` when the client's own first item has it. Where `input` is a
    string there is no place for an item, and none for BEFORE_LAST_USER.
    """
    role = "system" if request.edits.first_role == "system" else "developer"
    return splice_texts(body, request.edits, text, placement, directive, _FRAMES[role])


def _decode(body: bytes) -> _ItemsBody | _AnyBody:
    """Items first: that is what long bodies have, and a string is refused as soon as it is met."""
    try:
        return decode_body(_items_decoder, body)
    except UnreadableBody as error:
        if error.reason != "wrong_type":
            raise
    read = decode_body(_any_decoder, body)
    if not is_string(read.input):
        raise UnreadableBody("wrong_type")
    return read


def _read_string(body: bytes, text: Raw, limits: ReadLimits, system: Place | None) -> Conversation:
    if not is_text(text):
        return Conversation("", (), len(body), EditPoints(system=system, opening=Opening()))
    place = prefix_place(body, text)
    edits = EditPoints(last_user=place, system=system, opening=Opening(first_user_at=place.at - 1))
    return Conversation(read_text([text], limits.query_bytes), (), len(body), edits)


def _system_place(body: bytes, instructions: Raw) -> Place | None:
    if instructions is ABSENT:
        return key_place(body, b'"instructions":"', b'"')
    return prefix_place(body, instructions) if is_string(instructions) else None


def hash_messages(body: bytes) -> str:
    """Of the items of `input` that have a role; a string is one user message."""
    read = _decode(body)
    if isinstance(read, _AnyBody):
        return hash_turns([Turn("user", read.input)])
    check_count(read.input)
    return hash_turns([item for item in read.input if item.role is not None])


class _Part(msgspec.Struct, gc=False):
    type: str | None = None
    text: str | None = None
    refusal: str | None = None


class _Output(msgspec.Struct, gc=False):
    """An item of an answer: a message, a call, or what the provider did by itself."""

    type: str | None = None
    content: Raw = ABSENT
    call_id: Raw = ABSENT
    name: Raw = ABSENT
    arguments: Raw = ABSENT
    input: Raw = ABSENT
    """Of a call whose arguments are plain text."""


class _Reason(msgspec.Struct, gc=False):
    reason: Raw = ABSENT


class _Head(msgspec.Struct, gc=False, kw_only=True):
    """A body without what was said, which a stream has said before."""

    id: Raw = ABSENT
    model: Raw = ABSENT
    status: Raw = ABSENT
    error: Raw = ABSENT
    incomplete_details: Raw = ABSENT
    usage: Raw = ABSENT


class _Response(_Head, gc=False, kw_only=True):
    output: list[_Output] | None = None


class _Event(_Response, gc=False, kw_only=True):
    """An event, or a whole body, which has no type."""

    type: str | None = None
    delta: Raw = ABSENT
    output_index: int | None = None
    arguments: Raw = ABSENT
    item: Raw = ABSENT
    response: Raw = ABSENT


_head_decoder: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Head)
_response_decoder: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Response)
_event_decoder = msgspec.json.Decoder(_Event)
_output_decoder = msgspec.json.Decoder(_Output)
_parts_decoder = msgspec.json.Decoder(list[_Part])
_reason_decoder = msgspec.json.Decoder(_Reason)


def read_answer(is_sse: bool, limits: AnswerLimits) -> AnswerReader:  # noqa: FBT001 - as in the protocol
    """The end is one of `response.completed`, `.incomplete` and `.failed`.

    `finish_reason` is the response's status, and where that is `incomplete`, the reason it gives.
    """
    return BodyReader(is_sse, limits, _Answer(Draft(limits)))


class _Answer:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def take(self, name: bytes, piece: bytes) -> bool:
        read = try_decode(_event_decoder, piece)
        if read is None:
            return piece.strip() == b"[DONE]"  # some servers send Chat Completions' end too
        kind = read.type or name.decode("ascii", "replace")
        match kind:
            case "response.output_text.delta":
                self.draft.add_text(read_string(read.delta))
            case "response.refusal.delta":
                self.draft.add_refusal(read_string(read.delta))
            case "response.function_call_arguments.delta" | "response.custom_tool_call_input.delta":
                self.draft.add_arguments(read.output_index, read_string(read.delta))
            case "response.function_call_arguments.done":
                self._take_arguments(read.output_index, read.arguments)
            case "response.output_item.added" | "response.output_item.done":
                self._take_item(read.output_index, read.item)
            case "response.completed" | "response.incomplete" | "response.failed":
                self.draft.has_ended = True
                return self._take_end(read.response)
            case "response.created" | "response.in_progress":
                return self._take_begin(read.response)
            case "error":
                self.draft.note_error(read_error(read.error if is_given(read.error) else Raw(piece)))
            case "":
                self._take_response(read)
            case _:
                pass
        return True

    def settle(self) -> None:
        usage = Counts(self.draft.last_usage)
        self.draft.usage = Usage(
            input_tokens=usage.get("input_tokens"),
            output_tokens=usage.get("output_tokens"),
            cached_input_tokens=usage.inner("input_tokens_details").get("cached_tokens"),
            reasoning_tokens=usage.inner("output_tokens_details").get("reasoning_tokens"),
        )

    def _take_begin(self, raw: Raw) -> bool:
        """Its status is none that stays."""
        head = try_decode(_head_decoder, raw)
        if head is not None:
            self._take_head(head)
        return head is not None

    def _take_end(self, raw: Raw) -> bool:
        """What was said is read only where no event said it before."""
        response = try_decode(_head_decoder if self.draft.has_content() else _response_decoder, raw)
        if response is not None:
            self._take_response(response)
        return response is not None

    def _take_response(self, response: _Head) -> None:
        self._take_head(response)
        details = response.incomplete_details
        reason = try_decode(_reason_decoder, details) if is_given(details) else None
        found = read_code(reason.reason if reason else ABSENT, response.status)
        self.draft.finish_reason = found or self.draft.finish_reason
        if isinstance(response, _Response):
            for at, item in enumerate(response.output or ()):
                self._take_output(at, item)

    def _take_head(self, head: _Head) -> None:
        draft = self.draft
        draft.name_answer(head.id, head.model)
        draft.note_usage(head.usage)
        if is_given(head.error):
            draft.note_error(read_error(head.error))

    def _take_item(self, at: object, raw: Raw) -> None:
        """A call, when it begins and when it is whole. Messages come in events of their own."""
        item = try_decode(_output_decoder, raw)
        if item is not None and item.type in _CALLS:
            self._take_output(at, item)

    def _take_output(self, at: object, item: _Output) -> None:
        if item.type in _CALLS:
            if self.draft.open_id(at) is None:
                self.draft.open_call(at, read_id(item.call_id), read_id(item.name))
            self._take_arguments(at, item.input if item.arguments is ABSENT else item.arguments)
        elif item.type == "message":
            for part in try_decode(_parts_decoder, item.content) or ():
                if part.type == "output_text":
                    self.draft.add_text(part.text or "")
                elif part.type == "refusal":
                    self.draft.add_refusal(part.refusal or "")

    def _take_arguments(self, at: object, arguments: Raw) -> None:
        """The whole of them, unless they came before in pieces."""
        if not self.draft.has_arguments(at):
            self.draft.add_arguments(at, read_arguments(arguments))
