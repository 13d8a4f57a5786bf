"""One chat request and its answer, as Envoy shows them: events go in, effects come out.

Everything about what happens when is here. This file knows no gRPC, no protobuf, no clock and no event loop; the driver
(`extproc.filter.service`) turns Envoy's messages into events, performs the effects and feeds their results back.

Two invariants, whatever the order of the messages:
- each message gets exactly one reply (`Continue`, `Forward` or `SetResponseHeaders`), at once or after one `Assemble`;
- each exchange gets exactly one `Record`, with its one outcome.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from extproc import names
from extproc.chat import ChatFormat, ChatRequest, Placement, ReadLimits, UnreadableBody, recognise
from extproc.filter.identity import Identity
from extproc.filter.outcome import Outcome

__all__ = [
    "REQUEST_HEADERS",
    "Assemble",
    "Assembled",
    "Continue",
    "Effect",
    "Event",
    "Exchange",
    "Failed",
    "Forward",
    "NotAssembled",
    "OtherMessage",
    "Policy",
    "Record",
    "RequestBody",
    "RequestHeaders",
    "ResponseHeaders",
    "SetResponseHeaders",
    "StreamEnded",
    "UnexpectedEvent",
    "readable_request_id",
]


class UnexpectedEvent(Exception):
    """The driver fed an event that cannot happen in this state: a bug of ours, not of a peer."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What one installation, or one route of it, does with memory."""

    placement: Placement = Placement.LAST_USER
    is_enabled: bool = True
    max_body_bytes: int = 10 * 1024 * 1024
    context_window_tokens: int = 128_000
    limits: ReadLimits = ReadLimits()


# Events: facts that the driver tells.


@dataclass(frozen=True, slots=True)
class RequestHeaders:
    headers: Mapping[str, str]
    """Lower-case names, `:method` and `:path` among them; a header sent twice is joined with a comma."""
    identity: Identity | None
    end_of_stream: bool
    """True when no body follows."""


@dataclass(frozen=True, slots=True)
class RequestBody:
    body: bytes
    """The whole body, as the client sent it."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """The engine's answer. An empty text means that there is nothing to inject."""

    text: str
    memories: int
    tokens: int


@dataclass(frozen=True, slots=True)
class NotAssembled:
    reason: Outcome


@dataclass(frozen=True, slots=True)
class ResponseHeaders:
    status: str


@dataclass(frozen=True, slots=True)
class OtherMessage:
    """A message that needs nothing but its reply: trailers, a response body, a kind that this release does not know."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Handling the last message raised: a bug. Its reply is still owed when it was a message of Envoy's."""


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Envoy closed the stream, for whatever reason. No reply is owed."""


Event: TypeAlias = (
    RequestHeaders | RequestBody | Assembled | NotAssembled | ResponseHeaders | OtherMessage | Failed | StreamEnded
)


# Effects: orders to the driver.


@dataclass(frozen=True, slots=True)
class Continue:
    """Reply with nothing changed."""


@dataclass(frozen=True, slots=True)
class Assemble:
    """Ask the engine, within what is left of the budget, and feed `Assembled` or `NotAssembled`."""

    request: ChatRequest
    model: str
    identity: Identity
    session_id: str
    request_id: str
    available_tokens: int


@dataclass(frozen=True, slots=True)
class Forward:
    """Reply to the request body."""

    body: bytes | None
    """None: the client's own bytes go on, untouched."""
    content_length: int | None
    """To be set with the body; None where the client sent none (a chunked body stays chunked)."""


@dataclass(frozen=True, slots=True)
class SetResponseHeaders:
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What became of the request. Comes once for each exchange, before the reply that it belongs to."""

    outcome: Outcome
    memories: int
    tokens: int


Effect: TypeAlias = Continue | Assemble | Forward | SetResponseHeaders | Record


class State(Enum):
    OPENED = auto()
    HEADERS_SEEN = auto()
    """A chat request that may get memory; its body is awaited."""
    ASSEMBLING = auto()
    """The engine is asked; the reply to the request body is owed."""
    DECIDED = auto()
    """The outcome stands; everything further passes."""


REQUEST_HEADERS = frozenset(
    (
        ":method",
        ":path",
        "content-encoding",
        "content-length",
        "content-type",
        names.REQUEST_ID_HEADER,
        names.SESSION_ID_HEADER,
        names.SKIP_MEMORY_HEADER,
    )
)
"""What an exchange reads of a request's headers; the driver need not tell it others."""

