"""A redis-py client for every form of URL that `extproc.turns.broker` reads."""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from extproc.turns.broker import Broker, Mode

__all__ = ["connect"]

_SENTINEL_TIMEOUT_S = 0.5
"""For each Sentinel: they are asked one after the other, and answer from memory."""
_HEALTH_CHECK_S = 15
"""A connection that was idle for so long is tried with a PING: better that is lost than a batch."""


def connect(broker: Broker, connect_s: float, answer_s: float) -> Redis | RedisCluster:
    """A client, which connects when it is used; that of a cluster asks for the cluster's shape at once.

    Nothing is tried twice. `connect_s` and `answer_s`: limits in seconds.
    """
    options: dict[str, Any] = {
        "username": broker.username,
        "password": broker.password,
        "client_name": "ibex-extproc",
        "protocol": 2,  # all that is needed here, and what every server speaks
        **_limits(connect_s, answer_s),
        **_tls(broker),
    }
    no_retry = Retry(NoBackoff(), 0)
    match broker.mode:
        case Mode.SERVER:
            ((host, port),) = broker.addresses
            return Redis(host=host, port=port, db=broker.db, retry=no_retry, **options)
        case Mode.SOCKET:
            return Redis(unix_socket_path=broker.path, db=broker.db, retry=no_retry, **options)
        case Mode.SENTINEL:
            own = {
                "username": broker.sentinel_username,
                "password": broker.sentinel_password,
                "protocol": 2,
                "retry": no_retry,
                **_limits(_SENTINEL_TIMEOUT_S, _SENTINEL_TIMEOUT_S),
                **_tls(broker),
            }
            sentinels = Sentinel(broker.addresses, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
            primary: Redis = sentinels.master_for(  # type: ignore[no-untyped-call]
                broker.master, db=broker.db, retry=no_retry, **options
            )
            return primary
        case Mode.CLUSTER:
            nodes = [ClusterNode(host, port) for host, port in broker.addresses]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, retry=no_retry, **options)


def _limits(connect_s: float, answer_s: float) -> dict[str, Any]:
    return {
        "socket_connect_timeout": connect_s,
        "socket_timeout": answer_s,
        "socket_keepalive": True,
        "health_check_interval": _HEALTH_CHECK_S,
    }


def _tls(broker: Broker) -> dict[str, Any]:
    return {} if broker.tls is None else {"ssl": True, **broker.tls}
