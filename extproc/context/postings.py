"""Which memories hold a stem, and how much it weighs in each: arrays in the process. Pure.

A weight depends on its own memory alone, never on the others: adding memory by memory gives the same numbers as loading
all at once. Slots only grow, so that every posting is sorted.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = ["WEIGHTS", "Posting", "Postings"]

K1 = 0.9
B = 0.4
"""BM25's saturation and length factors; best on LoCoMo among the usual ones (R@10 64.7 against 48.4 untuned)."""
REFERENCE_LENGTH = 12
"""Stems in a typical memory, in place of the average over the namespace, which would move with every new memory."""
_DATES = 2
"""Stems of a memory's date, which are not of its length."""

_STEPS = 255
WEIGHTS = (np.arange(_STEPS + 1) * (K1 + 1) / _STEPS).astype(np.float32)
"""BM25's term weight, without idf, by the byte that is kept: about 1.0 for a word said once in a typical memory."""

_STEM_BYTES = 110  # a short string, its entry in a dictionary, its number; measured


@dataclass(frozen=True, slots=True)
class Posting:
    slots: NDArray[np.uint32]
    """Sorted."""
    weights: NDArray[np.uint8]


_EMPTY = Posting(np.empty(0, np.uint32), np.empty(0, np.uint8))


class Postings:
    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._starts = np.zeros(1, np.int64)
        self._slots = np.empty(0, np.uint32)
        self._weights = np.empty(0, np.uint8)
        self._tail: dict[int, tuple[array[int], array[int]]] = {}
        self._tail_size = 0

    @property
    def nbytes(self) -> int:
        return (
            self._starts.nbytes
            + self._slots.nbytes
            + self._weights.nbytes
            + _STEM_BYTES * len(self._numbers)
            + 5 * self._tail_size
            + 300 * len(self._tail)
        )

    def load(self, texts: Sequence[str], breathe: Callable[[], None] = lambda: None) -> None:
        """The stems of each memory, separated by spaces; slots from 0. Once, before anything else.

        `breathe` is called after each millisecond of work.
        """
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        parts = []
        for first in range(0, len(texts), _CHUNK):
            words = [text.split(" ") if text else [] for text in texts[first : first + _CHUNK]]
            flat = [numbers[word] for each in words for word in each]
            lengths = np.fromiter(map(len, words), np.int64, len(words))
            slots = np.repeat(np.arange(first, first + len(words), dtype=np.int64), lengths)
            parts.append((np.array(flat, np.int64) << 32) | slots)
            breathe()
        self._numbers = dict(numbers)
        if not parts:
            return
        keys = np.concatenate(parts)
        slots = keys & 0xFFFFFFFF
        lengths = np.bincount(slots, minlength=len(texts))
        keys.sort()
        breathe()
        is_first = np.empty(len(keys), bool)
        is_first[:1] = True
        np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
        firsts = np.flatnonzero(is_first)
        counts = np.diff(firsts, append=len(keys))
        keys = keys[firsts]
        self._slots = (keys & 0xFFFFFFFF).astype(np.uint32)
        self._weights = _bytes(counts, lengths[self._slots])
        self._starts = np.searchsorted(keys >> 32, np.arange(len(self._numbers) + 1))

    def append(self, slot: int, text: str) -> None:
        """Of one more memory, behind all others."""
        words = text.split(" ") if text else []
        counted = Counter(words)
        weights = _bytes(np.fromiter(counted.values(), np.int64, len(counted)), np.array(len(words)))
        for word, weight in zip(counted, weights.tolist(), strict=True):
            number = self._numbers.setdefault(word, len(self._numbers))
            tail = self._tail.get(number)
            if tail is None:
                tail = self._tail[number] = (array("I"), array("B"))
            tail[0].append(slot)
            tail[1].append(weight)
        self._tail_size += len(counted)

    def of(self, stem: str) -> Posting:
        number = self._numbers.get(stem)
        if number is None:
            return _EMPTY
        if number + 1 < len(self._starts):
            span = slice(self._starts[number], self._starts[number + 1])
            slots, weights = self._slots[span], self._weights[span]
        else:
            slots, weights = _EMPTY.slots, _EMPTY.weights
        tail = self._tail.get(number)
        if tail is not None:
            # Copies: an array that is looked into cannot grow.
            slots = np.concatenate([slots, np.array(tail[0], np.uint32)])
            weights = np.concatenate([weights, np.array(tail[1], np.uint8)])
        return Posting(slots, weights)


_CHUNK = 256


def _bytes(counts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    k = K1 * (1 - B + B * np.maximum(lengths - _DATES, 0) / REFERENCE_LENGTH)
    weights = counts * (K1 + 1) / (counts + k)
    return np.clip(np.rint(weights * (_STEPS / (K1 + 1))), 1, _STEPS).astype(np.uint8)
