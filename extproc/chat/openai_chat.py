"""OpenAI Chat Completions: `POST …/chat/completions`, as OpenAI, Azure, vLLM and most gateways serve it."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from extproc.chat._conversation import Turn, read_conversation
from extproc.chat._json import ABSENT, decode, read_count
from extproc.chat._request import ChatRequest, Placement, ReadLimits
from extproc.chat._route import segments
from extproc.chat._splice import ArrayOf, MessageFrame, splice_block

__all__ = ["name", "read_request", "recognise", "splice"]

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
        msgspec.json.Decoder(_Array), b'{"role":"user","content":"', b'"}', b'{"role":"%b","content":"' % role.encode()
    )
    for role in ("system", "developer")
}


def recognise(method: str, path: str) -> bool:
    return method == "POST" and segments(path)[-2:] == ["chat", "completions"]


def read_request(body: bytes, path: str, limits: ReadLimits) -> ChatRequest:
    """Without a `model`, it is the deployment in an Azure path."""
    read = decode(_decoder, body)
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


def splice(body: bytes, request: ChatRequest, text: str, placement: Placement) -> bytes:
    """`SYSTEM_FIRST` is a new first message, in the role `developer` when the client's own first message has it."""
    role = "developer" if request.edits.first_role == "developer" else "system"
    return splice_block(body, request.edits, text, placement, _FRAMES[role])


def _deployment(path: str) -> str:
    parts = segments(path)
    return parts[-3] if parts[-4:-3] == ["deployments"] else ""
