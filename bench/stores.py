"""What bulk work on a store of memories costs: an import that is killed and goes on, an export, another model's
features for all rows, one write at a time. `bench/README.md` says how to read it.

The commands run as users run them, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count as numbers
from pathlib import Path

import psycopg
from psycopg import sql

from bench.engine.corpus import DOES, TURNS, WHAT, WHEN, WHO, WHY
from extproc.memory.features import open_indexer
from extproc.memory.model import Namespace, new_memory
from extproc.memory.store import open_store
from extproc.settings import StoreSettings, load
from tests.integration.turns import postgres_side

__all__ = ["write_lines"]

ORG, AGENT, USER = str(uuid.UUID(int=0x57)), str(uuid.UUID(int=0x58)), "ada"
WRITES = 300
_BEGAN = datetime(2024, 1, 1, tzinfo=UTC)
_SYLLABLES = "ba do ka lu mi no pa ri sa te va xi zo ma len tor".split()  # noqa: SIM905
_NAMES = 200_000
_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Store:
    url: str
    server_s: Callable[[], float]
    """CPU of the server so far, seconds."""
    outdate: Callable[[], None]
    """Makes all features those of another model."""
    size: Callable[[], int]
    """Memories in it."""


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float
    server_s: float
    peak_mb: float

    def row(self, what: str, count: int) -> str:
        each = [f"{1000 * one / count:.2f} ms" for one in (self.cpu_s, self.server_s)]
        return f"| {what} | {count:,} | {self.wall_s:.0f} s | {each[0]} | {each[1]} | {self.peak_mb:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stores", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="memories")
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL of its own, not SQLite")
    parser.add_argument("--no-kill", action="store_true", help="let the import run through")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, _postgres() if options.postgres else _sqlite(Path(name)) as store:
        lines, exported = Path(name) / "lines.jsonl", Path(name) / "exported.jsonl"
        write_lines(lines, options.count)
        print("| | memories | time | CPU each | of the server | resident at most |\n|---|---|---|---|---|---|")
        left = options.count
        if not options.no_kill:
            cost = _run(store, "import", str(lines), until=options.count // 2)
            left -= (known := store.size())
            print(cost.row("import, killed", known), flush=True)
        print(_run(store, "import", str(lines)).row("import" if options.no_kill else "import, again", left), flush=True)
        owner = ("--org", ORG, "--agent", AGENT, "--user", USER)
        print(_run(store, "export", str(exported), *owner).row("export", options.count), flush=True)
        _compare(lines, exported)
        store.outdate()
        print(_run(store, "reindex").row("reindex", options.count), flush=True)
        _write(store)


def _run(store: Store, command: str, *arguments: str, until: int | None = None) -> Cost:
    """`until`: memories in the store with which it is killed."""
    began, server = time.monotonic(), store.server_s()
    environment = {**os.environ, "IBEX_DATABASE_URL": store.url}
    running = subprocess.Popen(
        [sys.executable, "-m", "extproc", "memory", command, *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    while until is not None and store.size() < until and running.returncode is None:
        time.sleep(0.1)
        if os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise SystemExit(f"{command} ended before it was killed")
    if until is not None:
        running.kill()
    _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if until is None and running.returncode:
        raise SystemExit(f"{command} failed")
    wall_s, server_s = time.monotonic() - began, store.server_s() - server
    return Cost(wall_s, used.ru_utime + used.ru_stime, server_s, used.ru_maxrss / 1024)


def _compare(lines: Path, exported: Path) -> None:
    """Every field that was given must be there again, in the same order."""
    with lines.open() as given, exported.open() as found:
        for number, one, other in zip(numbers(1), given, found, strict=False):
            before, after = json.loads(one), json.loads(other)
            if before != {name: after[name] for name in before}:
                raise SystemExit(f"line {number} is not what was imported")
        if next(given, None) or next(found, None):
            raise SystemExit("the export has another number of lines")
    print("\nThe export holds what was imported.\n")


def _write(store: Store) -> None:
    """One memory at a time, turns of one new session."""
    namespace = Namespace(ORG, AGENT, USER)
    chance = random.Random(2)
    opened = open_store(load(StoreSettings, database_url=store.url), open_indexer())
    took: list[float] = []
    cpu: list[float] = []
    server = 0.0
    for turn in range(WRITES):
        now = datetime.now(UTC)
        memory = new_memory(
            namespace, _sentence(chance), id=_id(now, chance), now=now, session_id="written", turn_index=turn
        )
        if turn == 10:  # statements are compiled, pages are there
            took, cpu, server = [], [], store.server_s()
        began, used = time.perf_counter(), time.process_time()
        opened.add(memory)
        took.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - used))
    server_ms = 1000 * (store.server_s() - server) / len(took)
    opened.close()
    print(
        f"One write: {statistics.median(cpu):.1f} ms of CPU, {server_ms:.1f} ms of the server's; "
        f"{statistics.median(took):.1f} ms until it is stored, of 20 the slowest {sorted(took)[-len(took) // 20]:.1f}"
    )


@contextmanager
def _sqlite(directory: Path) -> Iterator[Store]:
    file = directory / "memories.db"

    def outdate() -> None:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("UPDATE memories SET features_version = 'another'")
            connection.commit()

    def size() -> int:
        if not file.exists():
            return 0
        with closing(sqlite3.connect(file)) as connection:
            try:
                return int(connection.execute("SELECT coalesce(max(number), 0) FROM memories").fetchone()[0])
            except sqlite3.OperationalError:  # it is being made
                return 0

    yield Store(f"sqlite:///{file}", lambda: 0.0, outdate, size)


@contextmanager
def _postgres() -> Iterator[Store]:
    with postgres_side.server() as server, postgres_side.database(server) as database:
        server.execute(sql.SQL("CREATE EXTENSION vector").format(), database=database.name)

        def as_superuser(statement: str) -> int:
            with psycopg.connect(server.superuser_url, dbname=database.name, autocommit=True) as connection:
                cursor = connection.execute(statement)
                return int((cursor.fetchone() or [0])[0]) if cursor.description else 0

        def size() -> int:
            there = as_superuser("SELECT count(*) FROM pg_class WHERE relname = 'memories'")
            return as_superuser("SELECT count(*) FROM ibex_core.memories") if there else 0

        def outdate() -> None:
            as_superuser("UPDATE ibex_core.memories SET features_version = 'another'")

        with database.connect() as connection:
            its = Path(f"/proc/{connection.info.backend_pid}/stat").read_text().rsplit(")", 1)[1].split()
        yield Store(database.url, lambda: _cpu_s(int(its[1])), outdate, size)  # the backend's parent


def _cpu_s(pid: int) -> float:
    """Of a process and its children, also of those that ended."""
    ticks = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (str(pid), *children):
        try:
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()[11:15]))
        except FileNotFoundError:
            continue
    return ticks / _HZ


def write_lines(file: Path, count: int, seed: int = 1) -> None:
    """As `extproc memory export` would write them: sessions of turns, in the order of their ids."""
    with file.open("w", encoding="utf-8") as out:
        for line in _lines(count, random.Random(seed)):
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(count: int, chance: random.Random) -> Iterator[dict[str, object]]:
    said: set[str] = set()
    for number in range(count):
        while (content := _sentence(chance)) in said:  # the same text again would be the same memory
            continue
        said.add(content)
        at = _BEGAN + timedelta(seconds=30 * number)
        yield {
            "id": _id(at, chance),
            "org_id": ORG,
            "agent_id": AGENT,
            "user_id": USER,
            "content": content,
            "category": chance.choice(("factual", "preference", "episodic")),
            "session_id": f"s{number // TURNS}",
            "turn_index": number % TURNS,
            "created_at": at.isoformat(),
            "metadata": {"role": ("user", "assistant")[number % 2]},
        }


def _sentence(chance: random.Random) -> str:
    words = " ".join(chance.choice(part) for part in (WHO, DOES, WHAT, WHY, WHEN))
    return f"{words}, said {_name(chance)} {_name(chance)}."


def _name(chance: random.Random) -> str:
    """Few are common, most are rare."""
    number = int(_NAMES ** chance.random())
    syllables: list[str] = []
    while number or len(syllables) < 2:
        number, its = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[its])
    return "".join(syllables).capitalize()


def _id(at: datetime, chance: random.Random) -> str:
    """A UUID of version 7, by time."""
    bits = int(at.timestamp() * 1000) << 80 | 7 << 76 | chance.getrandbits(76)
    return str(uuid.UUID(int=bits & ~(3 << 62) | 2 << 62))


if __name__ == "__main__":
    main()
