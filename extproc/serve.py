"""Composition roots: one function for each process, which reads like its parts list.

Every process starts the same way (logs, spans, parts, server, admin listener, "ready") and stops the same way: not
ready, drain, flush, close, each step with a limit. SIGTERM and SIGINT stop it with exit code 0.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc.aio
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from extproc.settings import (
    AuthSettings,
    EngineSettings,
    FilterSettings,
    GateSettings,
    IdentitySettings,
    ObserverSettings,
    ProcessSettings,
    SettingsError,
    SharedRedisSettings,
)
from extproc.telemetry.admin import AdminListener, Readiness
from extproc.telemetry.logs import LineWriter, configure_logs
from extproc.telemetry.spans import start_spans
from extproc.telemetry.watchdog import Watchdog

if TYPE_CHECKING:
    from starlette.routing import Route

    from extproc.context.service import ContextService
    from extproc.directives.client import Directives
    from extproc.filter.identity import IdentitySources
    from extproc.memory.store import MemoryStore
    from extproc.turns.broker import Broker
    from extproc.turns.sessions import Sessions
    from extproc.turns.sinks import CheckpointSink, TaskSink, TraceSink

__all__ = ["run_auth", "run_engine", "run_filter", "run_gate", "run_observer", "server_options"]

_log = structlog.get_logger("extproc.serve")

_GRPC_OVERHEAD_BYTES = 1024 * 1024
"""A message is the body and what Envoy sends beside it: headers, metadata, attributes."""

_ENGINE_MESSAGE_BYTES = 4 * 1024 * 1024
"""A query and a few recent messages: far below."""

_AUTH_MESSAGE_BYTES = 1024 * 1024
"""A token and a few names."""
_AUTH_CONNECTIONS = 6
"""One for each thread of the auth service and of the directive service."""
_CHECK_MESSAGE_BYTES = 1024 * 1024
"""A request's headers."""
_STORE_CHECK = "memory_store"
"""In `/ready` of an engine, and a service of its gRPC health."""
_STORE_RETRY_S = 1.0
"""Between two attempts to open a store whose database is away when an engine starts."""
_STORE_LOOK_S = 1.0
"""Between two looks at whether it is away, for gRPC's health service; no statement is sent for it."""
_REDIS_TIMEOUT_S = 0.02
"""For each count of the rate limit: it takes well under 1 ms, and is on every request's way."""

_KEPT_DIRECTIVES = 20_000
_KEPT_DIRECTIVE_BYTES = 64 * 1024 * 1024
"""Two thousand of the longest."""

_CLOSE_LIMIT_S = 2.0
"""For each part. The outbox's file is closed by the kernel if a disk that hangs takes longer."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
_KEPT_BYTES = 64 * 1024 * 1024
"""Freed at the end of the heap and not given back."""
_LARGEST_ON_HEAP = 32 * 1024 * 1024
"""What glibc takes at most. Its own rule begins at 128 KB and follows what is freed; set, it stays."""

_TAKING_SHARE = 0.5
"""Of the seconds to end: where nobody heeds the notice new requests never stop coming, and those that run shall end."""


@dataclass(frozen=True, slots=True)
class _Running:
    """What the body of `_process` fills."""

    server: grpc.aio.Server
    logs: LineWriter
    closers: list[Callable[[], Awaitable[None]]]
    """Called in order after the last request."""
    takers: list[Callable[[float], Awaitable[None]]]
    """Called when no new requests should come, for those that have arrived and are not taken yet; with the seconds that
    it may take, a share of those for running ones to end."""
    stoppers: list[Callable[[], None]]
    """Called when no new requests are taken, before running ones may end."""
    stopping: asyncio.Event
    """Set by SIGTERM and SIGINT."""
    health: health.aio.HealthServicer
    """Of gRPC: for services beside those that every process has."""
    start_admin: Callable[[], Awaitable[None]]
    """Before its time, for a body that waits: alive, and not ready."""


class _StoppedAtStart(Exception):
    """A signal came before there was anything to stop."""


def run_filter(settings: FilterSettings) -> None:
    """`extproc filter`: until SIGTERM."""
    _keep_freed_memory()
    uvloop.run(_filter(settings))


def _keep_freed_memory() -> None:
    """A body of megabytes is copied five times on its way. With memory that the kernel has to make anew for each copy
    5 MB cost the filter 28 ms of CPU, and 16 ms with memory that it has kept (docs/overhead.md). glibc only."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def run_observer(settings: ObserverSettings) -> None:
    """`extproc observer`: until SIGTERM."""
    uvloop.run(_observer(settings))


