"""Envoy's configuration of the three set-ups: the same listener, with or without the external processor.

The processor's filter and cluster are read from the shipped `envoy/envoy.yaml`. What that file has besides (tracing,
access log, routing by model) is left out everywhere: it costs the same in every set-up and would only blur the
difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from bench.overhead.payload import AGENT_ID, ORG_ID, USER_ID
from extproc import names
from extproc.stack import envoy

__all__ = ["MAX_BODY_BYTES", "config"]

MAX_BODY_BYTES = 10 * 1024 * 1024

Node: TypeAlias = dict[str, Any]

_MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_HTTP = "type.googleapis.com/envoy.extensions.filters.http."


def config(listen_port: int, admin_port: int, upstream_port: int, processor_port: int | None) -> Node:
    """A whole configuration; `processor_port` None: without the external processor. Raises EnvoyError."""
    clusters = [_cluster("provider", upstream_port)]
    filters = [_identity()]
    if processor_port is not None:
        shipped = envoy.load(envoy.shipped("envoy.yaml"))
        filters.append(_processor(shipped))
        clusters.append(_processor_cluster(shipped, processor_port))
    filters.append({"name": "router", "typed_config": {"@type": _HTTP + "router.v3.Router"}})
    return {
        "admin": {"address": _address(admin_port)},
        "static_resources": {"listeners": [_listener(listen_port, filters)], "clusters": clusters},
    }


def _listener(port: int, http_filters: list[Node]) -> Node:
    manager = {
        "@type": _MANAGER,
        "stat_prefix": "gateway",
        "codec_type": "AUTO",
        "use_remote_address": True,
        "http_filters": http_filters,
        "route_config": {"virtual_hosts": [_virtual_host()]},
    }
    return {
        "name": "gateway",
        "address": _address(port),
        "per_connection_buffer_limit_bytes": MAX_BODY_BYTES,
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _virtual_host() -> Node:
    """The default headers stand where the processor did not answer: so fallbacks are counted."""
    defaults = {"x-ibex-memories-injected": "0", "x-ibex-context-tokens": "0", "x-ibex-context-fallback": "true"}
    return {
        "name": "gateway",
        "domains": ["*"],
        "response_headers_to_add": [
            {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
            for name, value in defaults.items()
        ],
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "provider", "timeout": "0s"}}],
    }


def _identity() -> Node:
    found = {"org_id": ORG_ID, "agent_id": AGENT_ID, "user_id": USER_ID}
    metadata = {"metadata_namespace": names.GATE_METADATA, "value": found}
    return {"name": "identity", "typed_config": {"@type": _HTTP + "set_metadata.v3.Config", "metadata": [metadata]}}


def _named(nodes: Iterable[Node], name: str) -> Node:
    for node in nodes:
        if node["name"] == name:
            return node
    raise envoy.EnvoyError(f"The shipped configuration has nothing named {name!r}.")


def _processor(shipped: Node) -> Node:
    managers = [
        network["typed_config"]
        for listener in shipped["static_resources"]["listeners"]
        for chain in listener["filter_chains"]
        for network in chain["filters"]
    ]
    found = _named((entry for manager in managers for entry in manager["http_filters"]), "ibex.context")
    # There it is off until a chat route turns it on; here every request is one.
    return {key: value for key, value in found.items() if key != "disabled"}


def _processor_cluster(shipped: Node, port: int) -> Node:
    cluster = _named(shipped["static_resources"]["clusters"], envoy.FILTER_CLUSTER)
    return cluster | {"load_assignment": _load_assignment(envoy.FILTER_CLUSTER, port)}


def _cluster(name: str, port: int) -> Node:
    return {
        "name": name,
        "connect_timeout": "5s",
        "type": "STATIC",
        "load_assignment": _load_assignment(name, port),
    }


def _load_assignment(cluster: str, port: int) -> Node:
    endpoint = {"endpoint": {"address": _address(port)}}
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": [endpoint]}]}


def _address(port: int) -> Node:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
