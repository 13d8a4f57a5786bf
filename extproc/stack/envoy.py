"""Envoy on one machine: find the binary, fit the shipped configuration to this machine's ports, start it, stop it.

The configuration that runs here is the one that is shipped: `render` changes addresses, identity and provider in it,
and nothing else. A name that the file does not have is an error, so that a renamed cluster cannot go unnoticed.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from typing_extensions import override

from extproc.stack.child import die_with_parent
from extproc.stack.keys import Key

__all__ = [
    "Address",
    "Certificate",
    "Envoy",
    "EnvoyError",
    "Plan",
    "Provider",
    "find_envoy",
    "free_port",
    "load",
    "render",
    "shipped",
    "start",
    "write",
]

DEFAULT_VERSION = "1.40.0"
PROVIDER_PREFIX = "provider_"
"""Every cluster whose name begins so is an LLM provider."""
UNKNOWN_MODEL_ROUTE = "provider_not_configured"
"""The route that answers 501."""
FILTER_CLUSTER = "extproc_filter"
GATE_CLUSTER = "extproc_gate"
OBSERVER_CLUSTER = "extproc_observer"
OBSERVER_FILTER = "ibex.observer"
COLLECTOR_CLUSTER = "otel_collector"
CREDENTIALS_FILTER = "credentials"
"""The filter of a provider's cluster that puts the provider's key in."""
IDENTITY_FILTER = "identity"
"""The set_metadata filter that says whose requests these are, in a configuration without a gate."""
CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, macOS
)

TLS_CIPHERS = (
    "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
    "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
)
"""Of TLS 1.2, in the order preferred; in brackets, the client's order counts. BoringSSL's syntax."""

TYPE_PREFIX = "type.googleapis.com/"
Node = dict[str, Any]
"""One object of Envoy's configuration, as YAML gives it."""


class EnvoyError(Exception):
    """Envoy cannot be found, configured or started. The message says what to do."""


