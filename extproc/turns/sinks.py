"""Where turns go, as the delivery sees it. Each sink is one adapter to one outside system; every method blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.turns.turn import Entry

__all__ = ["CheckpointSink", "ExtractionTask", "Refused", "TaskSink", "TraceSink", "Unavailable", "Written"]


class Unavailable(Exception):
    """The system cannot be reached or cannot work now: try the same again later. The message has no content in it."""


class Refused(Exception):
    """The system is well and will never take this: trying again is no use. The message has no content in it."""


@dataclass(frozen=True, slots=True)
class ExtractionTask:
    """One message for the queue `extraction`."""

    id: str
    """See `extproc.turns.turn.task_id`."""
    session_id: str
    """The session's row."""
    org_id: str
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one entry in the database."""

    turn_index: int
    """In its session, from 0; of a turn that was stored before: as it was stored then."""
    is_new: bool
    """False: the (org, request id) was there already, and nothing was added."""
    session_id: str
    """Of the row that the turn belongs to: another than the turn's own where somebody else made the session."""
    is_same: bool
    """Whether what is stored is this very turn, now or by an earlier delivery. False: it is another exchange with the
    same request id, and this turn is nowhere."""


class CheckpointSink(Protocol):
    """The database."""

    def write(self, entries: Sequence[Entry]) -> list[Written]:
        """Store all of them, in order, in one transaction; what is stored already stays as it is.

        Returns one for each entry. Raises Unavailable or Refused, and then nothing of the batch is stored.
        """
        ...

    def close(self) -> None: ...


class TaskSink(Protocol):
    """The broker."""

    def send(self, tasks: Sequence[ExtractionTask]) -> None:
        """Raises Unavailable; some of the tasks may have been sent then."""
        ...

    def close(self) -> None: ...


class TraceSink(Protocol):
    """ClickHouse."""

    def insert(self, entries: Sequence[Entry], token: str) -> None:
        """All rows or none. The same entries with the same `token` a second time add nothing.

        Raises Unavailable or Refused.
        """
        ...

    def close(self) -> None: ...
