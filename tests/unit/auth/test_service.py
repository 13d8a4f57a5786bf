"""On SQLite here; tests/integration/auth runs the same on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ibex.auth.v1 import auth_pb2 as pb
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from extproc.auth import service as service_module
from extproc.auth.store import AgentStatus
from extproc.auth.token import CHAT, Permission, mint
from extproc.memory.database import Database
from extproc.memory.lane import Lane
from extproc.memory.store import StoreError
from extproc.telemetry.logs import configure_logs
from tests.ranks import rank_test
from tests.unit.auth.service_side import Client, refused, running

HOUR = timedelta(hours=1)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/memories.db")
    yield made
    made.close()


@pytest.fixture
async def client(database: Database) -> AsyncIterator[Client]:
    async with running(database) as client:
        yield client


class TestValidateToken:
    async def test_a_token_says_whose_it_is(self, client: Client) -> None:
        answer = await client.validate(client.one.token)
        assert (answer.org_id, answer.permissions, answer.token_id) == (client.one.id, CHAT, client.one.row.id)
        assert [answer.HasField(name) for name in ("agent_id", "user_id", "expires_at")] == [False] * 3

    async def test_and_what_it_is_bound_to(self, client: Client) -> None:
        until = client.clock.now + HOUR
        _, plaintext = client.one.add_token(agent_id=client.one.agent, user_id="u1", expires_at=until)
        answer = await client.validate(plaintext)
        assert (answer.agent_id, answer.user_id) == (client.one.agent, "u1")
        assert answer.expires_at.ToDatetime(UTC) == until

    async def test_refusals_have_one_code_and_one_message(self, client: Client) -> None:
        _, expired = client.one.add_token(expires_at=client.clock.now + timedelta(seconds=1))
        revoked_row, revoked = client.one.add_token()
        client.store.revoke_token(client.one.id, revoked_row.id, None, client.clock.now)
        client.clock.now += timedelta(seconds=1)
        wrong = f"{client.one.row.prefix}_{'a' * 43}"
        cases = {"": "missing", "x": "malformed", mint()[0]: "unknown", wrong: "wrong_secret"}
        cases |= {revoked: "revoked", expired: "expired"}
        messages = {await refused(client.validate(token), StatusCode.UNAUTHENTICATED) for token in cases}
        assert messages == {"the token is not valid"}
        assert {reason: client.metric("refusals_total", reason=reason) for reason in cases.values()} == dict.fromkeys(
            cases.values(), 1.0
        )

    async def test_one_that_was_used_is_refused_from_the_moment_of_its_expiry(self, client: Client) -> None:
        _, plaintext = client.one.add_token(expires_at=client.clock.now + HOUR)
        client.clock.now += HOUR - timedelta(milliseconds=1)
        await client.validate(plaintext)
        client.clock.now += timedelta(milliseconds=1)
        await refused(client.validate(plaintext), StatusCode.UNAUTHENTICATED)

    async def test_one_that_was_used_is_refused_once_another_process_revokes_it(
        self, client: Client, database: Database
    ) -> None:
        await client.validate(client.one.token)
        client.store.revoke_token(client.one.id, client.one.row.id, None, client.clock.now)
        await refused(client.validate(client.one.token), StatusCode.UNAUTHENTICATED)

    async def test_only_so_many_are_computed_at_once(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Lane, "run", _full_for("auth-hashing", Lane.run))
        await refused(client.validate(client.one.token), StatusCode.RESOURCE_EXHAUSTED, "try again")

    async def test_a_flood_of_unknown_tokens_costs_no_hash(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Lane, "run", _full_for("auth-hashing", Lane.run))
        for _ in range(20):
            await refused(client.validate(mint()[0]), StatusCode.UNAUTHENTICATED)


def _full_for(name: str, run: object) -> object:
    from extproc.memory.lane import LaneFull

    async def refuse(lane: Lane, work: object) -> object:
        if lane._threads._thread_name_prefix == name:
            raise LaneFull
        return await run(lane, work)  # type: ignore[operator]

    return refuse


class TestValidateAgent:
    async def test_an_active_agent_may_act(self, client: Client) -> None:
        answer = await client.validate_agent(client.one.id, client.one.agent.upper(), client.one.token)
        assert (answer.org_id, answer.agent_id, answer.status) == (client.one.id, client.one.agent, "active")

    @pytest.mark.parametrize("status", [AgentStatus.PAUSED, AgentStatus.SUSPENDED, AgentStatus.ARCHIVED])
    async def test_an_inactive_one_may_not_from_the_next_call_on(self, client: Client, status: AgentStatus) -> None:
        await client.validate_agent(client.one.id, client.one.agent, client.one.token)
        client.store.set_agent_status(client.one.id, client.one.agent, status, client.clock.now)
        call = client.validate_agent(client.one.id, client.one.agent, client.one.token)
        await refused(call, StatusCode.PERMISSION_DENIED, "agent is not active")

    async def test_unknown_and_somebody_elses_are_one_answer(self, client: Client) -> None:
        one, other = client.one, client.other
        paused = other.add_agent(str(uuid.uuid4()), AgentStatus.PAUSED)
        bound = one.add_token(agent_id=one.agent)[1]
        second = one.add_agent(str(uuid.uuid4()))
        cases = [
            (one.id, str(uuid.uuid4()), one.token),  # unknown
            (one.id, other.agent, one.token),  # of another organisation
            (other.id, other.agent, one.token),  # with its organisation's name
            (other.id, paused, one.token),
            (other.id, one.agent, one.token),
            (str(uuid.uuid4()), one.agent, one.token),
            (one.id, second, bound),  # of a token that is bound to another agent
        ]
        messages = {await refused(client.validate_agent(*case), StatusCode.PERMISSION_DENIED) for case in cases}
        assert messages == {"the agent is not authorized"}

    async def test_without_a_valid_token_nothing_is_said(self, client: Client) -> None:
        for token in ("", "x", mint()[0], f"{client.one.row.prefix}_{'a' * 43}"):
            call = client.validate_agent(client.one.id, client.one.agent, token)
            await refused(call, StatusCode.UNAUTHENTICATED, "the token is not valid")
        client.store.revoke_token(client.one.id, client.one.row.id, None, client.clock.now)
        call = client.validate_agent(client.one.id, client.one.agent, client.one.token)
        await refused(call, StatusCode.UNAUTHENTICATED)

    @pytest.mark.parametrize("ids", [("x", str(uuid.uuid4())), (str(uuid.uuid4()), "x"), ("", "")])
    async def test_an_id_that_is_none_is_invalid(self, client: Client, ids: tuple[str, str]) -> None:
        await refused(client.validate_agent(*ids, client.one.token), StatusCode.INVALID_ARGUMENT, "is not a UUID")

    async def test_of_several_tokens_in_the_metadata_none_counts(self, client: Client) -> None:
        metadata = [("authorization", f"Bearer {org.token}") for org in (client.one, client.other)]
        request = pb.ValidateAgentRequest(org_id=client.one.id, agent_id=client.one.agent)
        await refused(client.stub.ValidateAgent(request, metadata=metadata, timeout=10), StatusCode.UNAUTHENTICATED)

    async def test_the_scheme_is_bearer_in_any_case(self, client: Client) -> None:
        request = pb.ValidateAgentRequest(org_id=client.one.id, agent_id=client.one.agent)
        for scheme, is_one in (("bearer", True), ("BEARER", True), ("Basic", False), ("", False)):
            metadata = [("authorization", f"{scheme} {client.one.token}")]
            call = client.stub.ValidateAgent(request, metadata=metadata, timeout=10)
            if is_one:
                assert (await call).status == "active"
            else:
                await refused(call, StatusCode.UNAUTHENTICATED)

    async def test_unknown_and_somebody_elses_take_the_same_time(self, client: Client) -> None:
        one, other = client.one, client.other
        took: dict[str, list[float]] = {"unknown": [], "foreign": []}
        await client.validate_agent(one.id, one.agent, one.token)
        for _ in range(100):
            # In turns, so that a busy moment of the machine meets both.
            for kind, agent_id in (("unknown", str(uuid.uuid4())), ("foreign", other.agent)):
                began = time.perf_counter()
                await refused(client.validate_agent(one.id, agent_id, one.token), StatusCode.PERMISSION_DENIED)
                took[kind].append((time.perf_counter() - began) * 1000)
        medians = {kind: statistics.median(times) for kind, times in took.items()}
        is_close = abs(medians["unknown"] - medians["foreign"]) < 5
        assert is_close or rank_test(*took.values()) > 0.001, medians


class TestManagement:
    async def test_a_token_that_was_made_is_good(self, client: Client) -> None:
        until = client.clock.now + HOUR
        answer = await client.create(
            client.one.admin, agent_id=client.one.agent, user_id="u1", expires_at=until, type=pb.TOKEN_TYPE_PAT
        )
        assert answer.plaintext.startswith(f"{answer.prefix}_")
        assert answer.created_at.ToDatetime(UTC) == client.clock.now
        found = await client.validate(answer.plaintext)
        assert (found.token_id, found.org_id, found.agent_id) == (answer.token_id, client.one.id, client.one.agent)

    async def test_a_list_shows_state_and_never_a_secret(self, client: Client) -> None:
        await client.validate(client.one.token)
        assert await client.revoke(client.one.admin, revoke_reason="lost") == {"x-ibex-revocation": "nowhere"}
        answer = await client.list(client.one.admin)
        states = {token.token_id: (token.is_revoked, token.HasField("revoked_at")) for token in answer.tokens}
        assert states == {client.one.row.id: (True, True), client.one.admin_row.id: (False, False)}
        assert client.one.row.hash.encode() not in answer.SerializeToString()
        assert answer.next_cursor == ""

    async def test_a_list_comes_in_pages(self, client: Client) -> None:
        rows = [client.one.row, client.one.admin_row] + [client.one.add_token()[0] for _ in range(3)]
        ids, cursor = [], ""
        for size in (2, 2, 1):
            page = await client.list(client.one.admin, limit=2, cursor=cursor)
            assert len(page.tokens) == size
            ids += [token.token_id for token in page.tokens]
            cursor = page.next_cursor
        assert (ids, cursor) == ([row.id for row in rows], "")

    async def test_a_revoked_token_is_refused_at_once_and_again_is_no_error(self, client: Client) -> None:
        await client.validate(client.one.token)
        await client.revoke(client.one.admin)
        await refused(client.validate(client.one.token), StatusCode.UNAUTHENTICATED)
        await client.revoke(client.one.admin)

    async def test_who_may_not_manage_tokens_is_denied(self, client: Client) -> None:
        for token in (client.one.token, client.other.admin):
            for call in (client.create(token), client.revoke(token), client.list(token)):
                await refused(call, StatusCode.PERMISSION_DENIED, "may manage tokens")
        for token in ("", mint()[0]):
            for call in (client.create(token), client.revoke(token), client.list(token)):
                await refused(call, StatusCode.UNAUTHENTICATED)
        assert len((await client.list(client.one.admin)).tokens) == 2
        await client.validate(client.one.token)

    async def test_nothing_of_another_organisation_is_reached(self, client: Client) -> None:
        one, other = client.one, client.other
        await refused(client.revoke(one.admin, token_id=other.row.id), StatusCode.NOT_FOUND, "no such token")
        await refused(client.revoke(one.admin, token_id=str(uuid.uuid4())), StatusCode.NOT_FOUND, "no such token")
        await refused(client.create(one.admin, agent_id=other.agent), StatusCode.NOT_FOUND, "no such agent")
        await refused(client.create(one.admin, org_id=other.id), StatusCode.PERMISSION_DENIED)
        await refused(client.list(one.admin, org_id=other.id), StatusCode.PERMISSION_DENIED)
        assert other.row.id not in {t.token_id for t in (await client.list(one.admin, cursor=other.row.id)).tokens}
        await client.validate(other.token)

    async def test_a_right_to_manage_is_not_passed_on(self, client: Client) -> None:
        for permissions in (int(Permission.TOKEN_ADMIN), CHAT | Permission.TOKEN_ADMIN):
            call = client.create(client.one.admin, permissions=permissions)
            await refused(call, StatusCode.INVALID_ARGUMENT, "extproc token create")

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"name": ""}, "name"),
            ({"permissions": -1}, "permissions"),
            ({"type": 7}, "type"),
            ({"agent_id": "x"}, "agent_id"),
            ({"user_id": "a b"}, "user_id"),
            ({"expires_at": Timestamp(seconds=1)}, "future"),
            ({"expires_at": Timestamp(seconds=2**62)}, "expires_at"),
        ],
    )
    async def test_what_is_wrong_is_said(self, client: Client, given: dict[str, object], reason: str) -> None:
        await refused(client.create(client.one.admin, **given), StatusCode.INVALID_ARGUMENT, reason)

    async def test_a_revocation_whose_caller_goes_away_is_done(self, client: Client) -> None:
        request = pb.RevokeTokenRequest(org_id=client.one.id, token_id=client.one.row.id)
        metadata = [("authorization", f"Bearer {client.one.admin}")]
        await client.list(client.one.admin)
        call = client.stub.RevokeToken(request, metadata=metadata)
        await asyncio.sleep(0.02)
        call.cancel()
        # It was done whole or not at all.
        await asyncio.sleep(0.2)
        (row,) = [t for t in client.store.tokens(client.one.id, 10) if t.id == client.one.row.id]
        if row.revoked_at is not None:
            await refused(client.validate(client.one.token), StatusCode.UNAUTHENTICATED)


class TestWhatIsSaid:
    async def test_nothing_of_a_token_is_logged_or_answered(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = BytesIO()
        logs = configure_logs("auth", "debug", lines)
        monkeypatch.setattr(service_module, "_log", structlog.get_logger("test"))
        made = await client.create(client.one.admin)
        wrong = f"{made.prefix}_{'q' * 43}"
        secrets = [made.plaintext, wrong, client.one.admin, client.one.token]
        messages = [await refused(client.validate(wrong), StatusCode.UNAUTHENTICATED)]
        for field in ("name", "description"):
            call = client.create(client.one.admin, **{field: made.plaintext})
            messages.append(await refused(call, StatusCode.INVALID_ARGUMENT))
        for field in ("org_id", "token_id", "revoke_reason"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.revoke(client.one.admin, **{field: made.plaintext})
            messages.append(str(caught.value.details()))
        request_id = str(uuid.uuid4())
        await client.revoke(client.one.admin, token_id=made.token_id)
        await refused(client.validate(made.plaintext, ("x-request-id", request_id)), StatusCode.UNAUTHENTICATED)
        await refused(client.validate(made.plaintext, ("x-request-id", made.plaintext)), StatusCode.UNAUTHENTICATED)
        logs.close()
        structlog.reset_defaults()
        logged = lines.getvalue().decode()
        for secret in secrets:
            assert secret.rpartition("_")[2] not in logged + "".join(messages)
        events = [json.loads(line) for line in logged.splitlines()]
        assert {event["event"] for event in events} == {"token_created", "token_revoked", "token_refused"}
        assert any(event.get("request_id") == request_id for event in events)

    async def test_a_span_is_the_callers_child_and_holds_ids(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(service_module, "_tracer", provider.get_tracer("test"))
        request_id = str(uuid.uuid4())
        await client.validate(client.one.token, ("traceparent", TRACEPARENT), ("x-request-id", request_id))
        (span,) = exporter.get_finished_spans()
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == TRACEPARENT.split("-")[1]
        assert dict(span.attributes or {}) == {
            "ibex.request.id": request_id,
            "ibex.org.id": client.one.id,
            "ibex.token.id": client.one.row.id,
            "rpc.grpc.status_code": 0,
        }

    async def test_a_store_that_is_away_is_unavailable_and_a_bug_says_nothing(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: object) -> None:
            raise StoreError("the database cannot be used now: postgresql://secret")

        monkeypatch.setattr(client.store.__class__, "token_by_prefix", away)
        assert "secret" not in await refused(client.validate(client.one.token), StatusCode.UNAVAILABLE)

        def broken(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(client.store.__class__, "token_by_prefix", broken)
        assert await refused(client.validate(client.one.token), StatusCode.INTERNAL) == "internal error"

    async def test_a_row_that_cannot_be_checked_is_no_proof(self, client: Client) -> None:
        _, plaintext = client.one.add_token(hash_of=lambda _plaintext: "nonsense")
        await refused(client.validate(plaintext), StatusCode.UNAVAILABLE)


VALUES = st.text(max_size=60) | st.sampled_from(["", str(uuid.UUID(int=0)), "ibex_pat_", mint()[0]])
NUMBERS = st.integers(-(2**63), 2**63 - 1)
HEADERS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=40)


class TestFuzz:
    """Whatever comes, the answer is a code of the contract's; never INTERNAL, never UNKNOWN with a traceback."""

    @FUZZ
    @given(texts=st.lists(VALUES, min_size=5, max_size=5), number=NUMBERS, small=st.integers(-(2**31), 2**31 - 1))
    @pytest.mark.parametrize("is_admin", [True, False])
    async def test_any_fields(self, client: Client, is_admin: bool, texts: list[str], number: int, small: int) -> None:
        a, b, c, d, e = texts
        own = client.one.id if is_admin else a
        metadata = [("authorization", f"Bearer {client.one.admin if is_admin else client.one.token}")]
        calls = [
            client.stub.ValidateToken(pb.ValidateTokenRequest(access_token=a), timeout=10),
            client.stub.ValidateAgent(pb.ValidateAgentRequest(agent_id=a, org_id=own), metadata=metadata, timeout=10),
            client.stub.RevokeToken(
                pb.RevokeTokenRequest(org_id=own, token_id=b, revoke_reason=c), metadata=metadata, timeout=10
            ),
            client.stub.ListTokens(
                pb.ListTokensRequest(org_id=own, cursor=b, limit=small), metadata=metadata, timeout=10
            ),
            client.stub.CreateToken(
                pb.CreateTokenRequest(
                    org_id=own,
                    name=b,
                    description=c,
                    type=small,  # type: ignore[arg-type]
                    permissions=number,
                    expires_at=Timestamp(seconds=number, nanos=small),
                    user_id=d,
                    agent_id=e,
                ),
                metadata=metadata,
                timeout=10,
            ),
        ]
        for call in calls:
            await _expected(call)

    @FUZZ
    @given(
        headers=st.lists(
            st.tuples(st.sampled_from(["authorization", "x-request-id", "traceparent", "tracestate"]), HEADERS),
            max_size=6,
        )
    )
    async def test_any_metadata(self, client: Client, headers: list[tuple[str, str]]) -> None:
        request = pb.ValidateAgentRequest(org_id=client.one.id, agent_id=client.one.agent)
        await _expected(client.stub.ValidateAgent(request, metadata=headers, timeout=10))


async def _expected(call: Any) -> None:
    allowed = {StatusCode.OK, StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED, StatusCode.INVALID_ARGUMENT}
    with suppress(grpc.aio.AioRpcError):
        await call
    assert await call.code() in allowed | {StatusCode.NOT_FOUND}, await call.details()
