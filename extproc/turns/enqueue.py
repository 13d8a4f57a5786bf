"""Extraction tasks go to Redis or Valkey: one LPUSH for each batch, so that all of it is on the queue or nothing.

Nothing is tried twice here; the delivery does that. Nothing trims the list either: what waits too long is a matter of
the workers, and its length is a metric.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

from prometheus_client import Gauge
from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's own, which is no OSError
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)
from redis.sentinel import MasterNotFoundError

from extproc.turns.broker import Broker
from extproc.turns.broker_client import connect
from extproc.turns.celery_message import QUEUE, encode_message
from extproc.turns.sinks import ExtractionTask, Unavailable

__all__ = ["RedisTasks"]

_CONNECT_TIMEOUT_S = 2.0
_TIMEOUT_S = 3.0
"""Far above what an LPUSH takes. A server that stands still costs the delivery this much, once for each attempt."""

_QUEUE_LENGTH = Gauge(
    "ibex_extraction_queue_length", "Tasks that no worker has taken yet, as of the last that were sent from here"
)


class RedisTasks:
    """A `TaskSink`. One thread sends."""

    def __init__(self, url: str) -> None:
        """Reads `url` (see `extproc.turns.broker`) and connects to nothing yet. Raises BrokerUrlError."""
        self._broker = Broker.parse(url)
        self._client: Redis | RedisCluster | None = None

    def send(self, tasks: Sequence[ExtractionTask]) -> None:
        if not tasks:
            return
        messages = [encode_message(task, str(uuid.uuid4())) for task in tasks]
        try:
            if self._client is None:
                self._client = connect(self._broker, _CONNECT_TIMEOUT_S, _TIMEOUT_S)
            length = self._client.lpush(QUEUE, *messages)
        except (RedisError, RedisClusterException, OSError) as error:
            # The next attempt begins from the URL: names are looked up, Sentinels and nodes asked again.
            self.close()
            # Not `from error`: some of redis-py's errors hold the command with all its messages.
            raise Unavailable(f"the broker ({self._broker.where}) {_problem(error)}") from None
        _QUEUE_LENGTH.set(length)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


_WORD = re.compile(r"[A-Z]{2,20}\b")
_REFUSALS = {
    "DB": "has no database of that number; change it in IBEX_BROKER_URL, or `databases` there",
    "MISCONF": "refuses writes since it cannot write to its disk; see its log",
    "NOREPLICAS": "refuses writes since too few of its replicas are there",
    "WRONGTYPE": f"holds something else than a list at the key `{QUEUE}`; find out who writes it, rename or delete it",
}
"""By the word with which the server's error begins, where redis-py has no class for it (it removes `ERR` itself)."""


def _problem(error: Exception) -> str:
    """What is wrong and what to do. The server's words are never repeated: they may hold parts of the command."""
    match error:
        case AuthenticationError() | AuthorizationError():
            return "refuses the user or the password; check both in IBEX_BROKER_URL"
        case BusyLoadingError():
            return "is still loading its file after a start"
        case MasterNotFoundError():
            return "has no primary now, or its Sentinels cannot be reached or do not know that name"
        case TimeoutError():
            return "does not answer in time"
        case ConnectionError() | OSError():
            return f"cannot be reached: {error}"
        case RedisClusterException():
            return "is no cluster, or none of these nodes can be reached"
        case OutOfMemoryError():
            return "is full; give it more memory (`maxmemory`), or find out why no worker takes tasks"
        case ReadOnlyError():
            return "is a replica; name the primary in IBEX_BROKER_URL, or its Sentinels"
        case NoPermissionError():
            return f"does not let this user write; allow it LPUSH on the key `{QUEUE}`"
        case MasterDownError():
            return "has lost its primary"
        case ClusterDownError():
            return "is down as a cluster; see CLUSTER INFO on its nodes"
        case MovedError():
            return "is a node of a cluster; use redis+cluster:// in IBEX_BROKER_URL"
        case ResponseError():
            word = _WORD.match(str(error))
            return _REFUSALS.get(word.group() if word else "", "answers with an error that is not known here")
        case _:
            return f"failed: {type(error).__name__}"
