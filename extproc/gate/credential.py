"""The caller's token: where it may stand in a request and what it looks like. Pure; nothing is asked of anybody here.

A token in the query string is never taken: paths are written into logs everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import unquote_plus

from extproc.gate.verdict import INVALID_TOKEN, MISSING_TOKEN, Denial

__all__ = ["CREDENTIAL_HEADERS", "find_token", "secret_parameters"]

CREDENTIAL_HEADERS: Final = frozenset(("authorization", "x-api-key", "x-goog-api-key", "api-key"))
"""What the official clients send: OpenAI, Anthropic, Gemini, Azure."""

_PREFIX = "ibex_pat_"
_TOKEN = re.compile(r"ibex_pat_[A-Za-z0-9._~+/=-]{8,500}")
"""The characters of a bearer token (RFC 6750, 2.1); no comma, which is what Envoy joins a repeated header with."""

_SECRET_PARAMETERS = frozenset(("key", "api_key", "api-key", "access_token"))
"""Gemini's clients send the first; the others are RFC 6750's and what people try."""


def find_token(headers: Mapping[str, str]) -> str | Denial:
    """The one token of a request, by its lower-case header names, without `Bearer`; a Denial without exactly one.

    An empty credential counts as none. Several headers may carry the same token; two different ones are malformed,
    since somebody else may believe the other one.
    """
    found = ""
    for name in CREDENTIAL_HEADERS & headers.keys():
        value = headers[name]
        if not value or not (token := _without_scheme(value.strip(), needs_scheme=name == "authorization")):
            continue
        if found and token != found:
            return INVALID_TOKEN
        found = token
    if not found:
        return MISSING_TOKEN
    return found if _TOKEN.fullmatch(found) else INVALID_TOKEN


def _without_scheme(value: str, *, needs_scheme: bool) -> str:
    """Empty for no credential. What has another scheme, or lacks one where it is needed, keeps a form of no token."""
    if value[:6].lower() == "bearer" and (len(value) == 6 or value[6] == " "):
        return value[7:].strip()
    return f"? {value}" if needs_scheme and value else value


def secret_parameters(path: str) -> list[str]:
    """Names, as they are spelled in the query of `path`, of the parameters that hold a credential."""
    _, mark, query = path.partition("?")
    return list(dict.fromkeys(_secrets(query))) if mark else []


def _secrets(query: str) -> Iterator[str]:
    for pair in query.partition("#")[0].split("&"):
        name, _, value = pair.partition("=")
        if unquote_plus(name).strip().lower() in _SECRET_PARAMETERS or _PREFIX in unquote_plus(value).lower():
            yield name
