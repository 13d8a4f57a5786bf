"""What a memory is, and who may see it. Pure: no store, no clock."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from extproc.memory.tokens import count_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

__all__ = [
    "MAX_CONTENT_BYTES",
    "Category",
    "InvalidValue",
    "Memory",
    "Namespace",
    "Source",
    "Status",
    "content_hash",
    "new_memory",
    "parse_category",
    "parse_uuid",
]

MAX_CONTENT_BYTES = 10_000
"""UTF-8 bytes of one memory's content."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_SESSION_ID = re.compile(r"[!-~]{1,64}")
_MAX_METADATA_BYTES = 16_384  # as JSON; some dozens of memories are read for one request
_MAX_METADATA_DEPTH = 32  # far below the interpreter's own limit, which depends on who calls
_MAX_USER_ID = 128  # characters; the same limit as the X-IBEX-User-ID header


class InvalidValue(ValueError):
    """A value from outside that breaks a rule. The message names the value's role and may be shown to who sent it."""


class Category(StrEnum):
    FACTUAL = "factual"
    PREFERENCE = "preference"
    BEHAVIORAL = "behavioral"
    EPISODIC = "episodic"
    PROCEDURAL = "procedural"


class Status(StrEnum):
    ACTIVE = "active"
    """The only status that is ever retrieved."""
    SUPERSEDED = "superseded"
    MERGED = "merged"
    ARCHIVED = "archived"
    QUARANTINED = "quarantined"
    DELETED = "deleted"


class Source(StrEnum):
    EXTRACTED = "extracted"
    USER_PROVIDED = "user_provided"
    IMPORTED = "imported"


def parse_uuid(text: str, role: str) -> str:
    """The UUID in lower case. Only the form with hyphens counts: two spellings of one id must not be two namespaces."""
    lowered = text.lower()
    if not _UUID.fullmatch(lowered):
        raise InvalidValue(f"{role} is not a UUID such as 7d2f4c1e-0b7a-4f0e-9f5e-1c2d3e4f5a6b")
    return lowered


