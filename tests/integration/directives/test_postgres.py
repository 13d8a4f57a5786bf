"""Directives on a real PostgreSQL: everything that holds on SQLite, and what only this database can do."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from extproc.directives.store import DirectiveStore
from extproc.memory.database import Database
from tests.integration.turns import postgres_side
from tests.unit.directives.test_store import TestDirectives, put

__all__ = ["TestDirectives"]

TABLES = ("directives", "directive_versions")


@pytest.fixture
def database(postgres: postgres_side.Database) -> Iterator[Database]:
    made = Database(postgres.url)
    yield made
    made.close()


@pytest.fixture
def store(database: Database) -> DirectiveStore:
    return DirectiveStore(database)


@pytest.fixture
def orgs(store: DirectiveStore, org: str, agent: str) -> tuple[str, str]:
    """Two, with a directive of the same agent each."""
    other = org.replace(org[:8], "0" * 8)
    put(store, org, agent, "Ours.")
    put(store, other, agent, "Theirs.")
    return org, other


def seen(connection: psycopg.Connection, table: str) -> set[str]:
    return {str(row[0]) for row in connection.execute(f"SELECT org_id FROM ibex_core.{table}")}


@pytest.mark.parametrize("table", TABLES)
def test_the_database_itself_shows_an_organisation_its_own_rows_only(
    postgres: postgres_side.Database, orgs: tuple[str, str], table: str
) -> None:
    for setting, expected in ((orgs[0], {orgs[0]}), (orgs[1], {orgs[1]}), ("", set())):
        with postgres.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (setting,))
            assert seen(connection, table) == expected
    with postgres.connect() as connection:
        assert seen(connection, table) == set()


def test_a_row_of_another_organisation_cannot_be_written(
    postgres: postgres_side.Database, orgs: tuple[str, str]
) -> None:
    with postgres.connect() as connection:
        connection.execute("SELECT set_config('app.current_org_id', %s, true)", (orgs[0],))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("UPDATE ibex_core.directives SET org_id = %s", (orgs[1],))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ibex_core.directive_versions SET content = 'Other.'",
        "DELETE FROM ibex_core.directive_versions",
        "TRUNCATE ibex_core.directive_versions CASCADE",
    ],
)
def test_versions_are_append_only(postgres: postgres_side.Database, orgs: tuple[str, str], statement: str) -> None:
    with postgres.connect() as connection:
        connection.execute("SELECT set_config('app.current_org_id', %s, true)", (orgs[0],))
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            connection.execute(statement)


def test_a_database_that_was_away_is_used_again(
    postgres: postgres_side.Database, store: DirectiveStore, org: str, agent: str
) -> None:
    put(store, org, agent, "Ours.")
    postgres.stop()
    postgres.start()
    found = store.active(org, agent)
    assert found is not None
    assert found[1] == "Ours."
