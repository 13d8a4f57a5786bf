"""OpenAI Chat Completions: `POST …/chat/completions`, as OpenAI, Azure, vLLM and most gateways serve it."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from extproc.chat._answer import AnswerLimits, AnswerReader, Usage
from extproc.chat._conversation import Turn, read_conversation
from extproc.chat._draft import Draft
from extproc.chat._hash import hash_turns
from extproc.chat._json import ABSENT, decode_body, read_count
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
from extproc.chat._reader import BodyReader
from extproc.chat._request import ChatRequest, Directive, Placement, ReadLimits
from extproc.chat._route import segments
from extproc.chat._splice import ArrayOf, MessageFrame, splice_texts

__all__ = ["hash_messages", "name", "read_answer", "read_request", "recognise", "splice"]

name = "openai_chat"


class _Body(msgspec.Struct, gc=False):
    messages: list[Turn]
    model: str | None = None
    stream: bool | None = None
    max_tokens: Raw = ABSENT
    max_completion_tokens: Raw = ABSENT


class _Array(ArrayOf):
    array: Raw = msgspec.field(name="messages")


_decoder = msgspec.json.Decoder(_Body)
_TEXT_TYPES: frozenset[str | None] = frozenset({"text"})
_FRAMES = {
    role: MessageFrame(
        decoder=msgspec.json.Decoder(_Array),
        turns=msgspec.json.Decoder(list[Turn]),
        text_types=_TEXT_TYPES,
        user=b'{"role":"user","content":"',
        after=b'"}',
        system=b'{"role":"%b","content":"' % role.encode(),
    )
    for role in ("system", "developer")
}


def recognise(method: str, path: str) -> bool:
    return method == "POST" and segments(path)[-2:] == ["chat", "completions"]


def read_request(body: bytes, path: str, limits: ReadLimits) -> ChatRequest:
    """Without a `model`, it is the deployment in an Azure path."""
    read = decode_body(_decoder, body)
    found = read_conversation(body, read.messages, _TEXT_TYPES, limits)
    return ChatRequest(
        format=name,
        model=read.model or _deployment(path),
        query=found.query,
        recent=found.recent,
        content_bytes=found.content_bytes,
        max_output_tokens=read_count(read.max_completion_tokens, read.max_tokens),
        is_streaming=read.stream is True,
        edits=found.edits,
    )


def splice(
    body: bytes, request: ChatRequest, text: str, placement: Placement, directive: Directive | None = None
) -> bytes:
    """`SYSTEM_FIRST` is a new first message, `SYSTEM_APPEND` one after the leading messages of the roles `system` and
    `developer`. Both are in the role `developer` when the client's own first message has it: models that take it
    refuse a mixture.
    """
    role = "developer" if request.edits.first_role == "developer" else "system"
    return splice_texts(body, request.edits, text, placement, directive, _FRAMES[role])


def _deployment(path: str) -> str:
    parts = segments(path)
    return parts[-3] if parts[-4:-3] == ["deployments"] else ""


def hash_messages(body: bytes) -> str:
    """Of `messages`."""
    return hash_turns(decode_body(_decoder, body).messages)


class _TextPart(msgspec.Struct, gc=False):
    type: str | None = None
    text: str | None = None


class _Function(msgspec.Struct, gc=False):
    name: Raw = ABSENT
    arguments: Raw = ABSENT


class _Call(msgspec.Struct, gc=False):
    index: int | None = None
    id: Raw = ABSENT
    function: _Function | None = None


class _Message(msgspec.Struct, gc=False):
    """A whole message, or what an event adds to it."""

    content: str | list[_TextPart] | None = None
    """Parts come from Mistral's models that reason."""
    refusal: str | None = None
    tool_calls: list[_Call] | None = None
    function_call: _Function | None = None
    """How tools were called before `tool_calls`; there is one at most."""


class _Choice(msgspec.Struct, gc=False):
    index: int | None = 0
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: Raw = ABSENT


class _Completion(msgspec.Struct, gc=False):
    """A body, or an event of a stream."""

    choices: list[_Choice] | None = None
    usage: Raw = ABSENT
    id: Raw = ABSENT
    model: Raw = ABSENT
    error: Raw = ABSENT
    object: Raw = ABSENT


_completion_decoder = msgspec.json.Decoder(_Completion)


def read_answer(is_sse: bool, limits: AnswerLimits) -> AnswerReader:  # noqa: FBT001 - as in the protocol
    """Choice 0 counts. The end is `[DONE]` or a finish reason, since some servers leave out the one or the other."""
    return BodyReader(is_sse, limits, _Answer(Draft(limits)))


class _Answer:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def take(self, name: bytes, piece: bytes) -> bool:  # noqa: ARG002 - the events have no names
        read = try_decode(_completion_decoder, piece)
        if read is None:
            return self._take_done(piece)
        draft = self.draft
        if read.choices:
            for choice in read.choices:
                if not choice.index:
                    self._take_choice(choice)
        if not (draft.model and draft.response_id):
            draft.name_answer(read.id, read.model)
        draft.note_usage(read.usage)
        if is_given(read.error):
            draft.note_error(read_error(read.error))
        elif read.choices is None and read_string(read.object) == "error":  # vLLM's were not inside of an `error`
            draft.note_error(read_error(Raw(piece)))
        return True

    def settle(self) -> None:
        usage = Counts(self.draft.last_usage)
        cached = usage.inner("prompt_tokens_details").get("cached_tokens")
        self.draft.usage = Usage(
            input_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            cached_input_tokens=usage.get("prompt_cache_hit_tokens") if cached is None else cached,  # DeepSeek's name
            reasoning_tokens=usage.inner("completion_tokens_details").get("reasoning_tokens"),
        )

    def _take_done(self, piece: bytes) -> bool:
        is_done = piece.strip() == b"[DONE]"
        self.draft.has_ended |= is_done
        return is_done

    def _take_choice(self, choice: _Choice) -> None:
        if choice.delta:
            self._take_message(choice.delta)
            for call in choice.delta.tool_calls or ():
                self._take_call(call.index or 0, call)
        elif choice.message:
            self._take_message(choice.message)
            for at, call in enumerate(choice.message.tool_calls or ()):
                self._take_call(at, call)
        if is_given(choice.finish_reason):
            self.draft.finish_reason = read_code(choice.finish_reason)
            self.draft.has_ended = True

    def _take_message(self, message: _Message) -> None:
        content = message.content
        if isinstance(content, str):
            self.draft.add_text(content)
        elif content:
            for part in content:
                if part.type == "text":
                    self.draft.add_text(part.text or "")
        if message.refusal:
            self.draft.add_refusal(message.refusal)
        if message.function_call:
            self._take_call("function_call", _Call(function=message.function_call))

    def _take_call(self, key: object, call: _Call) -> None:
        """Some servers give all calls index 0, or none, and an id to each."""
        call_id = read_id(call.id)
        known_id = self.draft.open_id(key)
        if known_id is None or (call_id and known_id and call_id != known_id):
            self.draft.open_call(key, call_id, read_id(call.function.name) if call.function else "")
        if call.function:
            self.draft.add_arguments(key, read_arguments(call.function.arguments))
