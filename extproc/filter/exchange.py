"""One chat request and its answer, as Envoy shows them: events go in, effects come out.

Everything about what happens when is here. This file knows no gRPC, no protobuf, no clock and no event loop; the driver
(`extproc.filter.service`) turns Envoy's messages into events, performs the effects and feeds their results back.

Two invariants, whatever the order of the messages:
- each message gets exactly one reply (`Continue`, `Forward` or `SetResponseHeaders`), at once, or after one
  `LookUpDirective`, one `Assemble`, or both in this order;
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
from extproc.directives.directive import ActiveDirective
from extproc.filter.identity import Identity
from extproc.filter.outcome import Outcome

__all__ = [
    "REQUEST_HEADERS",
    "Assemble",
    "Assembled",
    "Continue",
    "DirectiveKnown",
    "Effect",
    "Event",
    "Exchange",
    "Failed",
    "Forward",
    "LookUpDirective",
    "NotAssembled",
    "OtherMessage",
    "Policy",
    "PrepareDirective",
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
    """What one installation, or one route of it, does with memory and directives."""

    placement: Placement = Placement.LAST_USER
    is_enabled: bool = True
    max_body_bytes: int = 10 * 1024 * 1024
    context_window_tokens: int = 128_000
    limits: ReadLimits = ReadLimits()
    has_directives: bool = False
    """Whether agents may have directives; without, nobody is asked for any."""
    keeps_directive_on_skip: bool = False
    """Whether a client that wants no memory gets the directive all the same."""


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
class DirectiveKnown:
    """What the look-up gave. None: the agent has no directive, or nobody could say which."""

    directive: ActiveDirective | None


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
    RequestHeaders
    | RequestBody
    | DirectiveKnown
    | Assembled
    | NotAssembled
    | ResponseHeaders
    | OtherMessage
    | Failed
    | StreamEnded
)


# Effects: orders to the driver.


@dataclass(frozen=True, slots=True)
class Continue:
    """Reply with nothing changed."""


@dataclass(frozen=True, slots=True)
class PrepareDirective:
    """Begin to look for the directive of this agent and wait for nothing: the body will ask for it."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class LookUpDirective:
    """Look for the directive of this agent, within its share of the budget, and feed `DirectiveKnown`."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Assemble:
    """Ask the engine, within what is left of the budget, and feed `Assembled` or `NotAssembled`."""

    request: ChatRequest
    model: str
    identity: Identity
    session_id: str
    request_id: str
    available_tokens: int
    directive_version_id: str = ""


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
    """Of everything that went in, the directive included."""
    directive_version_id: str = ""
    """Empty: no directive went in."""


Effect: TypeAlias = Continue | PrepareDirective | LookUpDirective | Assemble | Forward | SetResponseHeaders | Record


class State(Enum):
    OPENED = auto()
    HEADERS_SEEN = auto()
    """A chat request that may get memory; its body is awaited."""
    LOOKING_UP = auto()
    """The directive is looked for; the reply to the request body is owed."""
    ASSEMBLING = auto()
    """The engine is asked; the reply to the request body is owed."""
    DECIDED = auto()
    """The outcome stands; everything further passes."""


_OWING = frozenset((State.LOOKING_UP, State.ASSEMBLING))
"""The states in which Envoy waits for the reply to the request body."""

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
        "_directive",
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
        "_skips_memory",
        "_state",
        "_tokens",
        "_version_id",
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
        self._skips_memory = False
        self._directive: ActiveDirective | None = None
        self._body = b""
        # What went in:
        self._memories = 0
        self._tokens = 0
        self._version_id = ""

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
            case DirectiveKnown() if self._state is State.LOOKING_UP:
                self._directive = event.directive
                return self._begin_assembly()
            case Assembled() if self._state is State.ASSEMBLING:
                return self._receive_assembled(event)
            case NotAssembled() if self._state is State.ASSEMBLING:
                return self._forward_without_memory(event.reason)
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
        if early:
            return self._decide(early)
        return [PrepareDirective(event.identity)] if self._policy.has_directives and event.identity else []

    def _choose_session_id(self, sent: str | None) -> str:
        return sent if sent is not None and _SESSION_ID.fullmatch(sent) else self._mint_session_id()

    def _outcome_from_headers(self, headers: Mapping[str, str], *, has_body: bool) -> Outcome | None:
        """The outcome where the headers alone decide it."""
        if self._format is None:
            return Outcome.NOT_CHAT
        if not self._policy.is_enabled:
            return Outcome.DISABLED
        if headers.get(names.SKIP_MEMORY_HEADER, "").strip().lower() in _YES:
            if not self._policy.keeps_directive_on_skip or self._identity is None:
                return Outcome.SKIPPED
            self._skips_memory = True
        if self._identity is None:
            return Outcome.NO_IDENTITY
        if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            return Outcome.ENCODED_BODY
        return None if has_body else Outcome.UNREADABLE_BODY

    def _receive_request_body(self, event: RequestBody) -> list[Effect]:
        if self._state in _OWING:
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
        self._request, self._body = request, event.body
        if self._policy.has_directives:
            self._state = State.LOOKING_UP
            return [LookUpDirective(self._identity)]
        return self._begin_assembly()

    def _begin_assembly(self) -> list[Effect]:
        """What there is to inject is known, but for memories."""
        request, identity = self._request, self._identity
        assert request is not None and identity is not None, "comes after reading the request"  # noqa: S101, PT018
        if self._skips_memory:
            return self._forward_without_memory(Outcome.SKIPPED)
        if not request.query.strip():
            return self._forward_without_memory(Outcome.NO_QUERY)
        available_tokens = self._available_tokens(request)
        if available_tokens <= 0:
            return self._forward_without_memory(Outcome.NOTHING_FOUND)
        self._state = State.ASSEMBLING
        version_id = self._directive.version_id if self._directive else ""
        return [
            Assemble(request, self.model, identity, self._session_id, self._request_id, available_tokens, version_id)
        ]

    def _available_tokens(self, request: ChatRequest) -> int:
        held = request.content_bytes // _BYTES_PER_TOKEN + (self._directive.tokens if self._directive else 0)
        wanted = request.max_output_tokens or _RESERVED_OUTPUT_TOKENS
        return self._policy.context_window_tokens - held - wanted

    def _receive_assembled(self, event: Assembled) -> list[Effect]:
        if not event.text:
            return self._forward_without_memory(Outcome.NOTHING_FOUND)
        body = self._splice(event.text)
        if len(body) > self._policy.max_body_bytes:
            # Envoy answers 413 to a body over its buffer limit, also when a filter made it so.
            return self._forward_without_memory(Outcome.BODY_TOO_LARGE)
        self._memories, self._tokens = event.memories, event.tokens
        return self._forward(Outcome.INJECTED, body)

    def _forward_without_memory(self, outcome: Outcome) -> list[Effect]:
        """The directive goes in also where memory does not: it is the operator's, and at hand."""
        if self._directive is None:
            return [*self._decide(outcome), Forward(None, None)]
        body = self._splice("")
        if len(body) > self._policy.max_body_bytes:
            missed = outcome if outcome.is_fallback else Outcome.BODY_TOO_LARGE
            return [*self._decide(missed), Forward(None, None)]
        if len(body) == len(self._body):  # a request without the place that the mode names
            return [*self._decide(outcome), Forward(None, None)]
        return self._forward(outcome, body)

    def _splice(self, text: str) -> bytes:
        assert self._format is not None and self._request is not None, "comes after reading the request"  # noqa: S101, PT018
        if self._directive is None:
            return self._format.splice(self._body, self._request, text, self._policy.placement)
        return self._format.splice(self._body, self._request, text, self._policy.placement, self._directive.directive)

    def _forward(self, outcome: Outcome, body: bytes) -> list[Effect]:
        if self._directive is not None:
            self._tokens += self._directive.tokens
            self._version_id = self._directive.version_id
        return [*self._decide(outcome), Forward(body, len(body) if self._had_content_length else None)]

    def _receive_response_headers(self, event: ResponseHeaders) -> list[Effect]:
        if self._state in _OWING:
            raise UnexpectedEvent("response headers while the reply to the request body is owed")
        if self._state is State.OPENED:
            # Nothing of the request was seen: Envoy's own default headers say what is true.
            return [*self._decide(Outcome.LOCAL_REPLY), Continue()]
        reason = Outcome.BODY_TOO_LARGE if event.status == "413" else Outcome.LOCAL_REPLY
        return [*self._decide(reason), SetResponseHeaders(self._response_headers())]

    def _receive_failed(self) -> list[Effect]:
        record = self._decide(Outcome.FILTER_ERROR)
        # Whatever was decided before, the client's own bytes go on now, and the response headers have to say so.
        self._outcome, self._memories, self._tokens, self._version_id = Outcome.FILTER_ERROR, 0, 0, ""
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
        self._directive = None
        return [Record(outcome, self._memories, self._tokens, self._version_id)]
