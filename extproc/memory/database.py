"""The database behind everything that is kept: SQLite on one machine, PostgreSQL for many. Every function blocks.

Engines, URLs, migrations and transactions; which rows there are is not known here. On PostgreSQL a transaction sees the
rows of one organisation at a time (`act_for`), by the database's own row-level security (docs/decisions/0011).
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
    StatementError,
)

from extproc.memory.schema import HEAD, POSTGRESQL_SCHEMA
from extproc.memory.store import StoreAway, StoreError, StoreRefused, store_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import URL, Connection, Engine, Table
    from sqlalchemy.dialects import postgresql, sqlite

    from extproc.settings import StoreSettings

__all__ = [
    "Database",
    "act_for",
    "act_for_sweep",
    "checkpoint_log",
    "driver_errors",
    "file_identity",
    "insert_into",
    "migrate",
    "open_engine",
    "reason",
    "shown_url",
]

BUSY_TIMEOUT_MS = 5_000
"""How long a writer of SQLite waits for another: an import commits every few hundred rows, far more often than this."""
STATEMENT_LIMIT_S = 5.0
"""Of one statement on PostgreSQL: one that takes longer waits for something that is not well."""
_LOCK_SHARE = 0.4
"""Of that limit, for waiting for another transaction's lock."""
_ANSWER_MARGIN_S = 1.0
"""What the client waits beyond that: the server's own words about a statement that took too long say more."""
_CONNECT_LIMIT_S = 3
_MOST_ATTEMPTS = 4
_MIGRATE_LIMIT_S = 30
"""For others that migrate at the same time."""
_MIGRATION_STATEMENT_LIMIT_S = 2.0 * _MIGRATE_LIMIT_S
_REWRITE_LIMIT_S = 3600.0
"""Of one statement that changes tables: one that rewrites `memories` makes its indexes anew."""
_MIGRATION_LOCK = 0x1BE8_0001
"""Advisory lock of PostgreSQL; any number that nobody else in the database uses."""

_URL_HELP = (
    "use sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with reserved characters of the password "
    "percent-encoded"
)

_NO_DRIVER = "PostgreSQL needs the package psycopg; install psycopg[binary]"

T = TypeVar("T")


