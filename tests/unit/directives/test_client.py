"""Look-ups against a Redis and a service that follow a script; the real ones are in the integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from ibex.directive.v1 import directive_pb2 as pb

from extproc.chat import Directive, InjectionMode
from extproc.directives.cache import DirectiveCache
from extproc.directives.client import Directives, LookUp, ServiceClient, Source
from extproc.directives.directive import ActiveDirective, Flaw, change_message, channel_of, encode, key_of
from extproc.memory.tokens import estimate_tokens
from extproc.redis.link import LinkProblem, Refusal, encode_command

ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
OTHER_ORG = "99999999-9999-4999-8999-999999999999"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
VALUE = encode("v1", "Be brief.", "system_first")
ONE = ActiveDirective("v1", Directive("Be brief.", InjectionMode.SYSTEM_FIRST), estimate_tokens("Be brief."))
TWO = ActiveDirective("v2", Directive("Be long.", InjectionMode.SYSTEM_FIRST), estimate_tokens("Be long."))
MISS, FAILED = LookUp(None, Source.MISS), LookUp(None, Source.FAILED)


@dataclass
class Redis:
    """Answers `reply`; a future is awaited."""

    reply: Any = None
    is_up: bool = True
    asked: list[bytes] = field(default_factory=list)

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        self.asked.append(command)
        if isinstance(self.reply, asyncio.Future):
            return self.reply
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self.reply)
        return answer


@dataclass
class Service:
    answer: ActiveDirective | Flaw | LookUp | None = None
    """None: never, unless released."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    on_ask: Callable[[], None] = lambda: None

    async def active_directive(self, org_id: str, agent_id: str) -> ActiveDirective | Flaw | LookUp:
        self.asked.append((org_id, agent_id))
        self.on_ask()
        if self.answer is None:
            await self.released.wait()
        assert self.answer is not None
        return self.answer


def directives(
    redis: Redis | None, service: Service | None, wait_s: float = 10.0, stale_s: float = 600.0
) -> Directives:
    cache = DirectiveCache(100, 10**6, stale_s)
    made = Directives(cache, redis, service, wait_s)  # type: ignore[arg-type]  # scripts with what is used of the real
    made.trust(0.0, float("inf"))
    return made


async def find(of: Directives, org: str = ORG) -> LookUp:
    return of.at_hand(org, AGENT) or await of.look_up(org, AGENT)


def age(of: Directives) -> None:
    """Everything that is kept becomes stale."""
    of.hear(channel_of(ORG).encode(), b"?")


async def test_redis_is_asked_for_the_organisations_key_once() -> None:
    redis, service = Redis(VALUE), Service()
    made = directives(redis, service)
    assert made.at_hand(ORG, AGENT) is None
    assert await made.look_up(ORG, AGENT) == LookUp(ONE, Source.REDIS)
    assert made.at_hand(ORG, AGENT) == LookUp(ONE, Source.FRESH)
    assert redis.asked == [encode_command("GET", key_of(ORG, AGENT))]
    assert service.asked == []


async def test_the_service_is_asked_where_redis_has_no_key() -> None:
    redis, service = Redis(None), Service(TWO)
    made = directives(redis, service)
    assert await find(made) == LookUp(TWO, Source.SERVICE)
    assert await find(made) == LookUp(TWO, Source.FRESH)
    assert service.asked == [(ORG, AGENT)]


@pytest.mark.parametrize("reply", [LinkProblem.DOWN, LinkProblem.TIMEOUT, Refusal("WRONGTYPE"), b"rubbish", [b"x"], 7])
async def test_the_service_is_asked_where_redis_fails(reply: Any) -> None:
    assert await find(directives(Redis(reply), Service(TWO))) == LookUp(TWO, Source.SERVICE)


async def test_an_agent_without_a_directive_is_asked_for_once() -> None:
    service = Service(MISS)
    made = directives(None, service)
    assert [await find(made) for _ in range(3)] == [MISS] * 3
    assert len(service.asked) == 1


async def test_a_key_that_expired_is_no_proof_where_there_is_no_service() -> None:
    redis = Redis(VALUE)
    made = directives(redis, None)
    assert (await find(made)).source is Source.REDIS
    age(made)
    redis.reply = None
    assert await find(made) == LookUp(ONE, Source.STALE)
    assert await find(directives(Redis(None), None)) == MISS


async def test_what_is_known_to_have_changed_is_not_served_again() -> None:
    redis = Redis(VALUE)
    made = directives(redis, None)
    await find(made)
    redis.reply, redis.is_up = None, False
    made.hear(channel_of(ORG).encode(), change_message(ORG, AGENT, None))
    assert await find(made) == FAILED


async def test_requests_at_the_same_time_share_one_look_up() -> None:
    service = Service()
    made = directives(None, service)
    waiting = [asyncio.create_task(made.look_up(ORG, AGENT)) for _ in range(20)]
    await asyncio.sleep(0.01)
    service.answer = ONE
    service.released.set()
    assert await asyncio.gather(*waiting) == [LookUp(ONE, Source.SERVICE)] * 20
    assert len(service.asked) == 1


async def test_a_request_waits_no_longer_than_its_share_and_the_next_finds_it() -> None:
    service = Service()
    made = directives(None, service, wait_s=0.01)
    assert await asyncio.wait_for(find(made), 5) == FAILED
    assert made.at_hand(ORG, AGENT) == FAILED, "while it goes on, nobody waits again"
    service.answer = ONE
    service.released.set()
    found: LookUp | None = None
    for _ in range(100):
        if (found := made.at_hand(ORG, AGENT)) == LookUp(ONE, Source.FRESH):
            break
        await asyncio.sleep(0.01)
    assert found == LookUp(ONE, Source.FRESH)