_YES = frozenset(("1", "true", "yes", "on"))
_SESSION_ID = _REQUEST_ID = re.compile(r"[!-~]{1,64}")
_MODEL_CHARACTERS = 256
"""Twice the longest model name seen. The client may write 10 MB there."""
_RESERVED_OUTPUT_TOKENS = 4096
"""Room kept for the answer when the request does not say how much it wants."""
_BYTES_PER_TOKEN = 3
"""Low on purpose (English has about 4): a request that might fill the window gets no memory."""


def readable_request_id(headers: Mapping[str, str]) -> str:
    """X-Request-ID where it can be one; else empty, since a client may write a prompt there and it goes into logs."""
    sent = headers.get(names.REQUEST_ID_HEADER, "")
    return sent if _REQUEST_ID.fullmatch(sent) else ""


class Exchange:
    """Feed every event to `receive` and perform the effects in order."""

    __slots__ = (
        "_body",
        "_format",
        "_had_content_length",
        "_identity",
        "_memories",
        "_mint_session_id",
        "_outcome",
        "_path",
        "_policy",
        "_request",
        "_request_id",
        "_session_id",
        "_state",
        "_tokens",
    )

    def __init__(self, policy: Policy, mint_session_id: Callable[[], str]) -> None:
        self._policy = policy
        self._mint_session_id = mint_session_id
        self._state = State.OPENED
        self._format: ChatFormat | None = None
        self._identity: Identity | None = None
        self._request: ChatRequest | None = None
        self._outcome: Outcome | None = None
        self._session_id = ""
        self._request_id = ""
        self._path = ""
        self._had_content_length = False
        self._body = b""
        self._memories = 0
        self._tokens = 0

    @property
    def session_id(self) -> str:
        """The session's external id; empty until the request headers were seen."""
        return self._session_id

    @property
    def identity(self) -> Identity | None:
        return self._identity

    @property
    def chat_format(self) -> str:
        """Name of the recognised chat format; empty when there is none."""
        return self._format.name if self._format else ""

    @property
    def model(self) -> str:
        """The model that the client asked for, cut to what spans and engines can bear; empty until it is read."""
        return self._request.model[:_MODEL_CHARACTERS] if self._request else ""

    def receive(self, event: Event) -> list[Effect]:
        match event:
            case RequestHeaders():
                return [*self._receive_request_headers(event), Continue()]
            case RequestBody():
                return self._receive_request_body(event)
            case Assembled() if self._state is State.ASSEMBLING:
                return self._receive_assembled(event)
            case NotAssembled() if self._state is State.ASSEMBLING:
                return [*self._decide(event.reason), Forward(None, None)]
            case ResponseHeaders():
                return self._receive_response_headers(event)
            case OtherMessage():
                return [Continue()]
            case Failed():
                return self._receive_failed()
            case StreamEnded():
                return self._decide(Outcome.CANCELLED)
            case _:
                raise UnexpectedEvent(f"{type(event).__name__} in state {self._state.name}")

    def _receive_request_headers(self, event: RequestHeaders) -> list[Effect]:
        if self._state is not State.OPENED:
            return []
        headers = event.headers
        self._session_id = self._choose_session_id(headers.get(names.SESSION_ID_HEADER))
        self._request_id = readable_request_id(headers)
        self._path = headers.get(":path", "")
        self._had_content_length = "content-length" in headers
        self._identity = event.identity
        self._format = recognise(headers.get(":method", ""), self._path, headers.get("content-type", ""))
        self._state = State.HEADERS_SEEN
        early = self._outcome_from_headers(headers, has_body=not event.end_of_stream)
        return self._decide(early) if early else []

    def _choose_session_id(self, sent: str | None) -> str:
        return sent if sent is not None and _SESSION_ID.fullmatch(sent) else self._mint_session_id()

    def _outcome_from_headers(self, headers: Mapping[str, str], *, has_body: bool) -> Outcome | None:
        """The outcome where the headers alone decide it."""
        if self._format is None:
            return Outcome.NOT_CHAT
        if not self._policy.is_enabled:
            return Outcome.DISABLED
        if headers.get(names.SKIP_MEMORY_HEADER, "").strip().lower() in _YES:
            return Outcome.SKIPPED
        if self._identity is None:
            return Outcome.NO_IDENTITY
        if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            return Outcome.ENCODED_BODY
        return None if has_body else Outcome.UNREADABLE_BODY

    def _receive_request_body(self, event: RequestBody) -> list[Effect]:
        if self._state is State.ASSEMBLING:
            raise UnexpectedEvent("a second message while the reply to the first is owed")
        if self._state is not State.HEADERS_SEEN or self._format is None or self._identity is None:
            # A body without headers can only be a configuration that does not send them: nothing is known of it.
            undecided = self._decide(Outcome.UNREADABLE_BODY)
            return [*undecided, Forward(None, None)]
        if len(event.body) > self._policy.max_body_bytes:
            return [*self._decide(Outcome.BODY_TOO_LARGE), Forward(None, None)]
        try:
            request = self._format.read_request(event.body, self._path, self._policy.limits)
        except UnreadableBody:
            return [*self._decide(Outcome.UNREADABLE_BODY), Forward(None, None)]
        self._request = request
        if not request.query.strip():
            return [*self._decide(Outcome.NO_QUERY), Forward(None, None)]
        available_tokens = self._available_tokens(request)
        if available_tokens <= 0:
            return [*self._decide(Outcome.NOTHING_FOUND), Forward(None, None)]
        self._body = event.body
        self._state = State.ASSEMBLING
        return [Assemble(request, self.model, self._identity, self._session_id, self._request_id, available_tokens)]

    def _available_tokens(self, request: ChatRequest) -> int:
        held = request.content_bytes // _BYTES_PER_TOKEN
        wanted = request.max_output_tokens or _RESERVED_OUTPUT_TOKENS
        return self._policy.context_window_tokens - held - wanted

    def _receive_assembled(self, event: Assembled) -> list[Effect]:
        assert self._format is not None and self._request is not None, "ASSEMBLING comes after reading the request"  # noqa: S101, PT018
        if not event.text:
            return [*self._decide(Outcome.NOTHING_FOUND), Forward(None, None)]
        body = self._format.splice(self._body, self._request, event.text, self._policy.placement)
        if len(body) > self._policy.max_body_bytes:
            # Envoy answers 413 to a body over its buffer limit, also when a filter made it so.
            return [*self._decide(Outcome.BODY_TOO_LARGE), Forward(None, None)]
        self._memories, self._tokens = event.memories, event.tokens
        return [*self._decide(Outcome.INJECTED), Forward(body, len(body) if self._had_content_length else None)]

    def _receive_response_headers(self, event: ResponseHeaders) -> list[Effect]:
        if self._state is State.ASSEMBLING:
            raise UnexpectedEvent("response headers while the reply to the request body is owed")
        if self._state is State.OPENED:
            # Nothing of the request was seen: Envoy's own default headers say what is true.
            return [*self._decide(Outcome.LOCAL_REPLY), Continue()]
        reason = Outcome.BODY_TOO_LARGE if event.status == "413" else Outcome.LOCAL_REPLY
        return [*self._decide(reason), SetResponseHeaders(self._response_headers())]

    def _receive_failed(self) -> list[Effect]:
        record = self._decide(Outcome.FILTER_ERROR)
        # Whatever was decided before, the client's own bytes go on now, and the response headers have to say so.
        self._outcome, self._memories, self._tokens = Outcome.FILTER_ERROR, 0, 0
        self._state = State.DECIDED
        return [*record, Continue()]

    def _response_headers(self) -> tuple[tuple[str, str], ...]:
        fallback = self._outcome is None or self._outcome.is_fallback
        headers = (
            (names.MEMORIES_INJECTED_HEADER, str(self._memories)),
            (names.CONTEXT_TOKENS_HEADER, str(self._tokens)),
            (names.CONTEXT_FALLBACK_HEADER, "true" if fallback else "false"),
        )
        return (*headers, (names.SESSION_ID_HEADER, self._session_id)) if self._session_id else headers

    def _decide(self, outcome: Outcome) -> list[Effect]:
        """The first decision stands. Frees the body: a stream may live for many minutes after it."""
        if self._outcome is not None:
            return []
        self._outcome = outcome
        self._state = State.DECIDED
        self._body = b""
        return [Record(outcome, self._memories, self._tokens)]
