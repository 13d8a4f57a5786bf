"""Finding memories by their words: an inverted index in the process, BM25 on a fixed scale. Pure.

One `Index` holds one partition (an agent's memories, or one user's). `search` takes several, with one idf over all of
them, so a user's own memories and the agent's compete on one scale without being copied together. A weight depends on
its own memory alone, never on the others: adding memory by memory gives the same numbers as building anew.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from extproc.memory.model import Status
from extproc.memory.text import stems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from extproc.memory.model import Memory
    from extproc.memory.text import Query

__all__ = ["Document", "Hit", "Index", "Matches", "search"]

K1 = 0.9
B = 0.4
"""BM25's saturation and length factors; best on LoCoMo among the usual ones (R@10 64.7 against 48.4 untuned)."""
REFERENCE_LENGTH = 12
"""Stems in a typical memory, in place of the average over the namespace, which would move with every new memory."""

LEAST_BACKGROUND = 100
"""Memories of an assumed background, which is as large as the namespace and this number together. A namespace of one
memory then ranks and gates like one of a thousand: without it, idf of a word that the only memory holds is near 0."""
LEAST_INFORMATION = 7.0
"""Sum of idf below which a query counts as if it had that much: about one rare word, or three common ones. So "thanks,
that worked" does not fully match every memory about work."""
MOST_INFORMATIVE = 8
"""Stems of a query that count towards its information, the rarest: a question at the end of a long message is answered
by a memory that matches a few words of it."""
MOST_SEARCHED = 32
"""Stems of a query that are looked up, the rarest that some memory holds: four times MOST_INFORMATIVE."""
MOST_POSTINGS = 200_000
"""Postings read for one request, tens of milliseconds; the rarest stem is always read. As many memories as the default
cache holds."""
_EVERYWHERE = 0.5
_COMMON = 0.1
"""Share of the background that holds such a word."""
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
    **dict.fromkeys(stems("user assistant agent"), _EVERYWHERE),
}

_MEMORY_BYTES = 1_200  # a Memory with its strings except the content, its slot, its entry by id; measured
_POSTING_BYTES = 24  # document, weight, and a share of the dictionary of stems


@dataclass(frozen=True, slots=True)
class Document:
    """A memory with its words counted: the part of indexing that may run in another thread."""

    memory: Memory
    weights: tuple[tuple[str, float], ...]
    """BM25's term weight of each stem, without idf: about 1.0 for a word said once in a typical memory."""

    @classmethod
    def of(cls, memory: Memory) -> Document:
        words = stems(memory.content)
        k = K1 * (1 - B + B * len(words) / REFERENCE_LENGTH)
        return cls(memory, tuple((stem, n * (K1 + 1) / (n + k)) for stem, n in Counter(words).items()))


@dataclass(slots=True)
class _Posting:
    slots: array[int]
    weights: array[float]


class Index:
    """The memories of one partition. Not for use by two threads at once."""

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        self._memories: list[Memory | None] = []
        self._slot_of: dict[str, int] = {}
        self._free: list[int] = []
        self._postings: dict[str, _Posting] = {}
        self._limited: set[int] = set()
        """Slots of memories that are valid for some time only."""
        self.approximate_bytes = 2_000
        for document in documents:
            self.put(document)

    def __len__(self) -> int:
        return len(self._slot_of)

    def put(self, document: Document) -> None:
        """Add, or replace the memory of the same id. A memory that is not active is taken out."""
        memory = document.memory
        self.remove(memory.id)
        if memory.status is not Status.ACTIVE:
            return
        if self._free:
            slot = self._free.pop()
            self._memories[slot] = memory
        else:
            slot = len(self._memories)
            self._memories.append(memory)
        self._slot_of[memory.id] = slot
        if memory.valid_from is not None or memory.valid_until is not None:
            self._limited.add(slot)
        postings = self._postings
        for stem, weight in document.weights:
            posting = postings.get(stem)
            if posting is None:
                posting = postings[stem] = _Posting(array("l"), array("d"))
            posting.slots.append(slot)
            posting.weights.append(weight)
        self.approximate_bytes += _size(document)

    def remove(self, memory_id: str) -> None:
        """Take a memory out; nothing happens when it is not there."""
        slot = self._slot_of.pop(memory_id, None)
        if slot is None:
            return
        document = Document.of(self.memory(slot))
        for stem, _ in document.weights:
            posting = self._postings[stem]
            at = posting.slots.index(slot)
            posting.slots.pop(at)
            posting.weights.pop(at)
            if not posting.slots:
                del self._postings[stem]
        self._memories[slot] = None
        self._free.append(slot)
        self._limited.discard(slot)
        self.approximate_bytes -= _size(document)

    def keep_only(self, memory_ids: set[str]) -> None:
        for gone in self._slot_of.keys() - memory_ids:
            self.remove(gone)

    def memory(self, slot: int) -> Memory:
        memory = self._memories[slot]
        assert memory is not None  # noqa: S101 (slots come from ids and postings, whose slots are filled)
        return memory

    def count(self, stem: str) -> int:
        posting = self._postings.get(stem)
        return len(posting.slots) if posting else 0

    def scores(self, weighted: Sequence[tuple[str, float]], now: datetime) -> dict[int, float]:
        """The sum of idf times term weight, by slot, of each memory that holds at least one of the stems."""
        scores: dict[int, float] = {}
        known = scores.get
        for stem, idf in weighted:
            posting = self._postings.get(stem)
            if posting is None:
                continue
            for slot, weight in zip(posting.slots, posting.weights, strict=True):
                scores[slot] = known(slot, 0.0) + idf * weight
        for slot in self._limited.intersection(scores):
            if not self.memory(slot).is_valid(now):
                del scores[slot]
        return scores


