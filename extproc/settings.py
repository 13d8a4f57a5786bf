"""Every setting, once: type, unit, default and help. The table in the README is made from this file.

The environment is read in one place (`load`), at start, and all mistakes are reported together. Each process reads its
own class. Nothing here is a service: run-time forms (patterns, clients) are built by `extproc.serve`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["EngineSettings", "FilterSettings", "ProcessSettings", "Settings", "SettingsError", "StoreSettings", "load"]


class SettingsError(Exception):
    """What was set cannot be used: a malformed value, an address in use. The message lists all of it, one a line."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="IBEX_", frozen=True, extra="ignore", populate_by_name=True)


class ProcessSettings(Settings):
    """What every server process has."""

    admin_listen: str = Field(
        "127.0.0.1:9090",
        description="`host:port` of `/health`, `/ready` and `/metrics`; port 0 takes a free one, empty turns it off",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    otlp_endpoint: str = Field(
        "",
        validation_alias=AliasChoices("IBEX_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="base URL of the OTLP/HTTP receiver of the spans, such as `http://127.0.0.1:4318`; "
        "`OTEL_EXPORTER_OTLP_ENDPOINT` says the same; empty: none are exported",
    )
    drain_s: Annotated[float, Field(ge=0, le=300)] = Field(
        5.0, description="seconds that running requests get to end after SIGTERM"
    )
    watchdog_s: Annotated[float, Field(ge=0, le=60)] = Field(
        2.0,
        description="seconds without a tick of the event loop after which the process ends itself, "
        "so that Envoy fails over at once; 0 turns it off",
    )


class FilterSettings(ProcessSettings):
    """`extproc filter`"""

    filter_listen: str = Field(
        "127.0.0.1:9101", description="where Envoy reaches the filter: `host:port` or `unix:/path`"
    )
    engine_address: str = Field("127.0.0.1:9102", description="gRPC target of the engine")
    budget_ms: Annotated[float, Field(gt=0, le=1000)] = Field(
        45.0, description="milliseconds from a request's arrival at the filter to its reply, everything included"
    )
    max_body_bytes: Annotated[int, Field(ge=1024, le=1024**3)] = Field(
        10 * 1024 * 1024, description="largest request body that is read; keep it equal to Envoy's buffer limit"
    )
    placement: Literal["last_user", "system_first", "before_last_user"] = Field(
        "last_user", description="where memories go; `last_user` keeps the provider's prompt cache valid"
    )
    max_query_bytes: Annotated[int, Field(ge=64, le=65536)] = Field(
        4096, description="bytes of the last user message that the engine gets as the query"
    )
    recent_messages: Annotated[int, Field(ge=0, le=32)] = Field(
        0,
        description="messages before the query that the engine gets with it, for engines that use them; ours does not",
    )
    context_window_tokens: Annotated[int, Field(ge=1024, le=100_000_000)] = Field(
        128_000, description="context window assumed for every model; no memory is added to a request that fills it"
    )
    identity_org: str = Field(
        "metadata:ibex.identity/org_id",
        description="trusted source of the org: `metadata:NAMESPACE/KEY[/KEY…]`, `header:NAME` or `value:TEXT`; "
        "several, separated by commas: the first that is present counts; empty: nobody has memories",
    )
    identity_agent: str = Field(
        "header:x-ibex-agent-id,metadata:ibex.identity/agent_id", description="source of the agent, in the same form"
    )
    identity_user: str = Field(
        "header:x-ibex-user-id", description="source of the end user inside the agent, in the same form; may be absent"
    )


class StoreSettings(Settings):
    """Where memories live."""

    data: Path = Field(Path(".state"), description="directory of the embedded stores")
    database_url: str = Field("", description="SQLAlchemy URL of the database; empty: SQLite in the data directory")


class EngineSettings(ProcessSettings, StoreSettings):
    """`extproc engine`"""

    engine_listen: str = Field(
        "127.0.0.1:9102", description="where filters reach the engine: `host:port` or `unix:/path`"
    )
    retrieval_wall_ms: Annotated[float, Field(gt=0)] = Field(
        35.0, description="milliseconds after which retrieval answers with what it has"
    )
    memory_budget_tokens: Annotated[int, Field(ge=0)] = Field(
        1024, description="most tokens that memories take in one request"
    )
    max_memories: Annotated[int, Field(ge=1, le=500)] = Field(50, description="most memories in one request")
    min_relevance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.15,
        description="share of the query's information that the best memory must match; below it nothing is injected",
    )
    namespace_cache_bytes: Annotated[int, Field(ge=1024 * 1024)] = Field(
        256 * 1024 * 1024,
        description="memory for indexed namespaces, about 1.5 kB a memory; the least recently used make room",
    )
    nonce_key: SecretStr = Field(
        SecretStr("ibex"),
        description="key of the hash that marks a memory block; one secret value for all engines of an installation",
    )


S = TypeVar("S", bound=Settings)


def load(kind: type[S], **given: Any) -> S:
    """Read one class of settings from the environment; `given` (a command's options) wins, and None means not given.

    Raises SettingsError with every mistake in it.
    """
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = [
            f"{_variable(str(mistake['loc'][0]))}: {mistake['msg']}"
            for mistake in error.errors(include_input=False, include_url=False)
        ]
        raise SettingsError("\n".join(lines)) from None


def _variable(field: str) -> str:
    return field if field.isupper() else f"IBEX_{field.upper()}"


def environment_names(kind: type[Settings]) -> list[str]:
    """The environment variables that one class reads, in order."""
    return [f"IBEX_{name.upper()}" for name in kind.model_fields]


def unknown_variables(*kinds: type[Settings]) -> list[str]:
    """IBEX_ variables in the environment that no class reads: most often a misspelt one."""
    known = {name for kind in kinds for name in environment_names(kind)}
    return sorted(name for name in os.environ if name.startswith("IBEX_") and name not in known)


def reference() -> str:
    """The table of all settings in Markdown, as the README has it (`make settings`)."""
    readers: dict[str, list[str]] = {}
    fields: dict[str, Any] = {}
    for process, kind in (("filter", FilterSettings), ("engine", EngineSettings), ("commands", StoreSettings)):
        for name, field in kind.model_fields.items():
            fields[name] = field
            readers.setdefault(name, []).append(process)
    rows = ["| variable | default | read by | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "a fixed text" if isinstance(field.default, SecretStr) else f"`{field.default}`"
        shown = "" if field.default == "" else default
        rows.append(f"| `IBEX_{name.upper()}` | {shown} | {', '.join(readers[name])} | {field.description} |")
    return "\n".join(rows)
