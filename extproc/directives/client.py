"""Finds directives: in this process, then in Redis, then with the service that reads the database.

A look-up is made once for each agent at a time, goes on behind a request that cannot wait for it, and is there for the
next. Redis and service are asked only while they are well, so that an outage costs requests nothing after its first
moments. All failures are values: the request goes on with what is at hand, or without a directive.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from ibex.directive.v1 import directive_pb2 as pb

from extproc.context.client import CHANNEL_OPTIONS
from extproc.directives import metrics
from extproc.directives.cache import DirectiveCache
from extproc.directives.circuit import Circuit
from extproc.directives.directive import ActiveDirective, Flaw, active_directive, decode, key_of, read_change
from extproc.redis.link import RedisLink, encode_command

__all__ = ["REDIS_TIMEOUT_S", "Directives", "LookUp", "ServiceClient", "Source"]

REDIS_TIMEOUT_S = 0.005
"""For one GET: it takes well under 1 ms, and after it there must be time for the service."""
_SERVICE_TIMEOUT_S = 1.0
"""Of a call that goes on behind the request."""
_ATTEMPTS = 3
"""Of a look-up that a change overtakes."""
_MOST_LOOK_UPS = 1000
"""At one time, of different agents."""
_FLAW_LOG_S = 60.0
"""Between two log lines about values that are no directives."""

_METHOD = "/ibex.directive.v1.DirectiveService/GetActiveDirective"

_log = structlog.get_logger("extproc.directives")


class Source(StrEnum):
    """Where an answer came from: the metric's label, and `directive` in the log line."""

    FRESH = "fresh"
    """This process had asked a moment ago."""
    REDIS = "redis"
    SERVICE = "service"
    STALE = "stale"
    """This process had asked some minutes ago, and nobody answers now."""
    MISS = "miss"
    """The agent has none."""
    FAILED = "failed"
    """Nobody answers, or not in time, and nothing is at hand."""


@dataclass(frozen=True, slots=True)
class LookUp:
    directive: ActiveDirective | None
    source: Source


_MISS, _FAILED = LookUp(None, Source.MISS), LookUp(None, Source.FAILED)
_NO_KEY = LookUp(None, Source.MISS)
"""Redis has none, and there is no service to ask: a key that expired is no proof that there is no directive."""
_count = {source: metrics.LOOK_UPS.labels(result=source.value) for source in Source}


