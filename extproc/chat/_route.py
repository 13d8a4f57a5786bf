"""Paths and content types, as a router reads them.

Only the end of a path counts, since gateways mount providers under prefixes of their own. The path is split before it
is percent-decoded, so `%2F` separates nothing. Names are compared with their case, as the providers do. One slash at
the end is passed over: most servers take such a path or redirect it.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

__all__ = ["is_event_stream", "is_json", "segments"]

_LONGEST_PATH: Final = 2048
"""No provider's path is a tenth of that; a longer one is no chat, and not worth decoding. The query does not count: a
client could make its chat unseen with a long one."""

_JSON: Final = re.compile(
    r"\s*application/(?:json|[\w.!#$&^-]+\+json)\s*(?:;.*)?", re.ASCII | re.IGNORECASE | re.DOTALL
)
_EVENT_STREAM: Final = re.compile(r"\s*text/event-stream\s*(?:;.*)?", re.ASCII | re.IGNORECASE | re.DOTALL)


def segments(path: str) -> list[str]:
    """The decoded segments of `:path`, without its query string."""
    path = path.partition("?")[0].partition("#")[0]
    if len(path) > _LONGEST_PATH:
        return [""]
    parts = path.split("/")
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    return [unquote(part) for part in parts] if "%" in path else parts


def is_json(content_type: str) -> bool:
    """Is it `application/json` or `application/*+json`, with any parameters? No content type at all counts as JSON."""
    return not content_type or _JSON.fullmatch(content_type) is not None


def is_event_stream(content_type: str) -> bool:
    """Is it `text/event-stream`, with any parameters?"""
    return _EVENT_STREAM.fullmatch(content_type) is not None