def run_engine(settings: EngineSettings) -> None:
    """`extproc engine`: until SIGTERM."""
    uvloop.run(_engine(settings))


def run_gate(settings: GateSettings) -> None:
    """`extproc gate`: until SIGTERM."""
    uvloop.run(_gate(settings))


def run_auth(settings: AuthSettings) -> None:
    """`extproc auth`: until SIGTERM."""
    uvloop.run(_auth(settings))


async def _filter(settings: FilterSettings) -> None:
    from extproc.chat import Placement, ReadLimits
    from extproc.context.client import EngineClient
    from extproc.filter.exchange import Policy
    from extproc.filter.service import SERVICE_NAME, ContextProcessor

    identities = _identity_sources(settings)
    policy = Policy(
        placement=Placement(settings.placement),
        max_body_bytes=settings.max_body_bytes,
        context_window_tokens=settings.context_window_tokens,
        limits=ReadLimits(query_bytes=settings.max_query_bytes, recent_messages=settings.recent_messages),
        has_directives=bool(settings.directive_address or settings.redis_url.get_secret_value()),
        keeps_directive_on_skip=settings.directive_always,
    )
    engine = EngineClient(settings.engine_address, settings.engine_most_open)
    checks: dict[str, Callable[[], Awaitable[bool]]] = {"engine": lambda: engine.is_ready(timeout_s=1.0)}
    lookups = _directive_lookups(settings) if policy.has_directives else None
    checks |= lookups.checks if lookups is not None else {}
    options = server_options(settings.max_body_bytes + _GRPC_OVERHEAD_BYTES)
    # A filter without its engine is ready all the same: requests go on without memory, which beats Envoy's time-out.
    async with _process(
        "filter", settings, settings.filter_listen, SERVICE_NAME, options, checks, needed=()
    ) as running:
        write_line = running.logs.put_object if settings.log_level in {"debug", "info"} else lambda _line: None
        source = lookups.directives if lookups is not None else None
        processor = ContextProcessor(engine, policy, identities, settings.budget_ms, write_line, source)
        processor.add_to_server(running.server)
        if lookups is not None:
            await lookups.start()
            running.closers.append(lookups.close)
        running.closers.append(engine.close)


@dataclass(frozen=True, slots=True)
class _Lookups:
    """What finds directives, and what it asks."""

    directives: Directives
    checks: dict[str, Callable[[], Awaitable[bool]]]
    start: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]


def _directive_lookups(settings: FilterSettings) -> _Lookups:
    """Nobody is reached here. Raises SettingsError."""
    from extproc.directives.cache import DirectiveCache
    from extproc.directives.client import REDIS_TIMEOUT_S, Directives, ServiceClient
    from extproc.directives.directive import ALL_CHANNELS
    from extproc.redis.channel import Channel
    from extproc.redis.link import RedisLink

    server = _redis_server(settings, "directives need one server, or Sentinels; a cluster's keys are not looked up")
    link = RedisLink(server, REDIS_TIMEOUT_S) if server is not None else None
    service = ServiceClient(settings.directive_address) if settings.directive_address else None
    cache = DirectiveCache(_KEPT_DIRECTIVES, _KEPT_DIRECTIVE_BYTES, settings.directive_stale_s)
    directives = Directives(cache, link, service, settings.directive_wait_ms / 1e3)
    channel = Channel(server, ALL_CHANNELS, directives) if server is not None else None
    checks: dict[str, Callable[[], Awaitable[bool]]] = {}
    if service is not None:
        checks["directives"] = lambda: service.is_ready(timeout_s=1.0)
    if link is not None:

        async def is_redis_well() -> bool:
            return link.is_up and directives.is_heard

        checks["redis"] = is_redis_well

    async def start() -> None:
        if link is not None and channel is not None:
            channel.start()
            await link.start()

    async def close() -> None:
        await directives.close()
        for part in (channel, link, service):
            if part is not None:
                await part.close()

    return _Lookups(directives, checks, start, close)


