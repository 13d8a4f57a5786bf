"""Memories as rows: what SQLite and PostgreSQL do alike, within a transaction that the caller opened.

A writer holds the agent's lock (`Postings.lock`), so that what it looks up stays true until it commits.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sqlalchemy import (
    and_,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    or_,
    select,
    text,
    union_all,
    update,
)

from extproc.memory.database import insert_into
from extproc.memory.embedding.embedder import EmbedderUnavailable
from extproc.memory.features import MOST_OF_TURNS, TURN_BEGINS, TURN_ENDS, Features, Row, by_turn, turn_of, window
from extproc.memory.model import Category, Memory, Namespace, Source, Status
from extproc.memory.schema import SLOT_CHARS, memories, memory_versions
from extproc.memory.store import Added, Outdated, ScoreUpdate, Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection

    from extproc.memory.features import Indexer

__all__ = [
    "COLUMNS",
    "FEATURES",
    "MOST_BETWEEN",
    "UNSEEN",
    "Place",
    "Postings",
    "Rows",
    "RowsSnapshot",
    "Stretch",
    "owned",
    "read_memory",
    "read_row",
    "retrievable",
    "visible",
]

_c = memories.c
_FEATURE_NAMES = ("features_version", "stems", "words", "embedding")
_OTHER_NAMES = ("revision", "embedding_model", "embedding_dimension", "number", "slot")
COLUMNS = [column for column in _c if column.name not in {*_FEATURE_NAMES, *_OTHER_NAMES}]
"""In the order of Memory's fields."""
_NAMES = [column.name for column in COLUMNS]
FEATURES = [_c[name] for name in _FEATURE_NAMES]
"""In the order of Features' fields, after COLUMNS: the columns of a Row."""
_ROW_COLUMNS = [*COLUMNS, *FEATURES]

MOST_BETWEEN = 10_000
"""Rows of a session between the first and the last of a batch: more is no conversation."""
_MOST_RETRIEVALS = 2**31 - 1
"""What PostgreSQL's column holds."""
_MOST_HISTORY = 500
"""Memories that one history shows."""
_REVISED = ("status", "confidence", "valid_until", "superseded_by", "metadata")
UNSEEN = (Status.QUARANTINED, Status.DELETED)
"""What must not show in its successors' features."""


class Place(NamedTuple):
    """A memory with its owner, as the index of terms needs it."""

    partition: Namespace
    id: str
    stems: str


class Stretch(NamedTuple):
    """Of a session: all that was said from the first to the last of these moments."""

    partition: Namespace
    session_id: str
    first: tuple[int, datetime]
    """As `turn_of` has it."""
    last: tuple[int, datetime]


class Postings(Protocol):
    """The index of terms, and what else each database does in its own way."""

    def lock(self, partitions: Sequence[Namespace]) -> None:
        """Until the transaction ends, nobody else writes these agents' memories; act for their organisation.

        In one order, so that two writers of several agents never wait for each other.
        """
        ...

    def around(self, stretches: Sequence[Stretch], after: int) -> list[Memory]:
        """What is stored of each stretch, MOST_OF_TURNS rows before and `after` rows behind it, in any order.

        Without what is UNSEEN. All are of one organisation.
        """
        ...

    def insert(self, rows: Sequence[dict[str, object]]) -> None:
        """Rows of `memories`, each with the same columns."""
        ...

    def update(self, org_id: str, rows: Sequence[dict[str, object]]) -> None:
        """Set all but `id` of the rows with these ids; each names the same columns."""
        ...

    def put(self, places: Sequence[Place]) -> None: ...

    def remove(self, places: Sequence[Place]) -> None:
        """Called while the rows are still there, with the stems that were put."""
        ...

    def bumped(self, partition: Namespace, version: Version) -> None: ...


