"""The vectors of one partition, eight bits a component, and the nearest of them. Pure.

One fixed scale for all: a vector's bytes do not depend on the others. Up to MOST_FLAT every vector is compared; above,
`prepared` makes an inverted file, which `use` puts in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["SCALE", "Vectors"]

SCALE = 254.0
"""Of a component. Of a unit vector few are beyond ±0.5; rounding moves a cosine by 0.001."""
_MOST = 127

MOST_FLAT = 50_000
"""Vectors that are all compared, in 2 ms; it grows with their number. An inverted file takes 0.3 ms for 100,000."""
FEW_LISTS, LISTS = 256, 1024
MANY = 250_000
"""Vectors from which on LISTS are made: each list then has about a thousand, as those before it."""
PROBES = 32
"""Lists looked into: 98 % of the nearest 50 are found."""
_TRAINED_WITH = 40
"""Vectors a list, on which lists are found: the least that faiss is content with."""


class Vectors:
    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._flat = faiss.IndexScalarQuantizer(
            dimension, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        )
        self._lists: faiss.IndexIVFScalarQuantizer | None = None

    def __len__(self) -> int:
        return int(self._flat.ntotal)

    @property
    def dimension(self) -> int:
        return self._dimension

    @property
    def nbytes(self) -> int:
        return len(self) * self._dimension + (0 if self._lists is None else len(self) * (self._dimension + 8))

    def append(self, vectors: NDArray[np.float32]) -> None:
        """(n, dimension), of unit length, or all 0 for none."""
        codes = _codes(vectors)
        self._flat.add(codes)
        if self._lists is not None:
            self._lists.add(codes)

    def cosines(self, slots: NDArray[np.integer], vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of the vectors at the slots with a unit vector; the same wherever they stand."""
        stored = faiss.rev_swig_ptr(self._flat.codes.data(), len(self) * self._dimension)
        codes = stored.reshape(len(self), self._dimension)[slots].astype(np.float64)
        codes -= 128
        cosines: NDArray[np.float32] = (codes @ vector.astype(np.float64) / SCALE).astype(np.float32)
        return cosines

    def nearest(self, vector: NDArray[np.float32], limit: int, blocked: NDArray[np.bool_] | None) -> NDArray[np.uint32]:
        """Slots, nearest first. `blocked`: by slot, what may not be found.

        While there are too many for a comparison with all, and the inverted file is not ready: of the last MOST_FLAT.
        """
        if not len(self):
            return np.empty(0, np.uint32)
        selector = None
        if self.wants_lists:
            blocked = np.zeros(len(self), bool) if blocked is None else blocked[: len(self)].copy()
            blocked[:-MOST_FLAT] = True
        if blocked is not None:
            bits = np.packbits(~blocked[: len(self)], bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]  # the stubs know the C++ side only
        limit = min(limit, len(self))
        query = _codes(vector[None])
        if self._lists is not None:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=PROBES)  # type: ignore[call-arg]
            found = self._lists.search(query, limit, params=parameters)[1]
        else:
            flat = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
            found = self._flat.search(query, limit, params=flat)[1]
        nearest: NDArray[np.uint32] = found[0][found[0] >= 0].astype(np.uint32)
        return nearest

    @property
    def wants_lists(self) -> bool:
        return self._lists is None and len(self) > MOST_FLAT

    def copied(self) -> NDArray[np.uint8]:
        """What is here now, for `prepared`, while more may come."""
        stored = faiss.rev_swig_ptr(self._flat.codes.data(), len(self) * self._dimension)
        return stored.reshape(len(self), self._dimension).copy()

    def prepared(
        self, codes: NDArray[np.uint8], breathe: Callable[[], None] = lambda: None
    ) -> faiss.IndexIVFScalarQuantizer:
        """An inverted file of what was copied. Takes half a minute for a million, in a thread of its own.

        `breathe` is called between its parts; what it raises ends the work.
        """
        count = LISTS if len(codes) >= MANY else FEW_LISTS
        lists = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(self._dimension), self._dimension, count,
            faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT, False,
        )  # fmt: skip
        lists.cp.niter = 10
        lists.train(_numbers(codes[:: max(1, len(codes) // (count * _TRAINED_WITH))]))
        for first in range(0, len(codes), _ADDED_AT_ONCE):
            breathe()
            lists.add(_numbers(codes[first : first + _ADDED_AT_ONCE]))
        return lists

    def use(self, lists: faiss.IndexIVFScalarQuantizer) -> None:
        """Put an inverted file in place, after adding what has come since."""
        if lists.ntotal < len(self):
            lists.add(_numbers(self.copied()[int(lists.ntotal) :]))
        self._lists = lists


_ADDED_AT_ONCE = 16_384


def _numbers(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    numbers = codes.astype(np.float32)
    numbers -= 128
    return numbers


def _codes(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.clip(np.rint(vectors * SCALE), -_MOST, _MOST), np.float32)
