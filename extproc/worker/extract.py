"""The door of every extractor: turns in, what may be remembered of them out. Pure."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from extproc.memory.model import Category

__all__ = [
    "EPISODE",
    "FACT_CONFIDENCE",
    "MOST_PER_TURN",
    "USER",
    "Accounting",
    "Extracted",
    "Extraction",
    "Extractor",
    "ExtractorRefused",
    "ExtractorUnavailable",
    "Turn",
    "normalised",
]

USER: Final = "user"
"""The subject of a fact about the one who speaks."""
EPISODE: Final = ""
"""The slot of what was said and stands for itself; every other slot is of a fact."""
MOST_PER_TURN = 10
"""Facts of one turn: more are a list that was pasted, or a model that invents."""
FACT_CONFIDENCE = 0.7
"""Of a fact that a rule found: below the 0.8 of what somebody entered, and raised when it is said again."""

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange of a session, as `turns` keeps it until its memories are written."""

    session_id: str
    index: int
    """In the session, from 0."""
    user_text: str
    assistant_text: str
    at: datetime
    """Aware. When it was said; its own time zone decides which day `tomorrow` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """One thing to remember, not yet compared with what is known."""

    content: str
    """As it will be stored: 1 to 10,000 bytes of UTF-8."""
    category: Category
    confidence: float
    """0..1"""
    turn_index: int
    """Of the turn that it is from."""
    at: datetime
    """When it was said."""
    quote: str
    """The words of the turn that say it."""
    subject: str = USER
    """Whom it is about: the user, a name as it was written, or a relation such as `user's sister`."""
    slot: str = EPISODE
    """What about them: `home`, `favourite:colour`."""
    value: str = ""
    polarity: int = 1
    """-1: it is not so, or no longer."""
    is_correction: bool = False
    """Its own words say that something else was so before."""
    valid_from: datetime | None = None
    """None: since it was said, or unknown. Never after `at`, where retrieval would hide it."""
    valid_until: datetime | None = None
    is_quarantined: bool = False
    """Kept apart for the operator and never retrieved."""
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Accounting:
    """What an extraction took; adds up over turns."""

    turns: int = 0
    input_tokens: int = 0
    """As the model's server counted them, like the next; 0 without a model."""
    output_tokens: int = 0
    cost: float = 0.0
    """In the currency of the configured prices."""
    calls: int = 0
    unsupported: int = 0
    """Proposed memories that the turns do not bear out; none was written."""
    redacted: int = 0
    """Secrets taken out of texts."""
    cut_turns: int = 0
    """Turns so long that only their beginning was read."""

    def __add__(self, other: Accounting) -> Accounting:
        return Accounting(
            self.turns + other.turns,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cost + other.cost,
            self.calls + other.calls,
            self.unsupported + other.unsupported,
            self.redacted + other.redacted,
            self.cut_turns + other.cut_turns,
        )


@dataclass(frozen=True, slots=True)
class Extraction:
    memories: list[Extracted]
    """In the order in which they were said; those of one turn together."""
    accounting: Accounting


class ExtractorUnavailable(Exception):
    """Nothing wrong with the turns: the same call may work later."""


class ExtractorRefused(Exception):
    """The same call will fail again. The message says why and holds nothing of the turns."""


class Extractor(Protocol):
    def extract(self, turns: Sequence[Turn]) -> Extraction:
        """Turns of one session, in order. The same turns give the same memories, as far as a model lets them.

        Raises ExtractorUnavailable and ExtractorRefused.
        """
        ...


def normalised(text: str) -> str:
    """For comparing what was said with what is claimed: letters without case or width, one kind of quote and space."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("“", '"').replace("”", '"')
    return _SPACES.sub(" ", folded).strip()
