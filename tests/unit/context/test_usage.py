"""Counts of what was used, while the store takes them and while it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from extproc.context.cache import NamespaceCache
from extproc.context.usage import RetrievalCounts
from extproc.memory.model import Memory
from extproc.memory.store import MemoryStore, StoreAway, StoreError


class Written:
    def __init__(self) -> None:
        self.failure: StoreError | None = None
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lost = 0

    def record_retrievals(self, counts: Counter[tuple[str, str]], _at: object) -> None:
        if self.failure is not None:
            raise self.failure
        self.counts += counts

    def lose(self, count: int) -> None:
        self.lost += count

    async def write(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def counts(written: Written) -> RetrievalCounts:
    cache = SimpleNamespace(write=written.write)
    return RetrievalCounts(cast("MemoryStore", written), cast("NamespaceCache", cache), on_lost=written.lose)


async def test_while_the_database_is_away_they_wait(
    counts: RetrievalCounts, written: Written, make: Callable[..., Memory]
) -> None:
    memory = make("tea")
    counts.add([memory])
    written.failure = StoreAway("gone")
    await counts.write()
    counts.add([memory])
    written.failure = None
    await counts.write()
    assert (written.counts, written.lost) == ({(memory.org_id, memory.id): 2}, 0)


@pytest.mark.parametrize("failure", [StoreAway("gone"), StoreError("full")])
async def test_what_cannot_be_written_at_the_end_is_lost_and_counted(
    counts: RetrievalCounts, written: Written, make: Callable[..., Memory], failure: StoreError
) -> None:
    counts.add([make("tea"), make("coffee")])
    written.failure = failure
    await counts.stop()
    assert written.lost == 2