class Address(NamedTuple):
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `host:port` or `[v6]:port`; port 0 to 65535. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not (colon and host and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
            raise ValueError(f"{text!r} is not host:port")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    @override
    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Certificate(NamedTuple):
    """What the gateway shows its clients, as PEM files."""

    chain: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Provider:
    """Where every provider cluster points. Raises EnvoyError for a key that would leave this machine in the clear."""

    address: Address
    tls: bool = False
    base_path: str = ""
    """Put before each path; without the `/v1` that request paths bring themselves."""
    ca_file: Path | None = None
    """Certificates that are trusted; None: the system's."""
    key: Key | None = None
    """What it wants with each request; None: nothing is sent."""

    def __post_init__(self) -> None:
        if self.key is not None and not self.tls and not _is_loopback(self.address.host):
            raise EnvoyError(
                f"The key in {self.key.variable} would go to {self.authority} over plain HTTP, for all to read: "
                "give the provider's URL as https://, or unset the variable."
            )

    @classmethod
    def parse(cls, url: str, ca_file: Path | None = None) -> Provider:
        """From `http://host[:port][/path]` or `https://…`, as one gives a base URL to a client. Raises EnvoyError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise EnvoyError(f"The provider URL {url!r} cannot be read: {error}.") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise EnvoyError(f"The provider URL {url!r} must be http://host or https://host, with a port where needed.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise EnvoyError(
                "The provider URL must hold no credential, query or fragment; put the key into the environment."
            )
        tls = parts.scheme == "https"
        base_path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(Address(parts.hostname, port or (443 if tls else 80)), tls, base_path, ca_file)

    @property
    def authority(self) -> str:
        """The Host header: without the scheme's own port."""
        port_is_implied = self.address.port == (443 if self.tls else 80)
        return str(self.address).rpartition(":")[0] if port_is_implied else str(self.address)


@dataclass(frozen=True, slots=True)
class Plan:
    """What differs between the shipped configuration and this machine. None leaves the shipped value."""

    listen: Address
    admin: Address
    filters: Sequence[Address] = ()
    """Endpoints of the filter; none: the shipped one."""
    gates: Sequence[Address] = ()
    """Endpoints of the gate; none: the shipped one, if it has any."""
    observers: Sequence[Address] = ()
    """Endpoints of the observer; none: nothing is observed."""
    provider: Provider | None = None
    any_model: bool = False
    """The provider knows every model: none is answered 501."""
    org_id: str | None = None
    """Whose requests these are where no gate says it, like `agent_id`."""
    agent_id: str | None = None
    tls: Certificate | None = None
    """None: plain HTTP."""
    key_files: Path | None = None
    """Directory with the keys of shipped providers (docs/gateway.md); None: they come from the environment."""
    collector: Address | None = None
    """OTLP/HTTP receiver of spans; None: no tracing at all."""


def find_envoy(configured: str | None = None, version: str = DEFAULT_VERSION, *, root: Path | None = None) -> Path:
    """The Envoy binary: `configured` if given, else `.envoy/VERSION` in the checkout, else `envoy` on PATH.

    Raises EnvoyError. `configured` is never silently replaced by another one.
    """
    if configured:
        found = shutil.which(configured)
        if found is None:
            raise EnvoyError(
                f"{configured} is not an executable file; set IBEX_ENVOY to an Envoy binary (1.36 to 1.40)."
            )
        return Path(found)
    root = root or Path(__file__).parents[2]
    beside = sorted((root / ".envoy" / version).glob("lib/python*/site-packages/envoy/_bin/envoy"))
    if beside:
        return beside[0]
    if found := shutil.which("envoy"):
        return Path(found)
    raise EnvoyError(
        f"No Envoy found in {root / '.envoy' / version} or on PATH. In a checkout run `make setup` "
        f"(`make setup-envoys` for all tested versions); elsewhere set IBEX_ENVOY to an Envoy binary (1.36 to 1.40)."
    )


def shipped(name: Literal["envoy.yaml", "dropin.yaml", "dropin-jwt.yaml"]) -> Path:
    """A configuration of this project: from the checkout, else from the installed package. Raises EnvoyError."""
    here = Path(__file__)
    places = (here.parents[2] / "envoy" / name, here.parent / "shipped" / name)
    for place in places:
        if place.is_file():
            return place
    raise EnvoyError(f"{name} is neither at {places[0]} nor at {places[1]}: the installation is incomplete.")


def load(file: Path) -> Node:
    """Raises EnvoyError when the file holds no YAML object."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise EnvoyError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise EnvoyError(f"{file} holds no Envoy configuration.")
    return config


def render(config: Node, plan: Plan) -> Node:
    """The same configuration for this machine, as a new object. Raises EnvoyError for a name that it does not have."""
    config = _copy(config)
    set_admin(config, plan.admin)
    set_listener(config, plan.listen)
    if plan.tls is not None:
        set_tls(config, plan.tls)
    if plan.key_files is not None:
        set_key_files(config, plan.key_files)
    if plan.filters:
        set_cluster(config, FILTER_CLUSTER, plan.filters)
    if plan.gates:
        set_cluster(config, GATE_CLUSTER, plan.gates)
    if plan.observers:
        set_cluster(config, OBSERVER_CLUSTER, plan.observers)
    else:
        drop_observer(config)
    if plan.any_model:
        route_any_model(config)
    if plan.provider is not None:
        set_provider(config, plan.provider)
    if plan.org_id is not None or plan.agent_id is not None:
        set_identity(config, org_id=plan.org_id, agent_id=plan.agent_id)
    if plan.collector is None:
        drop_tracing(config)
    else:
        set_collector(config, plan.collector)
    return config


def write(config: Node, file: Path) -> Path:
    """Write a rendered configuration where only this user can read it; its directory is made when absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_text(yaml.dump(config, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def set_admin(config: Node, address: Address) -> None:
    if "admin" not in config:
        raise EnvoyError("The configuration has no admin address; Envoy's readiness is asked there.")
    config["admin"]["address"] = _socket_address(address)


def set_listener(config: Node, address: Address) -> None:
    """Of a configuration with one listener."""
    listeners = config["static_resources"]["listeners"]
    if len(listeners) != 1:
        raise EnvoyError(f"The configuration has {len(listeners)} listeners; one was expected.")
    listeners[0]["address"] = _socket_address(address)
    # With it, a second Envoy on the same port would get half of the connections and nobody would be told.
    listeners[0]["enable_reuse_port"] = False


def set_tls(config: Node, certificate: Certificate) -> None:
    """Answer in HTTPS instead of HTTP."""
    (listener,) = config["static_resources"]["listeners"]
    for chain in listener["filter_chains"]:
        chain["transport_socket_connect_timeout"] = "10s"
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": TYPE_PREFIX + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "cipher_suites": list(TLS_CIPHERS)},
                    "tls_certificates": [
                        {
                            "certificate_chain": {"filename": str(certificate.chain)},
                            "private_key": {"filename": str(certificate.key)},
                        }
                    ],
                },
            },
        }


