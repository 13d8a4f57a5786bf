"""One request at the gate: events go in, each gets one effect. Everything about who may pass, and in which order things
are asked, is here; this file knows no gRPC, no Redis, no clock and no event loop.

Order: token, permissions, agent, rate limit. So a stranger learns nothing about agents, a request that is refused
anyway costs the org nothing of its minute, and what is cheap to refuse is refused first.

Two invariants, whatever the order of events:
- `Allow` comes after valid claims with all permissions, an active agent of theirs, and a count (or none wanted);
- an event that cannot happen is answered with `Deny`: a bug of ours closes the gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Final, TypeAlias

import msgspec
from typing_extensions import override

from extproc import names
from extproc.gate.credential import CREDENTIAL_HEADERS, find_token
from extproc.gate.verdict import (
    AGENT_NOT_AUTHORIZED,
    AGENT_SUSPENDED,
    CHAT_PERMISSIONS,
    DEGRADED,
    INSUFFICIENT_PERMISSIONS,
    INVALID_TOKEN,
    MALFORMED_AGENT,
    MALFORMED_USER,
    MISSING_AGENT,
    AgentVerdict,
    Claims,
    Code,
    Denial,
    Quota,
    TokenVerdict,
)

__all__ = [
    "AGENT_HEADER",
    "DECIDING_HEADERS",
    "REQUEST_HEADERS",
    "USER_HEADER",
    "Admitted",
    "AgentChecked",
    "Allow",
    "Arrived",
    "Count",
    "Counted",
    "Deny",
    "Effect",
    "Event",
    "Failed",
    "LimiterDown",
    "NeedAgent",
    "NeedToken",
    "NotLimited",
    "Passage",
    "TokenChecked",
]

AGENT_HEADER = "x-ibex-agent-id"
USER_HEADER = "x-ibex-user-id"

DECIDING_HEADERS: Final = CREDENTIAL_HEADERS | {AGENT_HEADER, USER_HEADER}
"""All that a passage reads of a request's headers."""
REQUEST_HEADERS: Final = DECIDING_HEADERS | {names.REQUEST_ID_HEADER}
"""What a passage and its report read of a request's headers; Envoy need not send others."""

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_USER = re.compile(r"(?!.*ibex_pat_)[!-~]{1,128}")
"""Without a token: a user's id is stored, and shown to operators."""

_UNCOUNTED = msgspec.structs.replace(DEGRADED, retry_after_s=5)
"""Contract, case 4.6."""


# Events: facts that the driver tells.


class Arrived(msgspec.Struct, frozen=True, gc=False):
    headers: Mapping[str, str]
    """Those of `REQUEST_HEADERS` that were sent; one sent twice is joined with a comma."""

    @override
    def __repr__(self) -> str:
        return "Arrived()"  # they hold the token


class TokenChecked(msgspec.Struct, frozen=True, gc=False):
    result: Claims | TokenVerdict
    is_cached: bool = False


class AgentChecked(msgspec.Struct, frozen=True, gc=False):
    verdict: AgentVerdict


class Counted(msgspec.Struct, frozen=True, gc=False):
    quota: Quota


class NotLimited(msgspec.Struct, frozen=True, gc=False):
    """There is no limiter, or none for this request."""


class LimiterDown(msgspec.Struct, frozen=True, gc=False):
    """It did not answer in time, or not at all."""


class Failed(msgspec.Struct, frozen=True, gc=False):
    """Handling this request raised: a bug."""


Event: TypeAlias = Arrived | TokenChecked | AgentChecked | Counted | NotLimited | LimiterDown | Failed


# Effects: orders to the driver.


class NeedToken(msgspec.Struct, frozen=True, gc=False):
    """Find out whose token it is, and feed `TokenChecked`."""

    token: str

    @override
    def __repr__(self) -> str:
        return "NeedToken()"


class NeedAgent(msgspec.Struct, frozen=True, gc=False):
    """Find out whether this agent may act for this token, and feed `AgentChecked`."""

    token: str
    org_id: str
    agent_id: str

    @override
    def __repr__(self) -> str:
        return f"NeedAgent({self.org_id}, {self.agent_id})"


class Count(msgspec.Struct, frozen=True, gc=False):
    """Count the request, and feed `Counted`, `NotLimited` or `LimiterDown`."""

    org_id: str
    agent_id: str


class Allow(msgspec.Struct, frozen=True, gc=False):
    claims: Claims
    agent_id: str
    user_id: str | None
    is_cached: bool
    """The claims came from the cache."""
    quota: Quota | None
    """None: nothing was counted."""


class Deny(msgspec.Struct, frozen=True, gc=False):
    denial: Denial
    org_id: str = ""
    """Empty as long as it is not known."""
    agent_id: str = ""
    """Empty as long as it is not known to be one of the org's."""
    quota: Quota | None = None


