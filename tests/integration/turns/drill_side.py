"""A whole chain of real parts: Envoy, `extproc observer`, PostgreSQL, Valkey, ClickHouse's engine; and load on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2

from extproc.stack import envoy
from extproc.stack.child import die_with_parent
from extproc.stack.envoy import Address
from tests.integration.conftest import AGENT, DROPIN_IDENTITY, ORG, answers, keep_pinging
from tests.integration.observe.transcript_provider import Provider, Script, provide
from tests.integration.turns import clickhouse_side, postgres_side, valkey_side

CHAT = "/v1/chat/completions"
ANSWER = [
    b'data: {"id":"c1","model":"m","choices":[{"index":0,"delta":{"content":"Hello."},"finish_reason":null}]}\n\n',
    b'data: {"id":"c1","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]
LIMIT_S = 90
PATIENT_OBSERVER = """
import os
from extproc.cli import GRPC_EXPERIMENTS, main
os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
from extproc.filter.observer import LagMeter
LagMeter.__init__.__defaults__ = (60.0,)
main()
"""
"""`extproc`, whose observer is not behind before its loop is a minute late. On a busy machine it would be now and then,
and let streams pass unobserved, as it should: that has tests of its own."""


@dataclass
class Observer:
    """`extproc observer`, on a port and a directory that it keeps over restarts."""

    directory: Path
    settings: dict[str, str]
    address: Address = field(default_factory=lambda: Address("127.0.0.1", envoy.free_port()))
    admin: Address = field(default_factory=lambda: Address("127.0.0.1", envoy.free_port()))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", PATIENT_OBSERVER, "observer", "--listen", str(self.address)]
        with (self.directory / "observer.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--admin", str(self.admin)],
                env={**os.environ, "IBEX_STATE_DIR": str(self.directory / "state"), **self.settings},
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        eventually(answers(f"http://{self.admin}/ready"), lambda: self.log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    @property
    def log(self) -> str:
        return (self.directory / "observer.log").read_text()


@dataclass
class Stored:
    """Request ids by place, doubles included; of tasks their ids."""

    checkpoints: Counter[str]
    traces: Counter[str]
    tasks: Counter[str]

    def counts(self) -> tuple[int, int, int]:
        return len(self.checkpoints), len(self.traces), len(self.tasks)


@dataclass
class Chain:
    url: str
    proxy: envoy.Envoy
    observers: list[Observer]
    postgres: postgres_side.Database
    valkey: valkey_side.Server
    clickhouse: clickhouse_side.ClickHouse

    @property
    def observer(self) -> Observer:
        return self.observers[0]

    def stored(self) -> Stored:
        with self.postgres.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, false)", (ORG,))
            rows = connection.execute("SELECT request_id FROM ibex_core.checkpoints").fetchall()
        messages = [json.loads(one) for one in self.valkey.execute("LRANGE", "extraction", 0, -1)]
        return Stored(
            Counter(str(row[0]) for row in rows),
            Counter(self.clickhouse.request_ids()),
            Counter(message["id"] for message in messages),
        )

    def dependencies(self) -> dict[str, str]:
        """One word for each, as the observer's `/ready` has it."""
        found: dict[str, str] = httpx2.get(f"http://{self.observer.admin}/ready", timeout=20).json()["dependencies"]
        return found

    def await_observer(self) -> None:
        """Until Envoy's health checks have reached the observer that runs now."""
        name = "cluster.extproc_observer.health_check.success"
        wanted = self._stat(name) + 1
        healthy = "cluster.extproc_observer.membership_healthy"
        eventually(lambda: self._stat(name) >= wanted and self._stat(healthy) == len(self.observers))

    def _stat(self, name: str) -> int:
        text = httpx2.get(f"http://{self.proxy.admin}/stats", params={"filter": f"^{name}$"}, timeout=20).text
        return int(text.rpartition(":")[2])


class Load:
    """Chat requests from several clients at once, until told to stop. Knows which were answered, whole."""

    def __init__(self, url: str, clients: int = 6, pause_s: float = 0.1) -> None:
        self._url = url
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self.answered: list[str] = []
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, number: int) -> None:
        with httpx2.Client(base_url=self._url, timeout=20) as client:
            while not self._stopping.wait(self._pause_s):
                request_id = str(uuid.uuid4())
                headers = {"x-request-id": request_id, "x-ibex-session-id": f"load-{number}"}
                body = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "Hello?"}]}
                try:
                    response = client.post(CHAT, json=body, headers=headers)
                    is_whole = response.status_code == 200 and response.content == b"".join(ANSWER)
                except httpx2.TransportError:
                    is_whole = False
                (self.answered if is_whole else self.failed).append(request_id)


def eventually(is_so: Callable[[], bool], explain: Callable[[], Any] = lambda: "", limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {limit_s} s: {explain()}"
        time.sleep(0.1)


@contextmanager
def chain(
    binary: Path, directory: Path, postgres: postgres_side.Database, observers: int = 1, notice_s: float = 0.0
) -> Iterator[Chain]:
    """`notice_s`: between SIGTERM and an observer's end, for Envoy to send new streams elsewhere."""
    with (
        valkey_side.valkey(directory / "valkey") as valkey,
        clickhouse_side.running(directory / "clickhouse") as clickhouse,
        provide() as provider,
    ):
        provider.script = Script(ANSWER)
        settings = {
            "IBEX_DATABASE_URL": postgres.url,
            "IBEX_BROKER_URL": valkey.url,
            "IBEX_CLICKHOUSE_URL": clickhouse.url,
            "IBEX_WATCHDOG_S": "0",
            "IBEX_NOTICE_S": str(notice_s),
            **dict(setting.split("=", 1) for setting in DROPIN_IDENTITY[1:]),
        }
        started = [Observer(directory, settings) for _ in range(observers)]
        proxy = _envoy(binary, directory, [each.address for each in started], provider)
        try:
            for each in started:
                each.start()
            proxy.wait_ready(45)
            listen = envoy.load(directory / "envoy.yaml")["static_resources"]["listeners"][0]["address"]
            port = listen["socket_address"]["port_value"]
            one = Chain(f"http://127.0.0.1:{port}", proxy, started, postgres, valkey, clickhouse)
            one.await_observer()
            yield one
        finally:
            for each in started:
                each.kill()
            proxy.stop()


def _envoy(binary: Path, directory: Path, observers: list[Address], provider: Provider) -> envoy.Envoy:
    """Without a gate and a context filter: what is drilled here comes after the answer."""
    plan = envoy.Plan(
        listen=Address("127.0.0.1", envoy.free_port()),
        admin=Address("127.0.0.1", envoy.free_port()),
        filters=[Address("127.0.0.1", envoy.free_port())],
        observers=observers,
        provider=envoy.Provider(provider.address),
        org_id=ORG,
        agent_id=AGENT,
    )
    config = envoy.render(envoy.load(envoy.shipped("dropin.yaml")), plan)
    _be_patient(config)
    file = envoy.write(config, directory / "envoy.yaml")
    return envoy.start(binary, file, plan.admin, state_dir=directory)


def _be_patient(config: envoy.Node) -> None:
    """A busy machine's observer may be late with a ping or a check, and then streams would pass unobserved.

    One that was killed, or says that it is leaving, is found out as fast as ever. What it has not read a second after
    the answer's end would be cut off, too.
    """
    envoy._http_filter(config, "ibex.observer")["typed_config"]["deferred_close_timeout"] = "60s"
    cluster = envoy._cluster(config, envoy.OBSERVER_CLUSTER)
    cluster["health_checks"][0]["timeout"] = "10s"
    keep_pinging(cluster, "20s")
