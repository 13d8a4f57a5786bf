"""The observer over a real gRPC connection; what a turn says is in test_observation."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
import structlog
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2
from prometheus_client import REGISTRY
from typing_extensions import override

from extproc.filter.identity import IdentitySources
from extproc.filter.observation import Observation, ObservationLimits, Observed
from extproc.filter.observer import LagMeter, StreamObserver
from extproc.turns.turn import End, TurnText
from tests.unit.filter.envoy_side import AGENT, ORG, Filter, ProcessCall, request_headers

WAIT_S = 45
QUESTION = {"model": "asked", "messages": [{"role": "user", "content": "What is new?"}]}
BODY = json.dumps(QUESTION).encode()
STREAM = (
    b'data: {"id":"c1","model":"answered","choices":[{"index":0,"delta":{"content":"Nothing."}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
)
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CANARY = "CANARY"
Message: TypeAlias = ext_proc.ProcessingRequest


class Kept(list[Observed]):
    """Takes turns, and waits for them."""

    refuses = False

    def take(self, observed: Observed) -> None:
        if self.refuses:
            raise RuntimeError("a bug")
        self.append(observed)

    async def wait(self, count: int = 1) -> list[Observed]:
        await eventually(lambda: len(self) >= count)
        return self


async def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s"
        await asyncio.sleep(0.01)


class Behind(LagMeter):
    """Says what a test wants."""

    answer = False

    @override
    def is_behind(self) -> bool:
        return self.answer


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def lag() -> Behind:
    return Behind()


@pytest.fixture
def processor(kept: Kept, lag: Behind) -> StreamObserver:
    identities = IdentitySources("metadata:ibex.identity/org_id", f"value:{AGENT}", "header:x-ibex-user-id")
    return StreamObserver(identities, ObservationLimits(), kept.take, lag)


@pytest.fixture
async def observer(processor: StreamObserver) -> AsyncIterator[Filter]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 16 * 1024 * 1024)])
    processor.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Filter(channel)
    await server.stop(0)
    assert sample("ibex_observer_open_streams") == 0
    assert processor._room.used == 0


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged, tracebacks included."""
    logged: list[dict[str, Any]] = []

    def keep_line(_logger: object, method: str, event: Any) -> Any:
        logged.append({"level": method, **event})
        raise structlog.DropEvent

    frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    structlog.configure(processors=[structlog.processors.ExceptionRenderer(frames), keep_line])
    yield logged
    structlog.reset_defaults()


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def unrecorded(reason: str) -> float:
    return sample("ibex_observer_unrecorded_total", reason=reason)


def request_chunk(body: bytes = BODY, *, ends: bool = True) -> Message:
    return Message(request_body=ext_proc.HttpBody(body=body, end_of_stream=ends))


def response_headers(context: dict[str, Any] | None = None, **headers: str) -> Message:
    pairs = {":status": "200", "content-type": "text/event-stream"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    entries = [base_pb2.HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs.items()]
    message = Message(response_headers=ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=entries)))
    attributes = {"xds.cluster_name": "provider_openai", "response.code_details": "via_upstream"}
    message.attributes["envoy.filters.http.ext_proc"].update(attributes)
    identity = struct_pb2.Struct()
    identity.update({"org_id": ORG})
    message.metadata_context.filter_metadata["ibex.identity"].CopyFrom(identity)
    if context is not None:
        found = struct_pb2.Struct()
        found.update(context)
        message.metadata_context.filter_metadata["ibex.context"].CopyFrom(found)
    return message


def response_chunk(body: bytes = b"", *, ends: bool = False) -> Message:
    return Message(response_body=ext_proc.HttpBody(body=body, end_of_stream=ends))


BEGINNING = (request_headers(), request_chunk(), response_headers())
EXCHANGE = (*BEGINNING, *map(response_chunk, STREAM), response_chunk(ends=True))


