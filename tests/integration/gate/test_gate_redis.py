"""Every way to Redis that a URL can name: both connections of a gate get there, and to nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from extproc.gate.limiter import RateLimiter
from extproc.gate.revocations import RevocationChannel
from extproc.gate.token_cache import TokenCache
from extproc.gate.verdict import Claims, Quota
from extproc.redis.link import LinkProblem, RedisLink
from extproc.turns.broker import Broker
from tests.integration.turns.valkey_side import valkey, watched

ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
CLAIMS = Claims(ORG, 196609, None, None, "t1", None)


async def until(is_so: Callable[[], bool], limit_s: float = 45.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {limit_s} s"
        await asyncio.sleep(0.02)


async def check_works(url: str, port: int, password: str | None = None) -> None:
    """Counts, and hears a revocation, of the server at `port`."""
    broker = Broker.parse(url)
    link, cache = RedisLink(broker, 5.0), TokenCache(10, 30)
    channel = RevocationChannel(broker, cache)
    channel.start()
    await link.start()
    try:
        await until(lambda: link.is_up and channel.is_alive)
        counted = await RateLimiter(link, 2, 0).count(ORG, AGENT)
        assert isinstance(counted, Quota)
        assert (counted.limit, counted.remaining) == (2, 1)
        cache.put(b"d", CLAIMS, cache.epoch, time.monotonic(), time.time())
        assert len(cache) == 1
        with Redis(port=port, password=password, protocol=2) as client:
            client.publish("ibex:token:revocations", '{"v":1,"token_id":"t1","revoked_at":"x","org_id":"y"}')
        await until(lambda: len(cache) == 0)
    finally:
        await channel.close()
        await link.close()


async def test_a_server(tmp_path: Path) -> None:
    with valkey(tmp_path) as server:
        await check_works(server.url, server.port)


async def test_a_password_and_a_database(tmp_path: Path) -> None:
    with valkey(tmp_path, "--requirepass", "secret") as server:
        await check_works(f"redis://:secret@127.0.0.1:{server.port}/3", server.port, "secret")


async def test_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with valkey(tmp_path, "--unixsocket", str(path)) as server:
        await check_works(f"unix://{path}", server.port)


async def test_sentinels(tmp_path: Path) -> None:
    with watched(tmp_path) as group:
        await check_works(group.url, group.primary.port)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}", "redis://:wrong@127.0.0.1:{}", "redis://127.0.0.1:{}/99"])
async def test_a_server_that_refuses_is_no_limiter_and_no_channel(tmp_path: Path, url: str) -> None:
    with valkey(tmp_path, *([] if url.endswith("99") else ["--requirepass", "secret"])) as server:
        broker = Broker.parse(url.format(server.port))
        link, cache = RedisLink(broker, 5.0), TokenCache(10, 30)
        channel = RevocationChannel(broker, cache)
        channel.start()
        await link.start()
        await asyncio.sleep(1.5)
        is_alive = channel.is_alive
        counted = await RateLimiter(link, 2, 0).count(ORG, AGENT)
        await channel.close()
        await link.close()
        assert counted is LinkProblem.DOWN
        assert not is_alive, "a server that refuses anything is not the one that was meant"


async def test_an_agents_own_limit_counts_beside_its_orgs(tmp_path: Path) -> None:
    with valkey(tmp_path) as server:
        link = RedisLink(Broker.parse(server.url), 5.0)
        await link.start()
        limiter = RateLimiter(link, 10, 2)
        if (left_s := 60 - time.time() % 60) < 5:
            await asyncio.sleep(left_s + 0.1)
        answers = [await limiter.count(ORG, AGENT) for _ in range(3)]
        other = await limiter.count(ORG, "22222222-2222-4222-8222-222222222222")
        await link.close()
    assert [answer.is_within for answer in answers if isinstance(answer, Quota)] == [True, True, False]
    assert isinstance(other, Quota)
    assert other.remaining == 7, "what the agent was refused is not counted for its org"


async def test_two_gates_at_once_let_no_more_through_than_the_limit(tmp_path: Path) -> None:
    with valkey(tmp_path) as server:
        links = [RedisLink(Broker.parse(server.url), 5.0) for _ in range(2)]
        for link in links:
            await link.start()
        if (left_s := 60 - time.time() % 60) < 5:
            await asyncio.sleep(left_s + 0.1)
        limiters = [RateLimiter(link, 50, 0) for link in links]
        answers = await asyncio.gather(*(limiters[n % 2].count(ORG, AGENT) for n in range(200)))
        for link in links:
            await link.close()
    assert sum(isinstance(answer, Quota) and answer.is_within for answer in answers) == 50
