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

__all__ = [
    "AuthSettings",
    "BrokerSettings",
    "EmbeddingSettings",
    "EngineSettings",
    "FilterSettings",
    "GateSettings",
    "IdentitySettings",
    "ObserverSettings",
    "OutboxSettings",
    "ProcessSettings",
    "Settings",
    "SettingsError",
    "SharedRedisSettings",
    "StoreSettings",
    "TelemetrySettings",
    "TraceSettings",
    "WorkerSettings",
    "load",
]


class SettingsError(Exception):
    """What was set cannot be used: a malformed value, an address in use. The message lists all of it, one a line."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="IBEX_", frozen=True, extra="ignore", populate_by_name=True)


def _admin_listen(port: int) -> Any:
    """Each process has a port of its own, so that all of them start on one machine as they are."""
    return Field(
        f"127.0.0.1:{port}",
        description="`host:port` of `/health`, `/ready` and `/metrics`; port 0 takes a free one, empty turns it off",
    )


class TelemetrySettings(Settings):
    """What every process has."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    otlp_endpoint: str = Field(
        "",
        validation_alias=AliasChoices("IBEX_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="base URL of the OTLP/HTTP receiver of the spans, such as `http://127.0.0.1:4318`; "
        "`OTEL_EXPORTER_OTLP_ENDPOINT` says the same; empty: none are exported",
    )


class ProcessSettings(TelemetrySettings):
    """What every server process has."""

    admin_listen: str = _admin_listen(9090)
    drain_s: Annotated[float, Field(ge=0, le=300)] = Field(
        5.0, description="seconds that running requests get to end after SIGTERM"
    )
    notice_s: Annotated[float, Field(ge=0, le=60)] = Field(
        0.0,
        description="seconds after SIGTERM in which new requests are still taken, while health checks say that the "
        "process is leaving; the observer's are those that Envoy needs to see it",
    )
    watchdog_s: Annotated[float, Field(ge=0, le=60)] = Field(
        2.0,
        description="seconds without a tick of the event loop after which the process ends itself, "
        "so that Envoy fails over at once; 0 turns it off",
    )


class IdentitySettings(Settings):
    """Whose request it is. By default the gate says it: no header is believed that nobody has named here."""

    identity_org: str = Field(
        "metadata:envoy.filters.http.ext_authz/org_id",
        description="trusted source of the org: `metadata:NAMESPACE/KEY[/KEY…]`, `header:NAME` or `value:TEXT`; "
        "several, separated by commas: the first that is present counts; empty: nobody has memories; "
        "the default is what the gate found",
    )
    identity_agent: str = Field(
        "metadata:envoy.filters.http.ext_authz/agent_id", description="source of the agent, in the same form"
    )
    identity_user: str = Field(
        "metadata:envoy.filters.http.ext_authz/user_id",
        description="source of the end user inside the agent, in the same form; may be absent",
    )


class SharedRedisSettings(Settings):
    """What gate, auth service and filters share."""

    redis_url: SecretStr = Field(
        SecretStr(""),
        description="Redis or Valkey with rate limits, token revocations and directives, in the forms of "
        "`IBEX_BROKER_URL`; empty: no limits, no token is cached, and directives come from `IBEX_DIRECTIVE_ADDRESS` "
        "alone",
    )


