"""`extproc engine` whose store has a bug: whatever partition is asked for, it gives the memories of one organisation.

Its arguments are those of `extproc engine`, after the id of that organisation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from extproc import cli
from extproc.memory.model import Namespace
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.store import Snapshot


def leak(org_id: str) -> None:
    genuine = SqliteMemoryStore.snapshot

    @contextmanager
    def snapshot(self: SqliteMemoryStore, partition: Namespace) -> Iterator[Snapshot]:
        with genuine(self, Namespace(org_id, partition.agent_id, partition.user_id)) as found:
            yield found

    SqliteMemoryStore.snapshot = snapshot  # type: ignore[method-assign]


if __name__ == "__main__":
    leak(sys.argv.pop(1))
    cli.main()