def _redis_server(settings: SharedRedisSettings, no_cluster: str) -> Broker | None:
    """None: there is none. `no_cluster`: what to say of a cluster. Raises SettingsError."""
    from extproc.turns.broker import Broker, BrokerUrlError, Mode

    url = settings.redis_url.get_secret_value()
    try:
        server = Broker.parse(url, "IBEX_REDIS_URL") if url else None
    except BrokerUrlError as error:
        raise SettingsError(str(error)) from None
    if server is not None and server.mode is Mode.CLUSTER:
        raise SettingsError(f"IBEX_REDIS_URL: {no_cluster}")
    return server


async def _observer(settings: ObserverSettings) -> None:
    from extproc.filter.observation import ObservationLimits
    from extproc.filter.observer import LagMeter, StreamObserver
    from extproc.filter.service import SERVICE_NAME
    from extproc.turns.delivery import Consumer, Delivery
    from extproc.turns.outbox import Outbox, OutboxError
    from extproc.turns.sessions_api import session_routes
    from extproc.turns.sweeper import Sweeper

    identities = _identity_sources(settings)
    limits = ObservationLimits(max_body_bytes=settings.max_body_bytes, max_text_bytes=settings.max_text_bytes)
    sinks = await asyncio.to_thread(_sinks, settings)
    try:
        outbox = await asyncio.to_thread(Outbox, settings.state_dir, settings.outbox_max_bytes)
    except OutboxError as error:
        raise SettingsError(str(error)) from None
    delivery = Delivery(outbox, sinks.checkpoints, sinks.tasks, sinks.traces)
    sweeper = Sweeper(
        sinks.sessions,
        sinks.sweeper_tasks,
        interval_s=settings.sweep_interval_s,
        idle_s=settings.session_idle_s,
        after_s=settings.sweep_after_s,
    )
    lag = LagMeter()
    observer = StreamObserver(identities, limits, lambda observed: outbox.put(observed.turn, observed.text), lag)

    def check_of(consumer: Consumer) -> Callable[[], Awaitable[bool]]:
        async def is_well() -> bool:
            return delivery.is_well(consumer)

        return is_well

    async def stop_delivery() -> None:
        # What is not delivered now is delivered by the next process that finds the outbox. The sinks are closed too.
        await asyncio.to_thread(outbox.flush, _CLOSE_LIMIT_S / 2)
        await asyncio.to_thread(delivery.stop, _CLOSE_LIMIT_S / 2)

    async def close_outbox() -> None:
        await asyncio.to_thread(outbox.close)
        if sinks.sweeper_tasks is not None:
            await asyncio.to_thread(sinks.sweeper_tasks.close)

    # None of what a turn goes to is needed to take turns: the outbox keeps them.
    checks = {"database": check_of(Consumer.CHECKPOINT)}
    if sinks.tasks is not None:
        checks["broker"] = check_of(Consumer.ENQUEUE)
    if sinks.traces is not None:
        checks["clickhouse"] = check_of(Consumer.TRACE)
    options = server_options(settings.max_body_bytes + _GRPC_OVERHEAD_BYTES)
    routes = session_routes(sinks.sessions)
    async with _process(
        "observer", settings, settings.observer_listen, SERVICE_NAME, options, checks, needed=(), routes=routes
    ) as running:
        for sink, variable, loss in (
            (sinks.tasks, "IBEX_BROKER_URL", "nothing is learnt from turns"),
            (sinks.traces, "IBEX_CLICKHOUSE_URL", "no traces are written"),
        ):
            if sink is None:
                _log.info("not set", variable=variable, consequence=loss)
        observer.add_to_server(running.server)
        running.takers.append(observer.take_waiting)
        running.stoppers.append(observer.stop)
        running.closers.extend((lag.stop, sweeper.stop, stop_delivery, close_outbox))
        lag.start()
        sweeper.start()
        delivery.start()


