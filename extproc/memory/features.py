"""What is computed of a memory when it is written, so that loading a namespace is concatenation. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from extproc.memory.embedding import EmbedderUnavailable, StaticTable, open_embedder
from extproc.memory.text import content_words, parse_query, stems

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import date

    from numpy.typing import NDArray

    from extproc.memory.embedding import Embedder, EmbeddingChoice
    from extproc.memory.model import Memory
    from extproc.memory.text import Query

__all__ = [
    "DATE_MARK",
    "MOST_OF_TURNS",
    "TURN_BEGINS",
    "TURN_ENDS",
    "Features",
    "Indexer",
    "Question",
    "Row",
    "WindowIndexer",
    "WordTable",
    "asked_date_stems",
    "by_turn",
    "date_stems",
    "indexed_text",
    "open_indexer",
    "speaker",
    "subject",
    "turn_of",
    "window",
]

TEXT_VERSION = "3"
"""Of this file and `text`: changes when the same memory gives other stems, words or predecessors."""
DATE_MARK = "@"
WINDOW = 2
"""Predecessors in a memory's vector (LoCoMo, R@10 of the vector alone: 39 without, 49 with two)."""
MOST_OF_TURNS = 8 * WINDOW
"""Memories of a session in which the predecessors are looked for: a turn seldom leaves more than a few."""
TURN_BEGINS, TURN_ENDS = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
"""No memory of a numbered turn is earlier or later."""


@dataclass(frozen=True, slots=True)
class Features:
    """Of one memory, as it lies in its row. Made by an `Indexer`, read by the engine's index of the same version."""

    version: str
    """Of the indexer that made it: tokeniser, word table and embedder together. Another one's must be made anew."""
    stems: str
    """The stems of the indexed text in order, with repetitions, separated by a space."""
    words: bytes
    """Ids in the word table, int32 little-endian, in order; unknown words are left out."""
    vector: bytes
    """Of the memory and its predecessors in the session (`window`): float16 little-endian, unit length; empty: none."""


class Row(NamedTuple):
    memory: Memory
    features: Features


class Indexer(Protocol):
    version: str
    dimension: int
    """Of the vectors, all of them."""

    def features(self, memories: Sequence[Memory], before: Sequence[Sequence[Memory]]) -> list[Features]:
        """In order. `before`: of each memory its predecessors in the session, oldest first, two at most. Blocks.

        Raises EmbedderUnavailable.
        """
        ...

    def without_vectors(self, memories: Sequence[Memory]) -> list[Features]:
        """The same but for the vectors: for an engine, while there is no embedder. Not to be stored."""
        ...


