"""A real Envoy between a client and the stand-in provider, on free ports, with a context filter that the test controls.

`envoy.yaml` has a real gate, which lets one token pass (`http_side.TOKEN`, of ORG and AGENT); a gateway's client sends
it with every request.

`ENVOY_VERSION` picks the Envoy (`make setup-envoys` installs them), `IBEX_ENVOY` a binary.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest

from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration.http_side import AUTHORIZED
from tests.integration.processor import Processor, serve

ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
DROPIN_IDENTITY = [
    "env",
    "IBEX_IDENTITY_ORG=metadata:ibex.identity/org_id",
    "IBEX_IDENTITY_AGENT=header:x-ibex-agent-id,metadata:ibex.identity/agent_id",
    "IBEX_IDENTITY_USER=header:x-ibex-user-id",
]
"""The beginning of a command whose process stands beside dropin.yaml, as it says there under A."""
UP_S = 90.0
"""For the start of a process, which takes a second unless the machine is busy."""
File = Literal["envoy.yaml", "dropin.yaml"]
Change = Callable[[envoy.Node], None]


@dataclass(frozen=True)
class Received:
    """A request as it reached the provider."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.headers}


@dataclass(frozen=True)
class StandIn:
    """The stand-in provider, in a process of its own."""

    address: Address

    def clear(self) -> None:
        httpx2.delete(f"http://{self.address}/received", timeout=20).raise_for_status()

    def received(self) -> list[Received]:
        entries = httpx2.get(f"http://{self.address}/received", timeout=20).raise_for_status().json()
        return [
            Received(
                entry["method"],
                entry["path"],
                [(name.lower(), value) for name, value in entry["headers"].items()],
                base64.b64decode(entry["body"]),
            )
            for entry in entries
        ]

    def last(self) -> Received:
        return self.received()[-1]


@dataclass(frozen=True)
class Gateway:
    """A running Envoy and what stands around it."""

    url: str
    address: Address
    admin: Address
    envoy: envoy.Envoy
    client: httpx2.Client
    """Sends the token."""

    def post(self, path: str, **arguments: Any) -> httpx2.Response:
        return self.client.post(path, **arguments)

    def chat(self, **arguments: Any) -> httpx2.Response:
        """A plain chat request, of OpenAI's shape."""
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
        return self.client.post("/v1/chat/completions", json=body, **arguments)

    def access_log(self, request_id: str) -> dict[str, Any]:
        """The access log's line of a request; waits for it, 20 s at most."""
        for _ in range(400):
            for line in self.envoy.access_log_file.read_text().splitlines():
                entry: dict[str, Any] = json.loads(line)
                if entry["request_id"] == request_id:
                    return entry
            time.sleep(0.05)
        raise AssertionError(f"no access log line for {request_id}")

    def stat(self, name: str) -> int:
        text = httpx2.get(f"http://{self.admin}/stats", params={"filter": f"^{name}$"}, timeout=20).text
        return int(text.rpartition(":")[2])


@pytest.fixture(scope="session")
def envoy_version() -> str:
    return os.environ.get("ENVOY_VERSION", envoy.DEFAULT_VERSION)


@pytest.fixture(scope="session")
def envoy_binary(envoy_version: str) -> Path:
    try:
        return envoy.find_envoy(os.environ.get("IBEX_ENVOY"), envoy_version)
    except envoy.EnvoyError as error:
        pytest.fail(str(error))