class FilterSettings(ProcessSettings, IdentitySettings, SharedRedisSettings):
    """`extproc filter`"""

    filter_listen: str = Field(
        "127.0.0.1:9101", description="where Envoy reaches the filter: `host:port` or `unix:/path`"
    )
    engine_address: str = Field(
        "127.0.0.1:9102",
        description="gRPC target of the engine; of several, such as `ipv4:10.0.0.1:9102,10.0.0.2:9102` or a name with "
        "several addresses (`dns:///engine:9102`), each has its turn",
    )
    # An engine answers about a dozen within the 45 ms that a call may take, and with 24 open another org's p99 is less
    # than a fifth higher (docs/engine-cost.md).
    engine_most_open: Annotated[int, Field(ge=1)] = Field(
        24,
        description="requests of one org that may ask the engine at once, for each filter process; more go on without "
        "memories, so that one org's flood slows no other. Divide it by the filters on one engine, multiply it by the "
        "engines of one filter",
    )
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
    directive_address: str = Field(
        "",
        description="gRPC target of the service that knows agents' directives, most often that of the auth service; "
        "empty: those that others put into Redis; without `IBEX_REDIS_URL` too: there are none",
    )
    directive_wait_ms: Annotated[float, Field(ge=0, le=1000)] = Field(
        10.0, description="milliseconds of `IBEX_BUDGET_MS` that a request waits for a directive that is not at hand"
    )
    directive_stale_s: Annotated[float, Field(ge=0, le=86_400)] = Field(
        600.0, description="seconds that a directive at hand is used while neither Redis nor that service answers"
    )
    directive_always: bool = Field(
        False,
        description="whether a request with `X-IBEX-Skip-Memory` gets its agent's directive all the same",
    )


class StoreSettings(Settings):
    """Where memories live."""

    data: Path = Field(Path(".state"), description="directory of the embedded stores")
    database_url: str = Field("", description="SQLAlchemy URL of the database; empty: SQLite in the data directory")
    store_away_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        300.0,
        description="seconds for which memories that are loaded are served while PostgreSQL is away; "
        "what others forgot meanwhile is still served; 0: never",
    )


class EmbeddingSettings(Settings):
    """What makes the vectors of memories and questions: the same for engines, workers and commands."""

    embedding: Literal["static", "minilm", "openai"] = Field(
        "static",
        description="`static`: the word table of the package; `minilm`: the transformer that it is made from "
        "(extra `minilm`); `openai`: a service, which gets all texts; see docs/embedding.md",
    )
    embedding_dir: Path | None = Field(None, description="`minilm`: directory of `extproc embedding build`")
    embedding_threads: Annotated[int, Field(ge=1, le=64)] = Field(1, description="`minilm`: threads on one text")
    embedding_url: str = Field("", description="`openai`: base of the API, such as `http://127.0.0.1:8000/v1`")
    embedding_key: SecretStr = Field(SecretStr(""), description="`openai`: key, empty where none is wanted")
    embedding_model: str = Field("", description="`openai`: name of the model")
    embedding_dimension: Annotated[int, Field(ge=0, le=4096)] = Field(
        0, description="`openai`: dimension of the model's vectors"
    )
    embedding_timeout_ms: Annotated[float, Field(gt=0)] = Field(
        20.0, description="`openai`: milliseconds for a question's vector; after it only words are compared"
    )


class BrokerSettings(Settings):
    """Where extraction tasks go."""

    broker_url: SecretStr = Field(
        SecretStr(""),
        description="Redis or Valkey that takes the extraction tasks: `redis://HOST:PORT/DB`, `rediss://…`, "
        "`unix://PATH`, `redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB` or `redis+cluster://HOST:PORT,HOST:PORT`; "
        "empty: none are sent",
    )


