"""The Celery application, and the process that runs it: `extproc worker`.

Built from settings by a function; nothing is built at import. Celery's own log lines, which can hold a message's
body, go the way of all libraries' (warnings and worse, without the words of exceptions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import structlog
from celery import Celery, signals
from celery.worker.consumer import Consumer
from kombu import Queue  # type: ignore[attr-defined]
from typing_extensions import override

from extproc.memory.store import StoreError
from extproc.settings import SettingsError, WorkerSettings
from extproc.telemetry.logs import LineWriter, configure_logs
from extproc.telemetry.spans import start_spans
from extproc.turns.broker import Broker, BrokerUrlError, Mode
from extproc.turns.celery_message import QUEUE, TASK
from extproc.worker.admin import AdminProcess
from extproc.worker.failed import failed_task
from extproc.worker.metrics import Event, Ready, Reason, SetAside, Stopping
from extproc.worker.parts import Parts
from extproc.worker.task import run_task
from extproc.worker.transport import SentinelTransport, ServerTransport

__all__ = ["Place", "make_app", "place_of", "run_worker"]

_HARD_SHARE = 1.2
_REDELIVERY_SHARE = 3.0
"""Of the soft limit: above the hard limit and the longest wait together, or a task would run twice for nothing."""
_SENTINEL_LIMIT_S = 2.0
"""For each Sentinel: they are asked one after the other, and one that stands still must not keep us from the next."""
_LOGGED = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR"}


@dataclass(frozen=True, slots=True)
class Place:
    """A broker in Celery's words."""

    url: str
    transport: type
    options: Mapping[str, object]
    tls: Mapping[str, object] | None


def place_of(broker: Broker) -> Place:
    """Raises SettingsError for a cluster, on which Celery cannot wait."""
    user = f"{quote(broker.username or '', safe='')}:{quote(broker.password, safe='')}@" if broker.password else ""
    tls = dict(broker.tls) if broker.tls is not None else None
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in broker.addresses]
    match broker.mode:
        case Mode.SERVER:
            return Place(f"redis://{user}{hosts[0]}/{broker.db}", ServerTransport, {}, tls)
        case Mode.SOCKET:
            return Place(f"redis+socket://{user}{broker.path}?virtual_host={broker.db}", ServerTransport, {}, tls)
        case Mode.SENTINEL:
            own = {"username": broker.sentinel_username, "password": broker.sentinel_password}
            limits = {"socket_connect_timeout": _SENTINEL_LIMIT_S, "socket_timeout": _SENTINEL_LIMIT_S}
            sentinel = {k: v for k, v in own.items() if v} | limits | ({} if tls is None else {"ssl": True, **tls})
            options = {"master_name": broker.master, "sentinel_kwargs": sentinel}
            url = ";".join(f"sentinel://{user}{host}/{broker.db}" for host in hosts)
            return Place(url, SentinelTransport, options, tls)
        case Mode.CLUSTER:
            raise SettingsError("IBEX_BROKER_URL: a worker needs one server, or Sentinels; it cannot wait on a cluster")


def make_app(settings: WorkerSettings, tell: Callable[[Event], None] = lambda _: None) -> Celery:
    """With the one task, and the parts that it needs in `app.parts`. Raises SettingsError; nobody is reached.

    `tell`: hears what happens, in the process where it does.
    """
    url = settings.broker_url.get_secret_value()
    if not url:
        raise SettingsError("IBEX_BROKER_URL is not set: a worker takes its tasks there")
    try:
        place = place_of(Broker.parse(url))
    except BrokerUrlError as error:
        raise SettingsError(str(error)) from None
    app = Celery("ibex", broker=place.url, set_as_current=False)
    parts = Parts(settings)
    app.parts = parts
    limit_s = settings.worker_limit_s
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_soft_time_limit=limit_s,
        task_time_limit=limit_s * _HARD_SHARE,
        task_default_queue=QUEUE,
        task_queues=[Queue(QUEUE, routing_key=QUEUE)],  # type: ignore[no-untyped-call]
        worker_concurrency=settings.worker_processes,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_consumer="extproc.worker.app:LastingConsumer",
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport=place.transport,
        broker_use_ssl=place.tls,
        broker_transport_options={
            "visibility_timeout": limit_s * _REDELIVERY_SHARE,
            # kombu looks for lost messages each 100 s by default.
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_keepalive": True,
            "health_check_interval": 15,
            "on_unreadable": lambda message: _set_aside_unreadable(settings, tell, message),
            **place.options,
        },
    )

    # How often it is tried is this program's setting, not Celery's default of three.
    # Not shared: Celery would give it to every other app of the process, too.
    @app.task(name=TASK, bind=True, typing=False, max_retries=None, shared=False)  # type: ignore[untyped-decorator]
    def extract_session_memories(task: Any, /, *args: object, **kwargs: object) -> None:
        run_task(task, parts, settings, tell, args, kwargs)

    return app