@dataclass(frozen=True, slots=True)
class _Sinks:
    """Where turns go; None: nowhere, by setting."""

    sessions: Sessions
    checkpoints: CheckpointSink
    tasks: TaskSink | None
    sweeper_tasks: TaskSink | None
    """The sweeper's own: one connection, one thread."""
    traces: TraceSink | None


def _sinks(settings: ObserverSettings) -> _Sinks:
    """None of them is reached here: who is away at start is waited for like anybody else. Raises SettingsError."""
    from extproc.memory.database import Database
    from extproc.memory.store import StoreError, store_url
    from extproc.turns.broker import BrokerUrlError
    from extproc.turns.checkpoint import DatabaseCheckpoints
    from extproc.turns.enqueue import RedisTasks
    from extproc.turns.sessions import Sessions
    from extproc.turns.trace import ClickHouseTraces

    broker_url, clickhouse_url = settings.broker_url.get_secret_value(), settings.clickhouse_url.get_secret_value()
    try:
        database = Database(store_url(settings))
        return _Sinks(
            Sessions(database),
            DatabaseCheckpoints(database, settings.turn_retention_s),
            RedisTasks(broker_url) if broker_url else None,
            RedisTasks(broker_url) if broker_url else None,
            ClickHouseTraces(clickhouse_url, settings.trace_retention_days) if clickhouse_url else None,
        )
    except (StoreError, BrokerUrlError) as error:
        raise SettingsError(str(error)) from None


def _identity_sources(settings: IdentitySettings) -> IdentitySources:
    from extproc.filter.identity import IdentitySources, SourceError

    try:
        return IdentitySources(settings.identity_org, settings.identity_agent, settings.identity_user)
    except SourceError as error:
        raise SettingsError(str(error)) from None


async def _engine(settings: EngineSettings) -> None:
    from extproc.context.reindexing import Reindexing
    from extproc.context.service import SERVICE_NAME, ContextService
    from extproc.memory.embedding import ModelUnusable, embedding_choice
    from extproc.memory.features import open_indexer
    from extproc.memory.store import StoreError, open_store

    choice = embedding_choice(settings)
    service: ContextService | None = None

    async def store_state() -> bool | str:
        return False if service is None else await service.store_state()

    # Without its database an engine serves what it holds, or nothing. Others have the same database: to take this one
    # out of service would only lose what it holds.
    checks = {_STORE_CHECK: store_state}
    options = server_options(_ENGINE_MESSAGE_BYTES)
    async with _process(
        "engine", settings, settings.engine_listen, SERVICE_NAME, options, checks, needed=()
    ) as running:
        try:
            indexer = await asyncio.to_thread(open_indexer, choice)
            # An engine writes no memories, so no other service is asked within a transaction of the store.
            store = await _opened(lambda: open_store(settings, indexer), running)
            running.closers.append(lambda: asyncio.to_thread(store.close))
            service = ContextService(store, indexer, settings)
            await service.start()
            service.freeze()
        except ModelUnusable as error:
            raise SettingsError(f"IBEX_EMBEDDING={settings.embedding}: {error}") from None
        except StoreError as error:
            raise SettingsError(f"the memory store cannot be opened: {error}") from None
        reindexing = Reindexing(
            store,
            lambda: open_indexer(choice.for_documents()),
            service.is_busy,
            is_left_to_us=choice.kind == "openai",
        )
        service.add_to_server(running.server)
        telling = asyncio.create_task(_tell_of_store(service, running.health), name="store health")

        async def stop_reindexing() -> None:
            telling.cancel()
            await asyncio.to_thread(reindexing.stop)

        running.closers[:0] = [service.stop, stop_reindexing]
        reindexing.start()