def set_cluster(config: Node, name: str, addresses: Sequence[Address]) -> None:
    """Give a cluster these endpoints."""
    cluster = _cluster(config, name)
    endpoints = [{"endpoint": {"address": _socket_address(address)}} for address in addresses]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]


def set_identity(config: Node, *, org_id: str | None, agent_id: str | None) -> None:
    """Whose requests these are, for every request of the listener."""
    entries = _http_filter(config, IDENTITY_FILTER)["typed_config"]["metadata"]
    given = {"org_id": org_id, "agent_id": agent_id}
    entries[0]["value"].update({key: value for key, value in given.items() if value is not None})


def route_any_model(config: Node) -> None:
    """Send a model that no route names to a provider instead of answering 501."""
    provider = next(cluster["name"] for cluster in _clusters(config) if cluster["name"].startswith(PROVIDER_PREFIX))
    route = _named(_routes(config), UNKNOWN_MODEL_ROUTE, "route")
    del route["direct_response"], route["typed_per_filter_config"]
    route["route"] = {"cluster": provider, "timeout": "0s", "auto_host_rewrite": True}


def set_provider(config: Node, provider: Provider) -> None:
    """Send every provider cluster to one address, with its host name and key, over TLS when it says so."""
    clusters = [cluster for cluster in _clusters(config) if cluster["name"].startswith(PROVIDER_PREFIX)]
    if not clusters:
        raise EnvoyError(f"The configuration has no cluster whose name begins with {PROVIDER_PREFIX}.")
    for cluster in clusters:
        _point(config, cluster, provider)
    names = {cluster["name"] for cluster in clusters}
    for route in _routes(config):
        action = route.get("route", {})
        if action.get("cluster") in names:
            action.pop("auto_host_rewrite", None)
            action["host_rewrite_literal"] = provider.authority
            if provider.base_path:
                action["regex_rewrite"] = {
                    "pattern": {"regex": "^/"},
                    "substitution": provider.base_path.replace("\\", "\\\\") + "/",
                }


def _point(config: Node, cluster: Node, provider: Provider) -> None:
    set_cluster(config, cluster["name"], [provider.address])
    is_static = _is_ip(provider.address.host)
    cluster["type"] = "STATIC" if is_static else "STRICT_DNS"
    cluster.pop("dns_lookup_family", None)
    if not is_static:
        cluster["dns_lookup_family"] = "V4_PREFERRED"
    cluster.pop("transport_socket", None)
    (options,) = cluster["typed_extension_protocol_options"].values()
    offered = options.pop("auto_config", {})
    options.pop("explicit_http_config", None)
    if provider.tls:
        cluster["transport_socket"] = _tls(provider)
        options["auto_config"] = offered  # HTTP/2, if the handshake says so
    else:
        options["explicit_http_config"] = {"http_protocol_options": {}}
    if credentials := _credentials(cluster):
        _take_key(credentials)
        if provider.key is not None:
            credentials["mutations"]["request_mutations"].append(_overwrite(provider.key.header, provider.key.value))


def set_key_files(config: Node, directory: Path) -> None:
    """Take each provider's key from `directory/NAME.yaml` (`extproc.stack.keys.write`) instead of the environment.

    NAME is the cluster's without `provider_`. Envoy reads a file again when another one is moved into its place.
    """
    for cluster in _clusters(config):
        if cluster["name"].startswith(PROVIDER_PREFIX) and (credentials := _credentials(cluster)):
            header = _take_key(credentials)
            (options,) = cluster["typed_extension_protocol_options"].values()
            file = directory / f"{cluster['name'].removeprefix(PROVIDER_PREFIX)}.yaml"
            options["http_filters"].insert(-1, _key_from(file, cluster["name"], header))


