"""One partition of a namespace (an agent's memories, or one user's) as arrays in the process. Pure.

A memory is a slot: a row of columns, a span of a blob, a span of word ids, a vector, its postings. Slots only grow;
what is removed or replaced stays behind as a dead one until the index is loaded anew. Memory objects are made when
asked for. Any number of threads may read, while none writes.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from extproc.context.postings import Postings
from extproc.context.vectors import Vectors
from extproc.memory.features import subject, turn_of
from extproc.memory.model import Category, Memory, Namespace, Source, Status
from extproc.memory.text import stems

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from extproc.memory.features import Row

__all__ = ["NONE", "Index"]

NONE = -1
"""No slot, no session, no subject."""


class _Slot(NamedTuple):
    """Times in microseconds since 1970; texts as places in the blob, names as numbers of a list."""

    id_high: int
    id_low: int
    blob: int
    words: int
    confidence: float
    usefulness: float
    content_hash: int
    """Its first eight bytes."""
    created: int
    updated: int
    valid_from: int
    valid_until: int
    retrieved: int
    content_bytes: int
    metadata_bytes: int
    tokens: int
    word_count: int
    retrievals: int
    session: int
    turn: int
    previous: int
    next: int
    subject: int
    owner: int
    category: int
    status: int
    source: int


_FORMATS = "u8 u8 i8 i8 f8 f8 u8 i8 i8 i8 i8 i8 i4 i4 i4 i4 i4 i4 i4 i4 i4 i4 i4 u1 u1 u1"
_COLUMNS = np.dtype(list(zip(_Slot._fields, _FORMATS.split(), strict=True)))

_HASH_BYTES = 32
"""Of the content's hash, which lies behind content and metadata."""
_CATEGORIES, _STATUSES, _SOURCES = list(Category), list(Status), list(Source)
_CATEGORY = {one: number for number, one in enumerate(_CATEGORIES)}
_STATUS = {one: number for number, one in enumerate(_STATUSES)}
_SOURCE = {one: number for number, one in enumerate(_SOURCES)}
_NO_TIME = np.iinfo(np.int64).min
_NO_TURN = -1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_decode = msgspec.json.Decoder().decode

_KEPT = (Status.ACTIVE, Status.SUPERSEDED)
"""What is held; the superseded only answer a query about the past."""
_PROFILE_SLOTS = frozenset({"name", "language", "pronouns", "time_zone", "timezone", "tone", "locale"})
"""Of `slot` in the metadata: what a reader should know of a user whatever is asked."""
MOST_DEAD = 4096
"""Slots left behind by removals, or memories added one by one, after which loading anew is better; or an eighth of
all, when that is more."""
_NEAR = 64
"""Places from the end of its session at which a memory is put in its place one by one: some 100 µs."""
_MOST_RETRIEVALS = 2**31 - 1
_NAME_BYTES = 150  # a session id or subject with its place in a list and a dictionary


