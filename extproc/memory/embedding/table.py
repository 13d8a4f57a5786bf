"""The static word table: a vector for each of some 28,000 English words, read from one memory-mapped file.

A text is the weighted mean of its words. Weights are in the vectors already: a rare word's is long, a common word's
short. `scripts/make_static_table.py` makes the file; its layout, all numbers little-endian:

    8 bytes   magic, `IBEXWORD`
    4 × u32   format 1; words with pieces; of these whole words; dimension
    u32       bytes of the word list
    32 bytes  SHA-256 of everything after the header
    to 64     zero
    words     UTF-8, one a line, whole words first, then pieces (`##ing`); padded with zero to a multiple of 64
    scales    float32 a word; padded
    vectors   int8, `dimension` a word: times the scale it is the word's weighted vector
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
import unicodedata
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from extproc.memory.embedding.embedder import ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["TABLE_NAME", "TABLE_PATH", "StaticTable", "table_bytes"]

TABLE_NAME: Final = "static-minilm-256-v1"
TABLE_PATH: Final = Path(__file__).with_name("static-minilm-256-v1.bin")
_HEADER = struct.Struct("<8sIIIII32s")
_HEADER_BYTES = 64
_MAGIC = b"IBEXWORD"
_FORMAT = 1

_WORD = re.compile(r"[^\W_]+(?:['’](?:s|t|d|m|ll|re|ve)(?![^\W_]))?")
"""With the half of a contraction, which carries no meaning and would pass for a letter."""
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
"""Of a name in code: `useEffect`, `HTTPServer2`."""
_MARKS = re.compile("[\u0300-\u036f]")
_LONG_GAP = re.compile(r"(\W{32})\W+")
"""Longer than any run of marks in a language (UAX #15 allows 30): sorting a run takes time with its square."""

_MAX_WORD = 24
"""Letters; longer ones that the table lacks are keys, hashes and lines without spaces."""
_MAX_PIECES = 4
"""Of an unknown word; what takes more is a key or noise, whose letters would only blur the text's vector."""
_KEPT_LINES = 256
"""Whose words are remembered: a memory is a line of its own text and of two that follow it. 5 MB of the longest."""
_MIN_HEAD = 3
"""Letters that must be left when an ending is taken off."""
_ENDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ies", ("y", "ie")),
    ("ied", ("y",)),
    ("es", ("", "e")),
    ("s", ("",)),
    ("ing", ("", "e")),
    ("ed", ("", "e")),
    ("ers", ("", "e")),
    ("er", ("", "e")),
    ("est", ("", "e")),
    ("ly", ("",)),
    ("ness", ("",)),
)
"""Endings with what may stand in their place. An inflected word that the table lacks has the vector of its head."""