def _credentials(cluster: Node) -> Node | None:
    """The settings of a provider's filter `credentials`; None where the key is the client's own (dropin.yaml)."""
    (options,) = cluster["typed_extension_protocol_options"].values()
    for entry in options.get("http_filters", []):
        if entry["name"] == CREDENTIALS_FILTER:
            settings: Node = entry["typed_config"]
            return settings
    return None


def _take_key(credentials: Node) -> str:
    """Remove the key from it; returns the header that it was in."""
    mutations = credentials["mutations"]["request_mutations"]
    (found,) = (one for one in mutations if "%ENVIRONMENT(" in one["append"]["header"]["value"])
    mutations.remove(found)
    header: str = found["append"]["header"]["key"]
    return header


def _overwrite(header: str, value: str) -> Node:
    return {"append": {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD", "header": {"key": header, "value": value}}}


def _key_from(file: Path, secret: str, header: str) -> Node:
    source = {"path": str(file), "watched_directory": {"path": str(file.parent)}}
    generic = {
        "@type": TYPE_PREFIX + "envoy.extensions.http.injected_credentials.generic.v3.Generic",
        "credential": {"name": secret, "sds_config": {"path_config_source": source}},
        "header": header,
    }
    return {
        "name": "key",
        "typed_config": {
            "@type": TYPE_PREFIX + "envoy.extensions.filters.http.credential_injector.v3.CredentialInjector",
            "overwrite": True,
            "allow_request_without_credential": False,
            "credential": {"name": "envoy.http.injected_credentials.generic", "typed_config": generic},
        },
    }


def set_collector(config: Node, address: Address) -> None:
    """Send spans over OTLP/HTTP, so that Envoy, filter and engine share one receiver."""
    set_cluster(config, COLLECTOR_CLUSTER, [address])
    del _cluster(config, COLLECTOR_CLUSTER)["typed_extension_protocol_options"]
    uri = {"uri": f"http://{address}/v1/traces", "cluster": COLLECTOR_CLUSTER, "timeout": "0.25s"}
    for manager in _http_managers(config):
        tracer = manager["tracing"]["provider"]["typed_config"]
        del tracer["grpc_service"]
        tracer["http_service"] = {"http_uri": uri}


def drop_observer(config: Node) -> None:
    """No observer filter, in no route either, and no cluster for it."""
    for manager in _http_managers(config):
        manager["http_filters"] = [entry for entry in manager["http_filters"] if entry["name"] != OBSERVER_FILTER]
        hosts = manager["route_config"]["virtual_hosts"]
        for place in [*hosts, *(route for host in hosts for route in host["routes"])]:
            place.get("typed_per_filter_config", {}).pop(OBSERVER_FILTER, None)
    _drop_cluster(config, OBSERVER_CLUSTER)


def drop_tracing(config: Node) -> None:
    """No spans and no cluster for them."""
    for manager in _http_managers(config):
        manager.pop("tracing", None)
    _drop_cluster(config, COLLECTOR_CLUSTER)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port for a server that is about to start, which nobody else is given for a minute.

    A connection that ends on it leaves it in TIME_WAIT: the kernel hands it out no more, while a server that binds it
    by number with SO_REUSEADDR, as all of ours do, gets it. Just closed, the same port would come twice now and then.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, 0))
        listener.listen(1)
        address = listener.getsockname()
        with socket.create_connection(address[:2]), listener.accept()[0]:  # whose end closes first waits
            port: int = address[1]
            return port