async def show(observer: Filter, *messages: Message, metadata: tuple[tuple[str, str], ...] = ()) -> ProcessCall:
    """A stream with these messages, which stays open. None may follow the one at which the observer returns: the
    client's library would take that for an error.
    """
    call = observer.open(*metadata)
    for message in messages:
        await call.write(message)
    return call


async def ended(call: ProcessCall) -> grpc.StatusCode:
    """How the observer ended the RPC; it replies nothing."""
    assert await asyncio.wait_for(call.read(), WAIT_S) is grpc.aio.EOF
    return await call.code()


async def test_how_long_the_gate_took_comes_as_metadata(observer: Filter, kept: Kept) -> None:
    message = response_headers({"org_id": ORG, "agent_id": AGENT})
    gate = struct_pb2.Struct()
    gate.update({"auth_ms": 1.25, "decision": "allowed"})
    message.metadata_context.filter_metadata["envoy.filters.http.ext_authz"].CopyFrom(gate)
    call = await show(observer, *BEGINNING[:2], message, response_chunk(ends=True))
    await ended(call)
    [observed] = await kept.wait()
    assert observed.turn.auth_ms == 1.25


async def test_an_exchange_is_one_turn_and_gets_no_reply(observer: Filter, kept: Kept) -> None:
    call = await show(observer, *EXCHANGE, metadata=(("traceparent", TRACEPARENT),))
    assert await ended(call) is grpc.StatusCode.OK
    [observed] = await kept.wait()
    turn = observed.turn
    assert (turn.end, turn.status_code, turn.org_id, turn.agent_id) == (End.COMPLETE, 200, ORG, AGENT)
    assert (turn.request_id, turn.external_id, turn.provider) == ("r1", "s1", "openai")
    assert (turn.traceparent, turn.chunks) == (TRACEPARENT, 3)
    assert turn.ttfb_ms is not None
    assert 0 < turn.ttfb_ms <= turn.total_ms
    assert turn.requested_at.tzinfo is not None
    assert observed.text == TurnText("What is new?", "Nothing.")


async def test_context_metadata_wins_over_the_trusted_sources(observer: Filter, kept: Kept) -> None:
    context = {"org_id": AGENT, "agent_id": ORG, "user_id": "ada", "memories": 3, "outcome": "injected"}
    await show(observer, *BEGINNING[:2], response_headers(context), response_chunk(STREAM[0], ends=True))
    [observed] = await kept.wait()
    turn = observed.turn
    assert (turn.org_id, turn.agent_id, turn.user_id) == (AGENT, ORG, "ada")
    assert (turn.memories_injected, turn.outcome) == (3, "injected")


async def test_an_identity_that_a_filter_behind_adds_counts(observer: Filter, kept: Kept) -> None:
    first = request_headers(org=None)
    first.metadata_context.filter_metadata["other"].update({"org_id": AGENT})
    await show(observer, first, *EXCHANGE[1:])
    [observed] = await kept.wait()
    assert observed.turn.org_id == ORG


async def test_an_exchange_gives_its_room_back(observer: Filter, kept: Kept, processor: StreamObserver) -> None:
    head = response_headers(content_type="application/json")
    call = await show(observer, request_headers(), request_chunk(ends=False), head, response_chunk(b"{}"))
    await eventually(lambda: processor._room.used == len(BODY) + 2)
    await call.done_writing()
    await kept.wait()
    await eventually(lambda: processor._room.used == 0)


async def test_what_is_no_chat_is_left_at_once(observer: Filter, kept: Kept) -> None:
    before = unrecorded("not_chat")
    call = await show(observer, request_headers({":path": "/v1/models"}))
    assert await ended(call) is grpc.StatusCode.OK
    assert unrecorded("not_chat") == before + 1
    assert kept == []


async def test_nobodys_exchange_is_counted(observer: Filter, kept: Kept) -> None:
    before = unrecorded("no_identity")
    call = await show(observer, request_headers(org=None), request_chunk())
    await call.done_writing()
    assert await ended(call) is grpc.StatusCode.OK
    assert unrecorded("no_identity") == before + 1
    assert kept == []


