"""Organisations, agents and tokens in the database. Every method blocks, and may be called from any thread.

No method reads across organisations, but for two windows (docs/decisions/0014): the one token with a prefix, since its
organisation is not known before, and the list of organisations, for operators and their limits.

Raises StoreError when the database cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, and_, insert, select, text, update

from extproc.auth.token import Token
from extproc.memory.database import Database, act_for, insert_into
from extproc.memory.schema import agents, api_tokens, organizations

__all__ = ["Agent", "AgentStatus", "IdentityStore", "NoSuch", "Organization", "all_pages"]

READ_LIMIT_S = 1.0
"""Of one look-up's statement: callers wait 50 ms, and a database that takes longer than this is not well."""

T = TypeVar("T")


class _Row(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_Row)


class NoSuch(Exception):
    """There is no such organisation, agent or token: for who asks, also when it is another organisation's."""


class AgentStatus(StrEnum):
    ACTIVE = "active"
    """The only status in which an agent may act."""
    PAUSED = "paused"
    SUSPENDED = "suspended"
    ARCHIVED = "archived"


@dataclass(frozen=True, slots=True)
class Organization:
    id: str
    name: str
    rpm_limit: int | None
    """Requests a minute; 0: any number; None: what the gate is set to."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Agent:
    org_id: str
    id: str
    name: str
    status: AgentStatus
    created_at: datetime
    updated_at: datetime


class IdentityStore:
    def __init__(self, database: Database) -> None:
        """The database stays the caller's to close."""
        self._database = database

    def check(self) -> None:
        """Raises StoreError when nothing can be looked up."""
        self.token_by_prefix("")

    def token_by_prefix(self, prefix: str) -> Token | None:
        return self._read(lambda connection: _token_by_prefix(connection, prefix))

    def token_and_agent(self, prefix: str, org_id: str, agent_id: str) -> tuple[Token | None, AgentStatus | None]:
        """The token, of whatever organisation, and the status of that organisation's agent, in one transaction.

        An unknown agent and one of another organisation take the same way: the key begins with the organisation.
        """

        def read(connection: Connection) -> tuple[Token | None, AgentStatus | None]:
            token = _token_by_prefix(connection, prefix)
            return token, None if token is None else _agent_status(connection, org_id, agent_id)

        return self._read(read)

    def add_token(self, token: Token) -> None:
        """Raises NoSuch when its organisation or agent is not there."""

        def write(connection: Connection) -> None:
            act_for(connection, token.org_id)
            _require(connection, token.org_id, token.agent_id)
            connection.execute(insert(api_tokens).values({name: getattr(token, name) for name in _TOKEN_FIELDS}))

        self._database.run(write)

    def revoke_token(self, org_id: str, token_id: str, reason: str | None, now: datetime) -> datetime:
        """Returns since when it is revoked: of one that was revoked before, since then. Raises NoSuch."""

        def write(connection: Connection) -> datetime:
            act_for(connection, org_id)
            c = api_tokens.c
            mine = and_(c.org_id == org_id, c.id == token_id)
            connection.execute(
                update(api_tokens).where(mine, c.revoked_at.is_(None)).values(revoked_at=now, revoke_reason=reason)
            )
            revoked_at: datetime | None = connection.execute(select(c.revoked_at).where(mine)).scalar_one_or_none()
            if revoked_at is None:
                raise NoSuch("the organisation has no such token")
            return revoked_at

        return self._database.run(write)

    def tokens(self, org_id: str, limit: int, after: str = "") -> list[Token]:
        """By id, which is by time. `after`: the last id of the page before."""

        def read(connection: Connection) -> list[Token]:
            act_for(connection, org_id)
            c = api_tokens.c
            later = [c.id > after] if after else []
            query = select(*_TOKEN_COLUMNS).where(c.org_id == org_id, *later).order_by(c.id).limit(limit)
            return [Token(*row) for row in connection.execute(query)]

        return self._read(read)

    def add_organization(self, organization: Organization) -> bool:
        """False: it was there already, and stays as it was."""
        return self._insert(organizations, organization.id, _values(organization, organizations))

    def set_rpm_limit(self, org_id: str, rpm_limit: int | None) -> None:
        """Raises NoSuch."""

        def write(connection: Connection) -> None:
            act_for(connection, org_id)
            changed = update(organizations).where(organizations.c.id == org_id).values(rpm_limit=rpm_limit)
            if connection.execute(changed).rowcount == 0:
                raise NoSuch("there is no such organisation")

        self._database.run(write)

    def organizations(self, limit: int, after: str = "") -> list[Organization]:
        """By id. `after`: the last id of the page before."""

        def read(connection: Connection) -> list[Organization]:
            _open_window(connection, "app.list_organizations", "on")
            c = organizations.c
            later = [c.id > after] if after else []
            query = select(c.id, c.name, c.rpm_limit, c.created_at).where(*later).order_by(c.id).limit(limit)
            return [Organization(*row) for row in connection.execute(query)]

        return self._read(read)

    def add_agent(self, agent: Agent) -> bool:
        """False: it was there already, and stays as it was. Raises NoSuch when its organisation is not there."""
        return self._insert(agents, agent.org_id, _values(agent, agents))

    def agents(self, org_id: str, limit: int, after: str = "") -> list[Agent]:
        """By id. `after`: the last id of the page before."""

        def read(connection: Connection) -> list[Agent]:
            act_for(connection, org_id)
            c = agents.c
            later = [c.id > after] if after else []
            query = select(c.org_id, c.id, c.name, c.status, c.created_at, c.updated_at)
            rows = connection.execute(query.where(c.org_id == org_id, *later).order_by(c.id).limit(limit))
            return [Agent(row.org_id, row.id, row.name, AgentStatus(row.status), *row[4:]) for row in rows]

        return self._read(read)

    def set_agent_status(self, org_id: str, agent_id: str, status: AgentStatus, now: datetime) -> None:
        """Raises NoSuch."""

        def write(connection: Connection) -> None:
            act_for(connection, org_id)
            c = agents.c
            changed = update(agents).where(c.org_id == org_id, c.id == agent_id).values(status=status, updated_at=now)
            if connection.execute(changed).rowcount == 0:
                raise NoSuch("the organisation has no such agent")

        self._database.run(write)

    def _read(self, work: Callable[[Connection], T]) -> T:
        return self._database.run(work, READ_LIMIT_S, writes=False)

    def _insert(self, table: Any, org_id: str, values: dict[str, object]) -> bool:
        def write(connection: Connection) -> bool:
            act_for(connection, org_id)
            if table is not organizations:
                _require(connection, org_id, None)
            added = insert_into(connection.dialect.name, table).values(values).on_conflict_do_nothing()
            return connection.execute(added.returning(table.c.id)).one_or_none() is not None

        return self._database.run(write)


