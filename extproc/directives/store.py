"""Directives in the database: one for each agent, and every version that it ever had. Every method blocks.

No method reads across organisations. Raises StoreError when the database cannot be used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Row, Select, and_, func, insert, select, update

from extproc.chat import InjectionMode
from extproc.directives.directive import MAX_BYTES
from extproc.memory.database import Database, act_for, insert_into
from extproc.memory.model import InvalidValue
from extproc.memory.schema import directive_versions, directives

__all__ = ["DirectiveStore", "NoDirective", "Standing", "Version", "parse_content", "parse_mode"]

READ_LIMIT_S = 1.0
"""Of one look-up's statement: nobody waits for it that long."""


class NoDirective(Exception):
    """The agent has none, or not this version of it: for who asks, also when it is another organisation's."""


@dataclass(frozen=True, slots=True)
class Version:
    id: str
    version: int
    """From 1."""
    content: str
    content_hash: str
    """SHA-256, lower-case hex, of its UTF-8 bytes."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Standing:
    """An agent's directive as it stands."""

    org_id: str
    agent_id: str
    version_id: str
    version: int
    content_hash: str
    injection_mode: str
    is_active: bool
    """Whether it goes into requests."""
    updated_at: datetime


def parse_content(text: str) -> str:
    """Raises InvalidValue."""
    if not text.strip():
        raise InvalidValue("the directive is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidValue("the directive is not UTF-8") from None
    if size > MAX_BYTES:
        raise InvalidValue(f"the directive has {size:,} bytes; the most is {MAX_BYTES:,}")
    if "\0" in text:
        raise InvalidValue("the directive has a NUL character, which no database holds")
    return text


def parse_mode(text: str) -> InjectionMode:
    """Raises InvalidValue. What is read from elsewhere is more tolerant: see `extproc.chat.injection_mode`."""
    try:
        return InjectionMode(text)
    except ValueError:
        raise InvalidValue(f"the mode is not one of {', '.join(InjectionMode)}") from None


class DirectiveStore:
    def __init__(self, database: Database) -> None:
        """The database stays the caller's to close."""
        self._database = database

    def active(self, org_id: str, agent_id: str) -> tuple[Standing, str] | None:
        """What goes into the agent's requests now, with its content; None: nothing."""

        def read(connection: Connection) -> tuple[Standing, str] | None:
            act_for(connection, org_id)
            found = connection.execute(_standing_query(org_id, agent_id, directive_versions.c.content)).one_or_none()
            return (_standing(found), found.content) if found is not None and found.is_active else None

        return self._database.run(read, READ_LIMIT_S, writes=False)

    def standing(self, org_id: str, agent_id: str) -> Standing:
        """Raises NoDirective."""

        def read(connection: Connection) -> Standing:
            act_for(connection, org_id)
            return _require(connection, org_id, agent_id)

        return self._database.run(read, writes=False)

    def all_of(self, org_id: str, limit: int, after: str = "") -> list[Standing]:
        """By agent. `after`: the last agent of the page before."""

        def read(connection: Connection) -> list[Standing]:
            act_for(connection, org_id)
            query = _standing_query(org_id)
            if after:
                query = query.where(directives.c.agent_id > after)
            return [_standing(row) for row in connection.execute(query.order_by(directives.c.agent_id).limit(limit))]

        return self._database.run(read, writes=False)

    def history(self, org_id: str, agent_id: str, limit: int, before: int | None = None) -> list[Version]:
        """Newest first. `before`: the last number of the page before."""

        def read(connection: Connection) -> list[Version]:
            act_for(connection, org_id)
            v = directive_versions.c
            query = (
                select(v.id, v.version, v.content, v.content_hash, v.created_at)
                .join(directives, _version_of_directive())
                .where(_mine(org_id, agent_id), *([v.version < before] if before is not None else []))
                .order_by(v.version.desc())
                .limit(limit)
            )
            return [Version(*row) for row in connection.execute(query)]

        return self._database.run(read, writes=False)

    def set(
        self,
        org_id: str,
        agent_id: str,
        content: str,
        mode: InjectionMode | None,
        new_ids: tuple[str, str],
        now: datetime,
    ) -> Standing:
        """Make a version and let it count from now on. The text that counts already makes no new one.

        `mode` None: as it was, at first `system_first`. `new_ids`: of the directive and of the version, where they are
        needed. What is stored is what `parse_content` gave.
        """
        content_hash = hashlib.sha256(content.encode()).hexdigest()

        def write(connection: Connection) -> Standing:
            act_for(connection, org_id)
            directive = self._locked_or_new(connection, org_id, agent_id, new_ids[0], now)
            v = directive_versions.c
            found = _current(connection, org_id, agent_id)
            version_id = found.version_id if found is not None and found.content_hash == content_hash else new_ids[1]
            if version_id == new_ids[1]:
                newest = select(func.coalesce(func.max(v.version), 0)).where(
                    v.directive_id == directive.id, v.org_id == org_id
                )
                row = {
                    "id": version_id,
                    "directive_id": directive.id,
                    "org_id": org_id,
                    "version": connection.execute(newest).scalar_one() + 1,
                    "content": content,
                    "content_hash": content_hash,
                    "created_at": now,
                }
                connection.execute(insert(directive_versions).values(row))
            _change(
                connection,
                org_id,
                agent_id,
                now,
                active_version_id=version_id,
                injection_mode=(mode or directive.injection_mode),
                is_active=True,
            )
            return _require(connection, org_id, agent_id)

        return self._database.run(write)

    def switch(self, org_id: str, agent_id: str, now: datetime, *, on: bool) -> Standing:
        """Whether it goes into requests. Raises NoDirective."""
        return self._changed(org_id, agent_id, now, is_active=on)

    def set_mode(self, org_id: str, agent_id: str, mode: InjectionMode, now: datetime) -> Standing:
        """Raises NoDirective."""
        return self._changed(org_id, agent_id, now, injection_mode=mode.value)

    def roll_back(self, org_id: str, agent_id: str, version: int | None, now: datetime) -> Standing:
        """Let an older version count again; None: the one before that which counts now. Raises NoDirective."""

        def write(connection: Connection) -> Standing:
            act_for(connection, org_id)
            _lock(connection, org_id, agent_id)
            wanted = _require(connection, org_id, agent_id).version - 1 if version is None else version
            v = directive_versions.c
            query = select(v.id).join(directives, _version_of_directive())
            found = connection.execute(query.where(_mine(org_id, agent_id), v.version == wanted)).scalar_one_or_none()
            if found is None:
                raise NoDirective(f"there is no version {wanted}")
            _change(connection, org_id, agent_id, now, active_version_id=found)
            return _require(connection, org_id, agent_id)

        return self._database.run(write)

    def _changed(self, org_id: str, agent_id: str, now: datetime, **values: object) -> Standing:
        def write(connection: Connection) -> Standing:
            act_for(connection, org_id)
            _change(connection, org_id, agent_id, now, **values)
            return _require(connection, org_id, agent_id)

        return self._database.run(write)

    def _locked_or_new(
        self, connection: Connection, org_id: str, agent_id: str, new_id: str, now: datetime
    ) -> Row[str, str]:
        row = {
            "id": new_id,
            "org_id": org_id,
            "agent_id": agent_id,
            "injection_mode": InjectionMode.SYSTEM_FIRST.value,
            "is_active": True,
            "created_at": now,
            "updated_at": now,
        }
        statement = insert_into(connection.dialect.name, directives).values(row)
        connection.execute(statement.on_conflict_do_nothing(index_elements=["org_id", "agent_id"]))
        locked = _lock(connection, org_id, agent_id)
        assert locked is not None, "inserted above, and nothing removes it"  # noqa: S101
        return locked


def _lock(connection: Connection, org_id: str, agent_id: str) -> Row[str, str] | None:
    """One writer of an agent's directive at a time; SQLite has one writer in any case."""
    query = select(directives.c.id, directives.c.injection_mode).where(_mine(org_id, agent_id))
    return connection.execute(query.with_for_update()).one_or_none()


def _change(connection: Connection, org_id: str, agent_id: str, now: datetime, **values: object) -> None:
    connection.execute(update(directives).where(_mine(org_id, agent_id)).values(updated_at=now, **values))


def _mine(org_id: str, agent_id: str) -> ColumnElement[bool]:
    return and_(directives.c.org_id == org_id, directives.c.agent_id == agent_id)


def _version_of_directive() -> ColumnElement[bool]:
    d, v = directives.c, directive_versions.c
    return and_(v.directive_id == d.id, v.org_id == d.org_id)


def _standing_query(org_id: str, agent_id: str | None = None, *more: Column[str]) -> Select[*tuple[Any, ...]]:
    d, v = directives.c, directive_versions.c
    columns = (
        d.org_id,
        d.agent_id,
        v.id.label("version_id"),
        v.version,
        v.content_hash,
        d.injection_mode,
        d.is_active,
        d.updated_at,
    )
    active = and_(_version_of_directive(), v.id == d.active_version_id)
    query = select(*columns, *more).join(directive_versions, active).where(d.org_id == org_id)
    return query if agent_id is None else query.where(d.agent_id == agent_id)


def _standing(row: Row[Any]) -> Standing:
    return Standing(*tuple(row)[:8])


def _current(connection: Connection, org_id: str, agent_id: str) -> Standing | None:
    found = connection.execute(_standing_query(org_id, agent_id)).one_or_none()
    return None if found is None else _standing(found)


def _require(connection: Connection, org_id: str, agent_id: str) -> Standing:
    found = _current(connection, org_id, agent_id)
    if found is None:
        raise NoDirective("the agent has no directive")
    return found
