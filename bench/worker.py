"""Turns a second of one worker process with `rules`: from stored text to written memories, without the queue.

    python -m bench.worker [--sessions 100] [--turns 10]

On SQLite in a temporary directory. CPU time counts; on a busy machine the clock says little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from extproc.memory.database import Database
from extproc.memory.embedding import StaticTable
from extproc.memory.features import WindowIndexer
from extproc.memory.store import open_store
from extproc.settings import StoreSettings, load
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.turn import End, Entry, Turn, TurnText, checkpoint_id, session_id
from extproc.worker.rules import RuleExtractor
from extproc.worker.session import SessionExtraction

ORG, AGENT = str(uuid.uuid4()), str(uuid.uuid4())
TEXTS = [
    "I moved to Lisbon in March and I'm allergic to peanuts",
    "Can you summarise the third chapter for me?",
    "Our release is on Friday and the staging database still runs on PostgreSQL 15.",
    "Thanks, that works. My sister Ana will join us at the station at 8 pm.",
    "I prefer short answers without bullet points.",
]


def entry(number: int, session: int) -> Entry:
    now, request_id, user = datetime.now(UTC), str(uuid.uuid4()), f"user-{session}"
    turn = Turn(
        request_id=request_id, org_id=ORG, agent_id=AGENT, user_id=user, external_id="talk",
        session_id=session_id(ORG, AGENT, user, "talk"), checkpoint_id=checkpoint_id(ORG, request_id),
        end=End.COMPLETE, status_code=200, is_complete=True, messages_hash="0" * 64, requested_at=now, completed_at=now,
    )  # fmt: skip
    return Entry(number + 1, turn, TurnText(f"{TEXTS[number % len(TEXTS)]} ({number})", "I see."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--turns", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        settings = load(StoreSettings, data=Path(directory))
        table = StaticTable.load()
        store = open_store(settings, WindowIndexer(table, table))
        database = Database(f"sqlite:///{directory}/memories.db")
        checkpoints = DatabaseCheckpoints(database, 86_400)
        for session in range(given.sessions):
            checkpoints.write([entry(number, session) for number in range(given.turns)])
        for at_once, sessions in ((16, range(given.sessions // 2)), (1, range(given.sessions // 2, given.sessions))):
            extraction = SessionExtraction(database, store, table, RuleExtractor(), at_once)
            began, cpu = time.perf_counter(), time.process_time()
            done = [extraction.run(ORG, session_id(ORG, AGENT, f"user-{one}", "talk")) for one in sessions]
            clock_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            turns, memories = sum(one.turns for one in done), sum(len(one.memories) for one in done)
            print(
                f"{at_once:>2} turns at once: {turns} turns, {memories} memories; {turns / cpu_s:.0f} turns a second"
                f" of CPU, {turns / clock_s:.0f} by the clock"
            )
        store.close()
        database.close()


if __name__ == "__main__":
    main()
