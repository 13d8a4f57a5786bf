"""Trace rows in ClickHouse: one for each exchange, without content.

The row, the table and what brings the table up to date stand here together. Any ClickHouse that speaks HTTP will do,
the embedded one of `extproc up` too. `insert_deduplication_token` makes a batch safe to send again: a plain MergeTree
remembers the tokens because of `non_replicated_deduplication_window`. On a cluster create `ibex.llm_traces` as a
ReplicatedMergeTree before the first start, or the database with the Replicated engine: such tables remember tokens by
themselves (26.5: 10,000 of the last hour), and what is there is left as it is.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

import clickhouse_connect
import msgspec
from clickhouse_connect.driver.exceptions import ClickHouseError, DataError, Error
from clickhouse_connect.driver.httputil import get_pool_manager
from typing_extensions import override
from urllib3.exceptions import HTTPError

from extproc.settings import SettingsError
from extproc.turns.sinks import Refused, Unavailable

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client
    from urllib3 import PoolManager

    from extproc.turns.turn import Entry, Turn

__all__ = ["COLUMNS", "TABLE", "ClickHouseServer", "ClickHouseTraces", "TraceRow", "migrate_traces", "trace_row"]

TABLE = "ibex.llm_traces"
CONNECT_TIMEOUT_S = 2
TIMEOUT_S = 10
"""Sending a batch, and waiting for the answer, each. A batch takes milliseconds; ClickHouse itself holds one back for a
second at most when parts pile up."""

# clickhouse-connect logs each failed request as well; those that matter here are exceptions.
logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
logging.getLogger("urllib3").setLevel(logging.ERROR)


class TraceRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One row of `ibex.llm_traces`. Every value is in the range of its column (COLUMNS)."""

    request_id: str
    trace_id: str
    """Of W3C trace context, 32 hexadecimal digits; empty: the request had none."""
    org_id: str
    agent_id: str
    session_id: str | None
    """None, as is `checkpoint_id`, where the turn has no checkpoint: then there may be no such session."""
    checkpoint_id: str | None
    model: str
    provider: str
    error_code: str
    context_outcome: str
    is_streaming: bool
    is_complete: bool
    context_fallback: bool
    input_tokens: int
    """0 where the provider did not say, as for the next three."""
    output_tokens: int
    total_tokens: int
    cache_read_tokens: int
    context_tokens: int
    memories_injected: int
    auth_latency_ms: float
    directive_latency_ms: float
    assemble_latency_ms: float
    filter_latency_ms: float
    provider_ttfb_ms: int
    """0: no byte came."""
    total_latency_ms: int
    status_code: int
    """0: the client got none."""
    requested_at: int
    """Milliseconds since 1970, UTC, as is `completed_at`."""
    completed_at: int


COLUMNS = {
    "request_id": "String",
    "trace_id": "String",
    "org_id": "UUID",
    "agent_id": "UUID",
    "session_id": "Nullable(UUID)",
    "checkpoint_id": "Nullable(UUID)",
    "model": "LowCardinality(String)",
    "provider": "LowCardinality(String)",
    "error_code": "LowCardinality(String)",
    "context_outcome": "LowCardinality(String)",
    "is_streaming": "Bool",
    "is_complete": "Bool",
    "context_fallback": "Bool",
    "input_tokens": "UInt32",
    "output_tokens": "UInt32",
    "total_tokens": "UInt32",
    "cache_read_tokens": "UInt32",
    "context_tokens": "UInt32",
    "memories_injected": "UInt16",
    "auth_latency_ms": "Float32",
    "directive_latency_ms": "Float32",
    "assemble_latency_ms": "Float32",
    "filter_latency_ms": "Float32",
    "provider_ttfb_ms": "UInt32",
    "total_latency_ms": "UInt32",
    "status_code": "UInt16",
    "requested_at": "DateTime64(3, 'UTC')",
    "completed_at": "DateTime64(3, 'UTC')",
}
"""Name and ClickHouse type, in the order of TraceRow's fields."""

