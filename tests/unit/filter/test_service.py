"""The driver over a real gRPC connection; the exchange's own cases are in test_exchange."""

from __future__ import annotations

import asyncio
import json
import time

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from ibex.context.v1 import context_pb2

from extproc.context.client import EngineAnswer, EngineClient
from extproc.filter import exchange as ex
from extproc.filter import report, wire
from extproc.filter.outcome import Outcome
from tests.unit.filter.envoy_side import (
    AGENT,
    ANSWER,
    ORG,
    Filter,
    StubEngine,
    ask,
    request_body,
    request_headers,
    response_headers,
)

BODY = json.dumps({"model": "gpt-x", "messages": [{"role": "user", "content": "What is my name?"}]}).encode()


def headers_of(reply: ext_proc.ProcessingResponse) -> dict[str, str]:
    mutation = reply.response_headers.response.header_mutation
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in mutation.set_headers)
    assert not any(option.header.value for option in mutation.set_headers), "value reaches the client empty"
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def outcome_of(reply: ext_proc.ProcessingResponse) -> str:
    return str(reply.dynamic_metadata["ibex.context"]["outcome"])


async def test_a_request_gets_its_memory_and_its_headers(context_filter: Filter, engine: StubEngine) -> None:
    call = context_filter.open()
    assert await ask(call, request_headers({"x-ibex-user-id": "u1"})) == ext_proc.ProcessingResponse(
        request_headers=ext_proc.HeadersResponse()
    )
    reply = await ask(call, request_body(BODY))
    common = reply.request_body.response
    content = json.loads(common.body_mutation.body)["messages"][0]["content"]
    assert content.startswith(ANSWER.assembled_context)
    [length] = common.header_mutation.set_headers
    assert (length.header.key, length.header.raw_value) == ("content-length", b"%d" % len(common.body_mutation.body))
    assert outcome_of(reply) == "injected"
    [asked] = engine.requests
    assert (asked.org_id, asked.agent_id, asked.user_id, asked.session_id) == (ORG, AGENT, "u1", "s1")
    assert (asked.query, asked.model, asked.request_id) == ("What is my name?", "gpt-x", "r1")
    assert headers_of(await ask(call, response_headers())) == {
        "x-ibex-memories-injected": "1",
        "x-ibex-context-tokens": "11",
        "x-ibex-context-fallback": "false",
        "x-ibex-session-id": "s1",
    }
    await call.done_writing()


async def test_an_answer_without_a_request_is_counted_and_leaves_no_line(context_filter: Filter) -> None:
    """A refusal of the gate: anybody can have a million of them."""
    count = report._count[Outcome.LOCAL_REPLY]._value
    before = count.get()
    call = context_filter.open()
    reply = await ask(call, response_headers("401"))
    assert await asyncio.wait_for(call.code(), 20) is grpc.StatusCode.OK, "and nothing waits for its end"
    assert reply.WhichOneof("response") == "response_headers"
    assert headers_of(reply) == {}
    assert count.get() == before + 1
    assert context_filter.lines == []


async def test_it_is_told_as_the_exchange_would_have_it() -> None:
    exchange = ex.Exchange(ex.Policy(), lambda: "s1")
    record, effect = exchange.receive(ex.ResponseHeaders("401"))
    assert isinstance(record, ex.Record)
    assert effect == ex.Continue()
    told = report.Report([]).metadata(exchange, record) | {"assemble_ms": 0, "engine_ms": 0}
    reply = ext_proc.ProcessingResponse.FromString(wire.unchanged("response_headers", told))
    assert ext_proc.ProcessingResponse.FromString(wire.LOCAL_REPLY) == reply


async def test_metadata_of_another_namespace_is_no_identity(context_filter: Filter, engine: StubEngine) -> None:
    call = context_filter.open()
    reply = await ask(call, request_headers(org=None))
    assert outcome_of(reply) == "no_identity"
    await ask(call, request_body(BODY))
    assert engine.requests == []
    call.cancel()


async def _rubbish(_raw: bytes) -> bytes:
    return b"\xff\xff\xff rubbish"


async def _too_long(_raw: bytes) -> bytes:
    return context_pb2.AssembleContextResponse(assembled_context="x" * 300_000, tokens_used=1).SerializeToString()


async def _negative(_raw: bytes) -> bytes:
    return context_pb2.AssembleContextResponse(assembled_context="x", tokens_used=-1).SerializeToString()


async def _many_rows(_raw: bytes) -> bytes:
    return b"\x22\x00" * 60_000 + b"\x0a\x05hello\x18\x01"


