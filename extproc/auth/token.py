"""What a token is: its wire form, its permissions, and whether it may be used now. Pure but for the randomness.

    ibex_pat_  q3VbW0yT8mZk  _  0nV…43 characters…
    kind       public        secret, 256 bits

The public part is unique and stands in lists, so that people can tell tokens apart; it finds the row. Letters and
digits only, so that a double click takes all of it and no shell or URL changes it.
"""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntFlag, StrEnum

__all__ = [
    "CHAT",
    "MOST_PERMISSIONS",
    "Permission",
    "Refusal",
    "Token",
    "contains_token",
    "mint",
    "refusal_of",
    "split",
]

_ALPHABET = string.ascii_letters + string.digits
_PUBLIC_CHARACTERS = 12
"""71 bits: two tokens never share them by chance, and nobody finds one that exists by trying."""
_SECRET_CHARACTERS = 43
"""256 bits."""
_FORM = re.compile(rf"(ibex_pat_[A-Za-z0-9]{{{_PUBLIC_CHARACTERS}}})_[A-Za-z0-9]{{{_SECRET_CHARACTERS}}}", re.ASCII)

MOST_PERMISSIONS = 2**63 - 1
"""An int64, from 0."""


class Permission(IntFlag):
    """Bits of `permissions`; others than these belong to other systems and are kept as they are."""

    MEMORY_READ = 1 << 0
    SESSION_CREATE = 1 << 16
    SESSION_READ = 1 << 17
    SESSION_TERMINATE = 1 << 18
    TOKEN_ADMIN = 1 << 32
    """Ours: make, list and revoke the organisation's tokens over gRPC. Only `extproc token create` grants it."""


CHAT = int(Permission.MEMORY_READ | Permission.SESSION_CREATE | Permission.SESSION_READ)
"""What a chat request needs: 196609."""


class Refusal(StrEnum):
    """Why a token is no proof. For logs and metrics: a caller is told none of it."""

    MISSING = "missing"
    MALFORMED = "malformed"
    UNKNOWN = "unknown"
    WRONG_SECRET = "wrong_secret"  # noqa: S105 - a name
    REVOKED = "revoked"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Token:
    """One row of `api_tokens`. All times are aware, in UTC."""

    id: str
    org_id: str
    name: str
    description: str
    prefix: str
    """With the kind: `ibex_pat_` and the public characters."""
    hash: str = field(repr=False)
    """Argon2id, encoded with its parameters."""
    permissions: int
    agent_id: str | None
    """None: any agent of the organisation."""
    user_id: str | None
    expires_at: datetime | None
    """The first moment at which it is not valid. None: never."""
    created_at: datetime
    revoked_at: datetime | None
    revoke_reason: str | None


def mint() -> tuple[str, str]:
    """A new token's plaintext, and its prefix."""
    prefix = f"ibex_pat_{_random(_PUBLIC_CHARACTERS)}"
    return f"{prefix}_{_random(_SECRET_CHARACTERS)}", prefix


def split(plaintext: str) -> str | None:
    """The prefix of what has the form of a token; None: it has not."""
    match = _FORM.fullmatch(plaintext)
    return match[1] if match else None


def contains_token(text: str) -> bool:
    """Whether somebody has put a whole token where a name or a reason belongs."""
    return _FORM.search(text) is not None


def refusal_of(token: Token, now: datetime) -> Refusal | None:
    """Whatever the caller's secret is: why nobody may use this token now."""
    if token.revoked_at is not None:
        return Refusal.REVOKED
    if token.expires_at is not None and now >= token.expires_at:
        return Refusal.EXPIRED
    return None


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