class Database:
    """Sessions and checkpoints live here. Safe to use from several threads.

    Nothing is opened before the first transaction, so a server that is away when this process starts is an error of
    that transaction only. Missing tables are made then.
    """

    def __init__(self, url: str, connections: int = 2) -> None:
        """`connections`: kept open; as many again are opened for a while. The default is enough for a delivery, which
        writes through one at a time, beside a sweeper and an API that rarely ask.

        Raises StoreError when no server could ever be found by this URL.
        """
        self._url = url
        self._connections = connections
        self._file = _file(_parsed(url))
        self._identity: tuple[int, int] | None = None
        self._engine: Engine | None = None
        self._opening = threading.Lock()

    def run(self, work: Callable[[Connection], T], limit_s: float = STATEMENT_LIMIT_S, *, writes: bool = True) -> T:
        """`work` in one transaction, which is committed when it returns.

        It must begin with `act_for` or `act_for_sweep`, and is called again from its beginning when another writer was
        in its way or the connection had died meanwhile. `limit_s`: of each statement, even where the server stands
        still, and of the time in which `work` is called again. `writes`: False where it only reads, and so waits for no
        writer of SQLite; PostgreSQL holds it to that. Raises StoreRefused when what it writes can never be stored, else
        StoreError.
        """
        deadline = time.monotonic() + limit_s
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            engine = self._opened()
            try:
                options = {"writes": writes, "limit_s": limit_s}
                with engine.connect().execution_options(**options) as connection, connection.begin():
                    return work(connection)
            except SQLAlchemyError as error:
                may_try_again = attempt < _MOST_ATTEMPTS and time.monotonic() < deadline
                if may_try_again and _is_worth_another_attempt(error):
                    time.sleep(random.uniform(0, 0.01 * attempt))  # noqa: S311 - so that two do not meet again
                    continue
                if _sql_state(error) == _READ_ONLY:
                    engine.dispose()  # the server became a replica: the name may lead to another one now
                raise _store_error(error) from None
            except (UnicodeError, OverflowError) as error:  # from the driver, before it sent anything
                raise StoreRefused(f"the database cannot hold a value: {type(error).__name__}") from None
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def snapshot(self, begin: Callable[[Connection], None], limit_s: float = STATEMENT_LIMIT_S) -> Iterator[Connection]:
        """A transaction that only reads, and sees nothing that is committed after it began. Raises StoreError.

        `begin` must be as `work` of `run` begins, and is called again when the connection had died meanwhile.
        """
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            engine = self._opened()
            try:
                options: dict[str, Any] = {"limit_s": limit_s}
                if self._file is None:
                    options["isolation_level"] = "REPEATABLE READ"
                with engine.connect().execution_options(**options) as connection, connection.begin():
                    try:
                        begin(connection)
                    except DBAPIError as error:
                        if attempt < _MOST_ATTEMPTS and error.connection_invalidated:
                            continue
                        raise
                    yield connection
                    return
            except SQLAlchemyError as error:
                raise _store_error(error) from None

    @contextmanager
    def driver(self, limit_s: float) -> Iterator[Any]:
        """PostgreSQL: the driver's own connection, for what SQLAlchemy cannot say. Each statement or pipeline is a
        transaction without a word more. Thrown away after an error. Raises StoreError."""
        try:
            pooled = self._opened().raw_connection()
        except SQLAlchemyError as error:
            raise _store_error(error) from None
        driver: Any = pooled.driver_connection
        driver.answer_limit_s = limit_s + _ANSWER_MARGIN_S
        try:
            with driver_errors():
                driver.autocommit = True
                yield driver
                driver.autocommit = False
        except BaseException:
            pooled.invalidate()
            raise
        finally:
            pooled.close()

    def connect_alone(self, answer_limit_s: float) -> Any:
        """PostgreSQL: a connection of the driver outside the pool, each statement its own transaction; to be closed.

        Raises StoreError. So do its statements, as long as they are run within `driver_errors`.
        """
        engine = self._opened()
        try:
            from extproc.memory._psycopg import ImpatientConnection

            arguments, options = engine.dialect.create_connect_args(engine.url)
            with driver_errors():
                connection = ImpatientConnection.connect(
                    *arguments, **{**_server_arguments(engine.url), **options}, autocommit=True
                )
        except ModuleNotFoundError:
            raise StoreError(_NO_DRIVER) from None
        connection.answer_limit_s = answer_limit_s
        return connection

    def forget_log(self) -> bool:
        """After rows with content were removed from SQLite: its log holds them until it is written back.

        Returns at once. False: a reader or a writer is busy just now, call it again later. Raises StoreError.
        """
        if self._file is None:
            return True
        try:
            with self._opened().connect() as connection, _without_waiting(connection):
                return checkpoint_log(connection)
        except SQLAlchemyError as error:
            raise _store_error(error) from None
        except sqlite3.Error as error:
            raise StoreError(f"the database cannot be used now: {error}") from None

    def renew(self) -> None:
        """After the server was away: idle connections are closed, for they lead nowhere. Those in use stay."""
        engine = self._engine
        if engine is not None:
            engine.dispose()

    def close(self) -> None:
        """A later transaction opens it again."""
        with self._opening:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    def _opened(self) -> Engine:
        engine = self._usable()
        if engine is not None:
            return engine
        with self._opening:
            engine = self._usable()
            if engine is not None:  # another thread was first
                return engine
            if self._engine is not None:
                self._engine.dispose()  # a file that was removed or replaced: nobody will read what is written to it
                self._engine = None
            migrate(self._url)
            engine = open_engine(self._url, **self._pool())
            self._identity = None if self._file is None else file_identity(self._file)
            self._engine = engine
            return engine

    def _usable(self) -> Engine | None:
        engine = self._engine
        is_current = self._file is None or file_identity(self._file) == self._identity
        return engine if engine is not None and is_current else None

    def _pool(self) -> dict[str, Any]:
        return {"pool_size": self._connections, "max_overflow": self._connections, "pool_timeout": 3.0}


@contextmanager
def driver_errors() -> Iterator[None]:
    """Around statements of PostgreSQL's driver itself: their errors are StoreError."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise _store_error(_wrapped(error)) from None


def act_for(connection: Connection, org_id: str, settings: Mapping[str, str] | None = None) -> None:
    """From here on the transaction sees and writes this organisation's rows only. Ends with the transaction.

    `settings`: further ones of PostgreSQL, by name, for as long. SQLite has nothing of the kind: each statement names
    the organisation in any case.
    """
    _set(connection, org_id, "", settings or {})


def act_for_sweep(connection: Connection) -> None:
    """From here on the transaction sees every organisation's sessions, and writes nothing that has an organisation."""
    _set(connection, "", "on", {})


