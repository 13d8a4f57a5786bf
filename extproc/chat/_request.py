"""What every chat format gives to the rest of the filter, and where its bytes may be edited. Types only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from extproc.chat._answer import AnswerLimits, AnswerReader

__all__ = [
    "ChatFormat",
    "ChatRequest",
    "Directive",
    "EditPoints",
    "InjectionMode",
    "Message",
    "Place",
    "Placement",
    "ReadLimits",
    "UnreadableBody",
    "injection_mode",
]


class Placement(StrEnum):
    """Where a block goes. Where a body has no such place, it goes to `LAST_USER`; see each format's `splice`."""

    LAST_USER = "last_user"
    """At the start of the last non-blank text of the last user message that carries text."""
    SYSTEM_FIRST = "system_first"
    """Before everything else that the model reads as instructions."""
    BEFORE_LAST_USER = "before_last_user"
    """A user message of its own, right before the last one that carries text."""


class InjectionMode(StrEnum):
    """Where a directive goes. The values are those of the store and the cache; see `splice` for bodies without the
    place.
    """

    SYSTEM_FIRST = "system_first"
    """Before everything else that the model reads as instructions."""
    SYSTEM_APPEND = "system_append"
    """After the instructions that the conversation begins with."""
    USER_PREPEND = "user_prepend"
    """At the start of the first non-blank text of the first user message that carries text, marked `[DIRECTIVE]: `."""


def injection_mode(text: str) -> InjectionMode:
    """The mode by its value; `SYSTEM_FIRST` for any other text."""
    try:
        return InjectionMode(text)
    except ValueError:
        return InjectionMode.SYSTEM_FIRST


@dataclass(frozen=True, slots=True)
class Directive:
    """What an operator tells an agent with every request."""

    text: str
    """Can be encoded as UTF-8, so it has no lone surrogates. An empty one is no directive."""
    mode: InjectionMode


class UnreadableBody(Exception):
    """The body cannot be read as its format says. Holds nothing of the client's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        """One of `not_json`, `not_utf8`, `too_deep`, `too_many_messages`, `wrong_type`, `not_located`."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    """As the client wrote it, except Gemini's `model`, which is `assistant` here as everywhere else."""
    text: str


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How much text to take out of a body, in bytes as the body spells them.

    An escape such as `\\u4e2d` is longer in the body than in UTF-8, never shorter, so the text obeys the limit too.
    """

    query_bytes: int = 4096
    recent_messages: int = 4
    recent_bytes: int = 2048
    """Of each recent message."""


@dataclass(frozen=True, slots=True)
class Place:
    """One insertion at an offset of the body: `before`, then a text as the inside of a JSON string, then `after`."""

    at: int
    before: bytes
    after: bytes
    between: bytes = rb"\n\n"
    """What separates two texts that go to this same place."""
    end: int = -1
    """Where the string or the array closes whose beginning this is; -1: it is no beginning of one."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How the array of messages begins, as offsets of content values; -1 where there is none."""

    leading: int = -1
    """How many messages it begins with that are instructions; -1: there is no array."""
    first_content_at: int = -1
    """Of the first message."""
    next_content_at: int = -1
    """Of the first after the leading ones."""
    first_user_at: int = -1
    """Of the first user message that may carry text, or of its first text alone."""
    first_user_end: int = -1


@dataclass(frozen=True, slots=True)
class EditPoints:
    """Offsets into the body a request was read from. For this room only."""

    last_user: Place | None = None
    """None: no user message carries text."""
    system: Place | None = None
    """The beginning of the instructions that stand outside of the messages. None: the format has none such (Chat
    Completions), or they take no text, as a `null`.
    """
    user_index: int = -1
    """Position of the last user message in its array; -1: nothing may be put right before it."""
    user_content_at: int = -1
    """Where that message's content value begins."""
    first_role: str = ""
    opening: Opening | None = None
    """None: to be found by reading the body again, which is cheap for a short one and mostly not needed."""


NO_EDITS = EditPoints()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat request as far as memory needs to know it."""

    format: str
    model: str
    """Empty when neither body nor path names one."""
    query: str
    """Text of the last user message that carries text, cut to `ReadLimits.query_bytes`; empty when there is none."""
    recent: tuple[Message, ...]
    """The last user and assistant messages with text before the query, oldest first."""
    content_bytes: int
    """Bytes the model will read, roughly: the whole body, where each large picture, sound or file counts as 6,000."""
    max_output_tokens: int | None
    """None: the client did not say."""
    is_streaming: bool
    edits: EditPoints = field(default=NO_EDITS, repr=False)
    """Read by the same format's `splice` only."""


class ChatFormat(Protocol):
    """One module for each format."""

    name: str

    def recognise(self, method: str, path: str) -> bool:
        """Is this a chat request of this format? `path` as in `:path`, query string included."""
        ...

    def read_request(self, body: bytes, path: str, limits: ReadLimits) -> ChatRequest:
        """Read a JSON body. Raises UnreadableBody and nothing else, whatever the bytes."""
        ...

    def splice(
        self, body: bytes, request: ChatRequest, text: str, placement: Placement, directive: Directive | None = None
    ) -> bytes:
        """The body with `directive` and `text` each inserted at one place, every other byte the client's.

        `request` is what `read_request` made of an equal body; both texts can be encoded as UTF-8, so they have no
        lone surrogates. Never raises then. An empty text is not inserted. At one place the directive comes first.

        Without a place for `placement` the text goes to LAST_USER: a request with a `query` always takes it. Without
        a place for its mode the directive goes to the next of SYSTEM_APPEND, SYSTEM_FIRST, USER_PREPEND, and after
        USER_PREPEND to SYSTEM_FIRST. The body itself comes back (`is`) when nothing went in; whenever anything did,
        the directive did too.
        """
        ...

    def read_answer(self, is_sse: bool, limits: AnswerLimits) -> AnswerReader:  # noqa: FBT001 - the content type's word
        """A reader for one answer. `is_sse`: its content type is that of an event stream."""
        ...

    def hash_messages(self, body: bytes) -> str:
        """SHA-256, lower-case hex, of the client's messages; see `extproc.chat._hash`. Raises UnreadableBody only."""
        ...