class WorkerSettings(TelemetrySettings, StoreSettings, EmbeddingSettings, BrokerSettings):
    """`extproc worker`"""

    admin_listen: str = _admin_listen(9095)
    worker_processes: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="processes that extract at the same time"
    )
    worker_turns: Annotated[int, Field(ge=1, le=256)] = Field(
        16, description="turns of one session that are extracted and written together; with a model: one call of it"
    )
    worker_limit_s: Annotated[float, Field(ge=2, le=3600)] = Field(
        120.0,
        description="seconds after which a task goes on in another one; a fifth more and it is ended. A task of a "
        "worker that died comes again after three times as long",
    )
    worker_attempts: Annotated[int, Field(ge=1, le=1000)] = Field(
        12, description="how often a task is tried while the database or the model is away, with growing waits"
    )
    worker_deliveries: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="how often a task is taken that its process never ends, before it is set aside as deadly"
    )
    extractor: Literal["rules", "llm"] = Field(
        "rules", description="what finds memories: `rules` needs no model; `llm` asks one; see docs/extraction.md"
    )
    redact_pii: bool = Field(
        False, description="whether e-mail addresses and phone numbers are taken out of memories, as secrets always are"
    )
    llm_url: str = Field("", description="`llm`: base of the API, such as `https://api.openai.com/v1`")
    llm_key: SecretStr = Field(SecretStr(""), description="`llm`: key, empty where none is wanted")
    llm_model: str = Field("", description="`llm`: name of the model; it must know JSON schema output")
    llm_timeout_s: Annotated[float, Field(gt=0, le=600)] = Field(
        30.0, description="`llm`: seconds for one answer; below `IBEX_WORKER_LIMIT_S`"
    )
    llm_input_price: Annotated[float, Field(ge=0)] = Field(
        0.0, description="`llm`: price of a million input tokens, for the recorded cost"
    )
    llm_output_price: Annotated[float, Field(ge=0)] = Field(0.0, description="`llm`: price of a million output tokens")


class TraceSettings(Settings):
    """Where trace rows go."""

    clickhouse_url: SecretStr = Field(
        SecretStr(""),
        description="HTTP interface of the ClickHouse that takes the trace rows, `http[s]://USER:PASSWORD@HOST:PORT`; "
        "empty: none are written",
    )
    trace_retention_days: Annotated[int, Field(ge=1, le=3650)] = Field(
        90, description="days after which ClickHouse removes a trace row"
    )


class OutboxSettings(Settings):
    """Where turns wait."""

    state_dir: Path = Field(
        Path(".state"),
        description="directory of the outboxes, on a local disk that stays (no NFS) and has 16 MiB free at least; "
        "several processes may share it",
    )
    outbox_max_bytes: Annotated[int, Field(ge=16 * 1024**2)] = Field(
        1024**3,
        description="most bytes that the turns of one process may take while a system is away; above it the oldest "
        "traces go, then the texts of new turns, then new turns, each counted",
    )


class ObserverSettings(ProcessSettings, IdentitySettings, StoreSettings, BrokerSettings, TraceSettings, OutboxSettings):
    """`extproc observer`"""

    admin_listen: str = _admin_listen(9092)
    observer_listen: str = Field(
        "127.0.0.1:9103", description="where Envoy reaches the observer: `host:port` or `unix:/path`"
    )
    notice_s: Annotated[float, Field(ge=0, le=60)] = Field(
        3.5, description="as for the others: two health checks of Envoy's, a second apart, and their time-out"
    )
    watchdog_s: Annotated[float, Field(ge=0, le=60)] = Field(
        1.5,
        description="as for the others, but lower: a stream may wait as long as its observer stands still",
    )
    max_body_bytes: Annotated[int, Field(ge=1024, le=1024**3)] = Field(
        10 * 1024 * 1024, description="largest request body that is read; keep it equal to Envoy's buffer limit"
    )
    max_text_bytes: Annotated[int, Field(ge=0, le=16 * 1024**2)] = Field(
        1024**2, description="most bytes that are kept of what the user said, and of the answer, each"
    )
    turn_retention_s: Annotated[int, Field(ge=60)] = Field(
        24 * 3600, description="seconds after which a turn's text is removed, extracted or not"
    )
    session_idle_s: Annotated[int, Field(ge=1)] = Field(
        45 * 60, description="seconds without a turn after which a session counts as abandoned"
    )
    sweep_interval_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        60.0, description="seconds between two looks for idle sessions, expired texts and sessions left behind"
    )
    sweep_after_s: Annotated[int, Field(ge=1)] = Field(
        600,
        description="seconds after its last turn before a session that was left behind is sent to extraction again",
    )


