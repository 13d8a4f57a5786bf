"""What the sink does without any server: errors in its own words, nothing built before it is needed."""

from __future__ import annotations

import pytest
from redis import Redis, exceptions
from redis.cluster import RedisCluster
from redis.sentinel import MasterNotFoundError, SentinelConnectionPool

from extproc.turns.broker import Broker, BrokerUrlError
from extproc.turns.broker_client import connect
from extproc.turns.enqueue import RedisTasks, _problem
from extproc.turns.sinks import ExtractionTask, TaskSink, Unavailable

TASK = ExtractionTask("task", "session", "org")
ECHO = "unknown command 'LPUSH', with args beginning with: 'extraction' '{\"body\":\"W1tdLHs' "


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (exceptions.AuthenticationError("WRONGPASS"), "user or the password"),
        (exceptions.AuthorizationError("no"), "user or the password"),
        (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "loading"),
        (exceptions.TimeoutError("Timeout reading from socket"), "in time"),
        (exceptions.ConnectionError("Error 111 connecting to a:1. Connection refused."), "Connection refused"),
        (OSError("no such thing"), "no such thing"),
        (MasterNotFoundError("No master found for 'm' : Redis<password=hunter2>"), "no primary"),
        (exceptions.RedisClusterException(f"No targets were found to execute {ECHO}"), "no cluster"),
        (exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "maxmemory"),
        (exceptions.ReadOnlyError("You can't write against a read only replica."), "replica"),
        (exceptions.NoPermissionError("User ada has no permissions"), "LPUSH"),
        (exceptions.MasterDownError("Link with MASTER is down"), "lost its primary"),
        (exceptions.ClusterDownError("The cluster is down"), "CLUSTER INFO"),
        (exceptions.MovedError("9748 10.0.0.1:6379"), "redis+cluster://"),
        (exceptions.ResponseError("WRONGTYPE Operation against a key"), "`extraction`"),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file: No space left"), "disk"),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."), "replicas"),
        (exceptions.ResponseError("DB index is out of range"), "database"),
        (exceptions.ResponseError(ECHO), "not known here"),
        (exceptions.ResponseError(""), "not known here"),
        (exceptions.DataError("x"), "DataError"),
    ],
)
def test_an_error_says_what_is_wrong(error: Exception, words: str) -> None:
    problem = _problem(error)
    assert words in problem
    assert "body" not in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "url",
    ["redis://127.0.0.1:1", "unix:///nowhere", "redis+sentinel://127.0.0.1:1/m", "redis+cluster://127.0.0.1:1"],
)
def test_a_sink_is_made_while_its_broker_is_away(url: str) -> None:
    sink: TaskSink = RedisTasks(url)
    sink.send([])
    with pytest.raises(Unavailable, match=r"^the broker \("):
        sink.send([TASK])
    sink.close()
    sink.close()


def test_a_url_that_cannot_be_used_is_refused_at_once() -> None:
    with pytest.raises(BrokerUrlError):
        RedisTasks("amqp://localhost")


@pytest.mark.parametrize(
    "url", ["redis://u:p@a/3", "rediss://u:p@a/3", "unix://u:p@/a?db=3", "redis+sentinel://u:p@a/m/3"]
)
def test_a_connection_has_limits_and_tries_once(url: str) -> None:
    client = connect(Broker.parse(url), 2.0, 3.0)
    assert not isinstance(client, RedisCluster)
    given = client.connection_pool.connection_kwargs
    assert (given["username"], given["password"], given["db"]) == ("u", "p", 3)
    assert given["socket_timeout"] == 3
    assert given.get("socket_connect_timeout", 2) == 2  # a Unix socket has none
    assert given["health_check_interval"] > 0
    assert given["retry"].get_retries() == 0


def test_sentinels_have_their_own_limits_and_credentials() -> None:
    client = connect(Broker.parse("redis+sentinel://u:p@a,b/m?sentinel_username=x&sentinel_password=y"), 2.0, 3.0)
    assert isinstance(client, Redis)
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    for sentinel in pool.sentinel_manager.sentinels:
        given = sentinel.connection_pool.connection_kwargs
        assert (given["username"], given["password"], given["socket_timeout"]) == ("x", "y", 0.5)
        assert given["retry"].get_retries() == 0
