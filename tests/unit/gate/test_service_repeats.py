"""Requests of a caller who is known: decided from bytes, and refused as soon as anything says so."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz

from extproc.gate import wire
from extproc.gate.agent_cache import AgentCache
from extproc.gate.auth_client import AuthClient
from extproc.gate.guard import Guard
from extproc.gate.limiter import RateLimiter
from extproc.gate.principals import Principals, digest_of
from extproc.gate.service import Authorizer, ServicerContext
from extproc.gate.token_cache import TokenCache
from extproc.gate.verdict import CHAT_PERMISSIONS, AgentVerdict, Claims
from extproc.redis.link import LinkProblem, RedisLink
from tests.unit.gate.gate_side import AGENT, ORG, REQUEST_ID, TOKEN, code_of, headers_of, question

OTHER = "99999999-9999-4999-8999-999999999999"
NO_CONTEXT = cast("ServicerContext", None)


class Redis:
    """Answers each question with `reply`."""

    def __init__(self) -> None:
        self.reply: object = b"1 60 59 1795375440 30"
        self.asked = 0

    def ask(self, _command: bytes) -> asyncio.Future[object]:
        self.asked += 1
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        answer.set_result(self.reply)
        return answer


class Caller:
    """Known to the caches, and with times in the test's hand. Nobody can be asked: no auth service is there."""

    def __init__(self, limiter: RateLimiter | None = None, *, denies_uncounted: bool = True) -> None:
        self.now, self.wall = 1000.0, time.time()
        self.cache = TokenCache(100, 30)
        self.agents = AgentCache(2)
        self.auth = AuthClient("127.0.0.1:1", 0.05)
        principals = Principals(
            self.auth, self.cache, self.agents, Guard(), clock=lambda: self.now, wall_clock=lambda: self.wall
        )
        self.gate = Authorizer(principals, limiter, denies_uncounted=denies_uncounted)
        self.cache.trust(self.now, self.now + 1000)
        self.learn()

    def learn(self, **changes: Any) -> None:
        claims: dict[str, Any] = {"permissions": CHAT_PERMISSIONS, "agent_id": None, "user_id": None, "token_id": "t1"}
        found = Claims(org_id=ORG, **(claims | {"expires_at": self.wall + 100} | changes))
        self.cache.put(digest_of(TOKEN), found, self.cache.epoch, self.now, self.wall)
        self.agents.put((digest_of(TOKEN), AGENT), AgentVerdict.ACTIVE, self.now)

    async def ask(self, raw: bytes | None = None) -> ext_authz.CheckResponse:
        reply = await self.gate.check(question() if raw is None else raw, NO_CONTEXT)
        return ext_authz.CheckResponse.FromString(reply)