def parse_category(text: str) -> Category:
    try:
        return Category(text)
    except ValueError:
        raise InvalidValue(f"category is not one of {', '.join(Category)}") from None


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whose memories: those of one user of an agent, or, without a user, those of the agent for everyone."""

    org_id: str
    agent_id: str
    user_id: str | None = None
    """None: agent-wide. Never the empty string."""

    @classmethod
    def parse(cls, org_id: str, agent_id: str, user_id: str = "") -> Namespace:
        """From the strings of a request or a command; an empty user means none. Raises InvalidValue."""
        if len(user_id) > _MAX_USER_ID or not user_id.isprintable():
            raise InvalidValue(f"user_id is not {_MAX_USER_ID} or fewer printable characters")
        return cls(parse_uuid(org_id, "org_id"), parse_uuid(agent_id, "agent_id"), user_id or None)

    def partitions(self) -> tuple[Namespace, ...]:
        """The disjoint sets of memories that may be seen here: the agent's, then the user's own."""
        if self.user_id is None:
            return (self,)
        return (Namespace(self.org_id, self.agent_id), self)

    def owns(self, memory: Memory) -> bool:
        """Whether the memory lies in exactly this partition."""
        return memory.org_id == self.org_id and memory.agent_id == self.agent_id and memory.user_id == self.user_id

    def can_see(self, memory: Memory) -> bool:
        return (
            memory.org_id == self.org_id
            and memory.agent_id == self.agent_id
            and (memory.user_id is None or memory.user_id == self.user_id)
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """One row of `memories`. All times are aware, in UTC."""

    id: str
    org_id: str
    agent_id: str
    user_id: str | None
    """None: agent-wide, visible to every user of the agent."""
    content: str
    content_hash: str
    """SHA-256, hex, of the normalised content: the same hash in one namespace is the same memory."""
    content_tokens: int
    """Counted with the extra `tokens`, else estimated; see `count_tokens`."""
    category: Category
    confidence: float
    """0..1"""
    usefulness: float
    """0..1, moved by feedback; 0.5 is neutral."""
    status: Status
    source: Source
    session_id: str | None
    turn_index: int | None
    valid_from: datetime | None
    valid_until: datetime | None
    """From this moment on the memory is no longer retrieved."""
    superseded_by: str | None
    retrieval_count: int
    last_retrieved_at: datetime | None
    created_at: datetime
    updated_at: datetime
    metadata: Mapping[str, object] = field(default_factory=dict)
    """JSON object; `tags` is a list of strings, `pinned` is true for what is to be in every block."""

    @property
    def is_pinned(self) -> bool:
        return self.metadata.get("pinned") is True

    def is_valid(self, now: datetime) -> bool:
        return (self.valid_from is None or self.valid_from <= now) and (
            self.valid_until is None or now < self.valid_until
        )


def new_memory(
    namespace: Namespace,
    content: str,
    *,
    id: str,  # noqa: A002 (the column's name)
    now: datetime,
    category: Category = Category.FACTUAL,
    confidence: float = 0.80,
    source: Source = Source.USER_PROVIDED,
    created_at: datetime | None = None,
    session_id: str | None = None,
    turn_index: int | None = None,
    valid_from: datetime | None = None,
    valid_until: datetime | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Memory:
    """An active memory with the defaults of the contract. Raises InvalidValue."""
    if not 0.0 <= confidence <= 1.0:
        raise InvalidValue("confidence is not a number from 0 to 1")
    if session_id is not None and not _SESSION_ID.fullmatch(session_id):
        raise InvalidValue("session_id is not 1 to 64 visible ASCII characters")
    if turn_index is not None and not 0 <= turn_index < 2**31:
        raise InvalidValue("turn_index is not a number from 0 to 2,147,483,647")
    _check_metadata(metadata or {})
    text = _tidy(content)
    return Memory(
        id=parse_uuid(id, "id"),
        org_id=namespace.org_id,
        agent_id=namespace.agent_id,
        user_id=namespace.user_id,
        content=text,
        content_hash=content_hash(text),
        content_tokens=count_tokens(text),
        category=category,
        confidence=confidence,
        usefulness=0.5,
        status=Status.ACTIVE,
        source=source,
        session_id=session_id,
        turn_index=turn_index,
        valid_from=valid_from,
        valid_until=valid_until,
        superseded_by=None,
        retrieval_count=0,
        last_retrieved_at=None,
        created_at=created_at or now,
        updated_at=now,
        metadata=metadata or {},
    )


def _check_metadata(metadata: Mapping[str, object]) -> None:
    """Raises InvalidValue for what no JSON column or file could hold."""
    level: list[object] = [metadata]
    for _ in range(_MAX_METADATA_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise InvalidValue(f"metadata is nested more than {_MAX_METADATA_DEPTH} deep")
    try:
        size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        raise InvalidValue("metadata is not JSON (it holds NaN, infinity or half of a surrogate pair)") from None
    if size > _MAX_METADATA_BYTES:
        raise InvalidValue(f"metadata is {size:,} bytes as JSON; at most {_MAX_METADATA_BYTES:,} fit in one memory")


def content_hash(content: str) -> str:
    """Equal for texts that differ only in white space or Unicode composition; case counts."""
    normalised = " ".join(unicodedata.normalize("NFC", content).split())
    return hashlib.sha256(normalised.encode()).hexdigest()


def _tidy(content: str) -> str:
    """The content as it is stored: one kind of line end, no white space around. Raises InvalidValue."""
    lines = content.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")  # PostgreSQL's text holds no NUL
    text = unicodedata.normalize("NFC", lines).strip()
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidValue("content is not valid Unicode text (it holds half of a surrogate pair)") from None
    if not text:
        raise InvalidValue("content is empty")
    if size > MAX_CONTENT_BYTES:
        raise InvalidValue(f"content is {size:,} bytes; at most {MAX_CONTENT_BYTES:,} fit in one memory")
    return text
