"""Where memories live, as the rest of the program sees it. Every method blocks, and may be called from any thread.

No method reads across organisations. Errors of the database are StoreError, whatever lies behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from extproc.memory.model import Memory, Namespace
    from extproc.settings import StoreSettings

__all__ = [
    "Added",
    "MemoryStore",
    "ScoreUpdate",
    "Snapshot",
    "StoreError",
    "StoreRefused",
    "Version",
    "open_store",
    "store_url",
]


class StoreError(Exception):
    """The store cannot be used. The message says what to do and holds no content."""


class StoreRefused(StoreError):
    """The store is well and will never take this: trying again is no use."""


@dataclass(frozen=True, slots=True)
class Version:
    """Of one (org, agent); equal versions mean equal memories."""

    changes: int = 0
    removals: int = 0


@dataclass(frozen=True, slots=True)
class Added:
    id: str
    is_new: bool
    """False: the same text was there already, under this id."""


@dataclass(frozen=True, slots=True)
class ScoreUpdate:
    memory_id: str
    previous: float
    new: float


class Snapshot(Protocol):
    """One partition at one moment."""

    @property
    def version(self) -> Version: ...

    def active(self) -> Iterator[list[Memory]]:
        """All active memories, in batches."""
        ...

    def changed(self, since: int, limit: int) -> list[Memory]:
        """What was written after the version `since`, of any status; at most `limit`."""
        ...

    def ids(self) -> set[str]: ...


class MemoryStore(Protocol):
    def version(self, org_id: str, agent_id: str) -> Version:
        """Asked once per request, on the event loop: microseconds when nothing was written."""
        ...

    def snapshot(self, partition: Namespace) -> AbstractContextManager[Snapshot]: ...

    def add(self, memory: Memory) -> Added: ...

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        """In order, in one transaction. None: another memory has that id already."""
        ...

    def page(self, namespace: Namespace, limit: int = 100, after: str = "") -> list[Memory]:
        """What can be seen in the namespace, of any status, by id (which for our own ids is by time).

        `after`: the last id of the page before.
        """
        ...

    def get(self, namespace: Namespace, memory_id: str) -> Memory | None: ...

    def forget(self, partition: Namespace, memory_id: str) -> bool:
        """Remove the row for good. False: no such memory in exactly this partition."""
        ...

    def forget_all(self, partition: Namespace) -> int:
        """Remove all rows of exactly this partition: an agent's own stay when a user's go. Returns how many."""
        ...

    def record_retrievals(self, counts: Mapping[tuple[str, str], int], at: datetime) -> None:
        """Add to the retrieval counts, by (org id, memory id)."""
        ...

    def move_usefulness(self, org_id: str, memory_ids: Sequence[str], step: float) -> list[ScoreUpdate]:
        """Move the usefulness of the org's memories by `step`, within 0..1. Unknown ids are left out."""
        ...

    def check(self) -> None:
        """Raises StoreError when the store cannot be read."""
        ...

    def close(self) -> None: ...


def store_url(settings: StoreSettings) -> str:
    """In the form of IBEX_DATABASE_URL: what a URL reserves, such as `?` in a directory's name, is quoted."""
    if settings.database_url:
        return settings.database_url
    from sqlalchemy.engine import URL

    file = (settings.data / "memories.db").absolute()
    return URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)


def open_store(settings: StoreSettings) -> MemoryStore:
    """Create what is missing (directory, tables) and open. Blocks. Raises StoreError."""
    url = store_url(settings)
    if not url.startswith("sqlite:"):
        raise StoreError("IBEX_DATABASE_URL names a database that cannot be used yet; use sqlite:///PATH or IBEX_DATA")
    from extproc.memory.sqlite import SqliteMemoryStore

    return SqliteMemoryStore.open(url)
