"""What became of one request: the value in metadata, metric label, span and trace, and what the operator reads."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """Exactly one for each request. `is_fallback` is the value of X-IBEX-Context-Fallback."""

    INJECTED = "injected"
    NOTHING_FOUND = "nothing_found"
    """The engine is well and had nothing to add, or the request already fills the context window."""
    SKIPPED = "skipped"
    """The client sent X-IBEX-Skip-Memory."""
    DISABLED = "disabled"
    """Memory is off for this route."""
    NOT_CHAT = "not_chat"
    NO_IDENTITY = "no_identity"
    NO_QUERY = "no_query"
    """No user message carries text."""

    TIMEOUT = "timeout"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    ENGINE_ERROR = "engine_error"
    UNREADABLE_BODY = "unreadable_body"
    ENCODED_BODY = "encoded_body"
    BODY_TOO_LARGE = "body_too_large"
    FILTER_ERROR = "filter_error"
    """A bug of ours, logged with its traceback."""
    CANCELLED = "cancelled"
    """Envoy closed the stream before the reply: the client went away, or `message_timeout` fired."""
    LOCAL_REPLY = "local_reply"
    """Envoy answered by itself before the filter had the whole request, such as the gate's 401."""

    @property
    def is_fallback(self) -> bool:
        """Whether context that was wanted is missing."""
        return self not in _WANTED


_WANTED = frozenset(
    (
        Outcome.INJECTED,
        Outcome.NOTHING_FOUND,
        Outcome.SKIPPED,
        Outcome.DISABLED,
        Outcome.NOT_CHAT,
        Outcome.NO_IDENTITY,
        Outcome.NO_QUERY,
    )
)
