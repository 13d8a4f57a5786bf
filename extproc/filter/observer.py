"""The gRPC side of the observer: reads what Envoy shows it, as fast as it comes, and replies nothing.

Envoy waits for no answer of an observer, but its flow control makes a stream wait once an observer stops reading. So
the one rule here is to read: what cannot be kept is dropped and counted, and a process that is behind takes no new
streams, which then pass unobserved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

import grpc
import grpc.aio
import structlog
import uuid_utils
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge

from extproc import names
from extproc.filter import wire
from extproc.filter.exchange import readable_request_id
from extproc.filter.identity import Identity, IdentitySources
from extproc.filter.observation import (
    REQUEST_HEADERS,
    RESPONSE_HEADERS,
    Observation,
    ObservationLimits,
    Observed,
    Room,
)
from extproc.filter.service import SERVICE_NAME
from extproc.turns.turn import End

__all__ = ["LagMeter", "StreamObserver"]

Keep = Callable[[Observed], None]
"""Takes a finished turn, at once: never waits, never raises."""

_ROOM_BYTES = 256 * 1024 * 1024
"""Of request bodies that are not whole yet, in all streams together: 25 of the largest, thousands of usual ones."""
_SLICE_S = 0.005
"""How long one stream may hold the loop while it works off a large message."""
_QUIET_S = 0.1
"""Without a new stream: then none waits to be taken, however busy the loop is with those that it has."""
_TICK_S = 0.25
_LAG_LIMIT_S = 1.0
"""A loop that ticks this much too late reads later than streams may wait for it; the watchdog ends it soon after."""

_log = structlog.get_logger("extproc.observer")

_STREAMS = Counter("ibex_observer_streams", "Exchanges that were observed, by how they ended", ["end"])
_UNRECORDED = Counter(
    "ibex_observer_unrecorded",
    "Streams that left no turn: no chat, no identity, refused because the process is behind, undecodable, a bug",
    ["reason"],
)
_CUT = Counter("ibex_observer_cut_texts", "Turns whose text is longer than what is kept")
_OPEN = Gauge("ibex_observer_open_streams", "Streams that are observed now")
_LAG = Gauge("ibex_observer_lag_seconds", "How late the event loop is")

_by_end = {end: _STREAMS.labels(end=end.value) for end in End}
_unrecorded = {
    reason: _UNRECORDED.labels(reason=reason) for reason in ("not_chat", "no_identity", "behind", "undecodable", "bug")
}


class LagMeter:
    """Whether the event loop keeps up. `start` it in that loop."""

    def __init__(self, limit_s: float = _LAG_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._due = 0.0
        self._lag_s = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="lag")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            self._due = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._lag_s = max(0.0, time.monotonic() - self._due)
            _LAG.set(self._lag_s)

    def is_behind(self) -> bool:
        """True from the first late tick to the first one in time; also while a tick is overdue."""
        overdue_s = time.monotonic() - self._due if self._due else 0.0
        return max(self._lag_s, overdue_s) > self._limit_s


class StreamObserver:
    """Role *observer*: one instance for every stream of the process. It keeps nothing between streams."""

    def __init__(
        self,
        identities: IdentitySources,
        limits: ObservationLimits,
        keep: Keep,
        lag: LagMeter,
    ) -> None:
        self._identities = identities
        self._limits = limits
        self._keep = keep
        self._lag = lag
        self._room = Room(_ROOM_BYTES)
        self._is_stopping = False
        self._taken = 0
        """Streams so far."""
        self._wanted_headers = REQUEST_HEADERS | identities.header_names

    def add_to_server(self, server: grpc.aio.Server) -> None:
        process: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self.process)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process}),))

    async def take_waiting(self, limit_s: float) -> None:
        """Call it before the server is stopped, which sends away every stream that the loop had no time to take yet.

        Ends when none has come for a moment, or after `limit_s`.
        """
        deadline, taken = time.monotonic() + limit_s, -1
        while taken != self._taken and time.monotonic() < deadline:
            taken = self._taken
            await asyncio.sleep(_QUIET_S)

    def stop(self) -> None:
        """From now on a stream that breaks off does so because we end, which says nothing about its exchange."""
        self._is_stopping = True

    async def process(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One stream: one HTTP request and its answer. Returns as soon as there is nothing more to learn."""
        self._taken += 1
        if self._lag.is_behind():
            _unrecorded["behind"].inc()
            return
        initial = dict(context.invocation_metadata() or ())
        stream = _Stream(
            Observation(self._limits, self._room, _mint_id),
            self._identities,
            self._wanted_headers,
            str(initial.get("traceparent", "")),
        )
        _OPEN.inc()
        try:
            read, receive = context.read, stream.receive
            while (message := await read()) is not grpc.aio.EOF:  # type: ignore[comparison-overlap]  # stub's gap
                receive(message)
                if stream.observation.has_work:
                    await _work_off(stream.observation)
                if stream.observation.is_over:
                    break
        except DecodeError:
            stream.observation.lose_sight()
            _unrecorded["undecodable"].inc()
            _log.warning("a message of Envoy's cannot be decoded; what is known of its stream is recorded")
        except Exception:  # noqa: BLE001 - a bug of ours must cost one turn at most, and no stream
            stream.observation.lose_sight()
            _unrecorded["bug"].inc()
            _log.exception("a bug; what is known of this stream is recorded", request_id=stream.request_id)
        finally:
            # Also when the RPC was cancelled, as it is when a client leaves: the turn belongs to the exchange, not to
            # the stream that showed it.
            _OPEN.dec()
            if self._is_stopping:
                stream.observation.lose_sight()
            self._finish(stream)

    def _finish(self, stream: _Stream) -> None:
        try:
            observed = stream.finish()
            if observed is None:
                _unrecorded["no_identity" if stream.observation.is_chat else "not_chat"].inc()
                return
            _by_end[observed.turn.end].inc()
            if observed.turn.text_was_cut:
                _CUT.inc()
            self._keep(observed)
        except Exception:  # noqa: BLE001 - as above
            _unrecorded["bug"].inc()
            _log.exception("a bug; a turn is lost", request_id=stream.request_id)
        finally:
            stream.observation.forget()


