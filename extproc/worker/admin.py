"""The worker's admin listener, in a process of its own beside those that extract.

Celery forks its processes whenever one died, and a process that forks must have no threads of ours: a lock that one of
them holds would be held for ever in the child. So the listener, its looks at what the worker needs, and all counting
are here; the others write what happened into a pipe, and never wait for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec
import structlog
from prometheus_client import GC_COLLECTOR, PROCESS_COLLECTOR, REGISTRY

from extproc.memory.database import Database, act_for_sweep
from extproc.memory.schema import sessions
from extproc.memory.store import StoreError, store_url
from extproc.settings import SettingsError, WorkerSettings
from extproc.telemetry.admin import AdminListener, Readiness
from extproc.telemetry.logs import configure_logs
from extproc.turns._threads import DaemonThreads
from extproc.turns.broker import Broker
from extproc.turns.broker_client import connect
from extproc.turns.celery_message import QUEUE
from extproc.worker.metrics import Event, Ready, Stopping, WorkerMetrics

if TYPE_CHECKING:
    from asyncio import StreamReader

    from sqlalchemy import Connection

__all__ = ["AdminProcess", "Progress"]

_LOOK_INTERVAL_S = 2.0
_LOOK_LIMIT_S = 2.0
"""Of connecting, and of an answer."""
_FRESH_S = 3 * (_LOOK_INTERVAL_S + _LOOK_LIMIT_S)
"""A look that succeeded so long ago says nothing of now: the next ones hang."""
_PARENT_INTERVAL_S = 1.0
_STALL_SHARE = 3.0
"""Of the soft limit: no task takes more than 1.2 of it, and all processes may be at one."""

_LISTENING = "listening"
"""The answer to who started it; any other is what is wrong."""

_decoder = msgspec.json.Decoder(Event)
_encode = msgspec.json.Encoder().encode
_log = structlog.get_logger(__name__)


class AdminProcess:
    """The side of the worker: `start` it before there is any thread, `tell` it from any process that was forked."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._writer: int | None = None
        self._pid: int | None = None

    def start(self) -> None:
        """Returns when it listens. Raises SettingsError when the address cannot be used."""
        if not self._settings.admin_listen:
            return
        events, self._writer = os.pipe()
        answers, answer = os.pipe()
        main = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._writer)
            os.close(answers)
            _run(self._settings, events, answer, main)
        os.close(events)
        os.close(answer)
        os.set_blocking(self._writer, False)
        with os.fdopen(answers, "rb") as said:
            problem = said.read().decode()
        if problem != _LISTENING:
            self.stop()
            raise SettingsError(problem or "the admin listener ended at once; see the log")

    def tell(self, event: Event) -> None:
        """What cannot be written at once is not counted: no task waits for its own metrics."""
        if self._writer is not None:
            with suppress(OSError):  # shorter than PIPE_BUF: whole, or not at all
                os.write(self._writer, _encode(event) + b"\n")

    def stop(self) -> None:
        """From the process that started it."""
        if self._pid is None or self._writer is None:
            return
        os.kill(self._pid, signal.SIGKILL)  # it has nothing to lose: what it counted, nobody can ask for any more
        os.waitpid(self._pid, 0)
        os.close(self._writer)
        self._pid = self._writer = None


