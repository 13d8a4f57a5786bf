"""Keys of providers: what each one is called and where it goes in a request.

No process of ours ever holds one: Envoy reads them from its environment or from files, and puts them in behind all
filters that ask somebody else. Only `extproc up` handles them, between its environment and Envoy's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BY_PROVIDER", "Key", "UnusableKey", "key_for", "take", "write"]

OTHER_PROVIDER = "IBEX_PROVIDER_KEY"
"""For a provider that nobody knows by name: the key of another company must not reach it by accident."""


class UnusableKey(ValueError):
    """The message says which and why, and never holds the key."""


@dataclass(frozen=True, slots=True)
class Key:
    variable: str
    """Of Envoy's environment."""
    header: str = "authorization"
    prefix: str = "Bearer "

    @property
    def value(self) -> str:
        """The header's value, in Envoy's words: it puts the variable in when it starts."""
        return f"{self.prefix}%ENVIRONMENT({self.variable})%"


BY_PROVIDER = {
    "openai": Key("OPENAI_API_KEY"),
    "anthropic": Key("ANTHROPIC_API_KEY", "x-api-key", ""),
    "gemini": Key("GEMINI_API_KEY", "x-goog-api-key", ""),
    "selfhosted": Key("SELFHOSTED_API_KEY"),
}
"""As envoy.yaml has them; a cluster is called `provider_NAME`."""

_BY_HOST = {
    "api.openai.com": BY_PROVIDER["openai"],
    "api.anthropic.com": BY_PROVIDER["anthropic"],
    "generativelanguage.googleapis.com": BY_PROVIDER["gemini"],
}


def key_for(host: str, variable: str | None = None) -> Key:
    """The key of the provider at `host`, from `variable` if given. Raises UnusableKey."""
    known = _BY_HOST.get(host.lower(), Key(OTHER_PROVIDER))
    if variable is None:
        return known
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UnusableKey(f"{variable!r} is no name of an environment variable")
    return Key(variable, known.header, known.prefix)


def take(environment: Mapping[str, str], variable: str) -> str | None:
    """The key in `variable`; None when it is not set or empty. Raises UnusableKey for what no header can hold."""
    key = environment.get(variable, "").strip()
    if key and not _is_visible(key):
        raise UnusableKey(f"{variable} holds characters that no API key has; set it again")
    return key or None


def write(directory: Path, provider: str, key: str) -> Path:
    """Write or replace a key file for Envoy, in one step and for this user alone.

    `provider`: of `BY_PROVIDER`. The file holds the whole value of the header, because Envoy 1.36 cannot put `Bearer`
    in front. Raises OSError, UnusableKey.
    """
    if provider not in BY_PROVIDER:
        raise UnusableKey(f"{provider!r} is none of {', '.join(BY_PROVIDER)}")
    if not _is_visible(key):
        raise UnusableKey(f"the key of {provider} is empty, or holds characters that no API key has")
    secret = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": f"provider_{provider}",
        "generic_secret": {"secret": {"inline_string": BY_PROVIDER[provider].prefix + key}},
    }
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    file, fresh = directory / f"{provider}.yaml", directory / f".{provider}.new"
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        json.dump({"resources": [secret]}, opened)  # JSON is YAML
    return fresh.replace(file)


def _is_visible(text: str) -> bool:
    return re.fullmatch("[!-~]+", text) is not None
