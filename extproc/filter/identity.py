"""Whose memories may be seen: read from sources that the operator trusts, never guessed.

A source is `header:NAME`, `metadata:NAMESPACE/KEY[/KEY...]` (Envoy's dynamic metadata) or `value:TEXT`; several stand
in one setting, separated by commas, and the first that is present counts. A source that is present with a value of the
wrong form gives no identity at all, never the next source: a caller must not choose its identity by spoiling one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Identity", "IdentitySources", "SourceError"]

Headers = Callable[[str], str | None]
"""The value of a request header by its lower-case name; None when absent."""
Metadata = Callable[[str, tuple[str, ...]], str | None]
"""The text at a path in a namespace of dynamic metadata; None when absent or no text."""


class SourceError(ValueError):
    """A setting names a source that does not exist; the message says which and what would be right."""


@dataclass(frozen=True, slots=True)
class Identity:
    org_id: str
    """UUID, lower case."""
    agent_id: str
    """UUID, lower case."""
    user_id: str | None
    """1-128 visible ASCII characters; None: memories of the whole agent only."""


@dataclass(frozen=True, slots=True)
class _Source:
    kind: str
    name: str
    path: tuple[str, ...] = ()

    def read(self, headers: Headers, metadata: Metadata) -> str | None:
        match self.kind:
            case "header":
                return headers(self.name)
            case "metadata":
                return metadata(self.name, self.path)
            case _:
                return self.name


def _parse(setting: str, variable: str) -> tuple[_Source, ...]:
    return tuple(_parse_one(part.strip(), variable) for part in setting.split(",") if part.strip())


def _parse_one(text: str, variable: str) -> _Source:
    kind, _, rest = text.partition(":")
    match kind:
        case "header" if rest:
            return _Source(kind, rest.lower())
        case "value" if rest:
            return _Source(kind, rest)
        case "metadata" if "/" in rest:
            namespace, *path = rest.split("/")
            if namespace and all(path):
                return _Source(kind, namespace, tuple(path))
    raise SourceError(
        f"{variable}: {text!r} is no identity source; "
        "write header:NAME, metadata:NAMESPACE/KEY or value:TEXT, several separated by commas"
    )


_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_USER = re.compile(r"[!-~]{1,128}")


class IdentitySources:
    """The three sources of one installation. Raises SourceError when a setting cannot be read."""

    def __init__(self, org: str, agent: str, user: str) -> None:
        self._org = _parse(org, "IBEX_IDENTITY_ORG")
        self._agent = _parse(agent, "IBEX_IDENTITY_AGENT")
        self._user = _parse(user, "IBEX_IDENTITY_USER")

    @property
    def header_names(self) -> frozenset[str]:
        """The request headers that `identify` may ask for."""
        sources = (*self._org, *self._agent, *self._user)
        return frozenset(source.name for source in sources if source.kind == "header")

    def identify(self, headers: Headers, metadata: Metadata) -> Identity | None:
        """None without a well-formed org and agent, or with a malformed user: then there is no memory."""
        org = _first(self._org, headers, metadata)
        agent = _first(self._agent, headers, metadata)
        if org is None or agent is None or not _UUID.fullmatch(org) or not _UUID.fullmatch(agent):
            return None
        user = _first(self._user, headers, metadata)
        if user is not None and not _USER.fullmatch(user):
            return None
        return Identity(org.lower(), agent.lower(), user)


def _first(sources: tuple[_Source, ...], headers: Headers, metadata: Metadata) -> str | None:
    for source in sources:
        if (value := source.read(headers, metadata)) is not None:
            return value
    return None
