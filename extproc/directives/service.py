"""`ibex.directive.v1.DirectiveService` over gRPC, in the auth service's process: which directive counts now?

Whoever reaches it may ask for any agent, as with the engine: it belongs into the network of filters, gates and engines,
where nobody else is. Nothing of a directive's text is in any message, log line or span.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc
import structlog
from ibex.directive.v1 import directive_pb2 as pb
from ibex.directive.v1 import directive_pb2_grpc
from prometheus_client import REGISTRY, Counter
from typing_extensions import override

from extproc.directives.announce import NotWritten
from extproc.directives.circuit import Circuit
from extproc.directives.directive import encode
from extproc.directives.store import DirectiveStore, Standing
from extproc.memory.lane import Lane, LaneFull
from extproc.memory.model import InvalidValue, parse_uuid
from extproc.memory.store import StoreError

if TYPE_CHECKING:
    from grpc import aio
    from ibex.directive.v1.directive_pb2_grpc import _ServicerContext as Context
    from prometheus_client import CollectorRegistry

    from extproc.directives.announce import DirectiveAnnouncer

__all__ = ["SERVICE_NAME", "DirectiveService"]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DirectiveService"].full_name

_DATABASE_THREADS = 2
_DATABASE_ROOM = 64
"""Look-ups of 1 to 2 ms. More at once are refused: filters wait 10 ms, and ask again."""
_REDIS_ROOM = 16
"""What does not fit is not written; the next filter asks here again."""

_log = structlog.get_logger(__name__)


class DirectiveService(directive_pb2_grpc.DirectiveServiceServicer):
    """Await `stop` after the server has stopped; in the server's event loop."""

    def __init__(
        self, store: DirectiveStore, announcer: DirectiveAnnouncer | None, registry: CollectorRegistry = REGISTRY
    ) -> None:
        """`announcer`: None where there is no Redis. Both stay nobody else's to use while this runs."""
        self._store = store
        self._announcer = announcer
        self._database = Lane("directive-database", _DATABASE_THREADS, _DATABASE_ROOM)
        self._redis = Lane("directive-redis", threads=1, room=_REDIS_ROOM)
        self._circuit = Circuit()
        self._fills: set[asyncio.Task[None]] = set()
        self._requests = Counter(
            "ibex_directive_requests", "Directives asked for by filters, by status code", ["code"], registry=registry
        )

    def add_to_server(self, server: aio.Server) -> None:
        directive_pb2_grpc.add_DirectiveServiceServicer_to_server(self, server)

    async def stop(self) -> None:
        for task in self._fills:
            task.cancel()
        if self._fills:
            await asyncio.wait(self._fills)
        self._redis.close()
        self._database.close()
        if self._announcer is not None:
            self._announcer.close()

    @override
    async def GetActiveDirective(
        self, request: pb.GetActiveDirectiveRequest, context: Context
    ) -> pb.GetActiveDirectiveResponse:
        code, reason, answer = grpc.StatusCode.OK, "", pb.GetActiveDirectiveResponse()
        try:
            org_id, agent_id = parse_uuid(request.org_id, "org_id"), parse_uuid(request.agent_id, "agent_id")
            answer = await self._find(org_id, agent_id)
        except InvalidValue as error:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except LaneFull:
            code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once; try again"
        except StoreError as error:
            code, reason = grpc.StatusCode.UNAVAILABLE, "the directives cannot be read now"
            _log.warning("directives_not_read", error=str(error))
        except Exception:  # noqa: BLE001 - the edge: a bug ends one call, not the server
            code, reason = grpc.StatusCode.INTERNAL, "internal error"
            _log.exception("directives_not_read_by_a_bug")
        self._requests.labels(code.name).inc()
        if code is not grpc.StatusCode.OK:
            await context.abort(code, reason)
        return answer

    async def _find(self, org_id: str, agent_id: str) -> pb.GetActiveDirectiveResponse:
        found = await self._database.run(lambda: self._store.active(org_id, agent_id))
        if found is None:
            return pb.GetActiveDirectiveResponse(found=False)
        standing, content = found
        if self._announcer is not None and not self._circuit.is_open(time.monotonic()):
            task = asyncio.create_task(self._fill(self._announcer, standing, content), name="fill")
            self._fills.add(task)
            task.add_done_callback(self._fills.discard)
        return pb.GetActiveDirectiveResponse(
            found=True, content=content, injection_mode=standing.injection_mode, version_id=standing.version_id
        )

    async def _fill(self, announcer: DirectiveAnnouncer, standing: Standing, content: str) -> None:
        """Behind the answer. Never raises but CancelledError."""
        org_id, agent_id = standing.org_id, standing.agent_id
        value = encode(standing.version_id, content, standing.injection_mode)
        try:
            if not await self._redis.run(lambda: announcer.fill(org_id, agent_id, value)):
                return
            # A change that was committed after the database was read, and told before the key was written, has not
            # removed it.
            version_id = await self._if_still(standing)
            if version_id != standing.version_id:
                await self._redis.run(lambda: announcer.changed(org_id, agent_id, version_id))
            self._circuit.succeeded()
        except (NotWritten, LaneFull) as error:
            self._circuit.failed(time.monotonic())
            _log.warning(
                "directive_not_cached", error=str(error) or "too much at once", next="filters ask this service instead"
            )
        except Exception:  # noqa: BLE001 - the answer is given whatever happens here
            _log.exception("directive_not_cached_by_a_bug")

    async def _if_still(self, standing: Standing) -> str | None:
        """The version's id, if it counts as it did; None: it does not, or nobody can say."""
        org_id, agent_id = standing.org_id, standing.agent_id
        try:
            found = await self._database.run(lambda: self._store.active(org_id, agent_id))
        except (LaneFull, StoreError):
            return None
        is_same = found is not None and found[0] == standing
        return standing.version_id if is_same else None