@pytest.fixture
async def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Questions that were decoded."""
    seen: list[bytes] = []
    read = wire.read_request

    def watch(raw: bytes, wanted: Any) -> wire.CheckedRequest:
        seen.append(raw)
        return read(raw, wanted)

    monkeypatch.setattr(wire, "read_request", watch)
    return seen


async def test_a_repeated_request_is_answered_alike_without_being_decoded(decoded: list[bytes]) -> None:
    caller = Caller()
    first, second = [await caller.ask() for _ in range(2)]
    for reply in (first, second):
        assert reply.dynamic_metadata["auth_ms"] >= 0
        reply.dynamic_metadata.fields["auth_ms"].number_value = 0
    assert first == second
    assert code_of(first) == "allowed"
    assert len(decoded) == 1


async def test_what_differs_from_request_to_request_is_no_other_caller(decoded: list[bytes]) -> None:
    caller = Caller()
    for path, request_id in (("/v1/models", "1"), ("/v1/chat/completions", "2")):
        assert code_of(await caller.ask(question({"x-request-id": request_id}, path=path))) == "allowed"
    assert len(decoded) == 1


REFUSALS: list[tuple[str, Callable[[Caller], object], str]] = [
    ("revoked", lambda caller: caller.cache.revoke("t1", caller.now), "SERVICE_DEGRADED"),
    ("revocations are not heard", lambda caller: caller.cache.distrust(), "SERVICE_DEGRADED"),
    ("silence for too long", lambda caller: setattr(caller, "now", caller.now + 2000), "SERVICE_DEGRADED"),
    ("expired", lambda caller: setattr(caller, "wall", caller.wall + 200), "SERVICE_DEGRADED"),
    ("not remembered", lambda caller: caller.cache.drop(digest_of(TOKEN)), "SERVICE_DEGRADED"),
    ("agent not asked for 2 s", lambda caller: setattr(caller, "now", caller.now + 2.1), "SERVICE_DEGRADED"),
    (
        "agent paused",
        lambda caller: caller.agents.put((digest_of(TOKEN), AGENT), AgentVerdict.INACTIVE, caller.now),
        "AGENT_SUSPENDED",
    ),
    ("permissions taken", lambda caller: caller.learn(permissions=1), "INSUFFICIENT_PERMISSIONS"),
    ("bound to another agent", lambda caller: caller.learn(agent_id=OTHER), "AGENT_NOT_AUTHORIZED"),
]


@pytest.mark.parametrize(("change", "code"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
async def test_what_is_heard_in_between_counts_at_once(change: Callable[[Caller], object], code: str) -> None:
    caller = Caller()
    for _ in range(3):
        assert code_of(await caller.ask()) == "allowed"
    change(caller)
    assert code_of(await caller.ask()) == code


async def test_claims_that_changed_are_those_of_the_answer() -> None:
    caller = Caller()
    for user in (None, "u1", "u2"):
        caller.learn(user_id=user)
        for _ in range(2):
            reply = await caller.ask(question({"x-ibex-user-id": "sent"}))
            assert reply.dynamic_metadata["user_id"] == (user or "sent")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"authorization": f"Bearer {TOKEN}x"}, "SERVICE_DEGRADED"),
        ({"authorization": None}, "MISSING_TOKEN"),
        ({"x-api-key": f"{TOKEN}x"}, "INVALID_TOKEN"),
        ({"x-ibex-agent-id": OTHER}, "SERVICE_DEGRADED"),
        ({"x-ibex-agent-id": "x"}, "VALIDATION_ERROR"),
        ({"x-ibex-user-id": ""}, "VALIDATION_ERROR"),
        ({"x-ibex-user-id": "u 1"}, "VALIDATION_ERROR"),
    ],
)
async def test_other_headers_are_another_caller(changes: dict[str, str | None], code: str) -> None:
    caller = Caller()
    for _ in range(3):
        await caller.ask()
    assert code_of(await caller.ask(question(changes))) == code


async def test_users_of_one_token_are_kept_apart() -> None:
    caller = Caller()
    for user in ("u1", "u2", "u1", "u2"):
        reply = await caller.ask(question({"x-ibex-user-id": user}))
        assert reply.dynamic_metadata["user_id"] == user
        assert headers_of(reply.ok_response.headers)["x-ibex-user-id"] == user


async def test_a_credential_in_the_query_of_a_repeated_request_does_not_go_on() -> None:
    caller = Caller()
    await caller.ask()
    reply = await caller.ask(question(path=f"/v1beta/models?key={TOKEN}&alt=sse"))
    assert list(reply.ok_response.query_parameters_to_remove) == ["key"]
    assert code_of(reply) == "allowed"


async def test_each_repeated_request_is_counted_once_and_refused_with_its_own_id() -> None:
    redis = Redis()
    caller = Caller(RateLimiter(cast("RedisLink", redis), 60, 0))
    for _ in range(3):
        reply = await caller.ask()
        assert headers_of(reply.ok_response.response_headers_to_add)["x-ratelimit-remaining"] == "59"
    redis.reply = b"0 60 0 1795375440 30"
    reply = await caller.ask()
    assert code_of(reply) == "RATE_LIMITED"
    assert headers_of(reply.denied_response.headers)["retry-after"] == "30"
    assert json.loads(reply.denied_response.body)["error"]["request_id"] == REQUEST_ID
    assert (reply.dynamic_metadata["org_id"], reply.dynamic_metadata["agent_id"]) == (ORG, AGENT)
    assert redis.asked == 4


@pytest.mark.parametrize(("denies", "code"), [(True, "SERVICE_DEGRADED"), (False, "allowed")])
@pytest.mark.parametrize("reply", [LinkProblem.DOWN, b"1 60", b"1 60 59 x 30", b"1 -1 0 0 0", b"9" * 200, 1, None])
async def test_a_count_that_is_none_is_an_outage(reply: object, denies: bool, code: str) -> None:
    redis = Redis()
    caller = Caller(RateLimiter(cast("RedisLink", redis), 60, 0), denies_uncounted=denies)
    await caller.ask()
    redis.reply = reply
    assert code_of(await caller.ask()) == code


async def test_a_bug_with_a_repeated_request_closes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller()
    await caller.ask()

    def broken(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Principals, "are_known", broken)
    assert code_of(await caller.ask()) == "SERVICE_DEGRADED"


async def test_another_address_is_no_other_caller(decoded: list[bytes]) -> None:
    """The guard alone wants it, and only of tokens that are not known."""
    caller = Caller()
    for address in (None, "203.0.113.9", "203.0.113.10"):
        assert code_of(await caller.ask(question({wire.ADDRESS_HEADER: address}))) == "allowed"
    assert len(decoded) == 1