async def _opened(open_: Callable[[], MemoryStore], running: _Running) -> MemoryStore:
    """The store, as soon as its database is there. Raises StoreError for whatever waiting does not mend."""
    from extproc.memory.store import StoreAway

    is_told = False
    while not running.stopping.is_set():
        try:
            return await asyncio.to_thread(open_)
        except StoreAway as error:
            if not is_told:
                _log.warning("the memory store is away, the engine starts when it is there", error=str(error))
                await running.start_admin()
            is_told = True
        with suppress(TimeoutError):
            await asyncio.wait_for(running.stopping.wait(), _STORE_RETRY_S)
    raise _StoppedAtStart


async def _tell_of_store(service: ContextService, servicer: health.aio.HealthServicer) -> None:
    """gRPC's health service has a name for the store alone, for whoever wants to be told; nobody need act on it."""
    while True:
        status = health_pb2.HealthCheckResponse
        await servicer.set(_STORE_CHECK, status.NOT_SERVING if service.is_store_away else status.SERVING)
        await asyncio.sleep(_STORE_LOOK_S)


async def _auth(settings: AuthSettings) -> None:
    from extproc.auth.announce import Announcer
    from extproc.auth.service import SERVICE_NAME, AuthService
    from extproc.directives.announce import DirectiveAnnouncer
    from extproc.directives.service import DirectiveService
    from extproc.directives.store import DirectiveStore
    from extproc.memory.database import Database
    from extproc.memory.lane import LaneFull
    from extproc.memory.store import StoreError, store_url

    url = settings.redis_url.get_secret_value()
    try:
        database = Database(store_url(settings), connections=_AUTH_CONNECTIONS)
        service = AuthService(database, Announcer(url) if url else None)
        directives = DirectiveService(DirectiveStore(database), DirectiveAnnouncer(url) if url else None)
    except StoreError as error:
        raise SettingsError(str(error)) from None

    async def is_store_well() -> bool:
        try:
            await service.check()
        except (StoreError, LaneFull):
            return False
        return True

    async def close_database() -> None:
        await asyncio.to_thread(database.close)

    checks = {"database": is_store_well}
    options = server_options(_AUTH_MESSAGE_BYTES)
    async with _process(
        "auth", settings, settings.auth_listen, SERVICE_NAME, options, checks, needed=("database",)
    ) as running:
        service.add_to_server(running.server)
        directives.add_to_server(running.server)
        running.closers.extend((directives.stop, service.stop, close_database))
        await service.start()


async def _gate(settings: GateSettings) -> None:
    from extproc.gate.agent_cache import AgentCache
    from extproc.gate.auth_client import AuthClient
    from extproc.gate.guard import Guard
    from extproc.gate.limiter import RateLimiter
    from extproc.gate.principals import Principals
    from extproc.gate.revocations import RevocationChannel
    from extproc.gate.service import SERVICE_NAME, Authorizer
    from extproc.gate.token_cache import TokenCache
    from extproc.redis.link import RedisLink

    redis = _redis_server(settings, "rate limits need one server, or Sentinels; a cluster cannot count them")
    auth = AuthClient(settings.auth_address, settings.auth_timeout_ms / 1e3)
    cache = TokenCache(settings.token_cache_entries, settings.token_cache_s)
    principals = Principals(auth, cache, AgentCache(settings.agent_cache_s), Guard())
    checks = {"auth": lambda: auth.is_ready(timeout_s=1.0)}
    link = RedisLink(redis, _REDIS_TIMEOUT_S) if redis is not None else None
    channel = RevocationChannel(redis, cache) if redis is not None else None
    if link is not None and channel is not None:
        limits, revocations = link, channel

        async def is_redis_well() -> bool:
            return limits.is_up and revocations.is_alive

        checks["redis"] = is_redis_well
    limiter = RateLimiter(link, settings.rate_limit_rpm, settings.rate_limit_agent_rpm) if link is not None else None
    # Without them a gate answers 503, or counts nothing: to take it out of service would help nobody.
    async with _process(
        "gate", settings, settings.gate_listen, SERVICE_NAME, server_options(_CHECK_MESSAGE_BYTES), checks, needed=()
    ) as running:
        write_line = running.logs.put_object if settings.log_level in {"debug", "info"} else lambda _line: None
        authorizer = Authorizer(
            principals,
            limiter,
            denies_uncounted=settings.rate_limit_on_error == "deny",
            is_traced=bool(settings.otlp_endpoint),
            write_line=write_line,
        )
        authorizer.add_to_server(running.server)
        if link is not None and channel is not None:
            channel.start()
            await link.start()
            running.closers.extend((channel.close, link.close))
        running.closers.append(auth.close)
        # A check leaves no cycles behind; looking for them at the default rate costs a tenth of it (bench/gate.py).
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)