class StaticTable:
    """Reads only, so any number of threads may share one; processes share its pages."""

    name: str = TABLE_NAME
    dimension: int
    vectors: NDArray[np.int8]
    """(words, dimension)"""
    scales: NDArray[np.float32]
    """(words,): `vectors[i] * scales[i]` is the weighted vector of a word."""
    whole_words: int
    """Ids below are words, from there on pieces of words, which only `embed` uses."""

    def __init__(self, file: memoryview) -> None:
        """`file`: all of it. Raises ModelUnusable."""
        if len(file) < _HEADER_BYTES:
            raise ModelUnusable("the word table is cut off; install the package again")
        magic, form, count, whole, dimension, list_bytes, digest = _HEADER.unpack_from(file)
        if (magic, form) != (_MAGIC, _FORMAT):
            raise ModelUnusable(f"the word table is not one of format {_FORMAT}; install the package again")
        scales_at = _HEADER_BYTES + _padded(list_bytes)
        vectors_at = scales_at + _padded(4 * count)
        if len(file) != vectors_at + count * dimension:
            raise ModelUnusable("the word table is cut off; install the package again")
        self._digest: bytes = digest
        self._file = file
        self._words = str(file[_HEADER_BYTES : _HEADER_BYTES + list_bytes], "utf-8").split("\n")
        self._ids = dict(zip(self._words, range(count), strict=True))
        self._longest_piece = max(map(len, self._words[whole:]), default=0)
        self._line = lru_cache(_KEPT_LINES)(self._line_ids)
        self.whole_words = whole
        self.dimension = dimension
        self.scales = np.frombuffer(file, "<f4", count, scales_at)
        self.vectors = np.frombuffer(file, np.int8, count * dimension, vectors_at).reshape(count, dimension)

    @classmethod
    def load(cls, path: Path = TABLE_PATH) -> StaticTable:
        """The package's own. Raises ModelUnusable."""
        try:
            with path.open("rb") as file:
                return cls(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelUnusable(f"no word table at {path} ({error}); install the package again") from error

    def is_intact(self) -> bool:
        """Whether the file is, byte for byte, the one that was made. Reads all of it."""
        return hashlib.sha256(self._file[_HEADER_BYTES:]).digest() == self._digest

    def word(self, id: int) -> str:  # noqa: A002 (what it is)
        return self._words[id]

    def word_id(self, word: str) -> int | None:
        """Of one word without spaces or marks, in any case; of its head if only that is known."""
        folded = _folded(word).lower()
        found = self._known(folded)
        return found if found is not None else self._head(folded)

    def words(self, text: str) -> NDArray[np.int32]:
        """Ids of the words of a text in order, with repetitions; unknown words are left out."""
        return np.fromiter(chain.from_iterable(self._parsed(text, pieces=False)), np.int32)

    def unit(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """(k, dimension): the words' vectors, each of length 1."""
        vectors = self.vectors[ids].astype(np.float32)
        vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
        return vectors

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        means = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            ids = np.concatenate([self._line(line) for line in text.split("\n")])
            if len(ids):
                means[row] = self.scales[ids] @ self.vectors[ids].astype(np.float32)
        lengths = np.sqrt(np.einsum("ij,ij->i", means, means))
        means /= np.where(lengths > 0, lengths, np.float32(1))[:, None]
        return means

    def _line_ids(self, line: str) -> NDArray[np.int32]:
        return np.fromiter(chain.from_iterable(self._parsed(line, pieces=True)), np.int32)

    def _parsed(self, text: str, *, pieces: bool) -> Iterator[Iterable[int]]:
        """The ids of each word; none of an unknown one."""
        for match in _WORD.finditer(_folded(text)):
            as_written = match[0]
            word = as_written.lower()
            found = self._known(word)
            if found is None and not word.isalnum():
                as_written, word = _without_contraction(as_written), _without_contraction(word)
                found = self._known(word)
            if found is None:
                found = self._head(word)
            if found is not None:
                yield (found,)
            elif len(word) <= _MAX_WORD and word.isascii():
                yield self._parts(as_written, pieces=pieces)

    def _parts(self, as_written: str, *, pieces: bool) -> list[int]:
        parts = _PART.findall(as_written)
        if len(parts) == 1:
            return self._pieces(as_written.lower()) if pieces and as_written.isalpha() else []
        if len(parts) > _MAX_PIECES:
            return []
        found = [self.word_id(part) for part in parts if len(part) > 1]
        return [id for id in found if id is not None]  # noqa: A001

    def _known(self, word: str) -> int | None:
        return self._ids.get(word)

    def _head(self, word: str) -> int | None:
        for ending, instead in _ENDINGS:
            if word.endswith(ending) and len(word) - len(ending) >= _MIN_HEAD:
                stem = word[: -len(ending)]
                heads = [stem + tail for tail in instead]
                if stem[-1] == stem[-2]:
                    heads.append(stem[:-1])
                for head in heads:
                    if (found := self._ids.get(head)) is not None:
                        return found
        return self._ids.get(f"{word}s")

    def _pieces(self, word: str) -> list[int]:
        """The longest known beginning, then the longest piece from there on; none where that takes too many."""
        found: list[int] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(min(len(word), start + self._longest_piece), start, -1):
                if (id := self._ids.get(mark + word[start:end])) is not None:  # noqa: A001
                    found.append(id)
                    start = end
                    break
            else:
                return []
            if len(found) > _MAX_PIECES:
                return []
        return found


def _folded(text: str) -> str:
    """Without accents; letters that are written in two ways become one."""
    if text.isascii():
        return text
    bounded = _LONG_GAP.sub(r"\1 ", _MARKS.sub("", text))
    return _MARKS.sub("", unicodedata.normalize("NFKD", bounded))


def _without_contraction(word: str) -> str:
    """`user's` is `user`, `isn't` is `is`."""
    head, tail = re.split("['’]", word, maxsplit=1)
    return head[:-1] if tail in {"t", "T"} and head[-1] in {"n", "N"} else head


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def table_bytes(words: Sequence[str], whole_words: int, vectors: NDArray[np.float32]) -> bytes:
    """The file of these words, whole ones first, with weighted vectors (words, dimension)."""
    scales = (np.abs(vectors).max(axis=1) / 127).astype("<f4")
    levels = np.rint(vectors / scales[:, None]).astype(np.int8)
    listed = "\n".join(words).encode()
    columns = [part.ljust(_padded(len(part)), b"\0") for part in (listed, scales.tobytes())]
    payload = b"".join([*columns, levels.tobytes()])
    header = _HEADER.pack(
        _MAGIC, _FORMAT, len(words), whole_words, vectors.shape[1], len(listed), hashlib.sha256(payload).digest()
    )
    return header.ljust(_HEADER_BYTES, b"\0") + payload
