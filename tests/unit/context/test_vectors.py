from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from extproc.context import vectors as module
from extproc.context.vectors import Vectors


def made(count: int, seed: int = 0) -> NDArray[np.float32]:
    found = np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def test_the_nearest_are_found_and_cosines_are_close() -> None:
    every = made(500)
    vectors = Vectors(64)
    vectors.append(every[:300])
    vectors.append(every[300:])
    query = made(1, 7)[0]
    exact = every @ query
    found = vectors.nearest(query, 20, None)
    assert len(set(found.tolist()) & set(np.argsort(-exact)[:20].tolist())) >= 18
    assert np.abs(vectors.cosines(np.arange(500), query) - exact).max() < 0.01


def test_what_is_blocked_is_not_found() -> None:
    every = made(50)
    vectors = Vectors(64)
    vectors.append(every)
    blocked = np.arange(50) % 2 == 0
    assert not set(vectors.nearest(every[4], 50, blocked).tolist()) & set(range(0, 50, 2))
    assert vectors.nearest(every[4], 1, None).tolist() == [4]


def test_lists_find_what_was_there_and_what_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_LISTS", 4)
    monkeypatch.setattr(module, "MOST_FLAT", 300)
    vectors = Vectors(64)
    vectors.append(made(400))
    wanted = [vectors.wants_lists]
    copied = vectors.copied()
    vectors.append(made(10, 1))
    vectors.use(vectors.prepared(copied))
    wanted.append(vectors.wants_lists)
    assert wanted == [True, False]
    vectors.append(made(10, 2))
    for slot, vector in ((5, made(400)[5]), (405, made(10, 1)[5]), (415, made(10, 2)[5])):
        assert vectors.nearest(vector, 3, None)[0] == slot