async def _too_large(_raw: bytes) -> bytes:
    return b"\x22\x00" * 500_000 + b"\x0a\x05hello\x18\x01"


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        (_rubbish, "engine_error"),
        (_too_long, "engine_error"),
        (_negative, "engine_error"),
        (_many_rows, "engine_error"),
        (_too_large, "engine_unavailable"),
    ],
)
async def test_an_engine_that_misbehaves_is_a_fallback(
    context_filter: Filter, engine: StubEngine, behaviour: object, outcome: str
) -> None:
    engine.behaviour = behaviour  # type: ignore[assignment]  # parametrised with functions of the right type
    call = context_filter.open()
    await ask(call, request_headers())
    reply = await ask(call, request_body(BODY))
    assert outcome_of(reply) == outcome
    assert not reply.request_body.response.HasField("body_mutation")
    answered = headers_of(await ask(call, response_headers()))
    assert answered["x-ibex-context-fallback"] == "true"
    assert answered["x-ibex-memories-injected"] == "0"
    call.cancel()


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (grpc.StatusCode.INTERNAL, "engine_error"),
        (grpc.StatusCode.INVALID_ARGUMENT, "engine_error"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "engine_unavailable"),
        (grpc.StatusCode.UNAVAILABLE, "engine_unavailable"),
    ],
)
async def test_an_engines_error_is_a_fallback(
    context_filter: Filter, engine: StubEngine, status: grpc.StatusCode, outcome: str
) -> None:
    engine.status = status
    call = context_filter.open()
    await ask(call, request_headers())
    assert outcome_of(await ask(call, request_body(BODY))) == outcome
    call.cancel()


async def test_the_engine_gets_what_is_left_of_the_budget(hasty_filter: Filter, engine: StubEngine) -> None:
    """A slow engine is given up at the budget, not at its own pace, which is 30 s."""

    async def forever(_raw: bytes) -> bytes:
        await asyncio.sleep(30)
        return b""

    engine.behaviour = forever
    call = hasty_filter.open()
    await ask(call, request_headers())
    started = time.perf_counter()
    reply = await ask(call, request_body(BODY))
    assert outcome_of(reply) == "timeout"
    assert not reply.request_body.response.HasField("body_mutation")
    assert time.perf_counter() - started < 15
    assert reply.dynamic_metadata["ibex.context"]["assemble_ms"] >= 40
    call.cancel()


UNKNOWN_KIND = ext_proc.ProcessingRequest.FromString(bytes([0xFA, 0x01, 0x02, 0x08, 0x01]))  # field 31: not ours yet


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (ext_proc.ProcessingRequest(request_trailers=ext_proc.HttpTrailers()), "request_trailers"),
        (ext_proc.ProcessingRequest(response_body=ext_proc.HttpBody(body=b"x")), "response_body"),
        (ext_proc.ProcessingRequest(response_trailers=ext_proc.HttpTrailers()), "response_trailers"),
        (request_body(BODY), "request_body"),
        (UNKNOWN_KIND, None),
        (ext_proc.ProcessingRequest(), None),
    ],
)
async def test_every_kind_of_message_gets_a_reply_of_its_kind(
    context_filter: Filter, message: ext_proc.ProcessingRequest, kind: str | None
) -> None:
    call = context_filter.open()
    for _ in range(2):
        assert (await ask(call, message)).WhichOneof("response") == kind
    call.cancel()


async def test_a_message_that_cannot_be_decoded_gets_its_reply(context_filter: Filter) -> None:
    """Dynamic metadata made of a header may hold bytes that are no UTF-8."""
    call = context_filter.open()
    good = request_headers(org="x" * 7).SerializeToString()
    broken = good.replace(b"x" * 7, b"\xff" * 7)
    assert broken != good
    raw: grpc.aio.StreamStreamCall[bytes, bytes] = context_filter.channel.stream_stream(
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
    )()
    await raw.write(broken)
    reply = ext_proc.ProcessingResponse.FromString(await asyncio.wait_for(raw.read(), 5))
    assert outcome_of(reply) == "filter_error"
    raw.cancel()
    call.cancel()


async def test_only_ids_and_finite_scores_of_an_engine_reach_a_span(engine: StubEngine, engine_address: str) -> None:
    rows = [("m1", 0.5), ("SECRET memory text", 0.5), ("m2", float("nan")), ("x" * 65, 0.5)]

    async def answer(_raw: bytes) -> bytes:
        used = [context_pb2.MemoryUsed(memory_id=name, composite_score=score) for name, score in rows]
        return context_pb2.AssembleContextResponse(assembled_context="t", memories_used=used).SerializeToString()

    engine.behaviour = answer
    client = EngineClient(engine_address, most_of_org=24)
    found = await client.assemble(context_pb2.AssembleContextRequest(), 5, None)
    await client.close()
    assert isinstance(found, EngineAnswer)
    assert found.memory_ids == ("m1",)
    assert found.memory_scores == (0.5,)


async def test_a_route_can_change_the_placement_or_turn_memory_off(context_filter: Filter) -> None:
    call = context_filter.open(("x-ibex-placement", "system_first"))
    await ask(call, request_headers())
    reply = await ask(call, request_body(BODY))
    assert json.loads(reply.request_body.response.body_mutation.body)["messages"][0]["role"] == "system"
    call.cancel()
    call = context_filter.open(("x-ibex-memory", "off"), ("x-ibex-placement", "nonsense"))
    assert outcome_of(await ask(call, request_headers())) == "disabled"
    call.cancel()


async def test_a_bug_of_ours_costs_nobody_a_request(context_filter: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("extproc.filter.exchange.recognise", broken)
    call = context_filter.open()
    assert outcome_of(await ask(call, request_headers())) == "filter_error"
    assert (await ask(call, request_body(BODY))).WhichOneof("response") == "request_body"
    assert headers_of(await ask(call, response_headers()))["x-ibex-context-fallback"] == "true"
    call.cancel()
