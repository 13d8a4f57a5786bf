"""Another model for all memories, beside an engine that answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from extproc.memory.features import open_indexer
from extproc.memory.model import Memory, Namespace
from extproc.memory.store import open_store
from extproc.settings import StoreSettings, load
from tests.integration.engine.conftest import engine

MANY = 6_000
"""An engine takes six seconds for them at least: it is killed before their end."""
LIMIT_S = 30.0


def test_an_engine_that_is_killed_goes_on_where_it_was_and_answers_meanwhile(
    tmp_path: Path, agent: Namespace, make: Callable[[str], Memory]
) -> None:
    url, version = f"sqlite:///{tmp_path}/memories.db", open_indexer().version
    store = open_store(load(StoreSettings, database_url=url))
    try:
        made = [make(f"The customer ordered {n} red bicycles.") for n in range(MANY)]
        store.add_many([*made, make("The user's dog is called Rex.")])

        def left_below(most: int) -> int:
            deadline = time.monotonic() + LIMIT_S
            while (left := store.count_outdated(agent.org_id, version)) >= most:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return left

        with engine(url, tmp_path) as running:
            left_below(MANY + 1)
            told = running.metric("memories_to_reindex")
            assert store.count_outdated(agent.org_id, version) <= told <= MANY
        left = store.count_outdated(agent.org_id, version)
        assert 0 < left <= told
        with engine(url, tmp_path) as running:
            assert left_below(left) > 0
            assert running.says(agent, "What is the name of my dog?", "Rex")
    finally:
        store.close()