class Rows:
    """Statements on memories, in one transaction."""

    def __init__(self, connection: Connection, indexer: Indexer | None, postings: Postings) -> None:
        self._connection = connection
        self._indexer = indexer
        self._postings = postings

    # Writing

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        places: dict[Namespace, list[int]] = {}
        for place, memory in enumerate(batch):
            places.setdefault(_partition(memory), []).append(place)
        added: list[Added | None] = [None] * len(batch)
        # In one order, so that two writers of several agents never wait for each other.
        for partition in sorted(places, key=lambda one: (one.org_id, one.agent_id, one.user_id or "")):
            results = self._add(partition, [batch[place] for place in places[partition]])
            for place, result in zip(places[partition], results, strict=True):
                added[place] = result
        return added

    def _add(self, partition: Namespace, given: Sequence[Memory]) -> list[Added | None]:
        self._postings.lock([partition])
        by_hash = self._by_hash(partition, [one.content_hash for one in given])
        taken = self._taken(partition, [one.id for one in given])
        new: list[Memory] = []
        added: list[Added | None] = []
        for memory in given:
            is_active = memory.status is Status.ACTIVE
            if is_active and (known := by_hash.get(memory.content_hash)) is not None:
                added.append(Added(known, is_new=False))
            elif (its := taken.get(memory.id)) is not None:
                added.append(Added(memory.id, is_new=False) if its == memory.content_hash else None)
            else:
                taken[memory.id] = memory.content_hash
                if is_active:
                    by_hash[memory.content_hash] = memory.id
                new.append(memory)
                added.append(Added(memory.id, is_new=True))
        if new:
            self._insert(partition, new)
        return added

    def _by_hash(self, partition: Namespace, hashes: Sequence[str]) -> dict[str, str]:
        """The ids of active memories with these content hashes."""
        # The owner as the index `memories_once` has it, and in no other way: SQLite would then read all that is theirs.
        owner = func.coalesce(_c.user_id, text("''")) == (partition.user_id or "")
        same = select(_c.content_hash, _c.id).where(
            _c.org_id == partition.org_id,
            _c.agent_id == partition.agent_id,
            owner,
            text("status = 'active'"),
            _c.content_hash.in_(hashes),
        )
        return {row.content_hash: row.id for row in self._connection.execute(same)}

    def _taken(self, partition: Namespace, ids: Sequence[str]) -> dict[str, str]:
        """Those of the ids that are there already, with their content hash where they are the partition's own."""
        query = select(_c.id, _c.content_hash, owned(partition)).where(_c.id.in_(ids))
        if self._connection.dialect.name != "sqlite":  # there ids are unique across organisations
            query = query.where(_c.org_id == partition.org_id)
        return {id_: its if is_own else "" for id_, its, is_own in self._connection.execute(query)}

    def _insert(self, partition: Namespace, new: Sequence[Memory]) -> None:
        before, followers = self._surroundings(new)
        features = self._features(new, before)
        revision = self.bump(partition)
        rows = [
            {**{name: getattr(memory, name) for name in _NAMES}, **_feature_values(made), "revision": revision}
            for memory, made in zip(new, features, strict=True)
        ]
        self._postings.insert(rows)
        self._postings.put([Place(partition, one.id, made.stems) for one, made in zip(new, features, strict=True)])
        self._make_anew(partition, followers, revision)

    def forget(self, partition: Namespace, memory_ids: Sequence[str]) -> int:
        """The features of what follows in the session hold a little of what goes, so they are made anew."""
        self._postings.lock([partition])
        which = and_(owned(partition), _c.id.in_(memory_ids))
        gone = [read_memory(row) for row in self._connection.execute(select(*COLUMNS).where(which))]
        if not gone:
            return 0
        _, followers = self._surroundings(gone)
        stems = select(_c.id, _c.stems).where(which)
        self._postings.remove([Place(partition, id_, its or "") for id_, its in self._connection.execute(stems)])
        self._connection.execute(delete(memories).where(which))
        gone_ids = {one.id for one in gone}
        left = [one for one, _ in followers if one.id not in gone_ids]
        revision = self.bump(partition, removals=1)
        self._make_anew(partition, self._with_predecessors(left), revision)
        return len(gone)

    def some_ids(self, partition: Namespace, limit: int) -> list[str]:
        return list(self._connection.execute(select(_c.id).where(owned(partition)).limit(limit)).scalars())

    def pin(self, partition: Namespace, memory_id: str, *, is_pinned: bool) -> bool:
        self._postings.lock([partition])
        which = and_(owned(partition), _c.id == memory_id)
        row = self._connection.execute(select(*COLUMNS).where(which)).one_or_none()
        if row is None:
            return False
        memory = read_memory(row)
        if memory.is_pinned != is_pinned:
            kept = {name: value for name, value in memory.metadata.items() if name != "pinned"}
            changed = {**kept, "pinned": True} if is_pinned else kept
            values = {"metadata": changed, "revision": self.bump(partition), "updated_at": datetime.now(UTC)}
            self._connection.execute(update(memories).where(which).values(values))
        return True

    def record_retrievals(self, org_id: str, counts: Mapping[str, int], at: datetime) -> None:
        counted = (
            update(memories)
            .where(_c.org_id == org_id, _c.id == bindparam("memory"))
            .values(
                retrieval_count=case(
                    (
                        _c.retrieval_count < _MOST_RETRIEVALS - bindparam("count"),
                        _c.retrieval_count + bindparam("count"),
                    ),
                    else_=_MOST_RETRIEVALS,
                ),
                last_retrieved_at=bindparam("at"),
            )
        )
        # In one order, so that two writers never wait for each other.
        values = [{"memory": id_, "count": count, "at": at} for id_, count in sorted(counts.items())]
        self._connection.execute(counted, values)

    def move_usefulness(self, org_id: str, memory_ids: Sequence[str], step: float) -> list[ScoreUpdate]:
        which = select(_c.id, _c.agent_id).where(_c.org_id == org_id, _c.id.in_(dict.fromkeys(memory_ids)))
        agents = {row.id: row.agent_id for row in self._connection.execute(which)}
        self._postings.lock([Namespace(org_id, agent_id) for agent_id in sorted(set(agents.values()))])
        updates = []
        revisions: dict[str, int] = {}
        for memory_id in dict.fromkeys(memory_ids):
            mine = and_(_c.org_id == org_id, _c.id == memory_id)
            row = self._connection.execute(select(_c.agent_id, _c.usefulness).where(mine)).one_or_none()
            if row is None:
                continue
            new = min(1.0, max(0.0, row.usefulness + step))
            if new != row.usefulness:
                if row.agent_id not in revisions:
                    revisions[row.agent_id] = self.bump(Namespace(org_id, row.agent_id))
                changed = {"usefulness": new, "revision": revisions[row.agent_id], "updated_at": datetime.now(UTC)}
                self._connection.execute(update(memories).where(mine).values(changed))
            updates.append(ScoreUpdate(memory_id, row.usefulness, new))
        return updates

    def write_features(self, org_id: str, features: Mapping[str, Features], *, is_news: bool = False) -> int:
        mine = and_(_c.org_id == org_id, _c.id.in_(features))
        agents = sorted(self._connection.execute(select(_c.agent_id).where(mine).distinct()).scalars())
        self._postings.lock([Namespace(org_id, agent_id) for agent_id in agents])
        # What has its features by now has them from who knew better: something that it follows was forgotten.
        versions = {one.version for one in features.values()}
        left = and_(mine, _c.agent_id.in_(agents), _c.features_version.not_in(versions))
        found = self._connection.execute(select(_c.agent_id, _c.user_id, _c.id, _c.stems).where(left).order_by(_c.id))
        rows = [(Namespace(org_id, row.agent_id, row.user_id), row.id, row.stems) for row in found]
        touched = sorted({whose.agent_id for whose, _, _ in rows}) if is_news else []
        news = {agent_id: {"revision": self.bump(Namespace(org_id, agent_id))} for agent_id in touched}
        values = [
            {"id": id_, **_feature_values(features[id_]), **news.get(whose.agent_id, {})} for whose, id_, _ in rows
        ]
        if values:
            self._postings.update(org_id, values)
        # Another model most often has the same stems.
        other = [(whose, id_, stems) for whose, id_, stems in rows if stems != features[id_].stems]
        self._postings.remove([Place(whose, id_, stems) for whose, id_, stems in other if stems is not None])
        self._postings.put([Place(whose, id_, features[id_].stems) for whose, id_, _ in other])
        return len(rows)

    def bump(self, partition: Namespace, removals: int = 0) -> int:
        """Count a write, in its own transaction. Returns the new version, for the rows that it touches."""
        c = memory_versions.c
        first = insert_into(self._connection.dialect.name, memory_versions).values(
            org_id=partition.org_id, agent_id=partition.agent_id, changes=1, removals=removals
        )
        counted = first.on_conflict_do_update(
            index_elements=[c.org_id, c.agent_id], set_={"changes": c.changes + 1, "removals": c.removals + removals}
        ).returning(c.changes, c.removals)
        version = Version(*self._connection.execute(counted).one())
        self._postings.bumped(partition, version)
        return version.changes

    # What is known, and what becomes of it

    @property
    def connection(self) -> Connection:
        """For rows of other tables, in the same transaction."""
        return self._connection

    def lock(self, partition: Namespace) -> None:
        """Until the transaction ends nobody else writes this agent's memories."""
        self._postings.lock([partition])

    def known(
        self, partition: Namespace, hashes: Iterable[str], slots: Iterable[str], ids: Iterable[str]
    ) -> list[Memory]:
        """Active memories of exactly this partition with one of these content hashes, `metadata.slot`s or ids."""
        wanted = (
            (_c.content_hash, set(hashes)),
            (_c.slot, {slot[:SLOT_CHARS] for slot in slots}),
            (_c.id, set(ids)),
        )
        mine = select(*COLUMNS).where(owned(partition), _c.status == Status.ACTIVE)
        # As `memories_once` has it: without it SQLite cannot use that index.
        mine = mine.where(func.coalesce(_c.user_id, literal_column("''")) == (partition.user_id or ""))
        # Each with an index of its own, where one condition of three parts would read all that the user has.
        queries = [mine.where(column.in_(sorted(values))) for column, values in wanted if values]
        if not queries:
            return []
        found = {row.id: row for row in self._connection.execute(union_all(*queries))}
        return [read_memory(found[id_]) for id_ in sorted(found)]

    def existing(self, org_id: str, memory_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that are taken, whatever became of them."""
        query = select(_c.id).where(_c.org_id == org_id, _c.id.in_(list(memory_ids)))
        return frozenset(self._connection.execute(query).scalars())

    def revise(self, partition: Namespace, revised: Sequence[Memory], at: datetime) -> None:
        """Write what consolidation changes of memories that are there: status, times, confidence, metadata."""
        if not revised:
            return
        values = {"revision": self.bump(partition), "updated_at": at}
        for memory in revised:
            changed = {name: getattr(memory, name) for name in _REVISED}
            mine = and_(owned(partition), _c.id == memory.id)
            self._connection.execute(update(memories).where(mine).values({**changed, **values}))

    def history(self, namespace: Namespace, memory_id: str) -> list[Memory]:
        """The memory, what it took the place of, and what took its place; by the time from which each held."""
        found: dict[str, Memory] = {}
        wanted = {memory_id}
        while wanted and len(found) < _MOST_HISTORY:
            which = or_(_c.id.in_(wanted), _c.superseded_by.in_(wanted))
            query = select(*COLUMNS).where(visible(namespace), which)
            rows = [memory for row in self._connection.execute(query) if (memory := read_memory(row)).id not in found]
            found |= {memory.id: memory for memory in rows}
            later = {memory.superseded_by for memory in rows if memory.superseded_by is not None}
            wanted = {memory.id for memory in rows} | (later - found.keys())
        if memory_id not in found:
            return []
        return sorted(found.values(), key=lambda memory: (memory.valid_from or memory.created_at, memory.id))

    # Features

    def _features(self, new: Sequence[Memory], before: Sequence[Sequence[Memory]]) -> list[Features]:
        """None of them where there is no indexer, or it cannot work now: they are made later (`reindex`)."""
        if self._indexer is None or not new:
            return [_NO_FEATURES] * len(new)
        try:
            return self._indexer.features(new, before)
        except EmbedderUnavailable:
            return [_NO_FEATURES] * len(new)

    def _make_anew(self, partition: Namespace, whose: Sequence[Outdated], revision: int) -> None:
        """Their own stems stay, so the index of terms does too."""
        if not whose:
            return
        made = self._features([one.memory for one in whose], [one.before for one in whose])
        if _NO_FEATURES in made:
            # What the old vectors hold of a forgotten memory goes all the same.
            mine = and_(_c.org_id == partition.org_id, _c.id.in_([one.memory.id for one in whose]))
            gone = {"features_version": "", "embedding": None, "embedding_model": None, "embedding_dimension": None}
            self._connection.execute(update(memories).where(mine).values({**gone, "revision": revision}))
            return
        places = select(_c.id, _c.stems).where(
            _c.org_id == partition.org_id, _c.id.in_([one.memory.id for one in whose])
        )
        old = [Place(partition, id_, stems) for id_, stems in self._connection.execute(places) if stems is not None]
        self._postings.remove(old)
        by_id = {one.memory.id: its for one, its in zip(whose, made, strict=True)}
        values = [{"id": id_, **_feature_values(its), "revision": revision} for id_, its in by_id.items()]
        self._postings.update(partition.org_id, values)
        self._postings.put([Place(partition, id_, its.stems) for id_, its in by_id.items()])

    def _surroundings(self, these: Sequence[Memory]) -> tuple[list[Sequence[Memory]], list[Outdated]]:
        """The predecessors of each, and what is stored already and has one of them as its predecessor."""
        before: dict[str, Sequence[Memory]] = {}
        followers: list[Outdated] = []
        mine = {one.id for one in these}
        for line in self._lines(these, MOST_OF_TURNS):
            for at, memory in enumerate(line):
                last = _predecessors(line, at)
                if memory.id in mine:
                    before[memory.id] = last
                elif not mine.isdisjoint(one.id for one in last):
                    followers.append(Outdated(memory, last))
        return [before.get(one.id, ()) for one in these], followers

    def _with_predecessors(self, these: Sequence[Memory]) -> list[Outdated]:
        mine = {one.id for one in these}
        before = {
            memory.id: _predecessors(line, at)
            for line in self._lines(these, 0)
            for at, memory in enumerate(line)
            if memory.id in mine
        }
        return [Outdated(one, before.get(one.id, ())) for one in these]

    def _lines(self, these: Sequence[Memory], after: int) -> Iterable[list[Memory]]:
        """Their sessions, each in its order, as far as it is near one of them. One question, however many they are."""
        sessions: dict[tuple[Namespace, str | None], list[Memory]] = defaultdict(list)
        for memory in these:
            if memory.session_id is not None and memory.status not in UNSEEN:
                sessions[_partition(memory), memory.session_id].append(memory)
        stretches = [_stretch(its) for its in sessions.values()]
        mine = {one.id for one in these}
        for memory in self._postings.around(stretches, after) if stretches else ():
            if memory.id not in mine:
                sessions[_partition(memory), memory.session_id].append(memory)
        return [sorted(its, key=by_turn) for its in sessions.values()]

    # Reading

    def page(self, namespace: Namespace, limit: int, after: str) -> list[Memory]:
        query = select(*COLUMNS).where(visible(namespace)).order_by(_c.id).limit(limit)
        if after:
            query = query.where(_c.id > after)
        return [read_memory(row) for row in self._connection.execute(query)]

    def get(self, namespace: Namespace, memory_id: str) -> Memory | None:
        query = select(*COLUMNS).where(visible(namespace), _c.id == memory_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else read_memory(row)

    def version(self, org_id: str, agent_id: str) -> Version:
        c = memory_versions.c
        query = select(c.changes, c.removals).where(c.org_id == org_id, c.agent_id == agent_id)
        row = self._connection.execute(query).one_or_none()
        return Version() if row is None else Version(*row)

    def outdated(self, org_id: str, version: str, limit: int, *, only_unmade: bool = False) -> list[Outdated]:
        found: list[Memory] = []
        for other in _outdated(version, only_unmade=only_unmade):
            # In the order of the index: read without it, a table whose first rows are done is read up to the others.
            query = select(*COLUMNS).where(_c.org_id == org_id, other).order_by(_c.features_version)
            query = query.limit(limit - len(found))
            found += [read_memory(row) for row in self._connection.execute(query)] if len(found) < limit else []
        return self._with_predecessors(found)

    def count_outdated(self, org_id: str, version: str, *, only_unmade: bool = False) -> int:
        return sum(
            self._connection.execute(
                select(func.count()).select_from(memories).where(_c.org_id == org_id, other)
            ).scalar_one()
            for other in _outdated(version, only_unmade=only_unmade)
        )


class RowsSnapshot:
    """One partition at one moment, within a transaction that sees nothing later."""

    def __init__(self, connection: Connection, partition: Namespace, version: Version, batch_rows: int) -> None:
        self._connection = connection
        self._partition = partition
        self._batch_rows = batch_rows
        self.version = version

    def active(self, *, with_superseded: bool = False) -> Iterator[list[Row]]:
        query = select(*_ROW_COLUMNS).where(owned(self._partition), retrievable(with_superseded=with_superseded))
        with self._connection.execution_options(yield_per=self._batch_rows).execute(query) as rows:
            for batch in rows.partitions():
                yield [read_row(row) for row in batch]

    def changed(self, since: int, limit: int) -> list[Row]:
        query = select(*_ROW_COLUMNS).where(owned(self._partition), _c.revision > since).limit(limit)
        return [read_row(row) for row in self._connection.execute(query)]

    def ids(self) -> set[str]:
        return set(self._connection.execute(select(_c.id).where(owned(self._partition))).scalars())


def owned(partition: Namespace) -> ColumnElement[bool]:
    user = _c.user_id.is_(None) if partition.user_id is None else _c.user_id == partition.user_id
    return and_(_c.org_id == partition.org_id, _c.agent_id == partition.agent_id, user)


def visible(namespace: Namespace) -> ColumnElement[bool]:
    return or_(*map(owned, namespace.partitions()))


def retrievable(*, with_superseded: bool) -> ColumnElement[bool]:
    return _c.status.in_([Status.ACTIVE, Status.SUPERSEDED]) if with_superseded else _c.status == Status.ACTIVE


def read_row(row: Sequence[Any]) -> Row:
    """Of COLUMNS and FEATURES."""
    version, stems, words, vector = row[-len(_FEATURE_NAMES) :]
    features = Features(version, stems or "", words or b"", vector or b"")
    return Row(read_memory(row[: -len(_FEATURE_NAMES)]), features)


_NO_FEATURES = Features("", "", b"", b"")
# A look into a dictionary is a fifth of calling the enumeration, and loading makes three for each memory.
_CATEGORIES = {one.value: one for one in Category}
_STATUSES = {one.value: one for one in Status}
_SOURCES = {one.value: one for one in Source}


def read_memory(row: Sequence[Any]) -> Memory:
    """Of COLUMNS."""
    values = list(row)
    values[7] = _CATEGORIES.get(values[7]) or Category(values[7])
    values[10] = _STATUSES.get(values[10]) or Status(values[10])
    values[11] = _SOURCES.get(values[11]) or Source(values[11])
    if not isinstance(values[-1], dict):  # metadata that another program wrote
        values[-1] = {}
    return Memory(*values)


def _feature_values(made: Features) -> dict[str, object]:
    return {
        "features_version": made.version,
        "stems": made.stems if made.version else None,
        "words": made.words or None,
        "embedding": made.vector or None,
        "embedding_model": made.version if made.vector else None,
        "embedding_dimension": len(made.vector) // 2 or None,
    }


def _partition(memory: Memory) -> Namespace:
    return Namespace(memory.org_id, memory.agent_id, memory.user_id)


def _stretch(its: Sequence[Memory]) -> Stretch:
    """Of memories of one session."""
    places = sorted(map(turn_of, its))
    turn, at = places[-1]
    session_id = its[0].session_id or ""
    return Stretch(_partition(its[0]), session_id, places[0], (turn, TURN_ENDS if at == TURN_BEGINS else at))


def _predecessors(line: Sequence[Memory], at: int) -> list[Memory]:
    return window(line[at], line[max(0, at - MOST_OF_TURNS) : at])


def _outdated(version: str, *, only_unmade: bool) -> tuple[ColumnElement[bool], ...]:
    if only_unmade:
        return (_c.features_version == "",)
    return _c.features_version < version, _c.features_version > version  # two ranges of the index; "not equal" is none