def _run(settings: WorkerSettings, events: int, answer: int, main: int) -> None:
    """The whole life of the process; does not return."""
    # They mean the main process, which lets running tasks end meanwhile; it is asked until then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    logs = configure_logs("worker", settings.log_level)
    try:
        asyncio.run(_Admin(settings, main).serve(events, answer))
    except SettingsError as error:
        _say(answer, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, this process must not go on as the worker itself
        _log.exception("the admin listener ended by a bug", error=type(error).__name__)
    finally:
        logs.close()
        os._exit(0)


class Progress:
    """Whether tasks are taken where there are some. Pure: times are given, in seconds."""

    def __init__(self, limit_s: float, now: float) -> None:
        """`limit_s`: within which a worker takes or ends a task, if there is one."""
        self._limit_s = limit_s
        self._moved_at = now
        self._empty_at = now

    def move(self, now: float) -> None:
        """A task was taken, or ended."""
        self._moved_at = now

    def look(self, length: int | None, now: float) -> None:
        """`length`: of the queue; None: nobody knows, so nobody can be blamed."""
        if not length:
            self._moved_at = now
        if length == 0:
            self._empty_at = now

    def is_stalled(self, now: float) -> bool:
        return now - self._moved_at > self._limit_s

    def waited_s(self, now: float) -> float:
        """For how long the queue has never been empty, as far as anybody looked."""
        return now - self._empty_at


class _Watch:
    """Looks now and then whether something that the worker needs is there, in a thread of its own."""

    def __init__(self, name: str, look: Callable[[], None]) -> None:
        """`look` raises when it is not."""
        self._look = look
        self._thread = DaemonThreads(1, f"watch {name}")
        self._seen_at: float | None = None

    async def run(self) -> None:
        while True:
            try:
                await self._thread.run(self._look)
            except Exception:  # noqa: BLE001 - many libraries, one meaning
                self._seen_at = None
            else:
                self._seen_at = time.monotonic()
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def is_well(self) -> bool:
        return self._seen_at is not None and time.monotonic() - self._seen_at < _FRESH_S


class _Admin:
    """Of one process."""

    def __init__(self, settings: WorkerSettings, main: int) -> None:
        self._settings = settings
        self._main = main
        for collector in (PROCESS_COLLECTOR, GC_COLLECTOR):  # they would speak of this process, not of those that work
            REGISTRY.unregister(collector)
        self._metrics = WorkerMetrics(REGISTRY)
        self._progress = Progress(settings.worker_limit_s * _STALL_SHARE, time.monotonic())
        looks = {"broker": self._look_at_broker(), "store": self._look_at_store()}
        if settings.extractor == "llm":
            looks["model"] = self._look_at_model()
        self._watches = {name: _Watch(name, look) for name, look in looks.items()}
        checks: dict[str, Callable[[], Awaitable[bool]]] = {
            name: watch.is_well for name, watch in self._watches.items()
        }
        # Nobody sends requests here, so to be ready is to be useful: a roll-out stops at workers that reach nothing.
        self._readiness = Readiness(checks, needed=tuple(checks))
        self._listener = AdminListener(
            "worker", settings.admin_listen, self._readiness, is_alive=lambda: not self._is_stalled()
        )

    async def serve(self, events: int, answer: int) -> None:
        """Until the main process is gone."""
        try:
            await self._listener.start()
        except (OSError, OverflowError, ValueError) as error:
            raise SettingsError(
                f"cannot listen on {self._settings.admin_listen} (IBEX_ADMIN_LISTEN): {error}"
            ) from None
        _log.info("admin", listen=self._listener.address)
        _say(answer, _LISTENING)
        tasks = [asyncio.create_task(watch.run()) for watch in self._watches.values()]
        tasks.append(asyncio.create_task(self._take(events)))
        while os.getppid() == self._main:  # noqa: ASYNC110 - nothing tells the end of a process that is not our child
            await asyncio.sleep(_PARENT_INTERVAL_S)
        for task in tasks:
            task.cancel()
        await self._listener.stop()

    async def _take(self, events: int) -> None:
        reader = await _reader(events)
        while line := await reader.readline():
            try:
                event = _decoder.decode(line)
            except msgspec.DecodeError:  # somebody else's words in our pipe
                continue
            self._metrics.count(event)
            self._progress.move(time.monotonic())
            match event:
                case Ready():
                    self._readiness.is_serving = True
                case Stopping():
                    self._readiness.is_serving = False

    def _is_stalled(self) -> bool:
        return self._progress.is_stalled(time.monotonic())

    def _look_at_broker(self) -> Callable[[], None]:
        broker = Broker.parse(self._settings.broker_url.get_secret_value())
        client = connect(broker, _LOOK_LIMIT_S, _LOOK_LIMIT_S)

        def look() -> None:
            length: int | None = None
            try:
                length = client.llen(QUEUE)
            finally:
                now = time.monotonic()
                self._progress.look(length, now)
                if length is not None:
                    self._metrics.queue_length.set(length)
                    self._metrics.queue_seconds.set(self._progress.waited_s(now))

        return look

    def _look_at_store(self) -> Callable[[], None]:
        try:
            database = Database(store_url(self._settings), connections=1)
        except StoreError as error:
            raise SettingsError(str(error)) from None

        def read(connection: Connection) -> None:
            act_for_sweep(connection)
            connection.execute(sessions.select().with_only_columns(sessions.c.id).limit(1)).all()

        return lambda: database.run(read, _LOOK_LIMIT_S, writes=False)

    def _look_at_model(self) -> Callable[[], None]:
        """Whether somebody takes connections there: a question would cost money."""
        url = urlsplit(self._settings.llm_url)
        place = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        return lambda: socket.create_connection(place, _LOOK_LIMIT_S).close()


async def _reader(events: int) -> StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), open(events, "rb", buffering=0))  # noqa: ASYNC230, SIM115 - a pipe
    return reader


def _say(answer: int, text: str) -> None:
    os.write(answer, text.encode())
    os.close(answer)