async def test_a_stream_without_a_message_is_no_chat(observer: Filter, kept: Kept) -> None:
    call = observer.open()
    await call.done_writing()
    assert await ended(call) is grpc.StatusCode.OK
    assert kept == []


async def test_kinds_of_messages_that_nobody_knows_are_passed_over(observer: Filter, kept: Kept) -> None:
    others = (
        Message(),
        Message.FromString(bytes([0xFA, 0x01, 0x02, 0x08, 0x01])),
        Message(request_trailers=ext_proc.HttpTrailers()),
        Message(response_trailers=ext_proc.HttpTrailers()),
    )
    await show(observer, *others, *EXCHANGE[:4], *others, *EXCHANGE[4:])
    [observed] = await kept.wait()
    assert observed.turn.end is End.COMPLETE


@pytest.mark.parametrize("shown", range(1, 6))
async def test_an_rpc_that_is_cancelled_leaves_one_turn(observer: Filter, kept: Kept, shown: int) -> None:
    call = await show(observer, *EXCHANGE[:shown])
    await eventually(lambda: sample("ibex_observer_open_streams") == 1)
    await asyncio.sleep(0.05)  # so that what was sent has been read
    call.cancel()
    [observed] = await kept.wait()
    # As Envoy does when the client leaves. With its finish reason the answer is whole, whoever closes what.
    assert observed.turn.end is (End.CLIENT_GONE if shown < 5 else End.COMPLETE)
    await asyncio.sleep(0.05)
    assert len(kept) == 1


async def test_an_end_without_the_answers_end_is_a_client_that_left(observer: Filter, kept: Kept) -> None:
    call = await show(observer, *EXCHANGE[:4])
    await call.done_writing()
    assert await ended(call) is grpc.StatusCode.OK
    [observed] = await kept.wait()
    assert observed.turn.end is End.CLIENT_GONE


async def test_a_message_that_cannot_be_decoded_costs_the_rest_of_its_turn(
    observer: Filter, kept: Kept, lines: list[dict[str, Any]]
) -> None:
    before = unrecorded("undecodable")
    raw: grpc.aio.StreamStreamCall[bytes, bytes] = observer.channel.stream_stream(
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
    )()
    for message in EXCHANGE[:4]:
        await raw.write(message.SerializeToString())
    await raw.write(b"\xff\xff\xff rubbish")
    assert await asyncio.wait_for(raw.read(), WAIT_S) is grpc.aio.EOF
    assert await raw.code() is grpc.StatusCode.OK
    [observed] = await kept.wait()
    assert (observed.turn.end, observed.turn.text_was_cut) == (End.INCOMPLETE, True)
    assert unrecorded("undecodable") == before + 1
    assert [line["level"] for line in lines] == ["warning"]


BUGS = [
    ("see_request_headers", 1),
    ("see_request_body", 2),
    ("see_response_headers", 3),
    ("see_response_body", 4),
    ("finish", len(EXCHANGE)),
]
"""A method of Observation, and how many messages are shown until it has been called."""


@pytest.mark.parametrize(("method", "shown"), BUGS)
async def test_a_bug_costs_one_turn_at_most(
    observer: Filter, kept: Kept, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]], method: str, shown: int
) -> None:
    def broken(*_args: object, **_named: object) -> None:
        raise RuntimeError("a bug")

    before = unrecorded("bug")
    with monkeypatch.context() as patch:
        patch.setattr(Observation, method, broken)
        call = await show(observer, *EXCHANGE[:shown])
        assert await ended(call) is grpc.StatusCode.OK
    assert unrecorded("bug") == before + 1
    assert [line["level"] for line in lines] == ["error"]
    lost = method in {"finish", "see_request_headers"}
    assert [one.turn.end for one in kept] == ([] if lost else [End.INCOMPLETE])
    await show(observer, *EXCHANGE)
    await eventually(lambda: bool(kept) and kept[-1].turn.end is End.COMPLETE)