def _set_aside_unreadable(settings: WorkerSettings, tell: Callable[[Event], None], message: Any) -> None:
    """In the main process, and rarely: its connection is closed again, for a fork must not inherit one."""
    content = message if isinstance(message, dict) else {}
    failed = failed_task(content.get("id"), content.get("kwargs"), "its message cannot be read", 1, datetime.now(UTC))
    log = structlog.get_logger(__name__)
    parts = Parts(settings)
    try:
        parts.set_aside(failed)
    except StoreError as error:
        log.error("a message that cannot be read was dropped", task_id=failed.task_id, problem=str(error))  # noqa: TRY400 - expected
    else:
        tell(SetAside(Reason.UNREADABLE))
        log.error("a message cannot be read; see `extproc worker failed`", task_id=failed.task_id)
    finally:
        parts.close()


class LastingConsumer(Consumer):  # type: ignore[misc]
    """Sets aside what Celery would log with its body and forget."""

    @override
    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._set_aside(message, {})

    @override
    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._set_aside(message, body)

    @override
    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._set_aside(message, body)

    @override
    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._set_aside(message, body)

    def _set_aside(self, message: Any, body: Any) -> None:
        with suppress(Exception):  # whatever is wrong with it: Celery has not got as far as the body
            body = message.payload
        kwargs = body[1] if isinstance(body, list | tuple) and len(body) > 1 else {}
        self.app.conf.broker_transport_options["on_unreadable"]({"id": message.headers.get("id"), "kwargs": kwargs})
        message.ack_log_error(structlog.get_logger(__name__), self.connection_errors)


def run_worker(settings: WorkerSettings) -> int:
    """`extproc worker`: until SIGTERM, which lets running tasks end. Returns the exit code. Raises SettingsError."""
    admin = AdminProcess(settings)
    app = make_app(settings, admin.tell)
    admin.start()
    logs = configure_logs("worker", settings.log_level)
    opened: list[LineWriter] = []

    def start_child(**_: object) -> None:
        """After the fork, which takes no threads along."""
        opened.append(configure_logs("worker", settings.log_level))
        start_spans("worker", settings.otlp_endpoint)
        with suppress(StoreError):  # the first task says so
            app.parts.extraction()

    def stop_child(**_: object) -> None:
        from opentelemetry import trace

        app.parts.close()
        provider = trace.get_tracer_provider()
        if hasattr(provider, "shutdown"):
            provider.shutdown()
        for writer in opened:
            writer.close()

    def say_ready(**_: object) -> None:
        admin.tell(Ready())
        structlog.get_logger(__name__).info("ready", queue=QUEUE, processes=settings.worker_processes)

    signals.setup_logging.connect(lambda **_: None, weak=False)  # Celery leaves logging alone then
    signals.worker_process_init.connect(start_child, weak=False)
    signals.worker_process_shutdown.connect(stop_child, weak=False)
    signals.worker_ready.connect(say_ready, weak=False)
    signals.worker_shutting_down.connect(lambda **_: admin.tell(Stopping()), weak=False)
    worker = app.Worker(
        quiet=True, pool_cls="prefork", loglevel=_LOGGED[settings.log_level],
        without_gossip=True, without_mingle=True, without_heartbeat=True,
    )  # fmt: skip
    try:
        worker.start()
        structlog.get_logger(__name__).info("stopped")
    finally:
        admin.stop()
        logs.close()
    return int(worker.exitcode or 0)
