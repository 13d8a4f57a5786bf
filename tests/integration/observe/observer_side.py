"""An observer in a process of its own that writes each turn as a line of JSON: for tests that look at the turn itself.

`python -m tests.integration.observe.observer_side HOST:PORT FILE`. SIGUSR1 blocks its event loop for a minute.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

import grpc.aio
import msgspec
import uvloop
from grpc_health.v1 import health, health_pb2_grpc

from extproc.filter.identity import IdentitySources
from extproc.filter.observation import ObservationLimits, Observed
from extproc.filter.observer import LagMeter, StreamObserver
from extproc.serve import server_options
from extproc.settings import ObserverSettings, load
from extproc.telemetry.watchdog import Watchdog

LIFETIME_S = 600
BLOCKED_S = 60


async def serve(address: str, file: Path) -> None:
    settings = load(ObserverSettings)
    identities = IdentitySources(settings.identity_org, settings.identity_agent, settings.identity_user)
    lag = LagMeter(limit_s=BLOCKED_S)  # a busy machine is not what these tests are about
    with file.open("ab", buffering=0) as lines:

        def keep(observed: Observed) -> None:
            lines.write(msgspec.json.encode({"turn": observed.turn, "text": observed.text}) + b"\n")

        server = grpc.aio.server(options=server_options(settings.max_body_bytes))
        StreamObserver(identities, ObservationLimits(), keep, lag).add_to_server(server)
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        server.add_insecure_port(address)
        await server.start()
        Watchdog(settings.watchdog_s).start()
        lag.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, time.sleep, BLOCKED_S)
        await server.wait_for_termination(LIFETIME_S)
        await lag.stop()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], Path(sys.argv[2])))
