"""The admin listener of a process: is it alive, is it ready, what does it count.

Not for the public: bind it to loopback or to a pod's own network.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typing_extensions import override

__all__ = ["AdminListener", "Readiness"]

Check = Callable[[], Awaitable[bool | str]]
"""Whether all is well with a dependency, or in words how it is."""
Closer = Callable[[], Awaitable[None]]

_CHECK_LIMIT_S = 2.0


class Readiness:
    """Whether a process should get requests, and how its dependencies are."""

    def __init__(self, checks: Mapping[str, Check], needed: tuple[str, ...]) -> None:
        """`needed` names the checks without which the process is not ready; the others are only shown."""
        self.is_serving = False
        self._checks = checks
        self._needed = needed

    async def report(self) -> tuple[bool, dict[str, str]]:
        """Readiness, and for each dependency `ok`, `unavailable` or what its check says."""
        states = dict(
            zip(self._checks, await asyncio.gather(*(_state(check) for check in self._checks.values())), strict=True)
        )
        is_ready = self.is_serving and all(states[name] == "ok" for name in self._needed)
        return is_ready, states


async def _state(check: Check) -> str:
    try:
        state = await asyncio.wait_for(check(), _CHECK_LIMIT_S)
    except TimeoutError:
        state = False
    return state if isinstance(state, str) else "ok" if state else "unavailable"


class AdminListener:
    """`/health`, `/ready` and `/metrics` on the process's own event loop. An empty address turns it off."""

    def __init__(
        self,
        process: str,
        listen: str,
        readiness: Readiness,
        routes: Sequence[Route] = (),
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        """`routes`: what this process has beside the usual three. `is_alive`: False where only a restart helps."""
        self._routes = routes
        self._is_alive = is_alive
        self._process = process
        self._listen = listen
        self._readiness = readiness
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.address = ""
        """`host:port` once started; differs from the setting when that asked for port 0."""

    async def start(self) -> None:
        """Raises OSError when the address cannot be used."""
        if not self._listen:
            return
        listener = _bound_socket(self._listen)
        host, port = listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        routes = [Route("/health", self._health), Route("/ready", self._ready), Route("/metrics", self._metrics)]
        routes += self._routes
        config = uvicorn.Config(
            Starlette(routes=routes), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listener]), name="admin")

    async def stop(self) -> None:
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._serving, 3.0)  # a tick, and the second that running requests get

    async def _health(self, _request: Request) -> Response:
        is_alive = self._is_alive()
        return JSONResponse(
            {"process": self._process, "status": "ok" if is_alive else "stalled"}, 200 if is_alive else 503
        )

    async def _ready(self, _request: Request) -> Response:
        is_ready, states = await self._readiness.report()
        body = {"process": self._process, "status": "ready" if is_ready else "not ready", "dependencies": states}
        return JSONResponse(body, 200 if is_ready else 503)

    async def _metrics(self, _request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to the composition root, and one wake-up a second instead of ten.

    Ten cost 2.2 ms of CPU a second in a process whose requests cost 2 ms each.
    """

    @override
    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # noqa: ASYNC110 - uvicorn stops by a flag
            await asyncio.sleep(1.0)

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bound_socket(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, int(port)))
    except (OSError, OverflowError, ValueError):
        listener.close()
        raise
    return listener
