"""envoy.yaml with its own TLS, keys and routes, sent to a provider on this machine; and an Envoy that stands for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil
import yaml

from extproc.stack import envoy
from extproc.stack.envoy import Address, Plan
from tests.integration.conftest import open_selfhosted, trust_gate
from tests.integration.http_side import AUTHORIZED

T = TypeVar("T")
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
"""The gateway sends it to OpenAI."""
gates: list[Address] = []
"""The one gate that all of these gateways ask; the fixture `gate` puts it here."""
MODELS = {"openai": "gpt-4o-mini", "anthropic": "claude-sonnet-4", "selfhosted": "owner/name"}


@dataclass(frozen=True)
class Running:
    plan: Plan
    envoy: envoy.Envoy
    client: httpx2.Client

    def chat(self, model: str = "gpt-4o-mini", path: str = "/v1/chat/completions", **arguments: Any) -> httpx2.Response:
        return self.client.post(path, json={**CHAT, "model": model}, **arguments)

    def admin(self, path: str) -> str:
        return httpx2.get(f"http://{self.plan.admin}{path}", timeout=10).raise_for_status().text

    def stat(self, name: str) -> int:
        """A counter or gauge; 0 while Envoy has no such thing."""
        text = httpx2.get(f"http://{self.plan.admin}/stats", params={"filter": f"^{name}$"}, timeout=20).text
        return int(text.rpartition(":")[2] or "0")

    def cpu_s(self) -> float:
        """Processor time of Envoy so far: other processes of a busy machine are not in it."""
        times = psutil.Process(self.envoy.process.pid).cpu_times()
        return times.user + times.system

    def access_log(self, request_id: str) -> dict[str, Any]:
        """The line of a request; waits for it, 20 s at most."""

        def find() -> dict[str, Any] | None:
            lines = map(json.loads, self.envoy.access_log_file.read_text().splitlines())
            return next((line for line in lines if line["request_id"] == request_id), None)

        line = eventually(find, 20.0)
        assert line
        return line


def fitting(**given: Any) -> Plan:
    """On free ports, with a gate and nothing else behind it."""
    listen, admin = (Address("127.0.0.1", envoy.free_port()) for _ in range(2))
    return Plan(listen, admin, **{"gates": gates, **given})


@contextmanager
def running(
    binary: Path,
    directory: Path,
    plan: Plan,
    *,
    change: Callable[[envoy.Node], None] | None = None,
    environment: Mapping[str, str] | None = None,
    verify: Any = True,
    file: Path | None = None,
    http2: bool = False,
) -> Iterator[Running]:
    config = envoy.render(envoy.load(file or envoy.shipped("envoy.yaml")), plan)
    if plan.gates:
        trust_gate(config)
    if change is not None:
        change(config)
    written = envoy.write(config, directory / "envoy.yaml")
    process = envoy.start(binary, written, plan.admin, state_dir=directory, environment=environment)
    try:
        process.wait_ready(45)
        url = f"http{'s' if plan.tls else ''}://localhost:{plan.listen.port}"
        with httpx2.Client(
            base_url=url, timeout=20, verify=verify, http1=not http2, http2=http2, headers=AUTHORIZED
        ) as client:
            yield Running(plan, process, client)
    finally:
        process.stop()


def as_shipped_to(
    provider: Address, ca_file: Path | None = None, selfhosted: Address | None = None
) -> Callable[[envoy.Node], None]:
    """Other addresses and another authority; TLS, names, keys, protocols and limits stay those of the file."""

    def redirect(config: envoy.Node) -> None:
        open_selfhosted(config)
        for cluster in provider_clusters(config):
            is_plain = "transport_socket" not in cluster
            envoy.set_cluster(config, cluster["name"], [selfhosted or provider if is_plain else provider])
            if ca_file and not is_plain:
                trusted = cluster["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
                trusted["trusted_ca"] = {"filename": str(ca_file)}

    return redirect


def provider_clusters(config: envoy.Node) -> list[envoy.Node]:
    return [cluster for cluster in envoy._clusters(config) if cluster["name"].startswith(envoy.PROVIDER_PREFIX)]


def eventually(ask: Callable[[], T], limit_s: float = 45.0) -> T:
    """The first answer that is true, or the last one after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not (answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


FRONT = """
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - name: front
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    listener_filters:
    - name: envoy.filters.listener.tls_inspector
      typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: [h2, http/1.1]
            tls_certificates: []
      filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          preserve_external_request_id: true
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: front
              domains: ["*"]
              request_headers_to_add:
              - header: {key: x-front-protocol, value: "%PROTOCOL%"}
              - header: {key: x-front-server-name, value: "%REQUESTED_SERVER_NAME%"}
              routes:
              - match: {prefix: /}
                route: {cluster: provider_behind, timeout: 0s}
  clusters:
  - name: provider_behind
    type: STATIC
    load_assignment: {cluster_name: provider_behind, endpoints: []}
"""
"""An Envoy in the place of a provider's own front: TLS, HTTP/2 and HTTP/1.1. It says how it was reached."""


@contextmanager
def front(binary: Path, directory: Path, certificate: envoy.Certificate, behind: Address) -> Iterator[Address]:
    """On `localhost`."""
    config = yaml.safe_load(FRONT)
    listen, admin = Address("127.0.0.1", envoy.free_port()), Address("127.0.0.1", envoy.free_port())
    envoy.set_admin(config, admin)
    envoy.set_listener(config, listen)
    envoy.set_cluster(config, "provider_behind", [behind])
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    chain["transport_socket"]["typed_config"]["common_tls_context"]["tls_certificates"] = [
        {
            "certificate_chain": {"filename": str(certificate.chain)},
            "private_key": {"filename": str(certificate.key)},
        }
    ]
    process = envoy.start(binary, envoy.write(config, directory / "front.yaml"), admin, state_dir=directory)
    try:
        process.wait_ready(45)
        yield Address("localhost", listen.port)
    finally:
        process.stop()
