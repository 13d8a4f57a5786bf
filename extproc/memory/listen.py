"""The versions of agents' memories on PostgreSQL, as this process knows them without asking each time.

Each writer notifies of the version that it made, in its transaction. One thread listens, on a connection of its own,
and makes sure of it: a question twice a second, whose answer cannot overtake a notification. So what is known here is
never older than the last question that was answered. When none is answered the server is away.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from extproc.memory.database import driver_errors
from extproc.memory.store import StoreAway, StoreError, Version

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CHANNEL", "FRESH_S", "Versions", "notification"]

CHANNEL = "ibex_memories"
BEAT_S = 0.5
"""Between two questions on the listening connection."""
_QUESTION = "SELECT 1"
ANSWER_LIMIT_S = 1.0
FRESH_S = 2.0
"""How old a version may be: a question's interval and limit, and time for a busy machine."""
ASK_AGAIN_S = 5.0
"""After which a version in use is asked for all the same: behind a pooler notifications may get lost unnoticed."""
_RETRY_S = 0.5
_RETRY_WHEN_REFUSED_S = 5.0
"""When the server is there and refuses to be listened to, which only somebody can change."""
_KEPT = 100_000
"""(org, agent) pairs, about 300 bytes each."""

_log = structlog.get_logger(__name__)

Key = tuple[str, str]


def notification(org_id: str, agent_id: str, version: Version) -> str:
    return f"{org_id} {agent_id} {version.changes} {version.removals}"