class Index:
    def __init__(self, partition: Namespace, rows: Sequence[Row] = ()) -> None:
        self.partition = partition
        self.postings = Postings()
        self.vectors: Vectors | None = None
        self._columns = _Grown(_COLUMNS)
        self._words = _Grown(np.dtype("<u2"))
        self._blob = bytearray()
        self._sessions = _Names()
        self._session_last: dict[int, int] = {}
        self._session_sizes = _Grown(np.dtype(np.intp))
        self._subjects = _Names()
        self._subject_stems: dict[int, list[str]] = {}
        self._owners: list[Namespace] = [partition]
        self._superseded_by: dict[int, str] = {}
        self._slot_of: dict[str, int] | None = None
        self._dead = _Slots()
        self._limited = _Slots()
        self._tagged: dict[str, set[int]] = {}
        self.pinned = _Slots()
        self.profile = _Slots()
        self._appended = 0
        if rows:
            self.load([rows])

    def __len__(self) -> int:
        return len(self._columns) - len(self._dead)

    @property
    def slots(self) -> int:
        """Dead ones included."""
        return len(self._columns)

    @property
    def is_worn(self) -> bool:
        """Whether loading it anew is due: much was removed or added one by one."""
        return len(self._dead) + self._appended > max(MOST_DEAD, self.slots // 8)

    @property
    def nbytes(self) -> int:
        """Approximately what the process holds for it."""
        names = len(self._sessions) + len(self._subjects)
        ids = 0 if self._slot_of is None else 150 * len(self._slot_of)
        vectors = 0 if self.vectors is None else self.vectors.nbytes
        arrays = self._columns.nbytes + self._words.nbytes + len(self._blob)
        return 4_000 + arrays + self.postings.nbytes + vectors + ids + _NAME_BYTES * names

    def load(self, batches: Iterable[Sequence[Row]], breathe: Callable[[], None] = lambda: None) -> None:
        """Everything at once, into an empty index. `breathe` is called after each batch, and as often for the rest."""
        texts: list[str] = []
        for batch in batches:
            kept = [row for row in batch if row.memory.status in _KEPT]
            self._append(kept)
            texts += [row.features.stems for row in kept]
            breathe()
        self.postings.load(texts, breathe)
        self._link()

    def update(self, rows: Sequence[Row]) -> None:
        """Add, or replace what has the same id. What is neither active nor superseded is taken out."""
        for row in rows:
            self.remove(row.memory.id)
        kept = list({row.memory.id: row for row in rows if row.memory.status in _KEPT}.values())
        first = self.slots
        self._append(kept)
        self._appended += len(kept)
        far: set[int] = set()
        for slot, row in enumerate(kept, start=first):
            self.postings.append(slot, row.features.stems)
            self._ids()[row.memory.id] = slot
            if not self._link_one(slot):
                far.add(int(self.column("session")[slot]))
        if far:
            self._link(far)

    def remove(self, memory_id: str) -> None:
        """Nothing happens when it is not there."""
        slot = self._ids().pop(memory_id, None)
        if slot is None:
            return
        for tag in _tags(self.memory(slot)):
            self._tagged[tag].discard(slot)
            if not self._tagged[tag]:
                del self._tagged[tag]
        self._dead.add(slot)
        for named in (self._limited, self.pinned, self.profile):
            named.discard(slot)
        self._superseded_by.pop(slot, None)
        columns = self._columns.array
        previous, next_, session = (int(columns[name][slot]) for name in ("previous", "next", "session"))
        if previous != NONE:
            columns["next"][previous] = next_
        if next_ != NONE:
            columns["previous"][next_] = previous
        if session != NONE:
            self._session_sizes.array[session] -= 1
            if self._session_last.get(session) == slot:
                self._session_last[session] = previous

    def keep_only(self, memory_ids: set[str]) -> None:
        for gone in self._ids().keys() - memory_ids:
            self.remove(gone)

    def count(self, stem: str) -> int:
        """How many memories hold it."""
        slots = self.postings.of(stem).slots
        dead = self._dead.sorted
        few, many = (slots, dead) if len(slots) < len(dead) else (dead, slots)
        if not len(few):
            return len(slots)
        at = np.minimum(np.searchsorted(many, few), len(many) - 1)
        return len(slots) - int(np.count_nonzero(many[at] == few))

    def before(self, memory: Memory, count: int) -> list[Memory]:
        """What was said last before it in the session, oldest first, whether it is here or not."""
        session = self._sessions.find(memory.session_id or "")
        slot = NONE if session is None else self._session_last.get(session, NONE)
        found: list[Memory] = []
        while slot != NONE and len(found) < count:
            one = self.memory(slot)
            if turn_of(one) < turn_of(memory):
                found.append(one)
            slot = int(self.column("previous")[slot])
        return found[::-1]

    def column(self, name: str) -> NDArray[Any]:
        """By slot."""
        values: NDArray[Any] = self._columns.array[name]
        return values

    def words_of(self, slots: NDArray[np.integer]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """The word ids of the slots one after the other, and how many each has."""
        starts = self.column("words")[slots]
        counts = self.column("word_count")[slots].astype(np.int64)
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(starts - (ends - counts), counts)
        return self._words.array[places], counts

    def session_sizes(self, sessions: NDArray[np.integer]) -> NDArray[np.intp]:
        """How many memories each session has; 0 for NONE."""
        if not len(self._session_sizes):
            return np.zeros(len(sessions), np.intp)
        sizes: NDArray[np.intp] = np.where(sessions == NONE, 0, self._session_sizes.array[sessions])
        return sizes

    def subject_stems(self, number: int) -> list[str]:
        """Of the name of whom memories are about."""
        found = self._subject_stems.get(number)
        if found is None:
            found = self._subject_stems[number] = stems(self._subjects.names[number])
        return found

    def accepted(self, categories: Collection[Category], tags: Collection[str]) -> NDArray[np.bool_]:
        """By slot, what is of one of the categories and has one of the tags; none given: any."""
        accepted = np.ones(self.slots, bool)
        if categories:
            accepted &= np.isin(self.column("category"), [_CATEGORY[one] for one in categories])
        if tags:
            slots = set().union(*(self._tagged.get(tag, ()) for tag in tags))
            is_tagged = np.zeros(self.slots, bool)
            is_tagged[list(slots)] = True
            accepted &= is_tagged
        return accepted

    def blocked(self, now: datetime, *, past: bool) -> NDArray[np.bool_] | None:
        """By slot, what may not be found now. None: everything may. `past`: what held once may be found too."""
        if not self._dead and not self._limited:
            return None
        blocked = np.zeros(self.slots, bool)
        blocked[self._dead.sorted] = True
        slots = self._limited.sorted
        at = _microseconds(now)
        is_blocked = self.column("valid_from")[slots] > at
        if not past:
            until = self.column("valid_until")[slots]
            is_blocked |= (until != _NO_TIME) & (until <= at)
            is_blocked |= self.column("status")[slots] != _STATUS[Status.ACTIVE]
        blocked[slots] = is_blocked
        return blocked

    def newest(self, slots: NDArray[np.integer], limit: int) -> list[Memory]:
        """Of these, the newest first; of equals the lowest ids."""
        created = self.column("created")[slots]
        if len(slots) > limit:
            may = created >= np.partition(created, -limit)[-limit]
            slots, created = slots[may], created[may]
        ids = self.column("id_low")[slots], self.column("id_high")[slots]
        return self.memories(slots[np.lexsort((*ids, -created))][:limit].tolist())

    def memory(self, slot: int) -> Memory:
        return self.memories([slot])[0]

    def memories(self, slots: Sequence[int]) -> list[Memory]:
        """In order."""
        return list(map(self._made, slots, self._columns.array[slots].tolist()))

    def _made(self, slot: int, columns: tuple[Any, ...]) -> Memory:
        row = _Slot._make(columns)
        start = row.blob
        middle = start + row.content_bytes
        end = middle + row.metadata_bytes
        owner = self._owners[row.owner]
        created = _EPOCH + timedelta(microseconds=row.created)
        return Memory(
            _uuid(row.id_high, row.id_low),
            owner.org_id,
            owner.agent_id,
            owner.user_id,
            self._blob[start:middle].decode(),
            self._blob[end : end + _HASH_BYTES].hex(),
            row.tokens,
            _CATEGORIES[row.category],
            row.confidence,
            row.usefulness,
            _STATUSES[row.status],
            _SOURCES[row.source],
            None if row.session == NONE else self._sessions.names[row.session],
            None if row.turn == _NO_TURN else row.turn,
            None if row.valid_from == _NO_TIME else _time(row.valid_from),
            None if row.valid_until == _NO_TIME else _time(row.valid_until),
            self._superseded_by.get(slot),
            row.retrievals,
            None if row.retrieved == _NO_TIME else _time(row.retrieved),
            created,
            created if row.updated == row.created else _EPOCH + timedelta(microseconds=row.updated),
            _metadata(self._blob[middle:end]) if row.metadata_bytes else {},
        )

    def _append(self, rows: Sequence[Row]) -> None:
        """Columns, texts, words and vectors; not postings, ids and neighbours."""
        if not rows:
            return
        memories = [row.memory for row in rows]
        first = self.slots
        new = np.zeros(len(rows), _COLUMNS)
        ids = np.frombuffer(bytes.fromhex("".join([one.id for one in memories]).replace("-", "")), ">u8")
        new["id_high"], new["id_low"] = ids[::2], ids[1::2]

        contents = [one.content.encode() for one in memories]
        metadata = [_encoded(one.metadata) if one.metadata else b"" for one in memories]
        new["content_bytes"] = list(map(len, contents))
        new["metadata_bytes"] = list(map(len, metadata))
        hashes = [bytes.fromhex(one.content_hash) for one in memories]
        new["content_hash"] = np.frombuffer(b"".join([one[:8] for one in hashes]), ">u8")
        sizes = new["content_bytes"].astype(np.int64) + new["metadata_bytes"] + _HASH_BYTES
        new["blob"] = len(self._blob) + np.cumsum(sizes) - sizes
        self._blob += b"".join([part for texts in zip(contents, metadata, hashes, strict=True) for part in texts])

        words = np.frombuffer(b"".join([row.features.words for row in rows]), "<i4")
        new["word_count"] = [len(row.features.words) // 4 for row in rows]
        counts = new["word_count"].astype(np.int64)
        new["words"] = len(self._words) + np.cumsum(counts) - counts
        self._words.extend(words.astype(np.uint16))

        new["tokens"] = [one.content_tokens for one in memories]
        new["category"] = [_CATEGORY[one.category] for one in memories]
        new["status"] = [_STATUS[one.status] for one in memories]
        new["source"] = [_SOURCE[one.source] for one in memories]
        new["confidence"] = [one.confidence for one in memories]
        new["usefulness"] = [one.usefulness for one in memories]
        new["retrievals"] = [min(one.retrieval_count, _MOST_RETRIEVALS) for one in memories]
        new["session"] = [NONE if one.session_id is None else self._sessions.number(one.session_id) for one in memories]
        new["turn"] = [_NO_TURN if one.turn_index is None else one.turn_index for one in memories]
        new["previous"] = new["next"] = NONE
        new["subject"] = [self._subjects.number(name) if (name := subject(one)) else NONE for one in memories]
        new["owner"] = [self._owner(one) for one in memories]
        new["created"] = [_microseconds(one.created_at) for one in memories]
        new["updated"] = [_microseconds(one.updated_at) for one in memories]
        for name in ("valid_from", "valid_until"):
            new[name] = [_NO_TIME if (at := getattr(one, name)) is None else _microseconds(at) for one in memories]
        new["retrieved"] = [
            _NO_TIME if one.last_retrieved_at is None else _microseconds(one.last_retrieved_at) for one in memories
        ]
        self._columns.extend(new)
        self._append_vectors([row.features.vector for row in rows], first)
        for slot, one in enumerate(memories, start=first):
            if one.valid_from or one.valid_until or one.status is not Status.ACTIVE:
                self._limited.add(slot)
            if one.superseded_by:
                self._superseded_by[slot] = one.superseded_by
            if one.metadata:
                self._note_metadata(slot, one)

    def _append_vectors(self, vectors: Sequence[bytes], first: int) -> None:
        size = max(map(len, vectors))
        if self.vectors is None:
            if not size:
                return
            self.vectors = Vectors(size // 2)
            self.vectors.append(np.zeros((first, size // 2), np.float32))
        empty = bytes(2 * self.vectors.dimension)
        whole = b"".join([vector or empty for vector in vectors])
        self.vectors.append(np.frombuffer(whole, "<f2").reshape(len(vectors), -1).astype(np.float32))

    def _note_metadata(self, slot: int, memory: Memory) -> None:
        metadata = memory.metadata
        for tag in _tags(memory):
            self._tagged.setdefault(tag, set()).add(slot)
        what = metadata.get("slot")
        if metadata.get("pinned") is True:
            self.pinned.add(slot)
        elif isinstance(what, str) and what in _PROFILE_SLOTS and metadata.get("subject", "user") == "user":
            self.profile.add(slot)

    def _owner(self, memory: Memory) -> int:
        if self.partition.owns(memory):
            return 0
        owner = Namespace(memory.org_id, memory.agent_id, memory.user_id)
        if owner not in self._owners:
            self._owners.append(owner)
        return self._owners.index(owner)

    def _ids(self) -> dict[str, int]:
        """Made when first needed: most indexes are only read."""
        if self._slot_of is None:
            high, low = self.column("id_high").tolist(), self.column("id_low").tolist()
            self._slot_of = {_uuid(*pair): slot for slot, pair in enumerate(zip(high, low, strict=True))}
        return self._slot_of

    def _link(self, only: Collection[int] | None = None) -> None:
        """Predecessor and successor of each memory in its session; what was said at once goes by its content.

        `only`: of these sessions, whose links were made before.
        """
        columns = self._columns.array
        if only is None:
            members = np.flatnonzero(columns["session"] != NONE)
        else:
            is_theirs = np.isin(columns["session"], list(only))
            is_theirs[self._dead.sorted] = False
            members = np.flatnonzero(is_theirs)
        if not len(members):
            return
        rows = columns[members]
        order = np.lexsort((rows["content_hash"], rows["created"], rows["turn"], rows["session"]))
        members, sessions = members[order], rows["session"][order]
        same = sessions[1:] == sessions[:-1]
        columns["previous"][members] = columns["next"][members] = NONE
        columns["next"][members[:-1][same]] = members[1:][same]
        columns["previous"][members[1:][same]] = members[:-1][same]
        lasts = np.flatnonzero(np.append(~same, True))
        self._session_last.update(zip(sessions[lasts].tolist(), members[lasts].tolist(), strict=True))
        self._make_room_for_sizes()
        self._session_sizes.array[sessions[lasts]] = np.diff(lasts, prepend=-1)

    def _link_one(self, slot: int) -> bool:
        """False: its place is far from the session's end, so that all of that must be linked anew."""
        columns = self._columns.array
        session = int(columns["session"][slot])
        if session == NONE:
            return True

        def key(which: int) -> tuple[int, ...]:
            return tuple(int(columns[name][which]) for name in ("turn", "created", "content_hash"))

        before, after, mine = self._session_last.get(session, NONE), NONE, key(slot)
        for _ in range(_NEAR):
            if before == NONE or key(before) <= mine:
                break
            before, after = int(columns["previous"][before]), before
        else:
            return False
        columns["previous"][slot], columns["next"][slot] = before, after
        if before != NONE:
            columns["next"][before] = slot
        if after == NONE:
            self._session_last[session] = slot
        else:
            columns["previous"][after] = slot
        self._make_room_for_sizes()
        self._session_sizes.array[session] += 1
        return True

    def _make_room_for_sizes(self) -> None:
        new = len(self._sessions) - len(self._session_sizes)
        if new:
            self._session_sizes.extend(np.zeros(new, np.intp))


class _Slots:
    """Some of the slots."""

    def __init__(self) -> None:
        self._slots: set[int] = set()
        self._sorted: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, slot: int) -> None:
        self._slots.add(slot)
        self._sorted = None

    def discard(self, slot: int) -> None:
        if slot in self._slots:
            self._slots.discard(slot)
            self._sorted = None

    @property
    def sorted(self) -> NDArray[np.int64]:
        """Made once after a change: each request looks at it, several times."""
        if self._sorted is None:
            found = np.fromiter(self._slots, np.int64, len(self._slots))
            found.sort()
            self._sorted = found
        return self._sorted


class _Grown:
    """An array that grows at its end by doubling."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.room = np.empty(0, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        return self.room.nbytes

    @property
    def array(self) -> NDArray[Any]:
        return self.room[: self._size]

    def extend(self, values: NDArray[Any]) -> None:
        needed = self._size + len(values)
        if needed > len(self.room):
            room = np.empty(needed if not self._size else max(needed, len(self.room) * 3 // 2), self.room.dtype)
            room[: self._size] = self.array
            self.room = room
        self.room[self._size : needed] = values
        self._size = needed


class _Names:
    """A number for each text."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        return self._numbers.get(name)

    def number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        return number


def _tags(memory: Memory) -> list[str]:
    tags = memory.metadata.get("tags")
    return list(dict.fromkeys(tag for tag in tags if isinstance(tag, str))) if isinstance(tags, list) else []


def _encoded(metadata: Mapping[str, object]) -> bytes:
    try:
        return msgspec.json.encode(metadata)
    except ValueError:  # half of a surrogate pair, which only another program could have stored
        return json.dumps(metadata).encode()


def _metadata(encoded: bytearray) -> Mapping[str, object]:
    found: Mapping[str, object]
    try:
        found = _decode(encoded)
    except ValueError:
        found = json.loads(encoded)
    return found


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // _MICROSECOND


def _time(microseconds: int) -> datetime | None:
    return None if microseconds == _NO_TIME else _EPOCH + timedelta(microseconds=microseconds)


def _uuid(high: int, low: int) -> str:
    text = f"{high:016x}{low:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