@contextmanager
def running(
    command: list[str], is_up: Callable[[], bool], cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is up within UP_S, and gone at the end."""
    process = subprocess.Popen(command, cwd=cwd)
    try:
        deadline = time.monotonic() + UP_S
        while not is_up():
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command} is not up within {UP_S} s"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait(10)


def answers(url: str) -> Callable[[], bool]:
    def is_up() -> bool:
        try:
            return httpx2.get(url, timeout=1).is_success
        except httpx2.TransportError:
            return False

    return is_up


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
def processor_address() -> Address:
    return Address("127.0.0.1", envoy.free_port())


@pytest.fixture(scope="session")
def processor_server(processor_address: Address) -> Iterator[Processor]:
    processor = Processor()
    server = serve(processor, str(processor_address))
    yield processor
    server.stop(0).wait(10)


@pytest.fixture
def processor(processor_server: Processor) -> Processor:
    """The filter of `gateway` and `dropin`: healthy, seven memories, unless a test says otherwise."""
    processor_server.reset()
    return processor_server


@pytest.fixture(scope="session")
def gate_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A gate in a process of its own, without a limit."""
    from tests.integration.gate.gate_side import open_gate

    with open_gate(tmp_path_factory.mktemp("gate")) as address:
        yield address


@contextmanager
def started(
    binary: Path,
    file: File,
    directory: Path,
    filters: list[Address],
    provider: Address | envoy.Provider,
    change: Change | None = None,
    collector: Address | None = None,
    gate: Address | None = None,
    is_patient: bool = True,
) -> Iterator[Gateway]:
    """`gate`: of envoy.yaml, which answers 503 without one. `is_patient`: with a filter that may take its time."""
    plan = envoy.Plan(
        listen=Address("127.0.0.1", envoy.free_port()),
        admin=Address("127.0.0.1", envoy.free_port()),
        filters=filters,
        gates=[gate] if gate is not None else [],
        provider=provider if isinstance(provider, envoy.Provider) else envoy.Provider(provider),
        org_id=ORG if file == "dropin.yaml" else None,
        agent_id=AGENT if file == "dropin.yaml" else None,
        collector=collector,
    )
    config = envoy.render(envoy.load(envoy.shipped(file)), plan)
    if is_patient:
        patient(config)
    if gate is not None:
        trust_gate(config)
    if change is not None:
        change(config)
    process = envoy.start(binary, envoy.write(config, directory / "envoy.yaml"), plan.admin, state_dir=directory)
    try:
        process.wait_ready(45)
        url = f"http://{plan.listen}"
        with httpx2.Client(base_url=url, timeout=20, headers=AUTHORIZED) as client:
            yield Gateway(url, plan.listen, plan.admin, process, client)
    finally:
        process.stop()


def trust_gate(config: envoy.Node) -> None:
    """On a busy machine a healthy gate may miss 300 ms, or health checks; what happens then is tested in gate/."""
    envoy._http_filter(config, "ibex.gate")["typed_config"]["grpc_service"]["timeout"] = "5s"
    cluster = envoy._cluster(config, envoy.GATE_CLUSTER)
    cluster["connect_timeout"] = "5s"
    cluster["health_checks"][0]["unhealthy_threshold"] = 100


def open_selfhosted(config: envoy.Node) -> None:
    """As an operator does who has put a server of their own there."""
    for route in envoy._routes(config):
        if "runtime_fraction" in route["match"]:
            route["match"]["runtime_fraction"]["default_value"]["numerator"] = 100


def patient(config: envoy.Node) -> None:
    """Twenty times the shipped `message_timeout`: on a busy machine a filter of Python may miss 100 ms now and then.

    And a connection to it, or a ping on it, more than that. What happens when it does is tested with the shipped
    values, in test_envoy_failures and in whole/.
    """
    envoy._http_filter(config, "ibex.context")["typed_config"]["message_timeout"] = "2s"
    cluster = envoy._cluster(config, envoy.FILTER_CLUSTER)
    cluster["connect_timeout"] = "5s"
    keep_pinging(cluster, "20s")


def keep_pinging(cluster: envoy.Node, timeout: str) -> None:
    """How long Envoy waits for the answer to a ping before it gives a connection up."""
    (options,) = cluster["typed_extension_protocol_options"].values()
    options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]["timeout"] = timeout


@pytest.fixture(scope="session")
def shared_gateway(
    envoy_binary: Path,
    provider_process: StandIn,
    processor_address: Address,
    gate_address: Address,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("gateway")
    address, filters = provider_process.address, [processor_address]

    with started(
        envoy_binary, "envoy.yaml", directory, filters, address, open_selfhosted, gate=gate_address
    ) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def shared_dropin(
    envoy_binary: Path,
    provider_process: StandIn,
    processor_address: Address,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("dropin")
    address = provider_process.address
    with started(envoy_binary, "dropin.yaml", directory, [processor_address], address) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway, processor: Processor, provider: StandIn) -> Gateway:
    """envoy.yaml with a healthy filter."""
    return shared_gateway


@pytest.fixture
def dropin(shared_dropin: Gateway, processor: Processor, provider: StandIn) -> Gateway:
    """dropin.yaml with a healthy filter."""
    return shared_dropin


@pytest.fixture(params=["envoy.yaml", "dropin.yaml"])
def either(request: pytest.FixtureRequest) -> Gateway:
    """Both files, one after the other."""
    name = "gateway" if request.param == "envoy.yaml" else "dropin"
    chosen: Gateway = request.getfixturevalue(name)
    return chosen


@pytest.fixture(scope="session")
def unserved_gateway(
    envoy_binary: Path, provider_process: StandIn, gate_address: Address, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """envoy.yaml with nothing where the filter should be."""
    nobody = Address("127.0.0.1", envoy.free_port())
    directory = tmp_path_factory.mktemp("unserved")
    address = provider_process.address
    with started(envoy_binary, "envoy.yaml", directory, [nobody], address, gate=gate_address) as gateway:
        yield gateway