class _Stream:
    """One observation and the messages that it is made from."""

    __slots__ = (
        "_identities",
        "_metadata_of",
        "_request_headers",
        "_started",
        "_started_at",
        "_traceparent",
        "_wanted_headers",
        "observation",
    )

    def __init__(
        self,
        observation: Observation,
        identities: IdentitySources,
        wanted_headers: frozenset[str],
        traceparent: str,
    ) -> None:
        self.observation = observation
        self._identities = identities
        self._wanted_headers = wanted_headers
        self._traceparent = traceparent
        self._started = time.perf_counter()
        self._started_at = datetime.now(UTC)
        self._request_headers: dict[str, str] = {}
        self._metadata_of: ext_proc.ProcessingRequest | None = None

    @property
    def request_id(self) -> str:
        return readable_request_id(self._request_headers)

    def receive(self, raw: bytes) -> None:
        """Raises DecodeError for what is no message."""
        observation = self.observation
        # By far the most are chunks of an answer, so these come first, and are not decoded.
        chunk = wire.answer_chunk(raw)
        if chunk is not None:
            observation.see_response_body(chunk, self._elapsed_ms(), end_of_stream=False)
            return
        message = ext_proc.ProcessingRequest.FromString(raw)
        if message.HasField("response_body"):
            body = message.response_body
            observation.see_response_body(body.body, self._elapsed_ms(), end_of_stream=body.end_of_stream)
        else:
            self._receive_other(message)

    def _receive_other(self, message: ext_proc.ProcessingRequest) -> None:
        match message.WhichOneof("request"):
            case "request_headers":
                self._request_headers = wire.read_headers(message.request_headers, self._wanted_headers)
                self.observation.see_request_headers(self._request_headers)
            case "request_body":
                body = message.request_body
                self.observation.see_request_body(body.body, end_of_stream=body.end_of_stream)
            case "response_headers":
                attributes = wire.attributes(message)
                self.observation.see_response_headers(
                    wire.read_headers(message.response_headers, RESPONSE_HEADERS),
                    wire.context_metadata(message),
                    attributes.get("xds.cluster_name", ""),
                    attributes.get("response.code_details", ""),
                    self._elapsed_ms(),
                    end_of_stream=message.response_headers.end_of_stream,
                    gate=_gate_metadata(message),
                )
        # The last one with metadata knows best whose request it is: filters behind this one add to it.
        if message.HasField("metadata_context"):
            self._metadata_of = message

    def finish(self) -> Observed | None:
        return self.observation.finish(self._identity(), self._traceparent, self._started_at, self._elapsed_ms())

    def _identity(self) -> Identity | None:
        message = self._metadata_of or ext_proc.ProcessingRequest()
        return self._identities.identify(
            self._request_headers.get, lambda namespace, path: wire.metadata_text(message, namespace, path)
        )

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started) * 1e3


def _gate_metadata(message: ext_proc.ProcessingRequest) -> dict[str, float]:
    """How long the gate took; empty where there is none."""
    filters = message.metadata_context.filter_metadata
    if names.GATE_METADATA not in filters:  # a look-up would add it
        return {}
    fields = filters[names.GATE_METADATA].fields
    return {"auth_ms": fields["auth_ms"].number_value} if "auth_ms" in fields else {}


async def _work_off(observation: Observation) -> None:
    """Other streams have their turn in between."""
    until = time.perf_counter() + _SLICE_S
    while observation.work():
        if time.perf_counter() > until:
            await asyncio.sleep(0)
            until = time.perf_counter() + _SLICE_S


def _mint_id() -> str:
    return str(uuid_utils.uuid7())