async def test_a_request_that_goes_away_takes_nothing_with_it() -> None:
    service = Service()
    made = directives(None, service)
    first = asyncio.create_task(made.look_up(ORG, AGENT))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(made.look_up(ORG, AGENT))
    await asyncio.sleep(0)
    service.answer = ONE
    service.released.set()
    assert await second == LookUp(ONE, Source.SERVICE)
    assert len(service.asked) == 1


async def test_prepared_in_time_it_is_at_hand() -> None:
    made = directives(Redis(VALUE), None)
    made.prepare(ORG, AGENT)
    await asyncio.sleep(0.01)
    assert made.at_hand(ORG, AGENT) == LookUp(ONE, Source.FRESH)


async def test_an_outage_leaves_what_is_at_hand() -> None:
    redis, service = Redis(VALUE), Service(FAILED)
    made = directives(redis, service)
    await find(made)
    age(made)
    redis.reply, redis.is_up = LinkProblem.DOWN, False
    assert await find(made) == LookUp(ONE, Source.STALE)


async def test_after_the_first_failures_an_outage_is_asked_nothing_and_costs_no_wait() -> None:
    redis, service = Redis(LinkProblem.TIMEOUT), Service(FAILED)
    made = directives(redis, service)
    for _ in range(2):
        assert await find(made) == FAILED
    assert [made.at_hand(ORG, AGENT) for _ in range(50)] == [FAILED] * 50
    assert (len(redis.asked), len(service.asked)) == (2, 2)


async def test_who_is_back_is_asked_again() -> None:
    service = Service(FAILED)
    made = directives(None, service)
    for _ in range(2):
        await find(made)
    service.answer = ONE
    found = FAILED
    for _ in range(200):
        if (found := await find(made)).directive == ONE:
            break
        await asyncio.sleep(0.02)
    assert found.directive == ONE


async def test_a_change_while_it_is_asked_for_is_asked_for_again() -> None:
    service = Service(ONE)
    made = directives(None, service)

    def change() -> None:
        if len(service.asked) == 1:
            made.hear(channel_of(ORG).encode(), change_message(ORG, AGENT, "v2"))
        else:
            service.answer = TWO

    service.on_ask = change
    assert await find(made) == LookUp(TWO, Source.SERVICE)
    assert made.at_hand(ORG, AGENT) == LookUp(TWO, Source.FRESH)


async def test_changes_without_end_are_not_chased() -> None:
    service = Service(ONE)
    made = directives(None, service)
    service.on_ask = lambda: made.hear(channel_of(ORG).encode(), change_message(ORG, AGENT, "v2"))
    assert await find(made) == LookUp(ONE, Source.SERVICE)
    assert len(service.asked) == 3
    assert made.at_hand(ORG, AGENT) is None, "it is not kept"
    await made.close()


async def test_a_value_that_is_no_directive_is_not_used() -> None:
    assert await find(directives(Redis(b"{}"), None)) == FAILED
    assert await find(directives(Redis(b"{}"), Service(Flaw.EMPTY))) == FAILED


async def test_organisations_with_the_same_agent_share_nothing() -> None:
    redis = Redis(VALUE)
    made = directives(redis, None)
    assert (await find(made)).directive == ONE
    redis.reply = None
    assert await find(made, OTHER_ORG) == MISS
    assert made.at_hand(ORG, AGENT) == LookUp(ONE, Source.FRESH)


async def test_look_ups_at_one_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.directives.client._MOST_LOOK_UPS", 1)
    made = directives(None, Service())
    assert made.at_hand(ORG, AGENT) is None
    assert made.at_hand(OTHER_ORG, AGENT) == FAILED
    await made.close()


class TestServiceClient:
    """Over a real gRPC connection."""

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (
                pb.GetActiveDirectiveResponse(
                    found=True, content="Be brief.", injection_mode="user_prepend", version_id="v1"
                ).SerializeToString(),
                ActiveDirective("v1", Directive("Be brief.", InjectionMode.USER_PREPEND), estimate_tokens("Be brief.")),
            ),
            (b"", MISS),
            (pb.GetActiveDirectiveResponse(content="not found all the same").SerializeToString(), MISS),
            (pb.GetActiveDirectiveResponse(found=True, version_id="v1").SerializeToString(), Flaw.EMPTY),
            (b"\xff\xff rubbish", Flaw.WRONG_TYPE),
            (b"\x12\x01\xff", Flaw.WRONG_TYPE),
            (None, FAILED),
        ],
    )
    async def test_whatever_a_service_answers_is_a_value(self, answer: bytes | None, expected: object) -> None:
        asked = []

        async def get(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            asked.append(pb.GetActiveDirectiveRequest.FromString(raw))
            if answer is None:
                await context.abort(grpc.StatusCode.INTERNAL, "told to")
            return answer

        server = grpc.aio.server()
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(get)
        name = "ibex.directive.v1.DirectiveService"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"GetActiveDirective": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = ServiceClient(f"127.0.0.1:{port}")
        found = await client.active_directive(ORG, AGENT)
        await client.close()
        await server.stop(0)
        assert asked == [pb.GetActiveDirectiveRequest(org_id=ORG, agent_id=AGENT)]
        if isinstance(found, ActiveDirective) and isinstance(expected, ActiveDirective):
            assert (found.version_id, found.directive) == (expected.version_id, expected.directive)
        else:
            assert found == expected

    async def test_nobody_there_is_a_value(self) -> None:
        client = ServiceClient("127.0.0.1:1")
        assert await client.active_directive(ORG, AGENT) == FAILED
        assert not await client.is_ready(0.05)
        await client.close()
