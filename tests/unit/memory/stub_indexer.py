"""An indexer without a word table: words as they stand, and a vector of which words occur in the window."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from extproc.memory.features import Features
from extproc.memory.model import Memory

__all__ = ["StubIndexer"]


class StubIndexer:
    def __init__(self, version: str = "stub-1", dimension: int = 256) -> None:
        self.version = version
        self.dimension = dimension

    def features(self, memories: Sequence[Memory], before: Sequence[Sequence[Memory]]) -> list[Features]:
        return [self._of(memory, its) for memory, its in zip(memories, before, strict=True)]

    def without_vectors(self, memories: Sequence[Memory]) -> list[Features]:
        return [replace(self._of(memory, ()), vector=b"") for memory in memories]

    def vector(self, text: str) -> bytes:
        counts = np.zeros(self.dimension, dtype=np.float32)
        for word in _words(text):
            counts[zlib.crc32(word.encode()) % self.dimension] += 1
        return (counts / np.linalg.norm(counts)).astype("<f2").tobytes()

    def _of(self, memory: Memory, before: Sequence[Memory]) -> Features:
        window = " ".join(one.content for one in [*before, memory])
        stems = _words(memory.content)
        words = np.array([zlib.crc32(one.encode()) % 30_000 for one in stems], dtype="<i4").tobytes()
        return Features(self.version, " ".join(stems), words, self.vector(window))


def _words(text: str) -> list[str]:
    return text.lower().split()
