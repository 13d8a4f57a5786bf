"""What the gate knows and says: claims, agents, quotas, denials. Values only; contract sections 1.2, 2, 3 and 8.

They are msgspec's structs where one is made for each request: a frozen dataclass costs five times as much.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto

import msgspec

__all__ = [
    "AGENT_NOT_AUTHORIZED",
    "AGENT_SUSPENDED",
    "CHAT_PERMISSIONS",
    "DEGRADED",
    "INSUFFICIENT_PERMISSIONS",
    "INVALID_TOKEN",
    "MALFORMED_AGENT",
    "MALFORMED_USER",
    "MISSING_AGENT",
    "MISSING_TOKEN",
    "AgentVerdict",
    "Claims",
    "Code",
    "Denial",
    "FieldError",
    "Quota",
    "TokenVerdict",
]

CHAT_PERMISSIONS = 1 << 0 | 1 << 16 | 1 << 17
"""MemoryRead, SessionCreate, SessionRead (196609). Asked of every request: the gate stands in front of providers only,
and whoever may list a provider's models or use its embeddings spends the same money as a chat."""


class Claims(msgspec.Struct, frozen=True, gc=False):
    """What a valid token says, as the auth service told it. Ids in lower case."""

    org_id: str
    permissions: int
    agent_id: str | None
    """None: the token is not bound to an agent."""
    user_id: str | None
    """None: the token is not bound to a user."""
    token_id: str | None
    """None: its revocation could not be recognised, so it is never cached."""
    expires_at: float | None
    """Unix seconds; None: it does not expire."""


class TokenVerdict(Enum):
    """Why there are no claims."""

    INVALID = auto()
    """Wrong, expired or revoked: the auth service said so, now or a moment ago."""
    UNAVAILABLE = auto()
    """It did not answer, or not with an answer."""
    BUSY = auto()
    """The guard did not let the question through, because of too many wrong tokens."""


class AgentVerdict(Enum):
    ACTIVE = auto()
    INACTIVE = auto()
    NOT_AUTHORIZED = auto()
    """Unknown, or of another org: nobody is told which."""
    TOKEN_INVALID = auto()
    """The token was revoked, or expired, since it was validated."""
    UNAVAILABLE = auto()
    BUSY = auto()
    """As for tokens: this one named too many agents that it may not use."""


class Quota(msgspec.Struct, frozen=True, gc=False):
    """What the limiter counted: the org's minute, or the agent's when that is the one that refuses."""

    is_within: bool
    limit: int
    remaining: int
    reset: int
    """Unix seconds at which the minute ends."""
    retry_after_s: int
    """Until then; 1 to 60."""


class Code(StrEnum):
    """Of the error envelope, and the label of the metric."""

    MISSING_AGENT_ID = "MISSING_AGENT_ID"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    MISSING_TOKEN = "MISSING_TOKEN"  # noqa: S105 - a name
    INVALID_TOKEN = "INVALID_TOKEN"  # noqa: S105
    INSUFFICIENT_PERMISSIONS = "INSUFFICIENT_PERMISSIONS"
    AGENT_NOT_AUTHORIZED = "AGENT_NOT_AUTHORIZED"
    AGENT_SUSPENDED = "AGENT_SUSPENDED"
    RATE_LIMITED = "RATE_LIMITED"
    SERVICE_DEGRADED = "SERVICE_DEGRADED"


class FieldError(msgspec.Struct, frozen=True, gc=False):
    field: str
    code: str
    message: str


class Denial(msgspec.Struct, frozen=True, gc=False):
    """The answer to a request that may not pass. Texts are ours; nothing that a client or a service sent is in them."""

    status: int
    code: Code
    message: str
    field_errors: tuple[FieldError, ...] = ()
    retry_after_s: int | None = None


MISSING_TOKEN = Denial(
    401, Code.MISSING_TOKEN, "No access token was sent. Send one as `Authorization: Bearer ibex_pat_...`."
)
INVALID_TOKEN = Denial(401, Code.INVALID_TOKEN, "The access token is malformed, unknown, expired or revoked.")
INSUFFICIENT_PERMISSIONS = Denial(
    403,
    Code.INSUFFICIENT_PERMISSIONS,
    "The access token lacks permissions. MemoryRead, SessionCreate and SessionRead are needed.",
)
MISSING_AGENT = Denial(
    400, Code.MISSING_AGENT_ID, "Name the calling agent in X-IBEX-Agent-ID; this token is not bound to one."
)
MALFORMED_AGENT = Denial(
    400,
    Code.VALIDATION_ERROR,
    "A header is not valid.",
    (FieldError("X-IBEX-Agent-ID", "invalid_uuid", "must be one UUID"),),
)
MALFORMED_USER = Denial(
    400,
    Code.VALIDATION_ERROR,
    "A header is not valid.",
    (FieldError("X-IBEX-User-ID", "invalid_user_id", "must be 1 to 128 visible ASCII characters, sent once"),),
)
AGENT_NOT_AUTHORIZED = Denial(403, Code.AGENT_NOT_AUTHORIZED, "This access token may not use this agent.")
AGENT_SUSPENDED = Denial(403, Code.AGENT_SUSPENDED, "This agent is not active.")
DEGRADED = Denial(
    503, Code.SERVICE_DEGRADED, "The request cannot be authorised at the moment. Try again shortly.", retry_after_s=1
)
