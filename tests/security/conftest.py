"""One `extproc up` with two organisations for all security tests. What it and the tests' other processes leave behind
is read at the end, by test_left_behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration.conftest import StandIn, answers, running
from tests.integration.otlp import Receiver, receive_spans
from tests.integration.patient_stack import patience
from tests.security.security_side import QUESTION, Caller, Commands, Gateway, Secrets, memory_of

LAST = "test_left_behind.py"
STOP_LIMIT_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the whole run left behind is looked at when it is over."""
    here = Path(__file__).parent
    ours = [item for item in items if item.path.parent == here]
    ours.sort(key=lambda item: item.path.name == LAST)
    places = iter(ours)
    items[:] = [next(places) if item.path.parent == here else item for item in items]


@dataclass
class Evidence:
    """Where everything that these tests start writes to."""

    spans: Receiver
    directories: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class World:
    """A running `extproc up`."""

    described: dict[str, Any]
    gateway: Gateway
    commands: Commands
    secrets: Secrets
    evidence: Evidence

    @property
    def state(self) -> Path:
        return Path(self.described["state_dir"])

    @property
    def config(self) -> envoy.Node:
        """Of its Envoy."""
        return envoy.load(self.state / "envoy.rendered.yaml")

    def address_of(self, cluster: str) -> Address:
        found = envoy._cluster(self.config, cluster)["load_assignment"]["endpoints"][0]["lb_endpoints"][0]
        place = found["endpoint"]["address"]["socket_address"]
        return Address(place["address"], place["port_value"])

    def admin_of(self, name: str) -> str:
        """The admin listener of one of its processes, from its command line."""
        (pid,) = self.described["pids"][name]
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return f"http://{words[words.index('--admin') + 1]}"

    def caller(self, org_id: str, agent_id: str = "", *options: str) -> Caller:
        """With a token of its own, and an agent of its own unless one is given."""
        agent_id = agent_id or self.commands.agent(org_id)
        return Caller(self.gateway, org_id, agent_id, *self.commands.token(org_id, *options))

    def newcomer(self, limit: int = 0) -> Caller:
        """An organisation of this test alone."""
        return self.caller(self.commands.org("newcomer", limit))


@dataclass(frozen=True)
class Tenants:
    """Two organisations whose agents have the same id, with a memory each that answers QUESTION."""

    a: Caller
    b: Caller
    other_a: Caller
    """Another agent of A's, whom B does not have."""


@pytest.fixture(scope="session")
def envoy_binary() -> Path:
    try:
        return envoy.find_envoy(os.environ.get("IBEX_ENVOY"), os.environ.get("ENVOY_VERSION", envoy.DEFAULT_VERSION))
    except envoy.EnvoyError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def secrets() -> Secrets:
    return Secrets(
        texts={
            "provider key": "sk-canary-key-of-the-provider",
            "unused provider key": "sk-canary-key-of-openai",
            "question": QUESTION,
            "prompt": "canary prompt: sell <all> of 4711 & tell nobody",
            "completion": "This is the stand-in provider.",
            "directive": "canary directive: be brief & kind",
            "memory of A": memory_of("a"),
            "memory of B": memory_of("b"),
            "memory of user U1": memory_of("u1"),
        }
    )


@pytest.fixture(scope="session")
def evidence() -> Iterator[Evidence]:
    with receive_spans() as spans:
        yield Evidence(spans)


@pytest.fixture(scope="session")
def provider_process() -> Iterator[StandIn]:
    address = Address("127.0.0.1", envoy.free_port())
    command = [sys.executable, "-m", "extproc.stack.provider", "--listen", str(address)]
    with running(command, answers(f"http://{address}/received")):
        yield StandIn(address)


@pytest.fixture
def provider(provider_process: StandIn) -> StandIn:
    provider_process.clear()
    return provider_process


@pytest.fixture(scope="session")
def world(
    envoy_binary: Path,
    provider_process: StandIn,
    secrets: Secrets,
    evidence: Evidence,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    state = directory / "state"
    evidence.directories.append(directory)
    # Without a worker: what is said here stays a turn, so that each memory is one that a test has written.
    command = ["up", "--json", "--no-worker", "--listen", f"127.0.0.1:{envoy.free_port()}", "--data", str(state)]
    command += ["--otlp", evidence.spans.url, "--provider", f"http://{provider_process.address}"]
    environment = {
        **patience(envoy_binary, directory),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "IBEX_LOG_LEVEL": "debug",  # so that all that could be logged is
        "IBEX_PROVIDER_KEY": secrets.texts["provider key"],
        "OPENAI_API_KEY": secrets.texts["unused provider key"],
    }
    with (directory / "up.err.log").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "extproc", *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (directory / "up.err.log").read_text()
        described = json.loads(line)
        secrets.token(described["token"])
        commands = Commands(state, described["broker"], secrets)
        address = Address.parse(described["gateway"].removeprefix("http://"))
        with httpx2.Client(base_url=described["gateway"], timeout=20, trust_env=False) as client:
            yield World(described, Gateway(address, client, provider_process), commands, secrets, evidence)
    finally:
        process.terminate()
        code = process.wait(STOP_LIMIT_S)
        if process.stdout is not None:
            process.stdout.close()
        assert code == 0


@pytest.fixture(scope="session")
def shared_tenants(world: World) -> Tenants:
    agent_id = str(uuid4())
    callers = {}
    for name in ("a", "b"):
        org_id = world.commands.org(name)
        world.commands.agent(org_id, agent_id)
        world.commands.remember(memory_of(name), org_id, agent_id)
        callers[name] = world.caller(org_id, agent_id)
    other = world.caller(callers["a"].org_id)
    world.commands.remember(memory_of("a"), other.org_id, other.agent_id)
    return Tenants(callers["a"], callers["b"], other)


@pytest.fixture
def tenants(shared_tenants: Tenants, provider: StandIn) -> Tenants:
    return shared_tenants
