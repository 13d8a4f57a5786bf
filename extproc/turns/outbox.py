"""The outbox: takes turns from an event loop without ever holding it up, and keeps them until everybody has them.

`put` is for one thread and touches no lock, no file and no clock but the wall's. One thread commits what was put, in
groups; another one looks after the files: this process's own and those that dead processes left behind.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from extproc.turns._file import HEADROOM_BYTES, OutboxFile
from extproc.turns._slot import Slot, claim_left_behind, claim_new
from extproc.turns._tables import Consumer, FileTrouble, FileUnusable, NewRow
from extproc.turns.metrics import OutboxMetrics, Part, Why
from extproc.turns.turn import Turn, TurnText

__all__ = ["Backoff", "Outbox", "OutboxError", "ids_of"]

_log = structlog.get_logger(__name__)

_GROUP_S = 0.01
"""How long the first turn of a group waits for others; the commit comes on top, within 20 ms on a disk of today."""
_MOST_GROUP_ROWS = 1000
_MOST_GROUP_BYTES = 8 * 1024**2
MEMORY_BYTES = 64 * 1024**2
"""Most that may wait for the disk: at 4 kB a turn, what 100 turns a second make in nearly three minutes."""
_TURNS_SHARE = 10
"""One part in so many of a bound is for turns alone, so that texts give way first."""
_EVICTED_SHARE = 64
"""One part in so many of the cap is freed at once: not a little for every commit."""
_FREED_ON_FULL_DISK = 1024**2
_TICK_S = 1.0
_LOOK_S = 10.0
"""Between two looks for files that were left behind, and between two times that erased text is wiped from the log."""
_REPORT_S = 10.0
"""Losses are said at most so often, with their number."""
_JOIN_S = 5.0

_NOT_OPENED = "an outbox that was left behind cannot be opened"

_encode = msgspec.json.Encoder().encode


class OutboxError(Exception):
    """The outbox cannot be opened. The message says why and what to do."""


class _Ids(msgspec.Struct):
    org_id: str
    request_id: str


class _Loss(NamedTuple):
    part: Part
    why: Why
    number: int
    turn: bytes
    """One of them, to name it; empty: unknown."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A file that is this process's, open."""

    slot: Slot
    file: OutboxFile


