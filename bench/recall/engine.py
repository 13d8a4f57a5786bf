"""What a run of a benchmark needs of the engine: its indexer, its stores, and vectors that were paid for once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.recall.measure import Conversation, Store, rows
from extproc.context.index import Index
from extproc.context.retrieve import Meanings
from extproc.memory.embedding import Embedder, StaticTable, embedding_choice, open_embedder
from extproc.memory.features import WindowIndexer
from extproc.memory.model import Namespace
from extproc.memory.tokens import count_tokens
from extproc.settings import EngineSettings

__all__ = ["KeptVectors", "open_stores", "with_exact_tokens"]


class KeptVectors:
    """An embedder whose vectors are kept in a file: a model takes minutes for what a table does in a second."""

    def __init__(self, embedder: Embedder, path: Path) -> None:
        self.name = embedder.name
        self.dimension = embedder.dimension
        self._embedder = embedder
        self._path = path
        self._vectors: dict[str, NDArray[np.float32]] = {}
        if path.exists():
            with np.load(path) as kept:
                self._vectors = dict(zip(kept["keys"].tolist(), kept["vectors"], strict=True))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        keys = [hashlib.sha256(f"{self.name}\n{text}".encode()).hexdigest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._vectors}
        if new:
            self._vectors.update(zip(new, self._embedder.embed(list(new.values())), strict=True))
        return np.array([self._vectors[key] for key in keys], np.float32).reshape(len(texts), self.dimension)

    def keep(self) -> None:
        np.savez(self._path, keys=np.array(list(self._vectors)), vectors=np.array(list(self._vectors.values())))


def open_stores(
    conversations: Sequence[Conversation], namespace: Namespace, settings: EngineSettings, kept: Path | None = None
) -> tuple[list[Store], Store]:
    """One store for each conversation, and one for all; with the embedder of the settings.

    Raises what `open_embedder` does. `kept`: a file of vectors, read and written.
    """
    table = StaticTable.load()
    embedder = open_embedder(embedding_choice(settings), table)
    keeper = KeptVectors(embedder, kept) if kept else None
    indexer = WindowIndexer(table, keeper or embedder)
    meanings = Meanings(table)
    rows_of = [rows(one, indexer) for one in conversations]
    alone = [
        Store(Index(namespace, its), [one], indexer, meanings) for its, one in zip(rows_of, conversations, strict=True)
    ]
    every = [row for its in rows_of for row in its]
    if keeper:
        keeper.embed([asked.text for one in conversations for asked in one.questions])
        keeper.keep()
    return alone, Store(Index(namespace, every), conversations, indexer, meanings)


def with_exact_tokens(conversation: Conversation) -> Conversation:
    """As with the extra `tokens`."""
    memories = [replace(one, content_tokens=count_tokens(one.content)) for one in conversation.memories]
    return replace(conversation, memories=memories)
