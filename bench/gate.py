"""What a warm check costs beside a bare grpc.aio echo: `python -m bench.gate [--seconds N]`.

Each server is a process of its own, with the gate's options, and is asked by one client with the same question. CPU is
the server's own, read before and after. All are measured in turn in each of many short rounds, over connections that
stay open, so that a noisy machine disturbs all alike; a ratio is the median of each round's. `redis`: with the rate
limit, on a Valkey of its own; its CPU is not counted, the gate's share is.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import grpc
import grpc.aio
import uvloop
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz

from extproc.gate.agent_cache import AgentCache
from extproc.gate.auth_client import AuthClient
from extproc.gate.guard import Guard
from extproc.gate.limiter import RateLimiter
from extproc.gate.principals import Principals, digest_of
from extproc.gate.service import SERVICE_NAME, Authorizer
from extproc.gate.token_cache import TokenCache
from extproc.gate.verdict import CHAT_PERMISSIONS, AgentVerdict, Claims
from extproc.redis.link import RedisLink
from extproc.serve import server_options
from extproc.stack import valkey
from extproc.stack.envoy import free_port
from extproc.turns.broker import Broker

ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
TOKEN = "ibex_pat_0123456789abcdefghijklmnop"
METHOD = f"/{SERVICE_NAME}/Check"
FOREVER_S = 1e9
SERVERS = ("echo", "gate", "gate + redis")
CONCURRENCY = 8

Call: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]


def question() -> bytes:
    """About what Envoy sends with the shipped configuration."""
    request = ext_authz.CheckRequest()
    attributes = request.attributes
    for peer, port in ((attributes.source, 51234), (attributes.destination, 8080)):
        peer.address.socket_address.address = "10.0.0.1"
        peer.address.socket_address.port_value = port
    attributes.request.time.GetCurrentTime()
    http = attributes.request.http
    http.id, http.method, http.path = "1234567890123456789", "POST", "/v1/chat/completions"
    http.host, http.scheme, http.protocol, http.size = "gateway", "https", "HTTP/2", 2000
    headers = {
        "authorization": f"Bearer {TOKEN}",
        "x-ibex-agent-id": AGENT,
        "x-request-id": "11111111-2222-4333-8444-555555555555",
    }
    for name, value in headers.items():
        http.header_map.headers.add(key=name, raw_value=value.encode())
    data: bytes = request.SerializeToString()
    return data


async def serve(kind: str, port: int, redis_url: str) -> None:
    server = grpc.aio.server(options=server_options(1024 * 1024))
    if kind == "echo":

        async def echo(raw: bytes, _context: object) -> bytes:
            return raw

        check: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Check": check}),))
    else:
        limiter = None
        if kind == "gate + redis":
            link = RedisLink(Broker.parse(redis_url), 1.0)
            await link.start()
            limiter = RateLimiter(link, 1_000_000_000, 0)
        Authorizer(warm_principals(), limiter, denies_uncounted=True).add_to_server(server)
        # As `extproc gate` does; the echo is bare.
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def warm_principals() -> Principals:
    """One token, one agent, known for good."""
    now = time.monotonic()
    cache = TokenCache(5000, FOREVER_S)
    cache.trust(now, FOREVER_S)
    claims = Claims(ORG, CHAT_PERMISSIONS, None, None, "t1", time.time() + FOREVER_S)
    cache.put(digest_of(TOKEN), claims, cache.epoch, now, time.time())
    agents = AgentCache(FOREVER_S)
    agents.put((digest_of(TOKEN), AGENT), AgentVerdict.ACTIVE, now)
    return Principals(AuthClient("127.0.0.1:1", 0.05), cache, agents, Guard())


@dataclass
class Measured:
    process: subprocess.Popen[bytes]
    port: int
    cpu_us: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)


def cpu_s(pid: int) -> float:
    """User and system time of a process and its threads, exact: Linux makes the id of its clock from the pid
    (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


async def load(call: Call, raw: bytes, seconds: float, concurrency: int) -> tuple[int, float]:
    """Answers, and the median of their microseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def ask() -> None:
        while (start := time.perf_counter()) < end:
            await call(raw)
            times.append((time.perf_counter() - start) * 1e6)

    await asyncio.gather(*(ask() for _ in range(concurrency)))
    return len(times), statistics.median(times)


@contextmanager
def servers(redis_url: str) -> Iterator[dict[str, Measured]]:
    started: dict[str, Measured] = {}
    try:
        for kind in SERVERS:
            port = free_port()
            command = [sys.executable, "-m", "bench.gate", "--serve", kind, "--port", str(port), "--redis", redis_url]
            started[kind] = Measured(subprocess.Popen(command), port)
        yield started
    finally:
        for server in started.values():
            server.process.kill()
            server.process.wait(10)


async def measure(started: dict[str, Measured], rounds: int, seconds: float) -> None:
    raw = question()
    async with AsyncExitStack() as stack:
        calls = []
        for server in started.values():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}"))
            call: Call = channel.unary_unary(METHOD)
            first = await call(raw, wait_for_ready=True, timeout=60)
            assert first == raw or ext_authz.CheckResponse.FromString(first).HasField("ok_response")
            await load(call, raw, 0.5, 4)
            calls.append((server, call))
        for number in range(rounds):
            # Another one begins each round: who comes after a busy one finds a warm machine.
            first_one = number % len(calls)
            for server, call in (*calls[first_one:], *calls[:first_one]):
                before = cpu_s(server.process.pid)
                answers, _ = await load(call, raw, seconds, CONCURRENCY)
                server.cpu_us.append((cpu_s(server.process.pid) - before) / answers * 1e6)
                _, p50 = await load(call, raw, seconds / 2, 1)
                server.p50_us.append(p50)


def main(options: SimpleNamespace | argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        redis = valkey.start(Path(directory))
        try:
            with servers(redis.url) as started:
                uvloop.run(measure(started, options.rounds, options.seconds))
        finally:
            redis.child.process.kill()
            redis.child.process.wait(10)
    echo = started["echo"]
    print(f"{'server':14}{'CPU µs':>10}{'× echo':>9}{'p50 µs':>10}{'+ echo':>9}")
    for kind, server in started.items():
        cpu, p50 = statistics.median(server.cpu_us), statistics.median(server.p50_us)
        ratio = statistics.median([own / base for own, base in zip(server.cpu_us, echo.cpu_us, strict=True)])
        added = p50 - statistics.median(echo.p50_us)
        print(f"{kind:14}{cpu:10.0f}{ratio:9.2f}{p50:10.0f}{added:9.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each server and round")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--redis", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        uvloop.run(serve(given.serve, given.port, given.redis))
    else:
        main(given)
