"""Turns and sinks for the tests of outbox and delivery."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from extproc.turns.sinks import ExtractionTask, Written
from extproc.turns.turn import End, Entry, Turn, TurnText, checkpoint_id, session_id

ORG, AGENT = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
TEXT = TurnText("my name is Ada", "hello Ada")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

_numbers = itertools.count()


def turn(request: str = "", **given: Any) -> Turn:
    """A turn that went well, of a request of its own unless it is named."""
    request = request or f"request-{next(_numbers)}"
    session = session_id(ORG, AGENT, None, "s")
    values: dict[str, Any] = {
        "request_id": request,
        "org_id": ORG,
        "agent_id": AGENT,
        "external_id": "s",
        "session_id": session,
        "checkpoint_id": checkpoint_id(ORG, request),
        "end": End.COMPLETE,
        "status_code": 200,
        "requested_at": NOON,
        "completed_at": NOON,
    }
    return Turn(**{**values, **given})


class Database:
    """Keeps checkpoints like the real one: by request id, with an index that rises."""

    def __init__(self) -> None:
        self.failing: Exception | None = None
        self.refused: set[str] = set()
        """Request ids."""
        self.refusal: type[Exception] = ValueError
        self.calls: list[int] = []
        self.rows: dict[str, tuple[int, TurnText | None]] = {}
        self.turns: dict[str, Turn] = {}
        self.sessions: dict[str, str] = {}
        """Rows that another program made, by the ids that the turns have for them."""
        self.is_closed = False

    def write(self, entries: Sequence[Entry]) -> list[Written]:
        self.calls.append(len(entries))
        if self.failing is not None:
            raise self.failing
        if any(entry.turn.request_id in self.refused for entry in entries):
            raise self.refusal
        results = []
        for entry in entries:
            is_new = entry.turn.request_id not in self.rows
            index, _ = self.rows.setdefault(entry.turn.request_id, (len(self.rows), entry.text))
            stored = self.turns.setdefault(entry.turn.request_id, entry.turn)
            session = self.sessions.get(stored.session_id, stored.session_id)
            results.append(Written(index, is_new, session, is_same=stored == entry.turn))
        return results

    def close(self) -> None:
        self.is_closed = True


class Queue:
    def __init__(self) -> None:
        self.failing: Exception | None = None
        self.sent: list[ExtractionTask] = []
        self.is_closed = False

    def send(self, tasks: Sequence[ExtractionTask]) -> None:
        if self.failing is not None:
            raise self.failing
        self.sent.extend(tasks)

    def close(self) -> None:
        self.is_closed = True


class Traces:
    """Takes a batch once by its token."""

    def __init__(self) -> None:
        self.failing: Exception | None = None
        self.refused: set[str] = set()
        self.refusal: type[Exception] = ValueError
        self.fails_after_insert = False
        self.batches: dict[str, list[str]] = {}
        self.calls: list[tuple[str, int]] = []
        self.is_closed = False

    @property
    def rows(self) -> list[str]:
        return [request for batch in self.batches.values() for request in batch]

    def insert(self, entries: Sequence[Entry], token: str) -> None:
        requests = [entry.turn.request_id for entry in entries]
        self.calls.append((token, len(entries)))
        if self.failing is not None and not self.fails_after_insert:
            raise self.failing
        if self.refused.intersection(requests):
            raise self.refusal
        assert self.batches.setdefault(token, requests) == requests, "other rows with the same token"
        if self.failing is not None:
            raise self.failing

    def close(self) -> None:
        self.is_closed = True


def wait_for(is_so: Callable[[], object], timeout_s: float = 45.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.005)
