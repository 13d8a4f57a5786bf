"""`POST /v1/sessions/{external_id}/terminate` on the admin listener: the client is done with a session.

The caller is trusted, as everybody who reaches that listener is; errors have the contract's envelope.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from extproc.memory.model import InvalidValue, parse_uuid
from extproc.names import REQUEST_ID_HEADER
from extproc.turns._threads import DaemonThreads
from extproc.turns.sessions import Sessions, TerminatedSession
from extproc.turns.sinks import Refused, Unavailable

__all__ = ["session_routes"]

_MOST_BODY_BYTES = 64 * 1024
_LIMIT_S = 5.0
_THREADS = 2
"""As many as the database has connections for it: others wait, within the limit."""
_EXTERNAL_ID = re.compile(r"[!-~]{1,64}")
_USER_ID = re.compile(r"[!-~]{1,128}")
_FIELDS = ("org_id", "agent_id", "user_id")

_log = structlog.get_logger(__name__)


def session_routes(sessions: Sessions) -> list[Route]:
    return [Route("/v1/sessions/{external_id:path}/terminate", _Terminate(sessions))]


class _Failure(Exception):
    """An answer that is not 200."""

    def __init__(
        self, status: int, code: str, message: str, field: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        """The field that is wrong; empty: none."""
        self.headers = headers or {}


_STOPPING = _Failure(
    503, "SERVICE_DEGRADED", "this process stops; send the whole request again", headers={"connection": "close"}
)


@dataclass(frozen=True, slots=True)
class _Named:
    """The session that a request names."""

    org_id: str
    agent_id: str
    user_id: str | None
    external_id: str


class _Terminate:
    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._threads = DaemonThreads(_THREADS, "sessions-api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request_id = _request_id(request.headers.get(REQUEST_ID_HEADER, ""))
        try:
            response: Response = JSONResponse(_shown(await self._terminate(request)))
        except _Failure as failure:
            response = _refusal(failure, request_id)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # by the listener that stops; it takes one that comes out of here for a bug
            response = _refusal(_STOPPING, request_id)
        except Exception:  # noqa: BLE001 - the one place where a bug becomes an answer
            _log.exception("terminate_broke", request_id=request_id)
            response = _refusal(_Failure(500, "INTERNAL_ERROR", "this is a bug; the log has it"), request_id)
        response.headers[REQUEST_ID_HEADER] = request_id
        await response(scope, receive, send)

    async def _terminate(self, request: Request) -> TerminatedSession:
        if request.method != "POST":
            raise _Failure(405, "METHOD_NOT_ALLOWED", "use POST", headers={"allow": "POST"})
        fields = {**_queried(request), **_decoded(await _read(request))}
        named = _parse(request.path_params["external_id"], fields)
        terminate = partial(
            self._sessions.terminate,
            named.org_id,
            named.agent_id,
            named.user_id,
            named.external_id,
            datetime.now(UTC),
        )
        try:
            found = await asyncio.wait_for(self._threads.run(terminate), _LIMIT_S)
        except (Unavailable, Refused, TimeoutError) as error:
            _log.warning("terminate_failed", error=str(error) or "no answer in time")
            message = "the database does not answer; try again in a moment, and look at /ready"
            raise _Failure(503, "SERVICE_DEGRADED", message, headers={"retry-after": "5"}) from None
        if found is None:
            raise _Failure(404, "NOT_FOUND", "no stored turn belongs to this session of this org, agent and user")
        return found


def _queried(request: Request) -> dict[str, object]:
    return {name: value for name in _FIELDS if (value := request.query_params.get(name)) is not None}


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BODY_BYTES:
            raise _Failure(413, "PAYLOAD_TOO_LARGE", f"the body is larger than {_MOST_BODY_BYTES} bytes")
    return bytes(body)


def _decoded(body: bytes) -> dict[str, object]:
    if not body.strip():
        return {}
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        raise _Failure(400, "INVALID_JSON", "the body is not JSON") from None
    if not isinstance(decoded, dict):
        raise _Failure(400, "VALIDATION_ERROR", "the body is not a JSON object")
    return {name: decoded[name] for name in _FIELDS if decoded.get(name) is not None}


def _parse(external_id: str, fields: dict[str, object]) -> _Named:
    if not _EXTERNAL_ID.fullmatch(external_id):
        raise _invalid("external_id", "is not 1 to 64 visible ASCII characters")
    if "agent_id" not in fields:
        raise _Failure(400, "MISSING_AGENT_ID", "name the agent: agent_id, as a query parameter or in a JSON body")
    user_id = fields.get("user_id")
    if user_id is not None and not (isinstance(user_id, str) and _USER_ID.fullmatch(user_id)):
        raise _invalid("user_id", "is not 1 to 128 visible ASCII characters; leave it out for the agent itself")
    return _Named(_uuid(fields, "org_id"), _uuid(fields, "agent_id"), user_id, external_id)


def _uuid(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    try:
        return parse_uuid(value if isinstance(value, str) else "", name)
    except InvalidValue as error:
        raise _invalid(name, str(error).removeprefix(f"{name} ")) from None


def _invalid(field: str, problem: str) -> _Failure:
    return _Failure(400, "VALIDATION_ERROR", f"{field} {problem}", field)


def _request_id(given: str) -> str:
    """The caller's when it is a UUID."""
    try:
        return parse_uuid(given, REQUEST_ID_HEADER)
    except InvalidValue:
        return str(uuid.uuid4())


def _shown(session: TerminatedSession) -> dict[str, object]:
    return {
        "session_id": session.session_id,
        "external_id": session.external_id,
        "status": session.status,
        "turn_count": session.turn_count,
        "completed_at": session.completed_at.isoformat(),
    }


def _refusal(failure: _Failure, request_id: str) -> Response:
    error: dict[str, object] = {
        "code": failure.code,
        "message": str(failure),
        "request_id": request_id,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if failure.field:
        error["field_errors"] = [{"field": failure.field, "code": "invalid", "message": str(failure)}]
    return JSONResponse({"error": error}, failure.status, failure.headers)