class WordTable(Protocol):
    """What is needed of a table of word vectors."""

    @property
    def name(self) -> str: ...

    @property
    def vectors(self) -> NDArray[np.int8]:
        """(words, dimension); the direction counts, not the length."""
        ...

    def words(self, text: str) -> NDArray[np.int32]:
        """Ids of the known words, in order; unknown ones are left out."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """A query with what its words mean."""

    query: Query
    ids: NDArray[np.int32]
    """Of each stem its word in the table, or -1."""
    vector: NDArray[np.float32] | None
    """Of the whole query, unit length. None: there is none, and only words are compared."""


def open_indexer(choice: EmbeddingChoice | None = None) -> WindowIndexer:
    """The package's word table, and the embedder of the operator's choice. Raises what `open_embedder` does."""
    table = StaticTable.load()
    return WindowIndexer(table, table if choice is None else open_embedder(choice, table))


class WindowIndexer:
    def __init__(self, table: WordTable, embedder: Embedder) -> None:
        self.table = table
        self.is_quick = isinstance(embedder, StaticTable)
        """Whether a question may be embedded on an event loop: 0.1 ms."""
        self._embedder = embedder
        self.version = f"{TEXT_VERSION}/{table.name}/{embedder.name}"
        self.dimension = embedder.dimension

    def features(self, memories: Sequence[Memory], before: Sequence[Sequence[Memory]]) -> list[Features]:
        if not memories:
            return []
        texts = [indexed_text(memory) for memory in memories]
        windows = [
            "\n".join([*map(indexed_text, predecessors[-WINDOW:]), text])
            for predecessors, text in zip(before, texts, strict=True)
        ]
        vectors = self._embedder.embed(windows).astype("<f2")
        return [
            replace(its, vector=vector.tobytes() if vector.any() else b"")
            for its, vector in zip(self.without_vectors(memories), vectors, strict=True)
        ]

    def without_vectors(self, memories: Sequence[Memory]) -> list[Features]:
        return [
            Features(
                self.version,
                " ".join([*stems(text), *date_stems(memory.created_at)]),
                self._words(text),
                b"",
            )
            for memory, text in zip(memories, map(indexed_text, memories), strict=True)
        ]

    def question(self, text: str) -> Question:
        """Blocks as the embedder does. Without a vector when there is none now."""
        question = self.words_of_question(text)
        if not question.query.stems:
            return question
        try:
            vector = self._embedder.embed([text])[0]
        except EmbedderUnavailable:
            return question
        return replace(question, vector=vector if vector.any() else None)

    def words_of_question(self, text: str) -> Question:
        """Without its vector."""
        query = parse_query(text)
        ids = [self.table.words(word)[:1] for word in query.words]
        return Question(query, np.array([found[0] if len(found) else -1 for found in ids], np.int32), None)

    def _words(self, text: str) -> bytes:
        return self.table.words(" ".join(dict.fromkeys(content_words(text)))).astype("<i4").tobytes()


def turn_of(memory: Memory) -> tuple[int, datetime]:
    """Where in its session it was said: what comes of one turn has one place, whatever its ids and microseconds."""
    return (-1, memory.created_at) if memory.turn_index is None else (memory.turn_index, TURN_BEGINS)


def by_turn(memory: Memory) -> tuple[object, ...]:
    """The order of a session; of one turn the fullest is the last."""
    return *turn_of(memory), *_fullness(memory)


def window(memory: Memory, others: Iterable[Memory]) -> list[Memory]:
    """Its predecessors among others of the session: of each of the WINDOW turns before it the fullest, oldest first.

    What comes of its own turn says the same in other words: with it, a vector would hang on the order of ids.
    """
    mine = turn_of(memory)
    of_turn: dict[tuple[int, datetime], Memory] = {}
    for other in others:
        if (its := turn_of(other)) < mine:
            known = of_turn.get(its)
            if known is None or _fullness(other) > _fullness(known):
                of_turn[its] = other
    return [of_turn[its] for its in sorted(of_turn)[-WINDOW:]]


def _fullness(memory: Memory) -> tuple[int, str]:
    return len(memory.content), memory.content


def date_stems(date: date) -> list[str]:
    """By which a month or a day of any year is looked up; no word of a text looks like them."""
    return [f"{DATE_MARK}{date:%m}", f"{DATE_MARK}{date:%m-%d}"]


def asked_date_stems(query: Query) -> list[str]:
    """Of the dates that a query writes, each once."""
    asked = (
        f"{DATE_MARK}{one.month:02}" if one.day is None else f"{DATE_MARK}{one.month:02}-{one.day:02}"
        for one in query.dates
    )
    return list(dict.fromkeys(asked))


def indexed_text(memory: Memory) -> str:
    """What is looked at of a memory: who said it, and what."""
    who = speaker(memory)
    return f"{who}: {memory.content}" if who else memory.content


def speaker(memory: Memory) -> str:
    """Who said it: a name, else the role; the empty string when neither is known."""
    return _text(memory, "speaker") or _text(memory, "role")


def subject(memory: Memory) -> str:
    """Whom it is about: a name or `user`; the empty string when not known."""
    return _text(memory, "subject") or speaker(memory)


def _text(memory: Memory, key: str) -> str:
    value = memory.metadata.get(key)
    return value.strip() if isinstance(value, str) else ""