class Hit(NamedTuple):
    memory: Memory
    relevance: float
    """0..1: the share of the query's information (sum of idf) that the memory matches."""


@dataclass(frozen=True, slots=True)
class Matches:
    hits: list[Hit]
    """In no order. Of equal ones at the limit the newest are in, then the lowest ids."""
    evaluated: int
    """Memories that share a word with the query."""


def search(
    indexes: Sequence[Index],
    query: Query,
    limit: int,
    now: datetime,
    accept: Callable[[Memory], bool] | None = None,
) -> Matches:
    """The `limit` most relevant memories of all the indexes together, of those that `accept` takes."""
    weighted = _idf(indexes, query)
    if not weighted:
        return Matches([], 0)
    searched = _searched(indexes, weighted)
    found: list[tuple[float, Index, int]] = []
    evaluated = 0
    for index in indexes:
        scores = index.scores(searched, now)
        if accept is not None:
            scores = {slot: score for slot, score in scores.items() if accept(index.memory(slot))}
        evaluated += len(scores)
        if len(scores) > limit:
            least = heapq.nlargest(limit, scores.values())[-1]
            found += [(score, index, slot) for slot, score in scores.items() if score >= least]
        else:
            found += [(score, index, slot) for slot, score in scores.items()]
    total = max(LEAST_INFORMATION, sum(sorted((idf for _, idf in weighted), reverse=True)[:MOST_INFORMATIVE]))
    hits = [Hit(index.memory(slot), min(1.0, score / total)) for score, index, slot in found]
    if len(hits) > limit:
        hits.sort(key=lambda hit: (-hit.relevance, -hit.memory.created_at.timestamp(), hit.memory.id))
        del hits[limit:]
    return Matches(hits, evaluated)


def _idf(indexes: Sequence[Index], query: Query) -> list[tuple[str, float]]:
    """Each stem of the query with its information; those that no memory holds tell how much is unmatched."""
    size = sum(map(len, indexes))
    if not size:
        return []
    background = LEAST_BACKGROUND + size
    weighted = []
    for stem in query.stems:
        seen = sum(index.count(stem) for index in indexes) + background * _BACKGROUND.get(stem, 0.0)
        weighted.append((stem, math.log(1 + (size + background - seen + 0.5) / (seen + 0.5))))
    return weighted


def _searched(indexes: Sequence[Index], weighted: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The stems to look up, rarest first, within MOST_SEARCHED and MOST_POSTINGS."""
    searched: list[tuple[str, float]] = []
    postings = 0
    for stem, idf in sorted(weighted, key=lambda one: -one[1]):
        count = sum(index.count(stem) for index in indexes)
        if not count:
            continue
        postings += count
        if searched and (postings > MOST_POSTINGS or len(searched) == MOST_SEARCHED):
            break
        searched.append((stem, idf))
    return searched


def _size(document: Document) -> int:
    return _MEMORY_BYTES + len(document.memory.content) + _POSTING_BYTES * len(document.weights)
