"""From a question to its candidates, with what speaks for each of them. Pure.

Candidates are the best by words and the nearest by vector, and their neighbours in the session; some hundreds. What is
measured of them is on a fixed scale: nothing depends on what else is in the store, but for idf. Several indexes (an
agent's memories and a user's) share one idf, so that their memories compete without being copied together.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from extproc.context.index import NONE
from extproc.context.postings import WEIGHTS
from extproc.context.steps import finish
from extproc.memory.features import asked_date_stems
from extproc.memory.text import Moment, Subject, stems

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from numpy.typing import NDArray

    from extproc.context.index import Index
    from extproc.context.steps import Steps
    from extproc.memory.features import Question, WordTable
    from extproc.memory.model import Memory
    from extproc.memory.text import Query

__all__ = ["Filter", "Meanings", "Pool", "collect", "collecting", "standing"]

CANDIDATES = 64
"""Of each source. On LoCoMo 50 find what 200 find (R@10 78.5, 78.1)."""
REACH = 2
"""Neighbours on each side that come along."""

BACKGROUND = 300
"""Memories of an assumed background that stand beside the namespace's own. A namespace of one memory then ranks and
gates like one of a thousand: without them, idf of a word that the only memory holds is near 0. From a thousand memories
on, the namespace's own counts decide."""
_HELD_BY_RANK = 1.2
"""Memories of the background that hold the most common word, did it stand alone: a word of rank r is one of some 10 r
words of a text (Zipf), and a memory has about twelve. So "allergic" tells more than "anything", held or not."""
_MOST_HELD = 0.5
_RAREST = 4e-5
"""Share of the background that holds a word which the table does not know, as that of its last."""
LEAST_INFORMATION = 7.0
"""Sum of idf below which a query counts as if it had that much: about one rare word, or three common ones. So "thanks,
that worked" does not fully match every memory about work."""
MOST_INFORMATIVE = 8
"""Stems of a query that count towards its information, the rarest: a question at the end of a long message is answered
by a memory that matches a few words of it."""
MOST_SEARCHED = 32
"""Stems of a query that are looked up, the rarest that some memory holds: four times MOST_INFORMATIVE."""
MOST_COMPARED = 16
"""Stems of a query whose meaning is compared: those that are looked up first."""
MOST_STANDING = 20
"""Pinned memories that are looked at: more do not fit in their share of a block."""
MOST_POSTINGS = 200_000
"""Postings read for one request to find candidates, about 3 ms; the rarest stem is always read. The candidates are then
weighed by all stems."""
_POSTINGS_OF_STEP = 30_000
"""About half a millisecond."""
_EVERYWHERE = 0.5
_FUNCTION = 0.3
_COMMON = 0.1
"""Share of the background that holds such a word; of these words the background is as large as the namespace besides,
since a store of facts may seldom hold them, and they tell nothing all the same."""
_BACKGROUND = {
    **dict.fromkeys(
        stems(
            """want need like love use go get make good new time day year thing way people say talk think look see find
            give take come keep try start stop continue work help show write explain create add change check list
            question answer word text example idea best simple short quick great big small long first last next old
            part line file name number"""
        ),
        _COMMON,
    ),
    **dict.fromkeys(map(str, range(100)), _COMMON),
    **dict.fromkeys(
        stems("die der den dem des man par pour plus dans como mas sie er wo mal gibt est"),
        _COMMON,
    ),
    **dict.fromkeys(
        stems(
            """al als ao au auf aus bei beim bis c com con d da de di dir du e el en es et fur il im j l la lo mich mir
            mit n na ne no o on par pas per por qu se sur um un von vor y zu"""
        ),
        _FUNCTION,
    ),
    **dict.fromkeys(stems("user assistant agent"), _EVERYWHERE),
}
"""Of other languages those that no list of stop words may hold, since English has such a word or name."""
_GRAMMAR = re.compile("^[\u3040-\u309f]+$|[的了是我你他她在有和什么吗呢吧个这那就都也不谁哪几]")
"""Of pairs of characters: Japanese endings and particles, Chinese function words."""
UNSPACED_SHARE = 0.4
"""Of the information of a query without spaces, what a memory that says the same holds: of its pairs of characters half
straddle two words."""