def _set(connection: Connection, org_id: str, sweep: str, more: Mapping[str, str]) -> None:
    """Of the transaction only: behind a pooler the next one on this connection may be somebody else's."""
    if connection.dialect.name != "postgresql":
        return
    limit_ms = connection.get_execution_options().get("limit_s", STATEMENT_LIMIT_S) * 1000
    settings = {
        "app.current_org_id": org_id,
        "app.sweep": sweep,
        "statement_timeout": str(int(limit_ms)),
        "lock_timeout": str(int(limit_ms * _LOCK_SHARE)),
        # As it is read: the first and last days of the calendar exist in no other zone.
        "TimeZone": "UTC",
        **more,
    }
    values = {f"value_{place}": value for place, value in enumerate(settings.values())}
    made = ", ".join(f"set_config('{name}', :value_{place}, true)" for place, name in enumerate(settings))
    connection.execute(text(f"SELECT {made}"), values)


def insert_into(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say what happens when the row is there already."""
    if dialect == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return postgresql.insert(table)


def open_engine(url: str, **options: Any) -> Engine:
    """For SQLite the file is made. `options` are those of SQLAlchemy's engine. Raises StoreError."""
    parsed = _parsed(url)
    return _sqlite_engine(parsed, **options) if _is_sqlite(parsed) else _postgresql_engine(parsed, **options)


def migrate(url: str, *, adds_vectors: bool = False) -> None:
    """Make the database's tables, or bring them up to date. Several processes may do so at once. Raises StoreError.

    `adds_vectors`: also what memories need on PostgreSQL, where the extension is there already.
    """
    from sqlalchemy.pool import NullPool

    parsed = _parsed(url)
    engine = open_engine(url, poolclass=NullPool)
    try:
        if _is_sqlite(parsed):
            _use_write_ahead_log(engine)
            _upgrade(engine, _sqlite_revision, _no_preparation)
        else:
            _upgrade(engine, _postgresql_revision, _prepare_postgresql)
            if adds_vectors:
                _add_vectors(engine)
    except SQLAlchemyError as error:
        kind = StoreAway if _is_away(error) else StoreError
        raise kind(f"the database cannot be opened or brought up to date: {reason(error)}") from None
    finally:
        engine.dispose()


def shown_url(settings: StoreSettings) -> str:
    """Where the data is, for people: without passwords."""
    try:
        parsed = _parsed(store_url(settings))
    except StoreError:
        return "the database of IBEX_DATABASE_URL"
    secrets = {name: "***" for name in parsed.query if "password" in name.lower()}
    shown = parsed.update_query_dict(secrets) if secrets else parsed
    return shown.set(drivername=shown.get_backend_name()).render_as_string(hide_password=True)


def reason(error: SQLAlchemyError) -> str:
    """The driver's words as far as they hold no values: SQLAlchemy's own hold the statement, and so content."""
    original = getattr(error, "orig", None)
    if isinstance(original, sqlite3.Error):
        return str(original)
    if original is None or not isinstance(error, DBAPIError) or isinstance(error, (DataError, IntegrityError)):
        return type(original or error).__name__
    # The first line only: DETAIL and CONTEXT quote rows.
    return (str(original).strip() or type(original).__name__).splitlines()[0]


def checkpoint_log(connection: Connection) -> bool:
    """Write SQLite's log back into the file and empty it, as far as readers allow. Outside a transaction's writes.

    False: somebody was busy for BUSY_TIMEOUT_MS, and the log is not empty.
    """
    (is_busy, *_) = _driver(connection).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not is_busy


@contextmanager
def _without_waiting(connection: Connection) -> Iterator[None]:
    """For others that use the file, SQLite only."""
    driver = _driver(connection)
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        yield
    finally:
        driver.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


def _driver(connection: Connection) -> Any:
    """The driver's own connection, which begins no transaction by itself."""
    return connection.connection.driver_connection


def file_identity(file: Path) -> tuple[int, int] | None:
    """Which file a path names now; None: none, or it cannot be seen."""
    try:
        found = os.stat(file)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # their words may hold a part of the password
        raise StoreError(f"IBEX_DATABASE_URL cannot be read; {_URL_HELP}") from None
    if _is_sqlite(parsed):
        if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
            raise StoreError("IBEX_DATABASE_URL names no file; use sqlite:///PATH")
        return parsed
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise StoreError(f"IBEX_DATABASE_URL names a database that is not supported; {_URL_HELP}")
    return parsed.set(drivername="postgresql+psycopg")


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _file(url: URL) -> Path | None:
    return Path(url.database).absolute() if _is_sqlite(url) and url.database else None


def _server_arguments(url: URL) -> dict[str, Any]:
    """Of every connection to PostgreSQL, where the URL does not say otherwise."""
    arguments: dict[str, object] = {
        "connect_timeout": _CONNECT_LIMIT_S,
        "application_name": "ibex-extproc",
        # A server that vanished without a word is noticed in seconds, not after the system's two hours.
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    return {name: value for name, value in arguments.items() if name not in url.query}


def _postgresql_engine(url: URL, **options: Any) -> Engine:
    try:
        from extproc.memory._psycopg import ImpatientConnection

        engine = create_engine(
            url,
            connect_args={
                **_server_arguments(url),
                "prepare_threshold": None,  # prepared statements do not survive a pooler
            },
            execution_options={"schema_translate_map": {None: POSTGRESQL_SCHEMA}},
            use_native_hstore=False,  # one question less for each connection
            hide_parameters=True,
            **options,
        )
    except ModuleNotFoundError:
        raise StoreError(_NO_DRIVER) from None
    except (ArgumentError, SQLAlchemyError, TypeError) as error:
        raise StoreError(f"IBEX_DATABASE_URL cannot be used: {type(error).__name__}; {_URL_HELP}") from None
    event.listen(engine, "do_connect", lambda _dialect, _record, args, kw: ImpatientConnection.connect(*args, **kw))
    event.listen(engine, "begin", _on_postgresql_begin)
    return engine


def _sqlite_engine(url: URL, **options: Any) -> Engine:
    try:
        engine = create_engine(url, connect_args={"check_same_thread": False}, hide_parameters=True, **options)
    except (ArgumentError, SQLAlchemyError) as error:
        raise StoreError(f"IBEX_DATABASE_URL cannot be used: {error}") from error
    try:
        file = Path(str(url.database)).absolute()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only a new file: closing a second descriptor of one in use would drop SQLite's locks.
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise StoreError(f"the directory of the memory store cannot be made: {error}") from error
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def _on_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin in `_on_sqlite_begin`, not by the driver's guess
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "foreign_keys = ON",
        "synchronous = NORMAL",  # with a write-ahead log: a power cut may lose the last commits, never the file
        "secure_delete = ON",  # what is forgotten is overwritten
    ):
        connection.execute(f"PRAGMA {pragma}")


def _on_postgresql_begin(connection: Connection) -> None:
    # Before the driver's own BEGIN, which goes with the first statement.
    options, driver = connection.get_execution_options(), _driver(connection)
    driver.answer_limit_s = options.get("limit_s", STATEMENT_LIMIT_S) + _ANSWER_MARGIN_S
    driver.read_only = None if options.get("writes") else True  # None: as the server has it, which may be a replica


def _on_sqlite_begin(connection: Connection) -> None:
    # A writer takes its lock at once: one that began by reading would fail, not wait, when another came first.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _use_write_ahead_log(engine: Engine) -> None:
    """The file remembers it. Two processes that switch at once do not wait for each other, so try again."""
    deadline = time.monotonic() + _MIGRATE_LIMIT_S
    while True:
        try:
            with engine.connect() as connection:
                _driver(connection).execute("PRAGMA journal_mode = WAL")
                return
        except sqlite3.Error as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise StoreError(f"the database cannot be opened: {error}") from error
            time.sleep(0.02)


def _upgrade(
    engine: Engine, revision: Callable[[Connection], str | None], prepare: Callable[[Connection], None]
) -> None:
    with _migrating(engine) as connection:
        # Asked before anything is locked: at most starts there is nothing to do, and a role without the right to do it.
        if revision(connection) == HEAD:
            return
        prepare(connection)
        if revision(connection) == HEAD:
            return
        from alembic.util import CommandError

        from extproc.memory.migrations import upgrade

        if connection.dialect.name == "postgresql":
            _driver(connection).answer_limit_s = _REWRITE_LIMIT_S
        try:
            upgrade(connection)
        except CommandError:
            raise StoreError("the database's tables are of a newer release; update this program") from None


@contextmanager
def _migrating(engine: Engine) -> Iterator[Connection]:
    options = {"writes": True, "limit_s": _MIGRATION_STATEMENT_LIMIT_S}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


def _add_vectors(engine: Engine) -> None:
    from extproc.memory import vectors

    with _migrating(engine) as connection:
        _driver(connection).answer_limit_s = vectors.ADD_LIMIT_S
        if vectors.extension_schema(connection) is not None:
            for dimension in vectors.SHIPPED_DIMENSIONS:
                vectors.add(connection, dimension)


def _no_preparation(_connection: Connection) -> None:
    """SQLite's writers exclude each other from the beginning of a transaction."""


def _prepare_postgresql(connection: Connection) -> None:
    connection.execute(text("SELECT set_config('lock_timeout', :limit, true)"), {"limit": f"{_MIGRATE_LIMIT_S}s"})
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    # `IF NOT EXISTS` would ask for the right to make schemas even where somebody else made this one.
    if connection.execute(text("SELECT to_regnamespace(:name)"), {"name": POSTGRESQL_SCHEMA}).scalar() is None:
        connection.execute(text(f"CREATE SCHEMA {POSTGRESQL_SCHEMA}"))


def _sqlite_revision(connection: Connection) -> str | None:
    known = connection.execute(text("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")).scalar()
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if known else None


def _postgresql_revision(connection: Connection) -> str | None:
    table = f"{POSTGRESQL_SCHEMA}.alembic_version"
    known = connection.execute(text("SELECT to_regclass(:table)"), {"table": table}).scalar()
    return connection.execute(text(f"SELECT version_num FROM {table}")).scalar() if known else None  # noqa: S608 - a constant


# SQLSTATE codes, PostgreSQL documentation, appendix A.
_READ_ONLY = "25006"
_NO_TABLE = "42P01"
_NO_RIGHT = "42501"
_IN_THE_WAY = {"40001", "40P01", "23505"}
"""Serialisation failure, deadlock, and a unique value that somebody else wrote between our question and our answer."""
_PROGRAM_LIMIT = "54"
_NO_SERVICE = ("08", "57P", "53300")
"""Connection failures, a server that stops or starts, and one with all its connections taken."""


def _sql_state(error: SQLAlchemyError) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")


def _is_worth_another_attempt(error: SQLAlchemyError) -> bool:
    return _sql_state(error) in _IN_THE_WAY or (isinstance(error, DBAPIError) and error.connection_invalidated)


def _wrapped(error: Exception) -> DBAPIError:
    """The driver's error as SQLAlchemy would give it."""
    kind = {"OperationalError": OperationalError, "InterfaceError": InterfaceError, "DataError": DataError}
    names = [one.__name__ for one in type(error).__mro__]
    wrapper = next((kind[name] for name in names if name in kind), DBAPIError)
    return wrapper("", {}, error, hide_parameters=True)


def _is_away(error: SQLAlchemyError) -> bool:
    """Whether the server could not be reached, or does not answer or serve now; a question that failed is no such."""
    state = _sql_state(error)
    is_silence = isinstance(error, (OperationalError, InterfaceError)) and not state
    return _is_of_postgresql(error) and (is_silence or state.startswith(_NO_SERVICE))


def _is_of_postgresql(error: SQLAlchemyError) -> bool:
    return isinstance(error, DBAPIError) and not isinstance(error.orig, sqlite3.Error)


def _store_error(error: SQLAlchemyError) -> StoreError:
    if _is_away(error):
        return StoreAway(f"the database cannot be used now: {reason(error)}")
    if _is_refusal(error):
        return StoreRefused(f"the database refuses what is to be stored: {reason(error)}")
    if _sql_state(error) == _NO_TABLE or "no such table" in reason(error):
        return StoreError(f"the database lacks a table; run `extproc migrate`: {reason(error)}")
    return StoreError(f"the database cannot be used now: {reason(error)}")


def _is_refusal(error: SQLAlchemyError) -> bool:
    """Whether trying again is no use. What an operator can set right (rights, tables, space) is no refusal."""
    if isinstance(error, (DataError, IntegrityError)):
        return True
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        return True  # a value that could not even be sent
    state = _sql_state(error)
    return state.startswith(_PROGRAM_LIMIT) or (state == _NO_RIGHT and _broke_row_security(error))


def _broke_row_security(error: SQLAlchemyError) -> bool:
    """A row of another organisation, and not a role without rights: both have one code, and words in any language."""
    diagnostics = getattr(getattr(error, "orig", None), "diag", None)
    return getattr(diagnostics, "source_function", "") == "ExecWithCheckOptions"
