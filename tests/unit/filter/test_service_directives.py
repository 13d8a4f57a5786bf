"""The driver with directives, over a real gRPC connection; where they come from follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from extproc.chat import Directive, InjectionMode
from extproc.context.client import EngineClient
from extproc.directives.client import LookUp, Source
from extproc.directives.directive import ActiveDirective
from extproc.filter.exchange import Policy
from extproc.filter.identity import IdentitySources
from extproc.filter.report import RequestLine
from extproc.filter.service import ContextProcessor
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
ONE = ActiveDirective("version-1", Directive("CANARY: be brief.", InjectionMode.SYSTEM_FIRST), 6)
FOUND = LookUp(ONE, Source.FRESH)


@dataclass
class Script:
    """At hand from the first body on, or after `delay_s`."""

    answer: LookUp = FOUND
    delay_s: float | None = None
    calls: list[tuple[str, str, str]] = field(default_factory=list)

    def prepare(self, org_id: str, agent_id: str) -> None:
        self.calls.append(("prepare", org_id, agent_id))

    def at_hand(self, org_id: str, agent_id: str) -> LookUp | None:
        self.calls.append(("at_hand", org_id, agent_id))
        return self.answer if self.delay_s is None else None

    async def look_up(self, org_id: str, agent_id: str) -> LookUp:
        self.calls.append(("look_up", org_id, agent_id))
        await asyncio.sleep(self.delay_s or 0)
        return self.answer


@dataclass
class Side:
    filter: Filter
    lines: list[RequestLine]

    async def exchange(self) -> tuple[ext_proc.ProcessingResponse, dict[str, str], RequestLine]:
        """The reply to the body, the response's headers, the log line."""
        call = self.filter.open()
        await ask(call, request_headers())
        reply = await ask(call, request_body(BODY))
        answered = await ask(call, response_headers())
        await call.done_writing()
        options = answered.response_headers.response.header_mutation.set_headers
        return reply, {option.header.key: option.header.raw_value.decode() for option in options}, self.lines[-1]


@asynccontextmanager
async def running(engine_address: str, script: Script, budget_ms: float = 1000.0) -> AsyncIterator[Side]:
    client = EngineClient(engine_address, most_of_org=24)
    identities = IdentitySources("metadata:ibex.identity/org_id", f"value:{AGENT}", "")
    server = grpc.aio.server()
    lines: list[RequestLine] = []
    policy = Policy(has_directives=True)
    ContextProcessor(client, policy, identities, budget_ms, lines.append, script).add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Side(Filter(channel), lines)
    await server.stop(0)
    await client.close()


def contents(reply: ext_proc.ProcessingResponse) -> list[str]:
    body = json.loads(reply.request_body.response.body_mutation.body)
    return [message["content"] for message in body["messages"]]


async def test_a_directive_goes_in_and_the_engine_hears_of_it(engine: StubEngine, engine_address: str) -> None:
    script = Script()
    async with running(engine_address, script) as side:
        reply, headers, line = await side.exchange()
    first, last = contents(reply)
    assert first == "CANARY: be brief."
    assert last.startswith(ANSWER.assembled_context)
    assert headers["x-ibex-context-tokens"] == "17"
    assert script.calls == [("prepare", ORG, AGENT), ("at_hand", ORG, AGENT)], "at hand, nobody waits"
    [asked] = engine.requests
    assert asked.directive_version_id == "version-1"
    metadata = reply.dynamic_metadata["ibex.context"]
    assert metadata["directive_version_id"] == "version-1"
    assert 0 <= metadata["directive_ms"] < 1000
    assert (line.directive, line.directive_version_id, line.tokens) == ("fresh", "version-1", 17)
    assert "CANARY" not in str(metadata) + str(line)


async def test_one_that_is_not_at_hand_is_waited_for(engine_address: str) -> None:
    script = Script(LookUp(ONE, Source.SERVICE), delay_s=0.02)
    async with running(engine_address, script) as side:
        reply, _, line = await side.exchange()
    assert contents(reply)[0] == "CANARY: be brief."
    assert line.directive == "service"
    assert line.directive_ms >= 20
    assert line.parse_ms < line.directive_ms
    assert line.assemble_ms >= line.directive_ms


async def test_the_wait_is_taken_from_the_engines_time(engine: StubEngine, engine_address: str) -> None:
    async with running(engine_address, Script(delay_s=0.05), budget_ms=40.0) as side:
        reply, headers, line = await side.exchange()
    assert engine.requests == []
    assert contents(reply) == ["CANARY: be brief.", "What is my name?"]
    assert headers["x-ibex-context-fallback"] == "true"
    assert line.outcome == "timeout"


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_an_engine_that_fails_leaves_the_directive(
    engine: StubEngine, engine_address: str, status: grpc.StatusCode
) -> None:
    engine.status = status
    async with running(engine_address, Script()) as side:
        reply, headers, line = await side.exchange()
    assert contents(reply) == ["CANARY: be brief.", "What is my name?"]
    assert (headers["x-ibex-memories-injected"], headers["x-ibex-context-tokens"]) == ("0", "6")
    assert headers["x-ibex-context-fallback"] == "true"
    assert line.directive_version_id == "version-1"


async def test_a_look_up_that_fails_costs_the_directive_and_nothing_else(
    engine: StubEngine, engine_address: str
) -> None:
    async with running(engine_address, Script(LookUp(None, Source.FAILED))) as side:
        reply, headers, line = await side.exchange()
    assert contents(reply)[0].startswith(ANSWER.assembled_context)
    assert headers["x-ibex-context-fallback"] == "false"
    assert (line.outcome, line.directive, line.directive_version_id) == ("injected", "failed", "")
    assert engine.requests[0].directive_version_id == ""


async def test_a_bug_in_a_look_up_costs_nobody_a_request(engine_address: str) -> None:
    script = Script()
    script.answer = None  # type: ignore[assignment]  # what cannot be
    async with running(engine_address, script) as side:
        reply, headers, line = await side.exchange()
    assert not reply.request_body.response.HasField("body_mutation")
    assert headers["x-ibex-context-fallback"] == "true"
    assert line.outcome == "filter_error"
