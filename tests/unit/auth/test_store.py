"""On SQLite here; tests/integration/auth runs the same on PostgreSQL."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uuid_utils

from extproc.auth.demo import ensure_demo
from extproc.auth.hashing import is_its_hash
from extproc.auth.new_token import new_token
from extproc.auth.store import Agent, AgentStatus, IdentityStore, NoSuch, Organization, all_pages
from extproc.auth.token import CHAT, Token
from extproc.memory.database import Database

NOW = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
MakeOrg = Callable[..., str]


def made(org_id: str, **given: object) -> Token:
    fields: dict[str, object] = {"name": "n", "permissions": CHAT, "hash_of": lambda _: "hash", "now": NOW, **given}
    return new_token(id=str(uuid_utils.uuid7()), org_id=org_id, **fields)[0]  # type: ignore[arg-type]


def agent(org_id: str, agent_id: str = "", status: AgentStatus = AgentStatus.ACTIVE) -> Agent:
    return Agent(org_id, agent_id or str(uuid.uuid4()), "Ada", status, NOW, NOW)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made_ = Database(f"sqlite:///{tmp_path}/memories.db")
    yield made_
    made_.close()


@pytest.fixture
def store(database: Database) -> IdentityStore:
    return IdentityStore(database)


@pytest.fixture
def new_org(store: IdentityStore) -> MakeOrg:
    def make(rpm_limit: int | None = None) -> str:
        org_id = str(uuid.uuid4())
        assert store.add_organization(Organization(org_id, "Acme", rpm_limit, NOW))
        return org_id

    return make


class TestTokens:
    def test_one_comes_back_as_it_was_stored(self, store: IdentityStore, new_org: MakeOrg) -> None:
        org = new_org()
        its = agent(org)
        store.add_agent(its)
        token = made(
            org, agent_id=its.id, user_id="u1", description="d", expires_at=NOW + timedelta(days=1), permissions=2**62
        )
        store.add_token(token)
        assert store.token_by_prefix(token.prefix) == token
        assert store.tokens(org, 10) == [token]

    def test_an_unknown_prefix_finds_nothing(self, store: IdentityStore, new_org: MakeOrg) -> None:
        store.add_token(made(new_org()))
        assert store.token_by_prefix("ibex_pat_aaaaaaaaaaaa") is None
        assert store.token_by_prefix("") is None

    def test_a_revoked_one_keeps_its_first_revocation(self, store: IdentityStore, new_org: MakeOrg) -> None:
        token = made(org := new_org())
        store.add_token(token)
        assert store.revoke_token(org, token.id, "lost", NOW) == NOW
        assert store.revoke_token(org, token.id, "again", NOW + timedelta(hours=1)) == NOW
        found = store.token_by_prefix(token.prefix)
        assert found is not None
        assert (found.revoked_at, found.revoke_reason) == (NOW, "lost")

    def test_nobody_revokes_what_is_anothers(self, store: IdentityStore, new_org: MakeOrg) -> None:
        token = made(new_org())
        store.add_token(token)
        for org_id, token_id in ((new_org(), token.id), (token.org_id, str(uuid.uuid4()))):
            with pytest.raises(NoSuch, match="no such token"):
                store.revoke_token(org_id, token_id, None, NOW)
        found = store.token_by_prefix(token.prefix)
        assert found is not None
        assert found.revoked_at is None

    def test_a_list_has_the_organisations_own_in_pages(self, store: IdentityStore, new_org: MakeOrg) -> None:
        one, other = new_org(), new_org()
        tokens = [made(one) for _ in range(5)]
        for token in [*tokens, made(other)]:
            store.add_token(token)
        assert [token.id for token in store.tokens(one, 2, tokens[1].id)] == [tokens[2].id, tokens[3].id]
        assert all_pages(lambda after: store.tokens(one, 2, after)) == tokens

    def test_none_is_made_for_an_organisation_or_agent_that_is_not_there(
        self, store: IdentityStore, new_org: MakeOrg
    ) -> None:
        one, other = new_org(), new_org()
        foreign = agent(other)
        store.add_agent(foreign)
        with pytest.raises(NoSuch, match="no such organisation"):
            store.add_token(made(str(uuid.uuid4())))
        for agent_id in (foreign.id, str(uuid.uuid4())):
            with pytest.raises(NoSuch, match="no such agent"):
                store.add_token(made(one, agent_id=agent_id))
        assert store.tokens(one, 10) == []


class TestAgents:
    def test_each_organisation_has_its_own_of_one_id(self, store: IdentityStore, new_org: MakeOrg) -> None:
        one, other, shared = new_org(), new_org(), str(uuid.uuid4())
        assert store.add_agent(agent(one, shared))
        assert store.add_agent(agent(other, shared))
        store.set_agent_status(one, shared, AgentStatus.PAUSED, NOW + timedelta(hours=1))
        (mine,), (theirs,) = store.agents(one, 10), store.agents(other, 10)
        assert (mine.status, mine.updated_at) == (AgentStatus.PAUSED, NOW + timedelta(hours=1))
        assert (theirs.status, theirs.updated_at) == (AgentStatus.ACTIVE, NOW)

    def test_one_that_is_there_stays_as_it_was(self, store: IdentityStore, new_org: MakeOrg) -> None:
        its = agent(new_org(), status=AgentStatus.PAUSED)
        assert store.add_agent(its)
        assert not store.add_agent(agent(its.org_id, its.id))
        assert store.agents(its.org_id, 10) == [its]

    def test_it_is_found_beside_a_token_by_its_organisation_alone(self, store: IdentityStore, new_org: MakeOrg) -> None:
        one, other = new_org(), new_org()
        token, its = made(one), agent(one)
        store.add_token(token)
        store.add_agent(its)
        assert store.token_and_agent(token.prefix, one, its.id) == (token, AgentStatus.ACTIVE)
        assert store.token_and_agent(token.prefix, other, its.id) == (token, None)
        assert store.token_and_agent(token.prefix, one, str(uuid.uuid4())) == (token, None)
        assert store.token_and_agent("ibex_pat_x", one, its.id) == (None, None)

    def test_none_of_another_organisation_is_changed(self, store: IdentityStore, new_org: MakeOrg) -> None:
        its = agent(new_org())
        store.add_agent(its)
        with pytest.raises(NoSuch, match="no such agent"):
            store.set_agent_status(new_org(), its.id, AgentStatus.PAUSED, NOW)
        with pytest.raises(NoSuch, match="no such organisation"):
            store.add_agent(agent(str(uuid.uuid4())))
        assert store.agents(its.org_id, 10) == [its]


class TestOrganizations:
    def test_all_are_listed_with_their_limits(self, store: IdentityStore, new_org: MakeOrg) -> None:
        limits = {new_org(limit): limit for limit in (None, 0, 7)}
        found = all_pages(lambda after: store.organizations(2, after))
        assert {one.id: one.rpm_limit for one in found} == limits
        assert found[0].created_at == NOW

    def test_a_limit_is_set_and_taken_away(self, store: IdentityStore, new_org: MakeOrg) -> None:
        org, other = new_org(), new_org(5)
        for limit in (30, None):
            store.set_rpm_limit(org, limit)
            assert {one.id: one.rpm_limit for one in store.organizations(10)} == {org: limit, other: 5}
        with pytest.raises(NoSuch):
            store.set_rpm_limit(str(uuid.uuid4()), 1)

    def test_one_that_is_there_stays_as_it_was(self, store: IdentityStore, new_org: MakeOrg) -> None:
        org = new_org(5)
        assert not store.add_organization(Organization(org, "Other", 9, NOW))
        assert [(one.name, one.rpm_limit) for one in store.organizations(10)] == [("Acme", 5)]


class TestDemo:
    def test_the_first_start_gets_a_token_and_the_others_none(self, database: Database, store: IdentityStore) -> None:
        org, its = str(uuid.uuid4()), str(uuid.uuid4())
        plaintext = ensure_demo(database, org, its)
        assert plaintext is not None
        assert ensure_demo(database, org, its) is None
        (token,) = store.tokens(org, 10)
        assert (token.agent_id, token.permissions, token.expires_at) == (its, CHAT, None)
        assert is_its_hash(token.hash, plaintext)
        assert [one.rpm_limit for one in store.organizations(10)] == [0], "any number"

    def test_a_revoked_one_does_not_come_back(self, database: Database, store: IdentityStore) -> None:
        org, its = str(uuid.uuid4()), str(uuid.uuid4())
        ensure_demo(database, org, its)
        (token,) = store.tokens(org, 10)
        store.revoke_token(org, token.id, None, NOW)
        assert ensure_demo(database, org, its) is None


def test_many_read_while_one_writes(store: IdentityStore, new_org: MakeOrg) -> None:
    token = made(org := new_org())
    store.add_token(token)
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda number: _used(store, token, org, number), range(60))
    assert all(found)


def _used(store: IdentityStore, token: Token, org: str, number: int) -> bool:
    if number % 10 == 0:
        store.add_token(made(org))
    return store.token_by_prefix(token.prefix) is not None


def test_a_look_up_does_not_wait_for_a_writer(store: IdentityStore, new_org: MakeOrg, tmp_path: Path) -> None:
    token = made(new_org())
    store.add_token(token)
    writer = sqlite3.connect(tmp_path / "memories.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    try:
        with ThreadPoolExecutor(1) as threads:
            looking = threads.submit(store.token_by_prefix, token.prefix)
            is_done = wait([looking], timeout=2).done
            writer.execute("ROLLBACK")
        assert is_done
    finally:
        writer.close()
