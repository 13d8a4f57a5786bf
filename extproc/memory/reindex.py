"""Features made anew, where they are of another indexer or of none: a new model, or rows from before there were any.

Batch by batch, beside everything else: readers make what is not there yet for themselves, vectors of two models lie
side by side. What is written meanwhile has its features from its writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.memory.features import Indexer
    from extproc.memory.store import MemoryStore

__all__ = ["BATCH", "reindex"]

BATCH = 200
"""Memories in one transaction: short enough that writers hardly wait."""


def reindex(
    store: MemoryStore,
    indexer: Indexer,
    *,
    organisations: Sequence[str] | None = None,
    batch: int = BATCH,
    tell: Callable[[int, int], None] = lambda _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
    only_unmade: bool = False,
) -> int:
    """Go through the organisations (None: all) once. Blocks. Returns how many memories were written.

    `tell` gets, after each batch, how many are done and how many there were at the beginning. Once only, so that two
    engines of different versions do not undo each other's work for ever; `only_unmade`, which leaves alone what anybody
    has made, may be repeated. Raises StoreError.
    """
    store.prepare(indexer)
    chosen = store.organisations() if organisations is None else organisations
    waiting = {org_id: store.count_outdated(org_id, indexer.version, only_unmade=only_unmade) for org_id in chosen}
    done = 0
    for org_id, its in waiting.items():
        left = its
        while left > 0 and not should_stop():
            found = store.outdated(org_id, indexer.version, batch, only_unmade=only_unmade)
            if not found:
                break
            made = indexer.features([one.memory for one in found], [one.before for one in found])
            by_id = {one.memory.id: its for one, its in zip(found, made, strict=True)}
            store.write_features(org_id, by_id, is_news=only_unmade)
            left -= len(found)
            done += len(found)
            tell(done, sum(waiting.values()))
    return done
