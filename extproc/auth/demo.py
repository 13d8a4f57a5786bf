"""The organisation, the agent and the token that `extproc up` begins with."""

from __future__ import annotations

from datetime import UTC, datetime

import uuid_utils

from extproc.auth.hashing import hash_token
from extproc.auth.new_token import new_token
from extproc.auth.store import Agent, AgentStatus, IdentityStore, Organization, all_pages
from extproc.auth.token import CHAT
from extproc.memory.database import Database

__all__ = ["ensure_demo", "ensure_demo_agent"]

_NAME = "extproc up"
_PAGE = 500


def ensure_demo_agent(database: Database, org_id: str, agent_id: str) -> None:
    """Make organisation and agent where they are missing. Blocks; raises StoreError."""
    store, now = IdentityStore(database), datetime.now(UTC)
    # Any number of requests: what a first look at the stack finds is no limit. `extproc org set-limit` asks for one.
    store.add_organization(Organization(org_id, _NAME, 0, now))
    store.add_agent(Agent(org_id, agent_id, _NAME, AgentStatus.ACTIVE, now, now))


def ensure_demo(database: Database, org_id: str, agent_id: str) -> str | None:
    """Make what is missing. Returns the token's plaintext when it was made just now: nobody can ever see it again.

    None: it was there, revoked or not. Blocks; raises StoreError.
    """
    ensure_demo_agent(database, org_id, agent_id)
    store, now = IdentityStore(database), datetime.now(UTC)
    if any(
        token.agent_id == agent_id and token.name == _NAME
        for token in all_pages(lambda after: store.tokens(org_id, _PAGE, after))
    ):
        return None
    token, plaintext = new_token(
        id=str(uuid_utils.uuid7()),
        now=now,
        hash_of=hash_token,
        org_id=org_id,
        name=_NAME,
        description="made at the first start",
        permissions=CHAT,
        agent_id=agent_id,
    )
    store.add_token(token)
    return plaintext
