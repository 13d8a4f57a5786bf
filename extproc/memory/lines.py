"""Memories as lines of JSON: what `extproc memory export` writes and `import` reads. Pure.

Everything that a store keeps and nobody can compute comes back as it was; `content` alone is enough for a line.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from extproc.memory.model import InvalidValue, Memory, Namespace, Source, Status, new_memory, parse_category, parse_uuid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import StrEnum

    E = TypeVar("E", bound=StrEnum)

__all__ = ["as_json", "memory_of_line"]

_NAMES = [field.name for field in fields(Memory)]
_MOST = 2**31 - 1
"""What a column of integers holds."""


def as_json(memory: Memory) -> dict[str, object]:
    """A row as `export` writes and `import` reads it."""
    row = {name: getattr(memory, name) for name in _NAMES}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}


def memory_of_line(line: str, defaults: Mapping[str, str], *, new_id: str, now: datetime) -> Memory:
    """`defaults`: of `org_id`, `agent_id` and `user_id`; `new_id`: for a line without one. Raises InvalidValue."""
    row = _Line(line)
    # A user_id of null says "agent-wide", and is not the absence of one.
    owner = {name: "" if row.is_null(name) else row.text(name, default) for name, default in defaults.items()}
    memory = new_memory(
        Namespace.parse(**owner),
        row.text("content"),
        id=row.text("id") or new_id,
        now=now,
        category=parse_category(row.text("category", "factual")),
        confidence=row.share("confidence", 0.8),
        source=row.member("source", Source.IMPORTED),
        created_at=row.moment("created_at"),
        session_id=row.text("session_id") or None,
        turn_index=row.count("turn_index"),
        valid_from=row.moment("valid_from"),
        valid_until=row.moment("valid_until"),
        metadata=row.object("metadata"),
    )
    status = row.member("status", Status.ACTIVE)
    if status is Status.DELETED:
        raise InvalidValue("status is deleted; what was deleted is not brought back")
    by = row.text("superseded_by")
    return replace(
        memory,
        status=status,
        usefulness=row.share("usefulness", memory.usefulness),
        superseded_by=parse_uuid(by, "superseded_by") if by else None,
        retrieval_count=row.count("retrieval_count") or 0,
        last_retrieved_at=row.moment("last_retrieved_at"),
        updated_at=row.moment("updated_at") or now,
    )


class _Line:
    """One line's fields. What is absent or null has the default; a value of another kind raises InvalidValue."""

    def __init__(self, line: str) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidValue("not JSON, or nested too deep") from None
        if not isinstance(row, dict):
            raise InvalidValue("not a JSON object")
        self._row = row

    def is_null(self, name: str) -> bool:
        return name in self._row and self._row[name] is None

    def text(self, name: str, default: str = "") -> str:
        value = self._row.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise InvalidValue(f"{name} is not a string")
        return value

    def member(self, name: str, default: E) -> E:
        value = self.text(name, default)
        try:
            return type(default)(value)
        except ValueError:
            raise InvalidValue(f"{name} is not one of {', '.join(type(default))}") from None

    def share(self, name: str, default: float) -> float:
        value = default if self._row.get(name) is None else self._row[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise InvalidValue(f"{name} is not a number from 0 to 1")
        return float(value)

    def count(self, name: str) -> int | None:
        value = self._row.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidValue(f"{name} is not an integer")
        if not 0 <= value <= _MOST:
            raise InvalidValue(f"{name} is not a number from 0 to {_MOST:,}")
        return value

    def moment(self, name: str) -> datetime | None:
        value = self.text(name)
        try:
            parsed = datetime.fromisoformat(value) if value else None
            if parsed is None:
                return None
            return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            raise InvalidValue(f"{name} is not a time such as 2025-03-01T12:00:00Z") from None

    def object(self, name: str) -> dict[str, object]:
        value = self._row.get(name) or {}
        if not isinstance(value, dict):
            raise InvalidValue(f"{name} is not an object")
        return value
