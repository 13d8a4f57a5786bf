"""Features that another model made, or nobody yet, are made anew behind the requests.

Once, when an engine starts; and those that nobody has made again and again, where writers leave them to an engine,
since they would have to ask another service.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Gauge

from extproc.memory.embedding import EmbedderUnavailable
from extproc.memory.reindex import reindex
from extproc.memory.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.memory.features import Indexer
    from extproc.memory.store import MemoryStore

__all__ = ["Reindexing"]

_log = structlog.get_logger(__name__)

BATCH = 50
"""Memories: their features take about 5 ms, which is as long as a search."""
PAUSE_S = 0.05
"""After each batch. The requests of the same process come first: 500 memories a second at most."""
RETRY_S = 60.0
"""After a failure of the store or of the embedder."""
AGAIN_S = 5.0
"""Until what was written meanwhile without features is looked for; a question for each organisation."""
STAND_ASIDE_S = 1.0
"""At most, while requests are inside: an engine that always has some comes to an end all the same."""
LOOK_EVERY_S = 0.005
TOLD_EVERY_S = 30.0

_LEFT = Gauge(
    "ibex_engine_memories_to_reindex", "Memories whose features are of another model or release, or not made yet"
)


class Reindexing:
    def __init__(
        self,
        store: MemoryStore,
        open_indexer: Callable[[], Indexer],
        is_busy: Callable[[], bool] = lambda: False,
        *,
        is_left_to_us: bool = False,
    ) -> None:
        """`open_indexer` is called in the thread: a model may take a second to open. `is_busy`: whether somebody waits
        for this process now. `is_left_to_us`: whether writers make no features."""
        self._store = store
        self._open_indexer = open_indexer
        self._is_busy = is_busy
        self._is_left_to_us = is_left_to_us
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="extproc-reindex", daemon=True)
        self._told = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Blocks until the batch that runs is written."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        indexer: Indexer | None = None
        is_first = True
        while not self._stopping.is_set():
            try:
                indexer = indexer or self._open_indexer()
                written = reindex(
                    self._store,
                    indexer,
                    batch=BATCH,
                    tell=self._tell,
                    should_stop=self._stopping.is_set,
                    only_unmade=not is_first,
                )
            except (StoreError, EmbedderUnavailable) as error:
                _log.warning("reindexing_stopped_and_goes_on_later", error=str(error), after_s=RETRY_S)
                self._stopping.wait(RETRY_S)
            except Exception:  # noqa: BLE001 (the edge of a thread)
                # A bug: what is not reindexed is computed when it is loaded, so that nothing is missing but time.
                _log.exception("reindexing_ended_by_a_bug")
                return
            else:
                if written:
                    _log.info("reindexed", memories=written)
                if not self._is_left_to_us:
                    return
                is_first = False
                self._stopping.wait(AGAIN_S)

    def _tell(self, done: int, total: int) -> None:
        _LEFT.set(total - done)
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY_S:
            self._told = now
            _log.info("reindexing", done=done, total=total)
        self._stopping.wait(PAUSE_S)
        while self._is_busy() and time.monotonic() - now < STAND_ASIDE_S and not self._stopping.is_set():
            self._stopping.wait(LOOK_EVERY_S)