LEAST_SIMILAR = 0.35
"""Cosine of two words below which they have nothing to do with each other (the static table's noise)."""
SOFT_LENGTH = 0.1
SOFT_REFERENCE = 12
"""Share by which a soft match falls with the memory's length, and the words of a typical one: a long memory has a word
like any other."""


class Filter(Protocol):
    """By slot of an index, what may be found at all."""

    def __call__(self, index: Index, /) -> NDArray[np.bool_]: ...


class Meanings:
    """How alike words are, by a table of their vectors."""

    def __init__(self, table: WordTable) -> None:
        self._vectors = table.vectors
        squares = [
            np.square(part.astype(np.float32)).sum(axis=1)
            for part in np.array_split(table.vectors, 1 + len(table.vectors) // 4096)
        ]
        self._inverse = 1 / np.maximum(np.sqrt(np.concatenate(squares)), 1e-6)

    def likeness(
        self, asked: NDArray[np.int32], words: NDArray[np.uint16], counts: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(asked, memories): of each asked word its best likeness with a word of each memory, 0..1.

        `words`: of all memories one after the other, `counts` of each. An asked word below 0 is like nothing.
        """
        likeness = np.zeros((len(asked), len(counts)), np.float32)
        known = np.flatnonzero(asked >= 0)
        if not len(known) or not len(words):
            return likeness
        is_there = np.zeros(len(self._vectors), bool)
        is_there[words] = True
        unique = np.flatnonzero(is_there)
        place = np.empty(len(self._vectors), np.int32)
        place[unique] = np.arange(len(unique), dtype=np.int32)

        ids = asked[known]
        queries = self._vectors[ids].astype(np.float32) * self._inverse[ids, None]
        alike = queries @ self._vectors[unique].astype(np.float32).T
        alike *= self._inverse[unique]
        alike[alike < LEAST_SIMILAR] = 0
        alike *= alike
        filled = np.flatnonzero(counts)
        starts = (np.cumsum(counts) - counts)[filled]
        likeness[np.ix_(known, filled)] = np.maximum.reduceat(alike[:, place[words]], starts, axis=1)
        return np.minimum(likeness, 1)


@dataclass(slots=True)
class Pool:
    """Candidates as columns."""

    indexes: Sequence[Index]
    which: NDArray[np.intp]
    """Of the indexes the one that holds it."""
    slots: NDArray[np.intp]
    previous: NDArray[np.intp]
    next: NDArray[np.intp]
    """Neighbours in the session, as places in the pool; NONE when not here."""
    session: NDArray[np.intp]
    """A number over all indexes, or NONE."""
    session_size: NDArray[np.intp]
    words: NDArray[np.float32]
    """Share of the query's information that it holds, or of that of one sentence that its author speaks of himself in;
    equal words and alike ones count half each. 0..1."""
    lexical: NDArray[np.float32]
    """BM25 as a share of the query's information, about 0..1.5."""
    soft: NDArray[np.float32]
    """The same with likeness in place of equality, 0..1."""
    cosine: NDArray[np.float32]
    is_named: NDArray[np.bool_]
    """Whom it is about is named in the query."""
    is_dated: NDArray[np.bool_]
    """It is of a month or day that the query writes."""
    id_high: NDArray[np.uint64]
    id_low: NDArray[np.uint64]
    created: NDArray[np.int64]
    """Microseconds since 1970."""
    usefulness: NDArray[np.float64]
    confidence: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.slots)


def collect(
    indexes: Sequence[Index],
    question: Question,
    meanings: Meanings,
    now: datetime,
    accept: Filter | None = None,
    candidates: int = CANDIDATES,
) -> Pool:
    """The candidates of all indexes together."""
    return finish(collecting(indexes, question, meanings, now, accept, candidates))


def collecting(
    indexes: Sequence[Index],
    question: Question,
    meanings: Meanings,
    now: datetime,
    accept: Filter | None = None,
    candidates: int = CANDIDATES,
) -> Steps[Pool]:
    """`collect` in steps. The indexes must not change meanwhile. When time is up no vector is looked for."""
    query = question.query
    weighed = _weighed(indexes, question)
    searched = _searched(weighed)
    dates = asked_date_stems(query)
    past = query.moment is Moment.PAST or bool(query.dates)
    parts = []
    for number, index in enumerate(indexes):
        if not index.slots:
            continue
        blocked = index.blocked(now, past=past)
        if accept is not None:
            blocked = ~accept(index) if blocked is None else blocked | ~accept(index)
        found = [(yield from _best_by_words(index, searched, dates, candidates, blocked))]
        is_late = yield
        if question.vector is not None and index.vectors is not None and not is_late:
            found.append(index.vectors.nearest(question.vector, candidates, blocked).astype(np.intp))
            yield
        slots = _with_neighbours(index, np.unique(np.concatenate(found)), blocked)
        if len(slots):
            parts.append((yield from _measure(index, number, slots, question, meanings, weighed)))
            yield
    return _joined(indexes, parts)


def standing(indexes: Sequence[Index], now: datetime) -> tuple[list[Memory], list[Memory]]:
    """What is pinned, and what a profile holds, each the newest first; of each MOST_STANDING at most."""
    found: tuple[list[Memory], list[Memory]] = ([], [])
    for index in indexes:
        if not index.pinned and not index.profile:
            continue
        blocked = index.blocked(now, past=False)
        for slots, memories in zip((index.pinned.sorted, index.profile.sorted), found, strict=True):
            free = slots if blocked is None else slots[~blocked[slots]]
            memories.extend(index.newest(free, MOST_STANDING))
    return _newest(found[0]), _newest(found[1])


def _newest(memories: Iterable[Memory]) -> list[Memory]:
    return sorted(memories, key=lambda memory: (-memory.created_at.timestamp(), memory.id))[:MOST_STANDING]


_DATE_IDF = 3.0
"""About that of a month, one of twelve."""


class _Weighed(NamedTuple):
    stem: str
    word: int
    """In the table, or -1."""
    idf: float
    held_by: int
    """Memories that hold it."""


def _weighed(indexes: Sequence[Index], question: Question) -> list[_Weighed]:
    """The stems of the query with their information, those that some memory holds first, of them the rarest first.

    Those that no memory holds tell how much is unmatched, and may have a word of like meaning.
    """
    size = sum(map(len, indexes))
    weighed = []
    for stem, word in zip(question.query.stems, question.ids.tolist(), strict=True):
        count = sum(index.count(stem) for index in indexes)
        common = _BACKGROUND.get(stem) or (_FUNCTION if stem[0] > "\u0dff" and _GRAMMAR.search(stem) else 0.0)
        background = BACKGROUND + size if common else BACKGROUND
        seen = count + background * max(common, _RAREST if word < 0 else min(_MOST_HELD, _HELD_BY_RANK / (word + 1)))
        idf = math.log(1 + max(0.0, size + background - seen + 0.5) / (seen + 0.5))
        weighed.append(_Weighed(stem, word, idf, count))
    return sorted(weighed, key=lambda one: (not one.held_by, -one.idf))


def _searched(weighed: Sequence[_Weighed]) -> list[_Weighed]:
    """The stems to look up, within MOST_SEARCHED and MOST_POSTINGS."""
    searched: list[_Weighed] = []
    postings = 0
    for one in weighed:
        postings += one.held_by
        if not one.held_by or (searched and (postings > MOST_POSTINGS or len(searched) == MOST_SEARCHED)):
            break
        searched.append(one)
    return searched


def _best_by_words(
    index: Index,
    searched: Sequence[_Weighed],
    dates: Sequence[str],
    limit: int,
    blocked: NDArray[np.bool_] | None,
) -> Steps[NDArray[np.intp]]:
    """Slots of the highest sums of idf times term weight; of equals the newest, then the lowest ids."""
    sums = np.zeros(index.slots, np.float32)
    touched = []
    read = 0
    for one in searched:
        posting = index.postings.of(one.stem)
        read += len(posting.slots)
        if read > _POSTINGS_OF_STEP:
            yield
            read = len(posting.slots)
        touched.append(posting.slots[sums[posting.slots] == 0])
        sums[posting.slots] += np.float32(one.idf) * WEIGHTS[posting.weights]
    slots = np.concatenate(touched).astype(np.intp) if touched else np.empty(0, np.intp)
    for stem in dates:
        posting = index.postings.of(stem)
        dated = posting.slots[sums[posting.slots] > 0]
        sums[dated] += np.float32(_DATE_IDF)
    scores = sums[slots]
    if blocked is not None:
        may = ~blocked[slots]
        slots, scores = slots[may], scores[may]
    if len(slots) <= limit:
        return slots
    return slots[_highest(scores, limit, index, slots)]


def _highest(scores: NDArray[np.float32], limit: int, index: Index, slots: NDArray[np.intp]) -> NDArray[np.intp]:
    """Places of the highest. What is equal at the limit goes by time and id, whatever the order in the arrays."""
    least = np.partition(scores, -limit)[-limit]
    above = np.flatnonzero(scores > least)
    equal = np.flatnonzero(scores == least)
    needed = limit - len(above)
    if needed < len(equal):
        created = index.column("created")[slots[equal]]
        oldest = np.partition(created, -needed)[-needed]
        newer = equal[created > oldest]
        same = equal[created == oldest]
        ids = index.column("id_high")[slots[same]], index.column("id_low")[slots[same]]
        same = same[np.lexsort(ids[::-1])[: needed - len(newer)]]
        equal = np.concatenate([newer, same])
    return np.concatenate([above, equal])


def _with_neighbours(index: Index, slots: NDArray[np.intp], blocked: NDArray[np.bool_] | None) -> NDArray[np.intp]:
    found = [slots]
    for side in ("previous", "next"):
        links = index.column(side)
        at = slots
        for _ in range(REACH):
            at = links[at].astype(np.intp)
            at = at[at != NONE]
            found.append(at)
    every = np.unique(np.concatenate(found))
    return every if blocked is None else every[~blocked[every]]


def _measure(
    index: Index,
    number: int,
    slots: NDArray[np.intp],
    question: Question,
    meanings: Meanings,
    weighed: Sequence[_Weighed],
) -> Steps[Pool]:
    """What speaks for each of the slots, which are sorted."""
    informative = sorted((one.idf for one in weighed), reverse=True)[:MOST_INFORMATIVE]
    total = np.float32(max(LEAST_INFORMATION, sum(informative)))
    weighed = weighed[:MOST_SEARCHED]
    idf = np.array([one.idf for one in weighed], np.float32)
    searched = slots.astype(np.uint32)
    weights = np.zeros((len(weighed), len(slots)), np.float32)
    for row, one in enumerate(weighed):
        posting = index.postings.of(one.stem)
        if len(posting.slots):
            at = np.minimum(np.searchsorted(posting.slots, searched), len(posting.slots) - 1)
            weights[row] = np.where(posting.slots[at] == searched, WEIGHTS[posting.weights[at]], 0)
    lexical = _product(idf, weights) / total
    yield

    asked = np.array([one.word for one in weighed[:MOST_COMPARED]], np.int32)
    ids, counts = index.words_of(slots)
    likeness = meanings.likeness(asked, ids, counts)
    likeness[weights[: len(asked)] > 0] = 1
    length = np.float32(1 - SOFT_LENGTH) + np.float32(SOFT_LENGTH / SOFT_REFERENCE) * counts.astype(np.float32)
    soft = np.minimum(_product(idf[: len(asked)], likeness) / total / length, 1)
    if question.query.is_unspaced:
        words = np.minimum(lexical / np.float32(UNSPACED_SHARE), 1)
    else:
        words = (np.minimum(lexical, 1) + soft) / 2
        for sentence in question.query.own:
            its = idf * np.array([one.stem in sentence for one in weighed], np.float32)
            least = np.float32(max(LEAST_INFORMATION, np.sort(its)[-MOST_INFORMATIVE:].sum()))
            alike = np.minimum(_product(its[: len(asked)], likeness) / least / length, 1)
            words = np.maximum(words, (np.minimum(_product(its, weights) / least, 1) + alike) / 2)

    if question.vector is None or index.vectors is None:
        cosine = np.zeros(len(slots), np.float32)
    else:
        cosine = index.vectors.cosines(slots, question.vector)
    yield

    columns = {
        name: index.column(name)[slots]
        for name in (
            "previous", "next", "session", "subject", "id_high", "id_low", "created", "usefulness", "confidence"
        )
    }  # fmt: skip
    sessions = columns["session"].astype(np.intp)
    return Pool(
        indexes=(),
        which=np.full(len(slots), number),
        slots=slots,
        previous=_places(slots, columns["previous"]),
        next=_places(slots, columns["next"]),
        session=np.where(sessions == NONE, NONE, sessions + (number << 32)),
        session_size=index.session_sizes(sessions),
        words=words,
        lexical=lexical,
        soft=soft,
        cosine=cosine,
        is_named=_named(index, columns["subject"], question.query),
        is_dated=_dated(columns["created"], question.query),
        id_high=columns["id_high"],
        id_low=columns["id_low"],
        created=columns["created"],
        usefulness=columns["usefulness"],
        confidence=columns["confidence"],
    )


def _product(row: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """Summed with more digits than are kept: the last ones hang on where a column stands, which means nothing."""
    product: NDArray[np.float32] = (row.astype(np.float64) @ columns.astype(np.float64)).astype(np.float32)
    return product


def _places(slots: NDArray[np.intp], wanted: NDArray[np.int32]) -> NDArray[np.intp]:
    """Where in the sorted slots each wanted one is, or NONE."""
    at = np.minimum(np.searchsorted(slots, wanted), len(slots) - 1)
    return np.where(slots[at] == wanted, at, NONE)


def _named(index: Index, subjects: NDArray[np.int32], query: Query) -> NDArray[np.bool_]:
    asked = set(query.stems)
    named = []
    for number in set(subjects.tolist()) - {NONE}:
        name = index.subject_stems(number)
        if (query.subject is Subject.AUTHOR) if name == _USER else (name and asked.issuperset(name)):
            named.append(number)
    if not named:
        return np.zeros(len(subjects), bool)
    return subjects == named[0] if len(named) == 1 else np.isin(subjects, named)


_USER = stems("user")


def _dated(created: NDArray[np.int64], query: Query) -> NDArray[np.bool_]:
    matched = np.zeros(len(created), bool)
    if not query.dates:
        return matched
    months = (created // 1_000).astype("M8[ms]").astype("M8[M]")
    days = (created // 1_000).astype("M8[ms]").astype("M8[D]")
    years = months.astype("M8[Y]").astype(int) + 1970
    month = months.astype(int) % 12 + 1
    day = (days - months).astype(int) + 1
    for asked in query.dates:
        matches = month == asked.month
        if asked.day is not None:
            matches &= day == asked.day
        if asked.year is not None:
            matches &= years == asked.year
        matched |= matches
    return matched


def _joined(indexes: Sequence[Index], parts: Sequence[Pool]) -> Pool:
    if len(parts) == 1:
        parts[0].indexes = indexes
        return parts[0]
    starts = np.cumsum([0, *map(len, parts)])
    columns: dict[str, Any] = {}
    for name in _POOL_COLUMNS:
        pieces = [getattr(part, name) for part in parts]
        if name in ("previous", "next"):
            pieces = [
                np.where(piece == NONE, NONE, piece + start) for piece, start in zip(pieces, starts, strict=False)
            ]
        columns[name] = np.concatenate(pieces) if pieces else np.empty(0, np.intp)
    return Pool(indexes=indexes, **columns)


_POOL_COLUMNS = tuple(name for name in Pool.__slots__ if name != "indexes")