class Versions:
    """Safe to use from several threads; the listening one is started by the first question."""

    def __init__(
        self,
        connect: Callable[[float], Any],
        ask: Callable[[str, str], Version],
        serve_away_s: float,
        on_back: Callable[[], None] = lambda: None,
    ) -> None:
        """`connect` gives a connection of psycopg in autocommit, which waits this many seconds for each answer.

        `ask` gets a version from the database. Both raise StoreError, and StoreAway when there is no server. `on_back`
        is called when the server is there again, before anybody is sent to it.
        """
        self._connect = connect
        self._ask = ask
        self._on_back = on_back
        self.serve_away_s = serve_away_s
        self._lock = threading.Lock()
        self._known: dict[Key, tuple[Version, float]] = {}
        """With the moment when it was last read from the database."""
        self._due: set[Key] = set()
        self._generation = 0
        """Counts the beginnings of a connection: what was asked for before may have changed unheard."""
        self._heard_at = -FRESH_S
        """When the last answered question was sent."""
        self._reached_at = time.monotonic()
        self._is_away = False
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._wake, self._woken = socket.socketpair()

    def close(self) -> None:
        self._is_closed = True
        with suppress(OSError):
            self._wake.send(b".")
        thread = self._thread
        if thread is not None:
            thread.join(ANSWER_LIMIT_S + 5.0)
        self._wake.close()
        self._woken.close()

    @property
    def away_s(self) -> float:
        return max(time.monotonic() - self._reached_at, 1e-3) if self._is_away else 0.0

    def known(self, org_id: str, agent_id: str) -> Version | None:
        """Without waiting. None: ask `current`."""
        self._start()
        now = time.monotonic()
        found = self._known.get((org_id, agent_id))
        if found is None:
            return None
        version, read_at = found
        if self._is_away:
            return version if self._may_serve(now) else None
        if now - self._heard_at >= FRESH_S:
            return None
        if now - read_at >= ASK_AGAIN_S:
            self._due.add((org_id, agent_id))
        return version

    def current(self, org_id: str, agent_id: str) -> Version:
        """Blocks. Raises StoreError."""
        self._start()
        key = (org_id, agent_id)
        found = self._known.get(key)
        if self._is_away:
            if found is not None and self._may_serve(time.monotonic()):
                return found[0]
            self.refuse_when_away()
        generation = self._generation
        asked_at = time.monotonic()
        try:
            version = self._ask(org_id, agent_id)
        except StoreAway:
            self.lost()
            if found is not None and self._may_serve(time.monotonic()):
                return found[0]
            raise
        with self._lock:
            self._reached_at = max(self._reached_at, asked_at)
            if generation == self._generation:
                return self._note(key, version, asked_at)
        return version

    def refuse_when_away(self) -> None:
        """Raises StoreAway at once, where asking would keep a thread waiting."""
        if self._is_away:
            raise StoreAway(f"PostgreSQL has been away for {self.away_s:.0f} s; it is tried again twice a second")

    def wrote(self, org_id: str, agent_id: str, version: Version) -> None:
        """After the commit of a write of this process."""
        with self._lock:
            self._note((org_id, agent_id), version, time.monotonic())

    def _may_serve(self, now: float) -> bool:
        return now - self._reached_at <= self.serve_away_s

    def _note(self, key: Key, version: Version, read_at: float) -> Version:
        """The newer of what is known and what was heard, for they may cross. Returns it. With the lock."""
        if key not in self._known and len(self._known) >= _KEPT:
            self._known.clear()
        known, before = self._known.get(key, (version, read_at))
        newest = version if version.changes >= known.changes else known
        self._known[key] = (newest, max(read_at, before))
        return newest

    # The thread

    def _start(self) -> None:
        if self._thread is not None or self._is_closed:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="extproc-memory-versions", daemon=True)
                self._thread.start()

    def _listen(self) -> None:
        refused = ""
        while not self._is_closed:
            pause_s = _RETRY_S
            try:
                connection = self._connect(ANSWER_LIMIT_S)
                try:
                    with driver_errors():
                        self._hear(connection)
                finally:
                    connection.close()
            except StoreAway:
                self.lost()
            except StoreError as error:
                pause_s = _RETRY_WHEN_REFUSED_S
                if self._is_away:  # a server that refuses is there, such as a replica, which has no LISTEN
                    self._came_back(time.monotonic(), is_heard=False)
                if str(error) != refused:
                    refused = str(error)
                    _log.warning("versions_not_heard_each_request_asks", error=refused)
            except Exception:  # noqa: BLE001 (a bug here must not end the hearing of changes)
                pause_s = _RETRY_WHEN_REFUSED_S
                _log.exception("versions_not_heard_by_a_bug")
            self._sleep(pause_s)

    def _hear(self, connection: Any) -> None:
        """Until it fails or the store is closed. Raises StoreError."""
        began = time.monotonic()
        # The driver takes notifications that come with an answer for itself, and hands them on only in this way.
        connection.add_notify_handler(lambda note: self._heard(note.payload))
        connection.execute(f"LISTEN {CHANNEL}")
        self._came_back(began)
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            next_beat = began + BEAT_S
            while not self._is_closed:
                selector.select(max(0.0, next_beat - time.monotonic()))
                sent_at = time.monotonic()
                if sent_at >= next_beat:
                    connection.execute(_QUESTION)
                    next_beat = sent_at + BEAT_S
                    self._take(connection)
                    self._heard_at = self._reached_at = sent_at
                    self._ask_again()
                else:
                    self._take(connection)

    def _take(self, connection: Any) -> None:
        """Every notification that has arrived without an answer."""
        connection.pgconn.consume_input()
        while (note := connection.pgconn.notifies()) is not None:
            self._heard(note.extra.decode())

    def _heard(self, payload: str) -> None:
        try:
            org_id, agent_id, changes, removals = payload.split()
            version = Version(int(changes), int(removals))
        except ValueError:
            return  # somebody else's words on our channel
        with self._lock:
            self._note((org_id, agent_id), version, time.monotonic())

    def _ask_again(self) -> None:
        """Until the next question is near; the others after it."""
        until = time.monotonic() + BEAT_S / 2
        while self._due and time.monotonic() < until:
            self.current(*self._due.pop())

    def _came_back(self, began: float, *, is_heard: bool = True) -> None:
        if self._is_away:
            self._on_back()
        with self._lock:
            self._generation += 1
            self._known.clear()
            self._reached_at = began
            self._heard_at = began if is_heard else -FRESH_S
            was_away, self._is_away = self._is_away, False
        if was_away:
            _log.info("postgresql_is_back")

    def lost(self) -> None:
        """A question found no server. From now on the listening thread looks for it."""
        self._start()
        with self._lock:
            was_away, self._is_away = self._is_away, not self._is_closed
            self._heard_at = -FRESH_S
        if not was_away:
            _log.warning("postgresql_is_away_loaded_memories_are_served", for_s=self.serve_away_s)

    def _sleep(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.select(seconds)