class Outbox:
    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        registry: CollectorRegistry = REGISTRY,
        *,
        memory_bytes: int = MEMORY_BYTES,
        look_s: float = _LOOK_S,
    ) -> None:
        """`max_bytes`: most that may wait in the file, adopted ones not counted. Raises OutboxError."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._memory_bytes = memory_bytes
        self._look_s = look_s
        self.metrics = OutboxMetrics(registry)
        own = _open(directory)
        self._slot, self._file = own.slot, own.file
        self._adopted: tuple[_Held, ...] = ()
        self._unusable: set[Path] = set()
        self._unmoved: set[Path] = set()
        self._wakes: list[Callable[[], None]] = []
        self._watches: list[Callable[[], None]] = []

        # Of the thread that puts:
        self._rows: deque[NewRow] = deque()
        self._put_count = 0
        self._put_bytes = 0
        # Of the thread that writes, which takes rows from the left:
        self._group: list[NewRow] = []
        self._settled_count = 0
        self._settled_bytes = 0
        self._problem = ""
        # Of both, read by the thread that looks after the files:
        self._losses: deque[_Loss] = deque()
        self._reported_at = float("-inf")
        self._unreported: Counter[tuple[Part, Why]] = Counter()
        self._named: bytes = b""

        self._is_closed = False
        self._has_rows = threading.Event()
        self._hurry = threading.Event()
        """Do not wait for more: somebody waits for the commit."""
        self._closing = threading.Event()
        self._settled = threading.Condition()
        self.metrics.show(
            {consumer: self._depth(consumer) for consumer in Consumer},
            {consumer: self._oldest_s(consumer) for consumer in Consumer},
            lambda: self._file.waiting_bytes,
            lambda: self._put_bytes - self._settled_bytes,
        )
        self._writer = threading.Thread(target=self._write, name="outbox-writer", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="outbox-keeper", daemon=True)
        self._writer.start()
        self._keeper.start()

    def put(self, turn: Turn, text: TurnText | None) -> None:
        """Keep a turn; what cannot be kept is counted. Never waits, never raises. For one thread."""
        try:
            row = _row(turn, text)
        except Exception:  # noqa: BLE001 - nothing that a client or a provider sent may stop an observer
            self._losses.append(_Loss(Part.TURN, Why.BUG, 1, b""))
            return
        if self._is_closed:
            self._losses.append(_Loss(Part.TURN, Why.CLOSED, 1, row.turn))
            return
        room = self._memory_bytes - (self._put_bytes - self._settled_bytes)
        fitted = _fitted(row, room, self._memory_bytes)
        if fitted is not row:
            part = Part.TURN if fitted is None else Part.TEXT
            self._losses.append(_Loss(part, Why.DISK if self._problem else Why.BEHIND, 1, row.turn))
            if fitted is None:
                return
            row = fitted
        self._put_count += 1
        self._put_bytes += row.size
        self._rows.append(row)
        if not self._has_rows.is_set():
            self._has_rows.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was put is on the disk. False: not within `timeout_s`."""
        wanted = self._put_count
        self._hurry.set()
        with self._settled:
            return self._settled.wait_for(lambda: self._settled_count >= wanted, timeout_s)

    def close(self) -> None:
        """Commit what was put, and give up the files. After the delivery has stopped."""
        self._is_closed = True
        self._closing.set()
        self._hurry.set()
        self._has_rows.set()
        self._writer.join(_JOIN_S)
        self._keeper.join(_JOIN_S)
        self._move_removed()
        self._report(is_last=True)
        for adopted in (*self._adopted, _Held(self._slot, self._file)):
            adopted.file.close()
            adopted.slot.release()

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Call this when there is something new; from any thread, and briefly."""
        self._wakes.append(wake)

    def watch(self, look: Callable[[], None]) -> None:
        """Call this about once a second, from one thread, and briefly."""
        self._watches.append(look)

    def files(self) -> tuple[OutboxFile, ...]:
        """The own one first, then those of dead processes. One that is empty by now may be closed."""
        return (self._file, *(adopted.file for adopted in self._adopted))

    def _depth(self, consumer: Consumer) -> Callable[[], float]:
        return lambda: sum(file.state(consumer).depth for file in self.files())

    def _oldest_s(self, consumer: Consumer) -> Callable[[], float]:
        def oldest_s() -> float:
            oldest = [at for file in self.files() if (at := file.state(consumer).oldest_at) is not None]
            return max(0.0, time.time() - min(oldest)) if oldest else 0.0

        return oldest_s

    def wake(self) -> None:
        """Everybody who subscribed: something is due."""
        for wake in self._wakes:
            wake()

    # -- the thread that writes

    def _write(self) -> None:
        backoff = Backoff()
        pause_s = _GROUP_S
        while True:
            self._has_rows.wait()
            self._hurry.wait(pause_s)
            self._hurry.clear()
            self._has_rows.clear()
            is_last = self._closing.is_set()
            try:
                self._commit()
                self._recovered()
                backoff.reset()
                pause_s = _GROUP_S
            except FileTrouble as error:
                self._failed(str(error))
                pause_s = backoff.next_s()
                self._has_rows.set()
            except Exception as error:  # noqa: BLE001 - whatever it is, this thread must live on
                self._failed(type(error).__name__)
                pause_s = backoff.next_s()
                self._has_rows.set()
            if is_last:
                break
        self._settle([*self._group, *self._rows], Why.CLOSED)

    def _commit(self) -> None:
        """Everything that was put. Raises FileTrouble, and then the group is tried again."""
        while self._group or self._rows:
            if not self._group:
                self._group = self._next_group()
            try:
                self._append(self._group)
            except FileTrouble as error:
                if not error.is_disk_full:
                    raise
                self._make_room(sum(row.size for row in self._group))
                self._append(self._group)
            self._settle(self._group)
            self._group = []
            self.wake()

    def _next_group(self) -> list[NewRow]:
        group: list[NewRow] = []
        size = 0
        while self._rows and len(group) < _MOST_GROUP_ROWS and size < _MOST_GROUP_BYTES:
            row = self._rows.popleft()
            size += row.size
            group.append(row)
        return group

    def _append(self, group: list[NewRow]) -> None:
        """What the cap allows of a group: before anything new is cut, the oldest traces go."""
        over = self._file.waiting_bytes + sum(row.size for row in group) - self._max_bytes
        if over > 0:
            self._evict(over + self._max_bytes // _EVICTED_SHARE, Why.CAP)
        room = self._max_bytes - self._file.waiting_bytes
        kept: list[NewRow] = []
        losses: list[_Loss] = []
        for row in group:
            fitted = _fitted(row, room, self._max_bytes)
            if fitted is not row:
                losses.append(_Loss(Part.TURN if fitted is None else Part.TEXT, Why.CAP, 1, row.turn))
            if fitted is not None:
                room -= fitted.size
                kept.append(fitted)
        if kept:
            with self.metrics.commit_seconds.time():
                self._file.append(kept)
            self.metrics.committed.inc(len(kept))
        self._losses.extend(losses)

    def _make_room(self, size: int) -> None:
        with suppress(FileTrouble):
            self._file.make_log_reusable()
        with suppress(FileTrouble):
            self._evict(size + _FREED_ON_FULL_DISK, Why.DISK)

    def _evict(self, size: int, why: Why) -> None:
        if evicted := self._file.evict_traces(size):
            self._losses.append(_Loss(Part.TRACE, why, evicted, b""))

    def _settle(self, rows: list[NewRow], lost: Why | None = None) -> None:
        """They are on the disk, or nobody can help them any more."""
        if lost is not None:
            self._losses.extend(_Loss(Part.TURN, lost, 1, row.turn) for row in rows)
        with self._settled:
            self._settled_count += len(rows)
            self._settled_bytes += sum(row.size for row in rows)
            self._settled.notify_all()

    def _failed(self, problem: str) -> None:
        if not self._problem:
            _log.warning(
                "turns wait in memory until the outbox can be written again; see to the disk of the state directory",
                file=self._file.path.name,
                problem=problem,
            )
        self._problem = problem

    def _recovered(self) -> None:
        if self._problem:
            self._problem = ""
            _log.info("the outbox is written again", file=self._file.path.name)

    # -- the thread that looks after the files

    def _keep(self) -> None:
        looked_at = float("-inf")
        corrupted = 0
        while not self._closing.wait(min(_TICK_S, self._look_s)):
            try:
                self._report()
                for look in self._watches:
                    look()
                self._move_removed()
                if sum(file.corrupted for file in self.files()) > corrupted:
                    self.metrics.corrupt_files.inc()
                    corrupted += 1
                self._notice_others()
                if time.monotonic() - looked_at >= self._look_s:
                    looked_at = time.monotonic()
                    self._slot.keep_reserve(HEADROOM_BYTES)
                    self._tidy()
                    self._remove_drained()
                    self._adopt()
            except Exception as error:  # noqa: BLE001 - whatever it is, this thread must live on
                _log.error("the outbox's files could not be looked after", problem=type(error).__name__)

    def _notice_others(self) -> None:
        for file in self.files():
            with suppress(FileTrouble):
                if file.notice_others():
                    self.wake()

    def _move_removed(self) -> None:
        """Files that somebody removed or replaced while they are open: what they hold goes to new ones."""
        for held in (_Held(self._slot, self._file), *self._adopted):
            if held.file.is_in_place():
                continue
            name = held.slot.file.name
            try:
                slot = self._move(held.file)
            except (FileTrouble, OSError) as error:
                if held.slot.file not in self._unmoved:
                    self._unmoved.add(held.slot.file)
                    _log.error(
                        "the outbox's file was removed and no other can be made: its turns end with this process; "
                        "see to the state directory",
                        file=name,
                        problem=str(error),
                    )
                continue
            held.slot.release()
            self._unmoved.discard(held.slot.file)
            if held.file is self._file:
                self._slot = slot
            else:
                self._adopted = tuple(_Held(slot, one.file) if one.file is held.file else one for one in self._adopted)
            _log.error(
                "the outbox's file was removed or replaced by somebody: what it held was written anew; "
                "leave the state directory of a running observer alone",
                file=name,
                now=slot.file.name,
                entries={consumer.value: held.file.state(consumer).depth for consumer in Consumer},
            )

    def _move(self, file: OutboxFile) -> Slot:
        """Raises FileTrouble, OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        slot = claim_new(self._directory)
        try:
            file.move(slot.file)
        except BaseException:
            slot.release()
            raise
        return slot

    def _tidy(self) -> None:
        for file in self.files():
            with suppress(FileTrouble):
                file.tidy()

    def _adopt(self) -> None:
        for slot in claim_left_behind(self._directory):
            try:
                file = _open_file(slot)
            except (FileTrouble, FileUnusable) as error:
                slot.release()
                if slot.file not in self._unusable:
                    self._unusable.add(slot.file)
                    name, problem = slot.file.name, str(error)
                    _log.warning(_NOT_OPENED, file=name, problem=problem)
                continue
            if not file.waiting_bytes:
                _give_back(_Held(slot, file))
                continue
            self._adopted = (*self._adopted, _Held(slot, file))
            _log.info(
                "adopted an outbox whose process ended; its turns are delivered from here",
                file=slot.file.name,
                entries={consumer.value: file.state(consumer).depth for consumer in Consumer},
            )
            self.wake()

    def _remove_drained(self) -> None:
        for adopted in [one for one in self._adopted if not one.file.waiting_bytes]:
            self._adopted = tuple(one for one in self._adopted if one is not adopted)
            _give_back(adopted)
            _log.info("delivered all of an adopted outbox", file=adopted.slot.file.name)

    def _report(self, *, is_last: bool = False) -> None:
        """Count losses, and say so: the first of a burst at once, the others together."""
        while self._losses:
            loss = self._losses.popleft()
            self.metrics.dropped.labels(loss.part, loss.why).inc(loss.number)
            self._unreported[loss.part, loss.why] += loss.number
            self._named = self._named or loss.turn
        now = time.monotonic()
        if not self._unreported or (now - self._reported_at < _REPORT_S and not is_last):
            return
        self._reported_at = now
        lost = {f"{part}_{why}": count for (part, why), count in self._unreported.items()}
        _log.warning(
            "turns were lost or cut, since there was no room for them or they came too late",
            **lost,
            **ids_of(self._named),
        )
        self._unreported.clear()
        self._named = b""


