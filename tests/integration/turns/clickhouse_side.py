"""ClickHouse for tests: the engine behind its HTTP interface, a process on a free port, and what it stores."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clickhouse_connect

from extproc.stack.child import die_with_parent
from extproc.stack.envoy import Address, free_port

START_LIMIT_S = 60.0


@dataclass
class ClickHouse:
    """One directory of tables, served or not. It keeps its port over restarts."""

    data: Path
    password: str = ""
    address: Address = field(default_factory=lambda: Address("127.0.0.1", free_port()))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        credentials = f"default:{self.password}@" if self.password else ""
        return f"http://{credentials}{self.address}"

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "extproc.stack.clickhouse", "--listen", str(self.address)]
        command += ["--data", str(self.data)]
        if self.password:
            file = self.data.with_name(f"{self.data.name}.password")
            file.write_text(self.password)
            command += ["--password-file", str(file)]
        self.process = subprocess.Popen(command, preexec_fn=die_with_parent)  # noqa: PLW1509 (one system call)
        deadline = time.monotonic() + START_LIMIT_S
        while not answers(self.address):
            assert self.process.poll() is None, f"ClickHouse ended with {self.process.returncode}"
            assert time.monotonic() < deadline, "ClickHouse does not answer"
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM; returns its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise

    def query(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        client = clickhouse_connect.get_client(
            host=self.address.host, port=self.address.port, password=self.password, autogenerate_session_id=False
        )
        try:
            return [tuple(row) for row in client.query(statement, parameters=parameters or None).result_rows]
        finally:
            client.close()

    def command(self, statement: str) -> None:
        client = clickhouse_connect.get_client(
            host=self.address.host, port=self.address.port, password=self.password, autogenerate_session_id=False
        )
        try:
            client.command(statement)
        finally:
            client.close()

    def request_ids(self) -> list[str]:
        """Of all trace rows, in order, doubles included."""
        return [row[0] for row in self.query("SELECT request_id FROM ibex.llm_traces ORDER BY request_id")]


def answers(address: Address) -> bool:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=2)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().read() == b"Ok.\n"
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def running(data: Path, password: str = "") -> Iterator[ClickHouse]:
    """Gone at the end, whatever the test did with it."""
    clickhouse = ClickHouse(data, password)
    try:
        clickhouse.start()
        yield clickhouse
    finally:
        clickhouse.kill()