class AuthSettings(ProcessSettings, StoreSettings, SharedRedisSettings):
    """`extproc auth`"""

    admin_listen: str = _admin_listen(9094)
    auth_listen: str = Field(
        "127.0.0.1:9105", description="where gates reach the auth service: `host:port` or `unix:/path`"
    )


class GateSettings(ProcessSettings, SharedRedisSettings):
    """`extproc gate`"""

    admin_listen: str = _admin_listen(9093)
    gate_listen: str = Field("127.0.0.1:9104", description="where Envoy reaches the gate: `host:port` or `unix:/path`")
    auth_address: str = Field("127.0.0.1:9105", description="gRPC target of the auth service")
    auth_timeout_ms: Annotated[float, Field(gt=0, le=1000)] = Field(
        50.0, description="milliseconds for each call of the auth service; after that the request is refused with 503"
    )
    token_cache_entries: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        5000, description="tokens that are remembered; 0: each request asks the auth service"
    )
    token_cache_s: Annotated[float, Field(ge=0, le=300)] = Field(
        30.0, description="seconds that a token is remembered, never beyond 5 s before its expiry"
    )
    agent_cache_s: Annotated[float, Field(ge=0, le=5)] = Field(
        2.0, description="seconds that an agent's status is remembered: a paused agent is refused after that long"
    )
    rate_limit_rpm: Annotated[int, Field(ge=0)] = Field(
        60, description="requests that an org may make each minute, if it has no limit of its own; 0: any number"
    )
    rate_limit_agent_rpm: Annotated[int, Field(ge=0)] = Field(
        0, description="the same for each agent inside its org; 0: any number"
    )
    rate_limit_on_error: Literal["allow", "deny"] = Field(
        "allow", description="what happens while Redis does not answer: `allow` counts nothing, `deny` is a 503"
    )


class EngineSettings(ProcessSettings, StoreSettings, EmbeddingSettings):
    """`extproc engine`"""

    admin_listen: str = _admin_listen(9091)
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
        0.18,
        description="relevance that the best memory must have for a question about its author, and up to 3 times as "
        "much for others; below it nothing is injected",
    )
    namespace_cache_bytes: Annotated[int, Field(ge=1024 * 1024)] = Field(
        256 * 1024 * 1024,
        description="memory for indexed namespaces, about 1 kB a memory; the least recently used make room",
    )
    most_requests: Annotated[int, Field(ge=2)] = Field(
        64, description="requests that wait or are worked on at once, half of them of one org; others are refused"
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


_PROCESSES: tuple[tuple[str, type[Settings]], ...] = (
    ("filter", FilterSettings),
    ("observer", ObserverSettings),
    ("engine", EngineSettings),
    ("gate", GateSettings),
    ("auth", AuthSettings),
    ("worker", WorkerSettings),
    ("commands", StoreSettings),
    ("commands", EmbeddingSettings),
    ("commands", BrokerSettings),
    ("commands", TraceSettings),
    ("commands", OutboxSettings),
)


def reference() -> str:
    """The table of all settings in Markdown, as the README has it (`make settings`)."""
    readers: dict[str, dict[str, str]] = {}
    meanings: dict[str, str] = {}
    for process, kind in _PROCESSES:
        for name, field in kind.model_fields.items():
            meanings.setdefault(name, str(field.description))
            readers.setdefault(name, {})[process] = _shown(field.default)
    rows = ["| variable | default | read by | meaning |", "|---|---|---|---|"]
    for name, defaults in readers.items():
        first = next(iter(defaults.values()))
        others = [f"{process} {default}" for process, default in defaults.items() if default != first]
        shown = "; ".join([first, *others])
        rows.append(f"| `IBEX_{name.upper()}` | {shown} | {', '.join(defaults)} | {meanings[name]} |")
    return "\n".join(rows)


def _shown(default: object) -> str:
    """A default in the table; a secret is not shown, an empty one is nothing."""
    if isinstance(default, SecretStr):
        return "a fixed text" if default.get_secret_value() else ""
    return "" if default == "" else f"`{default}`"
