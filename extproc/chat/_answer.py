"""What an answer says, and how a reader of answers looks from outside. Types only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["AnswerLimits", "AnswerReader", "Completion", "ToolCall", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the provider gave them; None: it did not say.

    They mean the same for every provider, as OpenTelemetry's GenAI conventions have it, so that traces can be added
    up: input includes what came from or went into a prompt cache, output includes reasoning.
    """

    input_tokens: int | None = None
    """Anthropic counts cached tokens apart, and Gemini the tokens of tool use: both are added here."""
    output_tokens: int | None = None
    """Gemini counts thoughts apart: they are added here."""
    cached_input_tokens: int | None = None
    """Of `input_tokens`, those read from the provider's prompt cache."""
    reasoning_tokens: int | None = None
    """Of `output_tokens`; Anthropic does not tell."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the client's tools; what the provider runs by itself is none."""

    id: str
    """Empty when the format has none, at most 256 visible ASCII characters, as is `name`."""
    name: str
    arguments: str
    """JSON, as far as it came, in the provider's spelling."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, as far as it was seen."""

    text: str = ""
    """Of the first choice: its text parts joined without a separator, as the providers' own libraries do. Reasoning,
    refusals and tool calls are not in it.
    """
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = ""
    """In the provider's words, at most 64 of `[A-Za-z0-9_.-]`; empty: unknown."""
    model: str = ""
    """The one that answered, at most 256 visible ASCII characters; empty: unknown."""
    response_id: str | None = None
    """The provider's own id, at most 256 visible ASCII characters."""
    usage: Usage = Usage()
    error: str = ""
    """Type or code of the error in the body or in mid-stream, at most 64 of `[A-Za-z0-9_.-]`, never its message;
    `error` where it has neither; empty: there was none.
    """
    has_ended: bool = False
    """The format's own last event was seen, or the whole JSON body was read."""
    was_cut: bool = False
    """A text was longer than its limit, or content was left out because it was too large or could not be read."""


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """How much of an answer is kept, and how much is looked at in one piece."""

    max_text_bytes: int = 1024**2
    """Of the text, of the refusal and of all arguments of tool calls, each, in UTF-8; cut between two characters."""
    max_event_bytes: int = 4 * 1024**2
    """Of one event, or one element of a streamed array; a picture fits. Hostile ones of this size hold the
    interpreter for up to 30 ms.
    """
    max_json_bytes: int = 8 * 1024**2
    """Of a JSON body that does not stream. Hostile ones of this size hold the interpreter for 10 to 40 ms."""


class AnswerReader(Protocol):
    """Reads one answer. Whatever the bytes, it neither raises nor keeps more than its limits allow."""

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the decoded body, cut anywhere."""
        ...

    def finish(self) -> Completion:
        """What was seen so far. Call it once, at any point; nothing may follow."""
        ...