@dataclass(slots=True)
class Envoy:
    """A running Envoy. Call `wait_ready` before use and `stop` at the end; both are bounded and may block that long."""

    process: subprocess.Popen[bytes]
    admin: Address
    log_file: Path
    """Envoy's own log (standard error)."""
    access_log_file: Path
    """One JSON line a request (standard output)."""

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Returns when the listeners take requests. Raises EnvoyError with the end of the log."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EnvoyError(f"Envoy ended with code {self.process.returncode}.\n{self.log_end()}")
            if _answers_ready(self.admin):
                return
            time.sleep(0.05)
        raise EnvoyError(f"Envoy was not ready within {timeout_s:g} s.\n{self.log_end()}")

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL. Does nothing when it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(grace_s)

    def log_end(self, lines: int = 20) -> str:
        try:
            return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def start(
    binary: Path,
    config_file: Path,
    admin: Address,
    *,
    state_dir: Path,
    concurrency: int = 2,
    log_level: str = "warning",
    environment: Mapping[str, str] | None = None,
) -> Envoy:
    """Start Envoy with `concurrency` worker threads. Raises EnvoyError.

    `environment` comes on top of ours: keys of providers that no other process is to have.
    `state_dir` gets envoy.log and envoy.access.log, new ones at each start.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    log_file, access_log_file = state_dir / "envoy.log", state_dir / "envoy.access.log"
    # Hot restart shares memory between all Envoys of a machine that have the same base id.
    command = [str(binary), "--config-path", str(config_file), "--disable-hot-restart"]
    command += ["--concurrency", str(concurrency), "--log-level", log_level, "--file-flush-interval-msec", "200"]
    try:
        with log_file.open("wb") as log, access_log_file.open("wb") as access_log:
            process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=access_log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
    except OSError as error:
        raise EnvoyError(f"{binary} cannot be started: {error}") from error
    return Envoy(process, admin, log_file, access_log_file)


def _answers_ready(admin: Address) -> bool:
    connection = http.client.HTTPConnection(admin.host, admin.port, timeout=1.0)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _clusters(config: Node) -> list[Node]:
    clusters: list[Node] = config["static_resources"]["clusters"]
    return clusters


def _cluster(config: Node, name: str) -> Node:
    return _named(_clusters(config), name, "cluster")


def _drop_cluster(config: Node, name: str) -> None:
    resources = config["static_resources"]
    resources["clusters"] = [cluster for cluster in resources["clusters"] if cluster["name"] != name]


def _http_filter(config: Node, name: str) -> Node:
    return _named(
        [entry for manager in _http_managers(config) for entry in manager["http_filters"]], name, "HTTP filter"
    )


def _named(nodes: list[Node], name: str, kind: str) -> Node:
    for node in nodes:
        if node.get("name") == name:
            return node
    known = ", ".join(str(node.get("name")) for node in nodes)
    raise EnvoyError(f"The configuration has no {kind} named {name!r}; it has: {known}.")


def _http_managers(config: Node) -> list[Node]:
    return [
        network_filter["typed_config"]
        for listener in config["static_resources"]["listeners"]
        for chain in listener["filter_chains"]
        for network_filter in chain["filters"]
        if network_filter["typed_config"]["@type"].endswith(".HttpConnectionManager")
    ]


def _routes(config: Node) -> list[Node]:
    return [
        route
        for manager in _http_managers(config)
        for host in manager["route_config"]["virtual_hosts"]
        for route in host["routes"]
    ]


def _socket_address(address: Address) -> Node:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def _tls(provider: Provider) -> Node:
    """TLS towards a provider: its certificate must be valid, trusted and for its host."""
    host = provider.address.host
    san = {"san_type": "IP_ADDRESS" if _is_ip(host) else "DNS", "matcher": {"exact": host}}
    context: Node = {
        "@type": TYPE_PREFIX + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": ["h2", "http/1.1"],
            "validation_context": {
                "trusted_ca": {"filename": str(provider.ca_file or system_ca_file())},
                "match_typed_subject_alt_names": [san],
            },
        },
    }
    if not _is_ip(host):  # RFC 6066: an address is no server name
        context["sni"] = host
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def system_ca_file() -> Path:
    """What this machine trusts: SSL_CERT_FILE, OpenSSL's own place, then the usual ones. Raises EnvoyError."""
    paths = ssl.get_default_verify_paths()
    for place in (os.environ.get(paths.openssl_cafile_env), paths.cafile, *CA_FILES):
        if place and Path(place).is_file():
            return Path(place)
    raise EnvoyError("No file of trusted certificates found; set SSL_CERT_FILE, or install ca-certificates.")


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback if _is_ip(host) else host.lower() == "localhost"


def _copy(node: Any) -> Any:
    """A deep copy in which a YAML alias is an object of its own, so that a change to one place stays there."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors: every object in full."""

    @override
    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True