_REMEMBERED_TOKENS = 10_000
"""As many as a ReplicatedMergeTree of 26.5 remembers. A hundred writers at five batches a second fill it in 20 s."""
_MAX_UINT16 = 2**16 - 1
_MAX_UINT32 = 2**32 - 1
_MAX_FLOAT32 = 3.4e38
_MAX_NAME = 128
_LATEST_MS = (2**32 - 1 - 3650 * 86_400) * 1000
"""In 2096. The time to live is counted in seconds that end in 2106; behind it a row would be removed at once."""
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_UUID = re.compile("[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header"""

_UNKNOWN_TABLE, _UNKNOWN_DATABASE = 60, 81
_REFUSES = {
    6: "CANNOT_PARSE_TEXT",
    26: "CANNOT_PARSE_QUOTED_STRING",
    27: "CANNOT_PARSE_INPUT_ASSERTION_FAILED",
    33: "CANNOT_READ_ALL_DATA",
    38: "CANNOT_PARSE_DATE",
    41: "CANNOT_PARSE_DATETIME",
    43: "ILLEGAL_TYPE_OF_ARGUMENT",
    50: "UNKNOWN_TYPE",
    53: "TYPE_MISMATCH",
    62: "SYNTAX_ERROR",
    69: "ARGUMENT_OUT_OF_BOUND",
    70: "CANNOT_CONVERT_TYPE",
    72: "CANNOT_PARSE_NUMBER",
    117: "INCORRECT_DATA",
    131: "TOO_LARGE_STRING_SIZE",
    190: "SIZES_OF_ARRAYS_DONT_MATCH",
    321: "VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE",
    349: "CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN",
    376: "CANNOT_PARSE_UUID",
    457: "BAD_QUERY_PARAMETER",
    467: "CANNOT_PARSE_BOOL",
    469: "VIOLATED_CONSTRAINT",
}
"""Codes about values, types and syntax: the same batch would fail again.

Whatever else is wrong may pass. A table without one of our columns too: once it has it, no row is lost.
"""
_WRONG_CREDENTIALS = {192, 193, 194, 516}
_ACCESS_DENIED = 497
_NAMES = {
    16: "NO_SUCH_COLUMN_IN_TABLE",
    47: "UNKNOWN_IDENTIFIER",
    57: "TABLE_ALREADY_EXISTS",
    _UNKNOWN_TABLE: "UNKNOWN_TABLE",
    _UNKNOWN_DATABASE: "UNKNOWN_DATABASE",
    159: "TIMEOUT_EXCEEDED",
    164: "READONLY",
    202: "TOO_MANY_SIMULTANEOUS_QUERIES",
    241: "MEMORY_LIMIT_EXCEEDED",
    242: "TABLE_IS_READ_ONLY",
    243: "NOT_ENOUGH_SPACE",
    252: "TOO_MANY_PARTS",
    **_REFUSES,
}
"""ClickHouse's names for its codes. Its texts are never shown, since they may quote a value."""


def trace_row(turn: Turn) -> TraceRow:
    """The row of a turn. Total: whatever is in the turn, its columns can hold what comes out."""
    input_tokens, output_tokens = turn.input_tokens or 0, turn.output_tokens or 0
    return TraceRow(
        request_id=_text(turn.request_id),
        trace_id=_trace_id(turn.traceparent),
        org_id=_uuid(turn.org_id),
        agent_id=_uuid(turn.agent_id),
        session_id=_uuid(turn.session_id) if turn.has_checkpoint else None,
        checkpoint_id=_uuid(turn.checkpoint_id) if turn.has_checkpoint else None,
        model=_text(turn.model),
        provider=_text(turn.provider),
        error_code=_text(turn.error_code),
        context_outcome=_text(turn.outcome),
        is_streaming=turn.is_streaming,
        is_complete=turn.is_complete,
        context_fallback=turn.context_fallback,
        input_tokens=_count(input_tokens),
        output_tokens=_count(output_tokens),
        total_tokens=_count(_count(input_tokens) + _count(output_tokens)),
        cache_read_tokens=_count(turn.cached_input_tokens or 0),
        context_tokens=_count(turn.context_tokens),
        memories_injected=_count(turn.memories_injected, _MAX_UINT16),
        auth_latency_ms=_fraction(turn.auth_ms),
        directive_latency_ms=_fraction(turn.directive_ms),
        assemble_latency_ms=_fraction(turn.engine_ms),
        filter_latency_ms=_fraction(turn.filter_ms),
        provider_ttfb_ms=_whole_ms(turn.ttfb_ms or 0.0),
        total_latency_ms=_whole_ms(turn.total_ms),
        status_code=_count(turn.status_code, _MAX_UINT16),
        requested_at=_epoch_ms(turn.requested_at),
        completed_at=_epoch_ms(turn.completed_at),
    )


def _count(number: int, most: int = _MAX_UINT32) -> int:
    return max(0, min(number, most))


def _fraction(number: float) -> float:
    """Within Float32; NaN is 0."""
    return 0.0 if math.isnan(number) else max(0.0, min(number, _MAX_FLOAT32))


def _whole_ms(number: float) -> int:
    return 0 if math.isnan(number) else round(max(0.0, min(number, float(_MAX_UINT32))))


def _epoch_ms(moment: datetime) -> int:
    return max(0, min(round(moment.timestamp() * 1000), _LATEST_MS))


def _text(text: str) -> str:
    """As UTF-8 it can be written: a lone surrogate becomes a question mark."""
    text = text[:_MAX_NAME]
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _uuid(text: str) -> str:
    """Nil where it is none: the row counts in the sums, and is nobody's."""
    return text if _UUID.fullmatch(text) else _NO_UUID


def _trace_id(traceparent: str) -> str:
    match = _TRACEPARENT.fullmatch(traceparent)
    return match[1] if match and match[1].strip("0") else ""


class ClickHouseTraces:
    """A `TraceSink`. One thread inserts. Nothing is connected before the first batch."""

    def __init__(self, url: str, retention_days: int) -> None:
        """Raises SettingsError for a URL that cannot be used."""
        self._server = ClickHouseServer.parse(url)
        self._retention_days = retention_days
        self._client: Client | None = None
        """Its server had the table when it was made."""

    def insert(self, entries: Sequence[Entry], token: str) -> None:
        if not entries:
            return
        rows = [msgspec.structs.astuple(trace_row(entry.turn)) for entry in entries]
        try:
            with self._server.failures():
                self._ready().insert(
                    TABLE,
                    rows,
                    column_names=_COLUMN_NAMES,
                    column_type_names=_COLUMN_TYPES,
                    settings=_once(token),
                )
        except (Unavailable, Refused):
            # Perhaps another server answers next time, and has no table yet.
            self.close()
            raise

    def close(self) -> None:
        if self._client is not None:
            # Its pool is shared with the next client, which shall not be handed a dead connection.
            self._client.close_connections()
            self._client.close()
            self._client = None

    def _ready(self) -> Client:
        if self._client is None:
            client = self._server.connect()
            try:
                _migrate(client, self._retention_days)
            except BaseException:
                client.close()
                raise
            self._client = client
        return self._client


def _once(token: str) -> dict[str, str | int]:
    """Settings of an insert that adds nothing when it is sent again.

    Never asynchronous, whatever the server's default: those rows get other tokens.
    """
    return {"insert_deduplication_token": token, "insert_deduplicate": 1, "async_insert": 0}


_COLUMN_NAMES = list(COLUMNS)
_COLUMN_TYPES = list(COLUMNS.values())


@dataclass(frozen=True, slots=True)
class ClickHouseServer:
    """Where a ClickHouse is, and as whom it is asked."""

    interface: str
    host: str
    port: int
    username: str
    """Empty: ClickHouse's `default`."""
    password: str
    path: str
    """Under which a proxy has it; empty for most."""

    @classmethod
    def parse(cls, url: str) -> ClickHouseServer:
        """From `http[s]://USER:PASSWORD@HOST:PORT`. Raises SettingsError, which says nothing of the URL's password."""
        parts, port = _split(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise _bad_url()
        return cls(
            interface=parts.scheme,
            host=parts.hostname,
            port=port or (8443 if parts.scheme == "https" else 8123),
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            path=parts.path.strip("/"),
        )

    @override
    def __str__(self) -> str:
        return f"ClickHouse at {self.host}:{self.port}"

    def connect(self) -> Client:
        """A client whose server has answered. Raises clickhouse-connect's errors: see `failures`."""
        return clickhouse_connect.get_client(
            interface=self.interface,
            host=self.host,
            port=self.port,
            username=self.username or None,
            password=self.password,
            proxy_path=self.path,
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=TIMEOUT_S,
            query_retries=0,
            autogenerate_session_id=False,
            client_name="ibex-extproc",
            # The client asks $http_proxy otherwise; no proxy knows this machine's loopback.
            pool_mgr=_direct_pool() if self._is_loopback() else None,
        )

    def _is_loopback(self) -> bool:
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turns what the client raises into Unavailable or Refused."""
        try:
            yield
        except ClickHouseError as error:
            raise self._failure(error) from None
        except (HTTPError, OSError) as error:
            raise Unavailable(f"{self} does not answer: {type(error).__name__}") from None
        except (ValueError, OverflowError, struct.error) as error:
            raise Refused(f"a value for {self} cannot be encoded: {type(error).__name__}") from None

    def _failure(self, error: ClickHouseError) -> Unavailable | Refused:
        code = error.code if isinstance(error, Error) else None
        # Of the client's own text only the number of a status is taken.
        status = re.search(r"HTTP status (\d{3})", str(error))
        if code in _WRONG_CREDENTIALS or (code is None and status and status[1] in {"401", "403"}):
            return Unavailable(f"{self} does not accept the user and password of IBEX_CLICKHOUSE_URL: correct them")
        if code == _ACCESS_DENIED:
            return Unavailable(
                f"{self} lacks a grant for the user of IBEX_CLICKHOUSE_URL: SELECT and INSERT on ibex.* for writing, "
                "CREATE and ALTER too for `extproc migrate`"
            )
        if code is not None:
            answered = f"{self} answered with error {code}" + (f" ({_NAMES[code]})" if code in _NAMES else "")
            return Refused(answered) if code in _REFUSES else Unavailable(answered)
        if isinstance(error, DataError):
            return Refused(f"a value for {self} cannot be encoded: {type(error).__name__}")
        reason = f"status {status[1]}" if status else _reason(error)
        return Unavailable(f"{self} does not answer: {reason}")


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _bad_url() from None
    return parts, port


def _bad_url() -> SettingsError:
    return SettingsError("IBEX_CLICKHOUSE_URL: must be http[s]://USER:PASSWORD@HOST:PORT, special characters as %XX")


def _reason(error: BaseException) -> str:
    """The name of what lies deepest: the client wraps urllib3's errors, and those wrap the socket's."""
    cause = error.__cause__
    if cause is None:
        return type(error).__name__
    inner = getattr(cause, "reason", None)
    return type(inner if isinstance(inner, Exception) else cause).__name__


@cache
def _direct_pool() -> PoolManager:
    pool: PoolManager = get_pool_manager()
    return pool


def migrate_traces(url: str, retention_days: int) -> None:
    """Create the table, or bring it up to this release and this retention. Safe to run again, and while others run.

    Raises Unavailable, and SettingsError for a URL that cannot be used.
    """
    server = ClickHouseServer.parse(url)
    try:
        with server.failures():
            client = server.connect()
            try:
                _migrate(client, retention_days)
            finally:
                client.close()
    except Refused as error:
        raise Unavailable(str(error)) from None


def _migrations(retention_days: int) -> list[list[str]]:
    """The statements of each version, from 1. Released ones stay as they are; all may run twice, and at the same time.

    A later column goes into COLUMNS, and into a version of its own as ALTER TABLE … ADD COLUMN IF NOT EXISTS.
    """
    columns = ",\n    ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    create = (
        f"CREATE TABLE IF NOT EXISTS {TABLE}\n(\n    {columns}\n)\n"
        "ENGINE = MergeTree\n"
        "PARTITION BY toYYYYMM(requested_at)\n"
        "ORDER BY (org_id, agent_id, requested_at)\n"
        f"TTL {_ttl(retention_days)}\n"
        f"SETTINGS non_replicated_deduplication_window = {_REMEMBERED_TOKENS}"
    )
    return [[create]]


_CREATE_DATABASE = "CREATE DATABASE IF NOT EXISTS ibex"
_CREATE_VERSIONS = (
    "CREATE TABLE IF NOT EXISTS ibex.schema_migrations "
    "(version UInt32, applied_at DateTime64(3, 'UTC') DEFAULT now64(3)) "
    "ENGINE = MergeTree ORDER BY version SETTINGS non_replicated_deduplication_window = 1000"
)


def _ttl(retention_days: int) -> str:
    return f"toDateTime(requested_at) + INTERVAL {int(retention_days)} DAY"


def _migrate(client: Client, retention_days: int) -> None:
    """Nothing but two reads when all is as it should be, so that a user who may only write is enough from then on."""
    migrations = _migrations(retention_days)
    present_days = _present_retention(client)
    # Without the table the list of what was done is of no use: somebody dropped one and not the other.
    done = 0 if present_days is None else _version(client)
    if done == 0:
        client.command(_CREATE_DATABASE)
        client.command(_CREATE_VERSIONS)
    for version, statements in enumerate(migrations[done:], start=done + 1):
        for statement in statements:
            client.command(statement)
        client.insert(
            "ibex.schema_migrations",
            [[version]],
            column_names=["version"],
            column_type_names=["UInt32"],
            settings=_once(f"version-{version}"),
        )
    if present_days is not None and present_days != retention_days:
        client.command(f"ALTER TABLE {TABLE} MODIFY TTL {_ttl(retention_days)}")


def _present_retention(client: Client) -> int | None:
    """The days after which the table removes a row, 0: never or otherwise. None: there is no table."""
    found = client.query(
        "SELECT create_table_query FROM system.tables WHERE database = 'ibex' AND name = 'llm_traces'"
    ).result_rows
    if not found:
        return None
    match = re.search(r"TTL toDateTime\(requested_at\) \+ toIntervalDay\((\d+)\)", str(found[0][0]))
    return int(match[1]) if match else 0


def _version(client: Client) -> int:
    """The newest that was applied; 0: none."""
    try:
        return int(client.query("SELECT max(version) FROM ibex.schema_migrations").result_rows[0][0])
    except Error as error:
        if error.code in {_UNKNOWN_TABLE, _UNKNOWN_DATABASE}:
            return 0
        raise