async def test_a_bug_in_work_that_was_left_costs_one_turn_at_most(
    observer: Filter, kept: Kept, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    def broken(_chunk: bytes) -> Iterator[bytes]:
        raise RuntimeError("a bug")

    monkeypatch.setattr("extproc.filter.observation._steps", broken)
    call = await show(observer, *BEGINNING, response_chunk(STREAM[0] * 1000))
    assert await ended(call) is grpc.StatusCode.OK
    assert [one.turn.end for one in kept] == [End.INCOMPLETE]
    assert [line["level"] for line in lines] == ["error"]


async def test_a_keeper_that_raises_is_counted(
    observer: Filter, kept: Kept, lines: list[dict[str, Any]], processor: StreamObserver
) -> None:
    before = unrecorded("bug")
    kept.refuses = True
    assert await ended(await show(observer, *EXCHANGE)) is grpc.StatusCode.OK
    assert unrecorded("bug") == before + 1
    assert [line["event"] for line in lines] == ["a bug; a turn is lost"]
    assert processor._room.used == 0


async def test_a_process_that_is_behind_takes_no_streams(observer: Filter, kept: Kept, lag: Behind) -> None:
    before = unrecorded("behind")
    lag.answer = True
    assert await ended(await show(observer)) is grpc.StatusCode.OK
    assert unrecorded("behind") == before + 1
    lag.answer = False
    await show(observer, *EXCHANGE)
    assert len(await kept.wait()) == 1


async def test_many_streams_at_once_are_one_turn_each(observer: Filter, kept: Kept) -> None:
    async def one(number: int) -> None:
        call = await show(observer, request_headers({"x-request-id": f"r{number}"}), *EXCHANGE[1:])
        assert await ended(call) is grpc.StatusCode.OK

    await asyncio.gather(*map(one, range(200)))
    assert sorted(observed.turn.request_id for observed in kept) == sorted(f"r{number}" for number in range(200))
    assert {observed.turn.end for observed in kept} == {End.COMPLETE}


async def test_while_a_large_message_is_worked_off_other_streams_go_on(observer: Filter, kept: Kept) -> None:
    """Some kilobytes that stand for 7 MB of the shortest events: more than a second's work."""
    packed = gzip.compress(b"data:\n\n" * 1_000_000 + b"".join(STREAM), 1)
    headers = response_headers(content_encoding="gzip")
    slow = await show(
        observer,
        request_headers({"x-request-id": "slow"}),
        request_chunk(),
        headers,
        response_chunk(packed),
        response_chunk(ends=True),
    )
    await asyncio.sleep(0.05)
    for number in range(5):
        await show(observer, request_headers({"x-request-id": str(number)}), *EXCHANGE[1:])
    await kept.wait(6)
    assert [observed.turn.request_id for observed in kept][-1] == "slow"
    assert kept[-1].text == TurnText("What is new?", "Nothing.")
    assert await ended(slow) is grpc.StatusCode.OK


async def test_a_cancelled_stream_does_not_work_off_what_is_left(observer: Filter, kept: Kept) -> None:
    packed = gzip.compress(b"data:\n\n" * 2_000_000, 1)
    call = await show(observer, *BEGINNING[:2], response_headers(content_encoding="gzip"), response_chunk(packed))
    await asyncio.sleep(0.1)
    call.cancel()
    [observed] = await kept.wait()
    assert (observed.turn.end, observed.turn.text_was_cut) == (End.CLIENT_GONE, True)


async def test_when_we_are_stopped_nobody_says_that_the_client_left(
    observer: Filter, processor: StreamObserver, kept: Kept
) -> None:
    call = await show(observer, *EXCHANGE[:4])
    await asyncio.sleep(0.05)
    processor.stop()
    call.cancel()
    [observed] = await kept.wait()
    assert (observed.turn.end, observed.turn.text_was_cut) == (End.INCOMPLETE, True)


async def test_no_log_line_holds_content(
    observer: Filter, kept: Kept, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    """Each way to a log line is taken, with the same word in whatever a client, a provider or a filter may write."""
    secret = f"my {CANARY} secret"
    headers = request_headers(
        {
            "x-request-id": secret,
            "x-ibex-session-id": CANARY,
            "x-ibex-user-id": CANARY,
            "traceparent": secret,
            "content-encoding": "gzip",
            "authorization": secret,
            ":path": f"/v1/chat/completions?key={CANARY}",
        }
    )
    body = gzip.compress(json.dumps({"model": secret, "messages": [{"role": "user", "content": secret}]}).encode())
    context = {"org_id": ORG, "agent_id": AGENT, "outcome": secret, "session_id": secret, secret: secret}
    answer = json.dumps({"id": secret, "model": secret, "error": {"code": secret, "message": secret}}).encode()
    told = response_headers(context, **{"x-ibex-session-id": secret, "content-type": "text/event-stream"})
    exchange = (headers, request_chunk(body), told, response_chunk(b"data: " + answer + b"\n\n"))
    last = response_chunk(ends=True)

    def broken(*_args: object, **_named: object) -> None:
        raise RuntimeError("a bug")

    await show(observer, *exchange, last)
    await kept.wait()
    for method, shown in BUGS:
        with monkeypatch.context() as patch:
            patch.setattr(Observation, method, broken)
            await ended(await show(observer, *(*exchange, last)[:shown]))
    kept.refuses = True
    await ended(await show(observer, *exchange, last))
    raw: grpc.aio.StreamStreamCall[bytes, bytes] = observer.channel.stream_stream(
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
    )()
    for message in exchange:
        await raw.write(message.SerializeToString())
    await raw.write(b"\xff" + secret.encode())
    assert await asyncio.wait_for(raw.read(), WAIT_S) is grpc.aio.EOF
    assert len(lines) == len(BUGS) + 3
    assert CANARY not in json.dumps(lines)


async def test_streams_that_the_loop_had_no_time_for_are_taken_before_the_server_stops(
    processor: StreamObserver, kept: Kept
) -> None:
    server = grpc.aio.server()
    processor.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        show_all: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
        )
        exchanges = [[request_headers({"x-request-id": str(number)}), *EXCHANGE[1:]] for number in range(100)]
        calls = [show_all(iter([message.SerializeToString() for message in one])) for one in exchanges]
        time.sleep(1.0)  # noqa: ASYNC251 - in which they arrive and nobody takes them
        await processor.take_waiting(20)
        processor.stop()
        await server.stop(20)
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    assert {observed.turn.request_id for observed in kept} == {str(number) for number in range(100)}
    assert {observed.turn.end for observed in kept} == {End.COMPLETE}


async def test_taking_what_waits_ends_in_time_though_new_streams_go_on_coming(
    observer: Filter, processor: StreamObserver
) -> None:
    async def go_on() -> None:
        while True:
            await show(observer, *EXCHANGE)

    coming = asyncio.create_task(go_on())
    await processor.take_waiting(0.5)
    coming.cancel()


# Lag


async def test_a_loop_that_keeps_up_is_not_behind() -> None:
    lag = LagMeter(limit_s=30)
    assert not lag.is_behind()
    lag.start()
    await asyncio.sleep(0.3)
    assert not lag.is_behind()
    await lag.stop()


async def test_a_loop_that_stands_still_is_behind_until_a_tick_is_in_time() -> None:
    lag = LagMeter(limit_s=0.2)
    lag.start()
    await asyncio.sleep(0.01)
    time.sleep(0.6)  # noqa: ASYNC251 - that is the case
    assert lag.is_behind(), "before the late tick could run: it is overdue"
    for _ in range(3):
        await asyncio.sleep(0)
    assert lag.is_behind(), "after it: it was late"
    await eventually(lambda: not lag.is_behind())
    await lag.stop()


async def test_lag_is_not_measured_before_the_start() -> None:
    assert not LagMeter(limit_s=0.0).is_behind()