Effect: TypeAlias = NeedToken | NeedAgent | Count | Allow | Deny


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """Valid claims with all permissions, and an active agent of theirs: all but the count.

    The same for each request with the same deciding headers, the same claims and the same verdict about the agent.
    """

    claims: Claims
    agent_id: str
    user_id: str | None
    is_cached: bool

    def settle(self, event: Event, *, denies_uncounted: bool) -> Allow | Deny:
        """`event`: what came of the count."""
        match event:
            case Counted() if event.quota.is_within:
                return Allow(self.claims, self.agent_id, self.user_id, self.is_cached, event.quota)
            case Counted():
                return Deny(_rate_limited(event.quota), self.claims.org_id, self.agent_id, event.quota)
            case NotLimited():
                return Allow(self.claims, self.agent_id, self.user_id, self.is_cached, None)
            case LimiterDown() if not denies_uncounted:
                return Allow(self.claims, self.agent_id, self.user_id, self.is_cached, None)
            case LimiterDown():
                return Deny(_UNCOUNTED, self.claims.org_id, self.agent_id)
            case _:
                return Deny(DEGRADED, self.claims.org_id, self.agent_id)


class State(Enum):
    OPENED = auto()
    TOKEN = auto()
    AGENT = auto()
    COUNT = auto()
    DECIDED = auto()


_BY_TOKEN: Final[dict[TokenVerdict, Denial]] = {
    TokenVerdict.INVALID: INVALID_TOKEN,
    TokenVerdict.UNAVAILABLE: DEGRADED,
    TokenVerdict.BUSY: DEGRADED,
}
_BY_AGENT: Final[dict[AgentVerdict, Denial]] = {
    AgentVerdict.INACTIVE: AGENT_SUSPENDED,
    AgentVerdict.NOT_AUTHORIZED: AGENT_NOT_AUTHORIZED,
    AgentVerdict.TOKEN_INVALID: INVALID_TOKEN,
    AgentVerdict.UNAVAILABLE: DEGRADED,
    AgentVerdict.BUSY: DEGRADED,
}


class Passage:
    """Feed `Arrived` and then what each effect asks for, until it is `Allow` or `Deny`."""

    __slots__ = (
        "_admitted",
        "_agent_id",
        "_claims",
        "_denies_uncounted",
        "_headers",
        "_is_cached",
        "_state",
        "_token",
        "_user_id",
    )

    def __init__(self, *, denies_uncounted: bool) -> None:
        """`denies_uncounted`: what happens while the limiter is down."""
        self._denies_uncounted = denies_uncounted
        self._state = State.OPENED
        self._headers: Mapping[str, str] = {}
        self._token = ""
        self._claims: Claims | None = None
        self._is_cached = False
        self._agent_id = ""
        self._user_id: str | None = None
        self._admitted: Admitted | None = None

    @property
    def admitted(self) -> Admitted | None:
        """None as long as it is not."""
        return self._admitted

    def receive(self, event: Event) -> Effect:
        match event:
            case Arrived() if self._state is State.OPENED:
                return self._receive_arrived(event.headers)
            case TokenChecked() if self._state is State.TOKEN:
                return self._receive_token(event)
            case AgentChecked() if self._state is State.AGENT:
                return self._receive_agent(event.verdict)
            case _ if self._state is State.COUNT and self._admitted is not None:
                self._state = State.DECIDED
                return self._admitted.settle(event, denies_uncounted=self._denies_uncounted)
            case _:
                return self._deny(DEGRADED)

    def _receive_arrived(self, headers: Mapping[str, str]) -> Effect:
        token = find_token(headers)
        if isinstance(token, Denial):
            return self._deny(token)
        self._headers, self._token, self._state = headers, token, State.TOKEN
        return NeedToken(token)

    def _receive_token(self, event: TokenChecked) -> Effect:
        claims = event.result
        if isinstance(claims, TokenVerdict):
            return self._deny(_BY_TOKEN[claims])
        self._claims, self._is_cached = claims, event.is_cached
        if claims.permissions & CHAT_PERMISSIONS != CHAT_PERMISSIONS:
            return self._deny(INSUFFICIENT_PERMISSIONS)
        agent_id = self._headers.get(AGENT_HEADER) or claims.agent_id
        if not agent_id:
            return self._deny(MISSING_AGENT)
        if not _UUID.fullmatch(agent_id):
            return self._deny(MALFORMED_AGENT)
        user_id = self._headers.get(USER_HEADER)
        if user_id is not None and not _USER.fullmatch(user_id):
            # An empty one too: its sender means to separate users, and would share the agent's memories instead.
            return self._deny(MALFORMED_USER)
        agent_id = agent_id.lower()
        if claims.agent_id is not None and claims.agent_id != agent_id:
            return self._deny(AGENT_NOT_AUTHORIZED)
        self._agent_id = agent_id
        self._user_id = claims.user_id if claims.user_id is not None else user_id
        self._state = State.AGENT
        return NeedAgent(self._token, claims.org_id, agent_id)

    def _receive_agent(self, verdict: AgentVerdict) -> Effect:
        assert self._claims is not None  # noqa: S101 - AGENT comes after the claims
        if verdict is not AgentVerdict.ACTIVE:
            return self._deny(_BY_AGENT[verdict], agent_id=self._agent_id if verdict is AgentVerdict.INACTIVE else "")
        self._state = State.COUNT
        self._admitted = Admitted(self._claims, self._agent_id, self._user_id, self._is_cached)
        return Count(self._claims.org_id, self._agent_id)

    def _deny(self, denial: Denial, *, agent_id: str = "") -> Deny:
        self._state = State.DECIDED
        return Deny(denial, self._claims.org_id if self._claims else "", agent_id)


def _rate_limited(quota: Quota) -> Denial:
    return Denial(
        429,
        Code.RATE_LIMITED,
        "This minute's requests are used up. Try again after Retry-After seconds.",
        retry_after_s=max(1, quota.retry_after_s),
    )
