"""What a directive is, how Redis holds it, and what a message about a change says. Pure.

    key {org_id}:directive:{agent_id}      {"v": 1, "content", "injection_mode", "version_id"}, for 60 s
    channel directive_updates:{org_id}     {"v": 1, "org_id", "agent_id", "version_id" (null: none any more)}

Others write there too, so reading is tolerant: whatever is no directive is a `Flaw`, and whatever is no message means
that any agent of the organisation may have changed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from extproc.chat import Directive, injection_mode
from extproc.memory.tokens import estimate_tokens

__all__ = [
    "ALL_CHANNELS",
    "MAX_BYTES",
    "REDIS_TTL_S",
    "ActiveDirective",
    "Change",
    "Flaw",
    "active_directive",
    "change_message",
    "channel_of",
    "decode",
    "encode",
    "key_of",
    "read_change",
]

MAX_BYTES = 32_768
"""UTF-8 bytes of a directive's content; the least is 1 (contract, section 6)."""
REDIS_TTL_S = 60
"""Of the key (contract, section 4): by so much a change that nobody was told of may be late."""

_CHANNEL = "directive_updates:"
ALL_CHANNELS = f"{_CHANNEL}*"
_VERSION = 1
_LONGEST_VALUE = 8 * MAX_BYTES
"""Bytes of a value in Redis: JSON may spell a byte with six."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_VERSION_ID = re.compile(r"[!-~]{1,64}")
"""An id goes into log lines and metadata. Whatever else stands there might be a text, and is not taken over."""


class Flaw(StrEnum):
    """Why a value is no directive."""

    NOT_JSON = "not_json"
    UNKNOWN_VERSION = "unknown_version"
    WRONG_TYPE = "wrong_type"
    EMPTY = "empty"
    """Or blank: a provider may refuse such an instruction."""
    TOO_LONG = "too_long"
    BAD_VERSION_ID = "bad_version_id"


@dataclass(frozen=True, slots=True)
class ActiveDirective:
    """What goes into every request of one agent."""

    version_id: str
    """1 to 64 visible ASCII characters."""
    directive: Directive
    tokens: int
    """An estimate, on the high side."""

    @property
    def size_bytes(self) -> int:
        return len(self.directive.text.encode())


def active_directive(version_id: str, content: str, mode: str) -> ActiveDirective | Flaw:
    """An unknown mode is `system_first` (contract, section 4)."""
    if not content.strip():
        return Flaw.EMPTY
    try:
        if len(content) > MAX_BYTES or len(content.encode()) > MAX_BYTES:
            return Flaw.TOO_LONG
    except UnicodeEncodeError:  # lone surrogates
        return Flaw.WRONG_TYPE
    if not _VERSION_ID.fullmatch(version_id):
        return Flaw.BAD_VERSION_ID
    return ActiveDirective(version_id, Directive(content, injection_mode(mode)), estimate_tokens(content))


def key_of(org_id: str, agent_id: str) -> str:
    return f"{org_id}:directive:{agent_id}"


def channel_of(org_id: str) -> str:
    return f"{_CHANNEL}{org_id}"


class _Value(msgspec.Struct):
    """The value in Redis. Fields beside these are passed over."""

    v: int | float
    content: str
    version_id: str
    injection_mode: Any = None


_decode_value = msgspec.json.Decoder(_Value).decode


def encode(version_id: str, content: str, mode: str) -> bytes:
    return msgspec.json.encode(
        {"v": _VERSION, "content": content, "injection_mode": mode, "version_id": version_id},
    )


def decode(raw: bytes) -> ActiveDirective | Flaw:
    """What stands in Redis."""
    if len(raw) > _LONGEST_VALUE:
        return Flaw.TOO_LONG
    try:
        value = _decode_value(raw)
    except msgspec.ValidationError:
        return Flaw.WRONG_TYPE
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Flaw.NOT_JSON
    if value.v != _VERSION:
        return Flaw.UNKNOWN_VERSION
    mode = value.injection_mode
    return active_directive(value.version_id, value.content, mode if isinstance(mode, str) else "")


@dataclass(frozen=True, slots=True)
class Change:
    """What was heard on a channel."""

    org_id: str
    """Lower case, as the agent's."""
    agent_id: str | None
    """None: any of the organisation's agents."""


class _Message(msgspec.Struct):
    agent_id: str


_decode_message = msgspec.json.Decoder(_Message | str).decode


def change_message(org_id: str, agent_id: str, version_id: str | None) -> bytes:
    return msgspec.json.encode({"v": _VERSION, "org_id": org_id, "agent_id": agent_id, "version_id": version_id})


def read_change(channel: bytes, message: bytes) -> Change | None:
    """None: the channel is no organisation's. The agent's id may also stand alone, as a JSON string or bare."""
    org_id = channel.decode("latin-1").removeprefix(_CHANNEL)
    if not _UUID.fullmatch(org_id):
        return None
    agent_id = _agent_of(message)
    return Change(org_id.lower(), agent_id.lower() if _UUID.fullmatch(agent_id) else None)


def _agent_of(message: bytes) -> str:
    try:
        read = _decode_message(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return message[:64].decode("latin-1").strip()
    return read if isinstance(read, str) else read.agent_id
