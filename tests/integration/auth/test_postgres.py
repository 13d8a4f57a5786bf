"""Identity on a real PostgreSQL: everything that holds on SQLite, and what only this database can do."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from grpc import StatusCode
from prometheus_client import CollectorRegistry
from sqlalchemy import text

from extproc.auth.demo import ensure_demo
from extproc.auth.service import AuthService
from extproc.auth.store import IdentityStore
from extproc.memory.database import Database
from tests.integration.turns import postgres_side
from tests.unit.auth.service_side import Client, refused, running
from tests.unit.auth.test_service import TestManagement, TestValidateAgent, TestValidateToken
from tests.unit.auth.test_store import (
    MakeOrg,
    TestAgents,
    TestDemo,
    TestOrganizations,
    TestTokens,
    agent,
    made,
    new_org,
    store,
    test_many_read_while_one_writes,
)

__all__ = [
    "TestAgents",
    "TestDemo",
    "TestManagement",
    "TestOrganizations",
    "TestTokens",
    "TestValidateAgent",
    "TestValidateToken",
    "new_org",
    "store",
    "test_many_read_while_one_writes",
]

TABLES = {"organizations": "id", "agents": "org_id", "api_tokens": "org_id"}
"""And the column that names the organisation."""


@pytest.fixture
def database(postgres: postgres_side.Database) -> Iterator[Database]:
    made_ = Database(postgres.url)
    yield made_
    made_.close()


@pytest.fixture
async def client(database: Database) -> AsyncIterator[Client]:
    async with running(database) as client:
        yield client


def setting(connection: psycopg.Connection, name: str, value: str) -> None:
    connection.execute("SELECT set_config(%s, %s, true)", (name, value))


def orgs_seen(connection: psycopg.Connection, table: str) -> set[str]:
    return {str(row[0]) for row in connection.execute(f"SELECT {TABLES[table]} FROM ibex_core.{table}")}


@pytest.fixture
def orgs(store: IdentityStore, new_org: MakeOrg) -> list[str]:
    """Two, each with an agent and two tokens."""
    both = [new_org(), new_org()]
    for org in both:
        store.add_agent(agent(org))
        for _ in range(2):
            store.add_token(made(org))
    return both


class TestRowsOfOneOrganisation:
    @pytest.mark.parametrize("table", [*TABLES, "directives", "directive_versions"])
    def test_row_level_security_binds_the_owner_too(
        self, postgres: postgres_side.Database, store: IdentityStore, table: str
    ) -> None:
        store.check()
        with postgres.connect() as connection:
            query = "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE oid = %s::regclass"
            assert connection.execute(query, (f"ibex_core.{table}",)).fetchone() == (True, True)

    @pytest.mark.parametrize("table", TABLES)
    def test_nobody_without_a_setting_sees_a_row(
        self, postgres: postgres_side.Database, orgs: list[str], table: str
    ) -> None:
        with postgres.connect() as connection:
            assert orgs_seen(connection, table) == set()
            setting(connection, "app.current_org_id", orgs[0])
            assert orgs_seen(connection, table) == {orgs[0]}

    @pytest.mark.parametrize("table", TABLES)
    def test_nobody_changes_anothers_row(self, postgres: postgres_side.Database, orgs: list[str], table: str) -> None:
        with postgres.connect() as connection:
            setting(connection, "app.current_org_id", orgs[0])
            column = TABLES[table]
            done = connection.execute(f"UPDATE ibex_core.{table} SET name = 'x' WHERE {column} = %s", (orgs[1],))
            assert done.rowcount == 0
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"UPDATE ibex_core.{table} SET {column} = %s", (orgs[1],))


class TestWindows:
    def test_a_prefix_shows_its_token_and_no_other(
        self, postgres: postgres_side.Database, store: IdentityStore, orgs: list[str]
    ) -> None:
        token = store.tokens(orgs[1], 10)[0]
        with postgres.connect() as connection:
            setting(connection, "app.current_token_prefix", token.prefix)
            rows = connection.execute("SELECT id::text FROM ibex_core.api_tokens").fetchall()
            assert rows == [(token.id,)]
            for table in ("organizations", "agents"):
                assert orgs_seen(connection, table) == set()

    @pytest.mark.parametrize("prefix", ["", "%", "ibex_pat_%", "ibex_pat_"])
    def test_what_is_no_whole_prefix_shows_none(
        self, postgres: postgres_side.Database, orgs: list[str], prefix: str
    ) -> None:
        with postgres.connect() as connection:
            setting(connection, "app.current_token_prefix", prefix)
            assert orgs_seen(connection, "api_tokens") == set()

    @pytest.mark.parametrize(
        "change", ["UPDATE ibex_core.api_tokens SET permissions = 0", "DELETE FROM ibex_core.api_tokens"]
    )
    def test_it_is_for_reading_only(
        self, postgres: postgres_side.Database, store: IdentityStore, orgs: list[str], change: str
    ) -> None:
        token = store.tokens(orgs[1], 10)[0]
        with postgres.connect() as connection:
            setting(connection, "app.current_token_prefix", token.prefix)
            assert connection.execute(change).rowcount == 0

    def test_the_list_of_organisations_shows_them_alone_and_for_reading(
        self, postgres: postgres_side.Database, orgs: list[str]
    ) -> None:
        with postgres.connect() as connection:
            setting(connection, "app.list_organizations", "on")
            assert orgs_seen(connection, "organizations") == set(orgs)
            for table in ("agents", "api_tokens"):
                assert orgs_seen(connection, table) == set()
            assert connection.execute("UPDATE ibex_core.organizations SET rpm_limit = 0").rowcount == 0

    def test_the_sweeps_window_shows_nothing_of_this(self, postgres: postgres_side.Database, orgs: list[str]) -> None:
        with postgres.connect() as connection:
            setting(connection, "app.sweep", "on")
            assert [orgs_seen(connection, table) for table in TABLES] == [set()] * 3

    def test_one_look_up_leaves_no_window_to_the_next(
        self, postgres: postgres_side.Database, store: IdentityStore, orgs: list[str], database: Database
    ) -> None:
        token = store.tokens(orgs[0], 10)[0]
        for _ in range(4):
            store.token_by_prefix(token.prefix)
            store.organizations(10)
        seen = database.run(
            lambda connection: connection.execute(text("SELECT count(*) FROM ibex_core.api_tokens")).scalar()
        )
        assert seen == 0


class TestDirectiveVersions:
    def test_they_are_append_only_and_of_a_size(self, postgres: postgres_side.Database, orgs: list[str]) -> None:
        org, directive = orgs[0], str(uuid.uuid4())
        insert = (
            "INSERT INTO ibex_core.directive_versions"
            " (id, directive_id, org_id, version, content, content_hash, created_at)"
            " VALUES (gen_random_uuid(), %s, %s, %s, %s, 'h', now())"
        )
        with postgres.connect() as connection:
            setting(connection, "app.current_org_id", org)
            connection.execute(
                "INSERT INTO ibex_core.directives"
                " (id, org_id, agent_id, injection_mode, is_active, created_at, updated_at)"
                " VALUES (%s, %s, gen_random_uuid(), 'system_first', true, now(), now())",
                (directive, org),
            )
            connection.execute(insert, (directive, org, 1, "ä" * 16384))
            for content in ("", "ä" * 16384 + "x"):
                with pytest.raises(psycopg.errors.CheckViolation), connection.transaction():
                    connection.execute(insert, (directive, org, 2, content))
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"), connection.transaction():
                connection.execute("UPDATE ibex_core.directive_versions SET content = 'x'")


class TestAway:
    async def test_a_server_that_is_away_is_unavailable_and_the_next_call_after_it_is_back_works(
        self, client: Client, postgres: postgres_side.Database
    ) -> None:
        await client.validate(client.one.token)
        postgres.stop()
        await refused(client.validate(client.one.token), StatusCode.UNAVAILABLE)
        await refused(client.validate_agent(client.one.id, client.one.agent, client.one.token), StatusCode.UNAVAILABLE)
        postgres.start()
        assert (await client.validate(client.one.token)).org_id == client.one.id

    async def test_a_service_starts_without_its_server(
        self, postgres: postgres_side.Database, database: Database
    ) -> None:
        store = IdentityStore(database)
        store.check()
        database.close()
        postgres.stop()
        service = AuthService(database, None, CollectorRegistry())
        await service.start()
        await service.stop()
        postgres.start()


def test_no_plaintext_is_in_a_dump(postgres: postgres_side.Database, database: Database, store: IdentityStore) -> None:
    plaintext = ensure_demo(database, org := str(uuid.uuid4()), str(uuid.uuid4()))
    assert plaintext is not None
    (token,) = store.tokens(org, 10)
    with psycopg.connect(postgres.server.superuser_url, dbname=postgres.name) as connection:
        rows = connection.execute("SELECT row_to_json(t)::text FROM ibex_core.api_tokens t").fetchall()
    dump = "".join(row[0] for row in rows)
    assert token.prefix in dump
    assert plaintext.rpartition("_")[2] not in dump
