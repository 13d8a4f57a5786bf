"""One finished exchange, as the outbox keeps it and as checkpoint, extraction task and trace are made from it.

Pure: no I/O, no clock. Ids are derived, so that doing anything twice finds what the first time made, and the path of a
request needs no look-up.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum

import msgspec

__all__ = ["End", "Entry", "Turn", "TurnText", "checkpoint_id", "session_id", "task_id"]

_NAMESPACE = uuid.UUID("5f1b6b7c-6a35-5c5b-9d7e-3f0f6e3d2a10")
"""Of every id that is derived here. Changing it would give each session a second row."""


class End(StrEnum):
    """How the exchange ended, as far as its own stream shows."""

    COMPLETE = "complete"
    """The answer came whole."""
    INCOMPLETE = "incomplete"
    """The answer began and broke off: the provider's connection ended, or its stream reported an error."""
    CLIENT_GONE = "client_gone"
    """The client left before the answer was whole."""
    PROVIDER_ERROR = "provider_error"
    """A status of 400 or above from the provider, or Envoy's own answer in place of it (nobody there, no answer)."""
    DENIED = "denied"
    """The gate said no."""


class TurnText(msgspec.Struct, frozen=True, gc=False):
    """What was said. Kept apart from the turn, since it is forgotten earlier."""

    user_text: str
    assistant_text: str


class Turn(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Ids, numbers and hashes of one exchange; no content."""

    request_id: str
    """X-Request-ID, 1-64 visible ASCII characters."""
    org_id: str
    """UUID, lower case, as are `agent_id`, `session_id` and `checkpoint_id`."""
    agent_id: str
    user_id: str | None = None
    """1-128 visible ASCII characters; None: no end user was named."""
    external_id: str
    """The session as the client calls it, 1-64 visible ASCII characters."""
    session_id: str
    """The session's row, see `session_id()`."""
    checkpoint_id: str
    """The checkpoint's row, see `checkpoint_id()`."""
    end: End
    status_code: int = 0
    """As the client got it; 0: it got none."""
    error_code: str = ""
    """Of the provider or of the gateway, at most 64 of `[A-Za-z0-9_.-]`; empty: none."""
    chat_format: str = ""
    model: str = ""
    """The one that answered, else the one that was asked for."""
    provider: str = ""
    """Envoy's upstream cluster, without a leading `provider_`."""
    provider_request_id: str | None = None
    """The provider's own id of the answer."""
    finish_reason: str = ""
    """In the provider's words; empty: unknown."""
    is_streaming: bool = False
    is_complete: bool = False
    input_tokens: int | None = None
    """As the provider counted them, like the next three; None: it did not say."""
    output_tokens: int | None = None
    cached_input_tokens: int | None = None
    """Of `input_tokens`, those read from the provider's prompt cache."""
    reasoning_tokens: int | None = None
    messages_hash: str = ""
    """SHA-256, hex, see the contract; empty: the request could not be read."""
    completion_hash: str | None = None
    """SHA-256, hex, of the completion's text; None: there is none, or it was too long to keep."""
    outcome: str = ""
    """The context filter's; empty: it did not answer."""
    memories_injected: int = 0
    context_tokens: int = 0
    context_fallback: bool = True
    auth_ms: float = 0.0
    directive_ms: float = 0.0
    engine_ms: float = 0.0
    filter_ms: float = 0.0
    ttfb_ms: float | None = None
    """From the request's arrival to the first byte of the answer's body; None: no byte came."""
    total_ms: float = 0.0
    """From the request's arrival to the end."""
    chunks: int = 0
    """Pieces of the answer's body, as they came from Envoy."""
    longest_gap_ms: float = 0.0
    """Longest time between two of them."""
    requested_at: datetime
    """Aware, UTC, like `completed_at`."""
    completed_at: datetime
    traceparent: str = ""
    """W3C trace context of the request; empty: it had none."""
    skip_extraction: bool = False
    """The client asked: no text kept, no task."""
    text_was_cut: bool = False
    """The text is longer than what is kept of it, or was left out for its length."""

    @property
    def has_checkpoint(self) -> bool:
        """Whether the provider answered, so that this is a turn of its session; the others leave a trace only."""
        return self.end not in {End.DENIED, End.PROVIDER_ERROR} and 200 <= self.status_code < 300


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A turn on its way, as the outbox hands it to a consumer."""

    seq: int
    """Its place in the outbox: rises, never used twice."""
    turn: Turn
    text: TurnText | None = None
    """Only for the checkpoint; None: there is none to keep."""
    turn_index: int | None = None
    """In its session; None until the checkpoint is written, and for a duplicate."""


def session_id(org_id: str, agent_id: str, user_id: str | None, external_id: str) -> str:
    """The row of a session: the same for everybody who knows whose it is and how the client calls it."""
    return _derived("session", org_id, agent_id, user_id or "", external_id)


def checkpoint_id(org_id: str, request_id: str) -> str:
    return _derived("checkpoint", org_id, request_id)


def task_id(org_id: str, session_id: str, turn_index: int) -> str:
    """Of the extraction task that a turn asks for: sent twice, it is recognisable."""
    return _derived("extraction", org_id, session_id, str(turn_index))


def _derived(*parts: str) -> str:
    # No part can hold a line break, so two lists never make one name.
    return str(uuid.uuid5(_NAMESPACE, "\n".join(parts)))