_TOKEN_FIELDS = [field.name for field in fields(Token)]
_TOKEN_COLUMNS = [api_tokens.c[name] for name in _TOKEN_FIELDS]


def _values(row: Organization | Agent, table: Any) -> dict[str, object]:
    return {column.name: getattr(row, column.name) for column in table.c}


def _token_by_prefix(connection: Connection, prefix: str) -> Token | None:
    _open_window(connection, "app.current_token_prefix", prefix)
    row = connection.execute(select(*_TOKEN_COLUMNS).where(api_tokens.c.prefix == prefix)).one_or_none()
    return None if row is None else Token(*row)


def _agent_status(connection: Connection, org_id: str, agent_id: str) -> AgentStatus | None:
    act_for(connection, org_id)
    query = select(agents.c.status).where(agents.c.org_id == org_id, agents.c.id == agent_id)
    status = connection.execute(query).scalar_one_or_none()
    return None if status is None else AgentStatus(status)


def _require(connection: Connection, org_id: str, agent_id: str | None) -> None:
    """Said in words here; the database's foreign keys hold it in any case."""
    if connection.execute(select(organizations.c.id).where(organizations.c.id == org_id)).one_or_none() is None:
        raise NoSuch("there is no such organisation")
    if agent_id is not None and _agent_status(connection, org_id, agent_id) is None:
        raise NoSuch("the organisation has no such agent")


_SET_WINDOW = text("SELECT set_config(:name, :value, true)")


def _open_window(connection: Connection, name: str, value: str) -> None:
    """From here on the transaction sees, beside nobody's rows, what the window shows. Ends with the transaction."""
    act_for(connection, "")
    if connection.dialect.name == "postgresql":
        connection.execute(_SET_WINDOW, {"name": name, "value": value})


def all_pages(page: Callable[[str], Sequence[R]]) -> list[R]:
    """Every row of what comes in pages by id; `page` takes the last id of the page before."""
    found: list[R] = []
    while rows := page(found[-1].id if found else ""):
        found += rows
    return found