def server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """gRPC options of every server here; the benchmark's bare processor has the same."""
    return [
        # grpcio's default of 4 MB stalls a larger body until Envoy's time-out.
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes + _GRPC_OVERHEAD_BYTES),
        # Envoy's keepalive pings look like abuse to a default server, which then closes the connection again and again.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        # Two processes on one port would each get half of the connections without anybody having asked for it.
        ("grpc.so_reuseport", 0),
    ]


@asynccontextmanager
async def _process(
    name: str,
    settings: ProcessSettings,
    listen: str,
    service_name: str,
    options: list[tuple[str, int]],
    checks: Mapping[str, Callable[[], Awaitable[bool | str]]],
    needed: tuple[str, ...],
    routes: Sequence[Route] = (),
) -> AsyncIterator[_Running]:
    """Everything around a gRPC service. The body adds the service; leaving it serves until a signal comes.

    Until then its port is closed, so that a client with several addresses goes to another one.
    """
    logs = configure_logs(name, settings.log_level)
    spans = start_spans(name, settings.otlp_endpoint)
    watchdog = Watchdog(settings.watchdog_s)
    readiness = Readiness(checks, needed)
    server = grpc.aio.server(options=options)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    admin = AdminListener(name, settings.admin_listen, readiness, routes)
    start_admin = partial(_start_admin, admin, settings.admin_listen)
    running = _Running(server, logs, [], [], [], _stopping(), health_servicer, start_admin)
    try:
        yield running
        _bind(server, listen)
        await server.start()
        await start_admin()
        await _set_health(health_servicer, service_name, health_pb2.HealthCheckResponse.SERVING)
        watchdog.start()
        readiness.is_serving = True
        _log.info("ready", listen=listen, admin=admin.address)
        await running.stopping.wait()
        _log.info("stopping: no new requests, running ones may end", drain_s=settings.drain_s)
        readiness.is_serving = False
        await _set_health(health_servicer, service_name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(settings.notice_s)
        drained_by = time.monotonic() + settings.drain_s
        for take in running.takers:
            await take(settings.drain_s * _TAKING_SHARE)
        for stop in running.stoppers:
            stop()
        await server.stop(max(0.0, drained_by - time.monotonic()))
    except _StoppedAtStart:
        _log.info("stopping before the start was over")
    finally:
        await server.stop(0)
        await admin.stop()
        for close in running.closers:
            try:
                await asyncio.wait_for(close(), _CLOSE_LIMIT_S)
            except Exception:  # noqa: BLE001 - what comes after it must be closed too
                _log.exception("a part did not close well")
        watchdog.stop()
        if spans is not None:
            await asyncio.to_thread(spans.shutdown)
        _log.info("stopped")
        logs.close()


def _bind(server: grpc.aio.Server, listen: str) -> None:
    try:
        server.add_insecure_port(listen)
    except RuntimeError as error:
        raise SettingsError(f"cannot listen on {listen}: is another process using it? ({error})") from None


async def _start_admin(admin: AdminListener, listen: str) -> None:
    if admin.address:
        return
    try:
        await admin.start()
    except (OSError, OverflowError, ValueError) as error:
        raise SettingsError(f"cannot listen on {listen} (IBEX_ADMIN_LISTEN): {error}") from None


async def _set_health(servicer: health.aio.HealthServicer, service_name: str, status: int) -> None:
    for name in ("", "readiness", service_name):
        await servicer.set(name, status)
    await servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)


def _stopping() -> asyncio.Event:
    """Set by SIGTERM and SIGINT from now on."""
    received = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received.set)
    return received
