"""A new token, checked: what somebody asks for becomes a row, or is refused with a reason. Pure but for the secret."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from extproc.auth.token import MOST_PERMISSIONS, Permission, Token, contains_token, mint
from extproc.memory.model import InvalidValue, parse_uuid

__all__ = ["new_token", "parse_name", "parse_reason"]

_MOST_NAME = 128
_MOST_TEXT = 1024
"""Characters of a description or a reason."""
_USER_ID = re.compile(r"[!-~]{1,128}")
"""As the X-IBEX-User-ID header has it."""


def new_token(
    *,
    id: str,  # noqa: A002 - the column's name
    now: datetime,
    hash_of: Callable[[str], str],
    org_id: str,
    name: str,
    description: str = "",
    permissions: int,
    agent_id: str = "",
    user_id: str = "",
    expires_at: datetime | None = None,
) -> tuple[Token, str]:
    """The row, and the plaintext that nobody can ever see again. Empty ids: not bound. Raises InvalidValue."""
    if not 0 <= permissions <= MOST_PERMISSIONS:
        raise InvalidValue("permissions are not a number from 0 to 2^63 - 1")
    if permissions & Permission.TOKEN_ADMIN and (agent_id or user_id):
        raise InvalidValue("permissions to manage tokens are the organisation's; bind the token to no agent or user")
    if user_id and not _USER_ID.fullmatch(user_id):
        raise InvalidValue("user_id is not 1 to 128 visible ASCII characters")
    if expires_at is not None and expires_at <= now:
        raise InvalidValue("expires_at is not in the future")
    plaintext, prefix = mint()
    token = Token(
        id=id,
        org_id=parse_uuid(org_id, "org_id"),
        name=parse_name(name),
        description=_text(description, "description"),
        prefix=prefix,
        hash="",
        permissions=permissions,
        agent_id=parse_uuid(agent_id, "agent_id") if agent_id else None,
        user_id=user_id or None,
        expires_at=expires_at,
        created_at=now,
        revoked_at=None,
        revoke_reason=None,
    )
    # Last, since it takes long: whatever is wrong was said before.
    return replace(token, hash=hash_of(plaintext)), plaintext


def parse_name(text: str) -> str:
    """Of an organisation, an agent or a token. Raises InvalidValue."""
    name = text.strip()
    if not 1 <= len(name) <= _MOST_NAME or not name.isprintable():
        raise InvalidValue(f"name is not 1 to {_MOST_NAME} printable characters")
    return _without_token(name, "name")


def parse_reason(text: str) -> str | None:
    """Why a token is revoked; None: not said. Raises InvalidValue."""
    return _text(text, "revoke_reason") or None


def _text(text: str, role: str) -> str:
    if len(text) > _MOST_TEXT or not text.isprintable():
        raise InvalidValue(f"{role} is not {_MOST_TEXT} or fewer printable characters")
    return _without_token(text.strip(), role)


def _without_token(text: str, role: str) -> str:
    if contains_token(text):
        raise InvalidValue(f"{role} holds a token, which belongs nowhere but to its user")
    return text