class Backoff:
    """Growing waits with jitter, so that many processes do not come back at once."""

    def __init__(self, first_s: float = 0.1, longest_s: float = 10.0) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._tries = 0

    def next_s(self) -> float:
        """Between half and all of a wait that doubles each time."""
        longest = min(self._longest_s, self._first_s * 2 ** min(self._tries, 30))
        self._tries += 1
        return float(longest * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    def reset(self) -> None:
        self._tries = 0


def _open(directory: Path) -> _Held:
    """A file that was left behind, one that has turns in it if there is one; else a new file."""
    idle: list[_Held] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for slot in claim_left_behind(directory):
            try:
                held = _Held(slot, _open_file(slot))
            except (FileTrouble, FileUnusable) as error:
                slot.release()
                _log.warning(_NOT_OPENED, file=slot.file.name, problem=str(error))
                continue
            if held.file.waiting_bytes:
                return held
            idle.append(held)
        return idle.pop(0) if idle else _new(directory)
    except OSError as error:
        raise OutboxError(f"the state directory {directory} cannot be used: {error}; see IBEX_STATE_DIR") from error
    finally:
        for held in idle:
            held.file.close()
            held.slot.release()


def _new(directory: Path) -> _Held:
    slot = claim_new(directory)
    try:
        return _Held(slot, _open_file(slot))
    except (FileTrouble, FileUnusable) as error:
        slot.release()
        raise OutboxError(
            f"{slot.file} cannot be made: {error}; free some megabytes on that disk, or choose another IBEX_STATE_DIR"
        ) from error


def _open_file(slot: Slot) -> OutboxFile:
    """Raises FileUnusable, FileTrouble; the latter not for want of room as long as there is a reserve."""
    try:
        return OutboxFile(slot.file)
    except FileTrouble:
        if not slot.give_up_reserve():
            raise
        return OutboxFile(slot.file)


def _give_back(adopted: _Held) -> None:
    """A file without entries goes; one with something set aside stays for who looks into it."""
    with suppress(FileTrouble):
        if adopted.file.close_for_removal():
            adopted.slot.remove()
            return
    adopted.file.close()
    adopted.slot.release()


def _row(turn: Turn, text: TurnText | None) -> NewRow:
    has_checkpoint = turn.has_checkpoint
    keeps_text = text is not None and has_checkpoint and not turn.skip_extraction
    return NewRow(
        put_at=time.time(),
        for_checkpoint=has_checkpoint,
        for_enqueue=keeps_text,
        turn=_encoded(turn),
        text=_encoded(text) if keeps_text and text is not None else None,
    )


def _encoded(value: Turn | TurnText) -> bytes:
    try:
        return _encode(value)
    except UnicodeEncodeError:
        # Halves of surrogate pairs, from a provider's JSON: UTF-8 has no place for them.
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        clean = {
            name: field.encode("utf-8", "replace").decode() for name, field in fields.items() if type(field) is str
        }
        return _encode(msgspec.structs.replace(value, **clean))


def _fitted(row: NewRow, room: int, bound: int) -> NewRow | None:
    """The row, or what of it goes into `room` bytes of a place for `bound`."""
    if row.text is not None and row.size > room - bound // _TURNS_SHARE:
        row = row._replace(text=None, for_enqueue=False)
    return row if row.size <= room else None


def ids_of(turn: bytes) -> dict[str, str]:
    """What a log line may say of an encoded turn; nothing when it cannot be read."""
    try:
        ids = msgspec.json.decode(turn, type=_Ids)
    except msgspec.MsgspecError:
        return {}
    return {"org_id": ids.org_id, "request_id": ids.request_id}
