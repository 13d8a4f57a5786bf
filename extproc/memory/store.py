"""Where memories live, as the rest of the program sees it. Every method blocks, and may be called from any thread.

No method reads across organisations. Errors of the database are StoreError, whatever lies behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime
    from typing import TypeVar

    from extproc.memory.features import Features, Indexer, Row
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.rows import Rows
    from extproc.settings import StoreSettings

    T = TypeVar("T")

__all__ = [
    "Added",
    "MemoryStore",
    "Outdated",
    "ScoreUpdate",
    "Snapshot",
    "StoreAway",
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


class StoreAway(StoreError):
    """Its server cannot be reached or does not answer: it may be back at any moment."""


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


class Outdated(NamedTuple):
    """A memory whose features are of another indexer, or that has none."""

    memory: Memory
    before: Sequence[Memory]
    """Its predecessors in the session, oldest first, two at most."""


class Snapshot(Protocol):
    """One partition at one moment.

    Features of another indexer than the engine's (`features.version` differs; empty: there are none yet) come as they
    are: the reader makes them anew for itself, and `reindex` in the store.
    """

    @property
    def version(self) -> Version: ...

    def active(self, *, with_superseded: bool = False) -> Iterator[list[Row]]:
        """All active memories, in batches, in no order.

        `with_superseded`: also those that a newer one took the place of, for questions about the past; `memory.status`
        tells them apart, `valid_from` and `valid_until` say when they held, `superseded_by` names the newer one.
        """
        ...

    def changed(self, since: int, limit: int) -> list[Row]:
        """What was written after the version `since`, of any status; at most `limit`."""
        ...

    def ids(self) -> set[str]: ...


class MemoryStore(Protocol):
    def version(self, org_id: str, agent_id: str) -> Version | None:
        """What is known without waiting, for the event loop: microseconds. None: ask `current_version`, in a thread.

        On SQLite it is the file's own state, never None. On PostgreSQL it is what the notifications say, while they
        flow: a write of another process is seen a few milliseconds after its commit and 2 s after it at the latest, one
        through this store at once. While the server is away, the last known version, for as long as the store was told
        to serve without it (`away_s`). Raises StoreError when the store cannot be read.
        """
        ...

    def current_version(self, org_id: str, agent_id: str) -> Version:
        """As the database says now; while PostgreSQL is away, as `version`. Blocks. Raises StoreError."""
        ...

    def away_s(self) -> float:
        """For how many seconds the database has not been reached and memories are served without it; 0: it is there."""
        ...

    def snapshot(self, partition: Namespace) -> AbstractContextManager[Snapshot]: ...

    def candidates(
        self,
        namespace: Namespace,
        stems: Sequence[str],
        vector: bytes | None,
        limit: int = 64,
        *,
        with_superseded: bool = False,
    ) -> list[Row]:
        """Memories worth scoring in a namespace that is not loaded, of all its partitions, each once, in no order.

        At most `limit` that hold the rarest of the stems, on PostgreSQL at most `limit` whose vectors are nearest to
        `vector` (as in `Features`; needs the store's indexer), and the active ones up to two turns before and after
        each. PostgreSQL: one round trip. SQLite has no index of vectors and passes over `vector`.
        """
        ...

    def add(self, memory: Memory) -> Added: ...

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        """In order, in one transaction, with the features of the store's indexer.

        None: another memory has that id already (PostgreSQL: one of the same organisation).
        """
        ...

    def page(self, namespace: Namespace, limit: int = 100, after: str = "") -> list[Memory]:
        """What can be seen in the namespace, of any status, by id (which for our own ids is by time).

        `after`: the last id of the page before.
        """
        ...

    def get(self, namespace: Namespace, memory_id: str) -> Memory | None: ...

    def pin(self, partition: Namespace, memory_id: str, *, is_pinned: bool) -> bool:
        """Set `Memory.is_pinned`. False: no such memory in exactly this partition."""
        ...

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

    def transact(self, org_id: str, work: Callable[[Rows], T]) -> T:
        """`work` in one transaction, which may also write other tables of the database (`Rows.connection`).

        PostgreSQL: as that organisation; `work` is called again when another writer was in its way. Raises StoreError.
        """
        ...

    def history(self, namespace: Namespace, memory_id: str) -> list[Memory]:
        """The memory with all that it took the place of and all that took its place, the oldest first; empty: none."""
        ...

    def prepare(self, indexer: Indexer) -> None:
        """Make room for another indexer's features, before `write_features`. Raises StoreError with what to do."""
        ...

    def refresh_statistics(self, org_id: str) -> None:
        """After a large write: what a database finds out by itself within minutes, and is slow without. Raises
        StoreError.
        """
        ...

    def organisations(self) -> list[str]:
        """The ids of those that have memories; for maintenance, which then goes through them one by one."""
        ...

    def outdated(self, org_id: str, version: str, limit: int, *, only_unmade: bool = False) -> list[Outdated]:
        """Some of the organisation's memories whose features are not of this indexer version; or of none."""
        ...

    def count_outdated(self, org_id: str, version: str, *, only_unmade: bool = False) -> int: ...

    def write_features(self, org_id: str, features: Mapping[str, Features], *, is_news: bool = False) -> int:
        """By memory id; what is gone, or has features of this version by now, is passed over. Returns how many were
        written.

        No new version, unless they are news: an engine that holds the namespace made the same features when it loaded
        it, if its embedder answered as quickly as a question must be.
        """
        ...

    def check(self) -> None:
        """Raises StoreError when the store cannot be read and does not serve without its database (`away_s`)."""
        ...

    def close(self) -> None: ...


def store_url(settings: StoreSettings) -> str:
    """In the form of IBEX_DATABASE_URL: what a URL reserves, such as `?` in a directory's name, is quoted."""
    if settings.database_url:
        return settings.database_url
    from sqlalchemy.engine import URL

    file = (settings.data / "memories.db").absolute()
    return URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)


def open_store(settings: StoreSettings, indexer: Indexer | None = None) -> MemoryStore:
    """Create what is missing (directory, tables) and open. Blocks. Raises StoreError.

    `indexer` makes the features of what is written, within the writer's transaction: not one that asks another service.
    Without one they are made later, by `reindex`.
    """
    url = store_url(settings)
    if url.startswith("sqlite:"):
        from extproc.memory.sqlite import SqliteMemoryStore

        return SqliteMemoryStore.open(url, indexer)
    from extproc.memory.postgres import PostgresMemoryStore

    return PostgresMemoryStore.open(url, indexer, serve_away_s=settings.store_away_s)