class ServiceClient:
    """One channel to one `ibex.directive.v1.DirectiveService`. Close with `close`."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        # Bytes both ways: rubbish is ours to name, not grpcio's to raise.
        self._get: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_METHOD)

    async def active_directive(self, org_id: str, agent_id: str) -> ActiveDirective | Flaw | LookUp:
        """The directive, or `miss` or `failed`."""
        request = pb.GetActiveDirectiveRequest(org_id=org_id, agent_id=agent_id).SerializeToString()
        try:
            answer = pb.GetActiveDirectiveResponse.FromString(await self._get(request, timeout=_SERVICE_TIMEOUT_S))
        except grpc.aio.AioRpcError:
            return _FAILED
        except DecodeError:
            return Flaw.WRONG_TYPE
        if not answer.found:
            return _MISS
        return active_directive(answer.version_id, answer.content, answer.injection_mode)

    async def is_ready(self, timeout_s: float) -> bool:
        """Whether a connection stands, or can be made within `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        await self._channel.close()


class _Flight:
    """One look-up on its way."""

    __slots__ = ("began", "task")

    def __init__(self, task: asyncio.Task[LookUp], began: float) -> None:
        self.task = task
        self.began = began


class Directives:
    """Belongs to one event loop. Also what the channel of changes tells (`extproc.redis.channel.Listener`)."""

    def __init__(
        self, cache: DirectiveCache, redis: RedisLink | None, service: ServiceClient | None, wait_s: float
    ) -> None:
        """None: there is no such place, by setting. `wait_s`: the longest that a request waits."""
        self._cache = cache
        self._redis = redis
        self._service = service
        self._wait_s = wait_s
        self._redis_circuit, self._service_circuit = Circuit(), Circuit()
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._flaw_logged_at = float("-inf")
        metrics.CACHE_BYTES.set_function(lambda: cache.bytes)
        metrics.CHANNEL_ALIVE.set_function(lambda: float(self.is_heard))

    @property
    def is_heard(self) -> bool:
        """Whether changes are heard."""
        return self._cache.is_trusted(time.monotonic())

    async def close(self) -> None:
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def prepare(self, org_id: str, agent_id: str) -> None:
        """Begin to look for it, unless it is at hand."""
        now = time.monotonic()
        kept = self._cache.get(org_id, agent_id, now)
        if kept is None or not kept.is_fresh:
            self._flight(org_id, agent_id, now)

    def at_hand(self, org_id: str, agent_id: str) -> LookUp | None:
        """What can be said without waiting; None: await `look_up`."""
        now = time.monotonic()
        kept = self._cache.get(org_id, agent_id, now)
        if kept is not None and kept.is_fresh:
            return _counted(LookUp(kept.directive, Source.FRESH) if kept.directive else _MISS)
        flight = self._flight(org_id, agent_id, now)
        if flight is None or now - flight.began >= self._wait_s:
            return _counted(self._without_answer(org_id, agent_id))
        return None

    async def look_up(self, org_id: str, agent_id: str) -> LookUp:
        """Waits for what `at_hand` has begun, no longer than is left of its share of the budget."""
        asked_at = time.monotonic()
        flight = self._flight(org_id, agent_id, asked_at)
        answer = _FAILED
        if flight is not None:
            # No cancellation: the look-up goes on behind a request that went away or waited long enough.
            await asyncio.wait([flight.task], timeout=max(0.0, flight.began + self._wait_s - asked_at))
            if flight.task.done() and not flight.task.cancelled():
                answer = flight.task.result()
        metrics.SECONDS.observe(time.monotonic() - asked_at)
        return _counted(self._without_answer(org_id, agent_id, answer) if _is_none(answer) else answer)

    def _without_answer(self, org_id: str, agent_id: str, otherwise: LookUp = _FAILED) -> LookUp:
        kept = self._cache.get(org_id, agent_id, time.monotonic())
        if kept is None:
            return otherwise
        return LookUp(kept.directive, Source.STALE) if kept.directive else _MISS

    def _flight(self, org_id: str, agent_id: str, now: float) -> _Flight | None:
        """The look-up of this agent, begun if need be. None: there is nobody to ask now."""
        agent = (org_id, agent_id)
        flight = self._flights.get(agent)
        if flight is None and (self._may_ask_redis(now) or self._may_ask_service(now)):
            if len(self._flights) >= _MOST_LOOK_UPS:
                return None
            task = asyncio.create_task(self._ask(org_id, agent_id), name="directive")
            flight = self._flights[agent] = _Flight(task, now)
            task.add_done_callback(lambda _done: self._flights.pop(agent, None))
        return flight

    async def _ask(self, org_id: str, agent_id: str) -> LookUp:
        """Never raises but CancelledError. What a change overtook three times is used once, and not kept."""
        answer = _FAILED
        try:
            for _ in range(_ATTEMPTS):
                mark, asked_at = self._cache.mark, time.monotonic()
                answer = await self._ask_once(org_id, agent_id)
                if _is_none(answer) or self._cache.put(org_id, agent_id, answer.directive, mark, asked_at):
                    break
        except Exception:  # noqa: BLE001 - a bug of ours must not cost a request
            _log.exception("a bug; requests go on with the directive that is at hand")
            return _FAILED
        return answer

    async def _ask_once(self, org_id: str, agent_id: str) -> LookUp:
        answer = _FAILED
        if self._redis is not None and self._may_ask_redis(time.monotonic()):
            answer = await self._ask_redis(self._redis, org_id, agent_id)
            if answer.directive is not None:
                return answer
        if self._service is None:
            return answer
        return await self._ask_service(self._service, org_id, agent_id)

    async def _ask_redis(self, redis: RedisLink, org_id: str, agent_id: str) -> LookUp:
        reply = await redis.ask(encode_command("GET", key_of(org_id, agent_id)))
        is_answer = reply is None or isinstance(reply, bytes)
        _note("redis", self._redis_circuit, is_well=is_answer)
        if reply is None:
            return _NO_KEY
        return self._found(decode(reply), Source.REDIS) if isinstance(reply, bytes) else _FAILED

    async def _ask_service(self, service: ServiceClient, org_id: str, agent_id: str) -> LookUp:
        if not self._may_ask_service(time.monotonic()):
            return _FAILED
        answer = await service.active_directive(org_id, agent_id)
        found = answer if isinstance(answer, LookUp) else self._found(answer, Source.SERVICE)
        _note("service", self._service_circuit, is_well=found.source is not Source.FAILED)
        return found

    def _found(self, found: ActiveDirective | Flaw, source: Source) -> LookUp:
        if isinstance(found, ActiveDirective):
            return LookUp(found, source)
        metrics.FLAWS.labels(reason=found.value).inc()
        now = time.monotonic()
        if now - self._flaw_logged_at >= _FLAW_LOG_S:
            self._flaw_logged_at = now
            _log.warning("a value is no directive and is not used", source=source.value, reason=found.value)
        return _FAILED

    def _may_ask_redis(self, now: float) -> bool:
        return self._redis is not None and self._redis.is_up and not self._redis_circuit.is_open(now)

    def _may_ask_service(self, now: float) -> bool:
        return self._service is not None and not self._service_circuit.is_open(now)

    # What the channel of changes tells.

    def hear(self, channel: bytes, message: bytes) -> None:
        if (change := read_change(channel, message)) is not None:
            self._cache.change(change)

    def trust(self, now: float, until: float) -> None:
        self._cache.trust(now, until)

    def distrust(self) -> None:
        self._cache.distrust()

    def found(self) -> None:
        _log.info("changes of directives are heard")

    def lost(self) -> None:
        _log.warning("changes of directives are not heard; until they are, each is asked for again after 2 s")


def _is_none(answer: LookUp) -> bool:
    """Whether it says nothing about the agent, so that what is at hand still counts."""
    return answer.source is Source.FAILED or answer is _NO_KEY


def _note(who: str, circuit: Circuit, *, is_well: bool) -> None:
    now = time.monotonic()
    was_failing = circuit.is_failing
    if is_well:
        circuit.succeeded()
    else:
        circuit.failed(now)
    if circuit.is_failing and not was_failing:
        _log.warning("directives cannot be looked up there; it is asked again now and then", who=who)
    elif was_failing and not circuit.is_failing:
        _log.info("directives can be looked up there again", who=who)


def _counted(found: LookUp) -> LookUp:
    _count[found.source].inc()
    return found
