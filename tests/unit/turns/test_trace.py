"""A turn becomes a row that no column can refuse, and an error of ClickHouse the right one of two."""

from __future__ import annotations

import struct
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, DataError, OperationalError
from hypothesis import given
from hypothesis import strategies as st
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError

from extproc.settings import SettingsError
from extproc.turns import trace
from extproc.turns.sinks import Refused, Unavailable
from extproc.turns.trace import COLUMNS, ClickHouseServer, ClickHouseTraces, TraceRow, trace_row
from extproc.turns.turn import End, Turn

ORG, AGENT, SESSION, CHECKPOINT = (str(uuid.UUID(int=number)) for number in range(1, 5))
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
NOW = datetime(2025, 3, 1, 12, 30, 15, 678_000, tzinfo=UTC)
CONTRACT = {
    "String": {"request_id", "trace_id"},
    "UUID": {"org_id", "agent_id"},
    "Nullable(UUID)": {"session_id", "checkpoint_id"},
    "LowCardinality(String)": {"model", "provider", "error_code", "context_outcome"},
    "Bool": {"is_streaming", "is_complete", "context_fallback"},
    "UInt32": {
        "input_tokens",
        "output_tokens",
        "total_tokens",
        "cache_read_tokens",
        "context_tokens",
        "provider_ttfb_ms",
        "total_latency_ms",
    },
    "UInt16": {"memories_injected", "status_code"},
    "Float32": {"auth_latency_ms", "directive_latency_ms", "assemble_latency_ms", "filter_latency_ms"},
    "DateTime64(3, 'UTC')": {"requested_at", "completed_at"},
}


def turn(**changes: Any) -> Turn:
    given: dict[str, Any] = {
        "request_id": "r1",
        "org_id": ORG,
        "agent_id": AGENT,
        "external_id": "s1",
        "session_id": SESSION,
        "checkpoint_id": CHECKPOINT,
        "end": End.COMPLETE,
        "status_code": 200,
        "requested_at": NOW,
        "completed_at": NOW + timedelta(milliseconds=1500),
    }
    return Turn(**{**given, **changes})


def test_the_columns_are_those_of_the_contract_and_none_has_content() -> None:
    assert {name: kind for kind, names in CONTRACT.items() for name in names} == COLUMNS
    assert tuple(COLUMNS) == TraceRow.__struct_fields__


def test_a_row_says_what_the_turn_says() -> None:
    row = trace_row(
        turn(
            traceparent=f"00-{TRACE_ID}-b7ad6b7169203331-01",
            model="gpt-4o",
            provider="openai",
            error_code="none_really",
            outcome="injected",
            is_streaming=True,
            is_complete=True,
            context_fallback=False,
            input_tokens=100,
            output_tokens=20,
            cached_input_tokens=64,
            context_tokens=30,
            memories_injected=4,
            auth_ms=1.5,
            directive_ms=0.25,
            engine_ms=7.5,
            filter_ms=9.0,
            ttfb_ms=210.6,
            total_ms=1500.4,
        )
    )
    assert msgspec.structs.asdict(row) == {
        "request_id": "r1",
        "trace_id": TRACE_ID,
        "org_id": ORG,
        "agent_id": AGENT,
        "session_id": SESSION,
        "checkpoint_id": CHECKPOINT,
        "model": "gpt-4o",
        "provider": "openai",
        "error_code": "none_really",
        "context_outcome": "injected",
        "is_streaming": True,
        "is_complete": True,
        "context_fallback": False,
        "input_tokens": 100,
        "output_tokens": 20,
        "total_tokens": 120,
        "cache_read_tokens": 64,
        "context_tokens": 30,
        "memories_injected": 4,
        "auth_latency_ms": 1.5,
        "directive_latency_ms": 0.25,
        "assemble_latency_ms": 7.5,
        "filter_latency_ms": 9.0,
        "provider_ttfb_ms": 211,
        "total_latency_ms": 1500,
        "status_code": 200,
        "requested_at": 1740832215678,
        "completed_at": 1740832217178,
    }


def test_what_the_provider_did_not_say_is_zero() -> None:
    row = trace_row(turn())
    assert (row.input_tokens, row.output_tokens, row.total_tokens, row.cache_read_tokens) == (0, 0, 0, 0)
    assert (row.provider_ttfb_ms, row.trace_id) == (0, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"end": End.DENIED, "status_code": 403},
        {"end": End.PROVIDER_ERROR, "status_code": 502},
        {"end": End.CLIENT_GONE, "status_code": 0},
    ],
)
def test_without_a_checkpoint_there_is_no_session_either(changes: dict[str, Any]) -> None:
    row = trace_row(turn(**changes))
    assert (row.session_id, row.checkpoint_id) == (None, None)


@pytest.mark.parametrize(
    "header",
    ["", "00", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE_ID[:-1]}g-b7ad6b7169203331-01", f"00-{TRACE_ID}"],
)
def test_a_trace_context_that_is_none_gives_no_trace_id(header: str) -> None:
    assert trace_row(turn(traceparent=header)).trace_id == ""


def test_a_later_version_of_trace_context_is_read() -> None:
    assert trace_row(turn(traceparent=f"cc-{TRACE_ID}-b7ad6b7169203331-01-more")).trace_id == TRACE_ID


INTEGERS = st.integers(min_value=-(2**70), max_value=2**70)
NUMBERS = st.floats() | INTEGERS.map(float)
TEXTS = st.text(max_size=300) | st.text(st.characters(categories=["Cs", "Ll"]), max_size=300)
MOMENTS = st.datetimes(timezones=st.just(UTC))
ANY_TURN = st.builds(
    turn,
    request_id=TEXTS,
    org_id=TEXTS | st.just(ORG),
    agent_id=TEXTS | st.just(AGENT),
    session_id=TEXTS | st.just(SESSION),
    checkpoint_id=TEXTS,
    end=st.sampled_from(End),
    status_code=INTEGERS | st.just(200),
    error_code=TEXTS,
    model=TEXTS,
    provider=TEXTS,
    outcome=TEXTS,
    traceparent=TEXTS,
    input_tokens=st.none() | INTEGERS,
    output_tokens=st.none() | INTEGERS,
    cached_input_tokens=st.none() | INTEGERS,
    context_tokens=INTEGERS,
    memories_injected=INTEGERS,
    auth_ms=NUMBERS,
    directive_ms=NUMBERS,
    engine_ms=NUMBERS,
    filter_ms=NUMBERS,
    ttfb_ms=st.none() | NUMBERS,
    total_ms=NUMBERS,
    requested_at=MOMENTS,
    completed_at=MOMENTS,
)


def fits(kind: str, value: Any) -> bool:
    """Whether a column of the type holds the value as it is."""
    match kind:
        case "String" | "LowCardinality(String)":
            return len(value.encode("utf-8")) <= 512
        case "Nullable(UUID)":
            return value is None or fits("UUID", value)
        case "UUID":
            return bool(uuid.UUID(value)) and len(value) == 36
        case "Bool":
            return isinstance(value, bool)
        case "UInt16":
            return isinstance(value, int) and len(struct.pack("<H", value)) == 2
        case "UInt32":
            return isinstance(value, int) and len(struct.pack("<I", value)) == 4
        case "Float32":
            return bool(0 <= struct.unpack("<f", struct.pack("<f", value))[0] < float("inf"))
        case "DateTime64(3, 'UTC')":
            # With the longest retention, within what ClickHouse counts a time to live in.
            return isinstance(value, int) and value >= 0 and value // 1000 + 3650 * 86_400 < 2**32
    return False


@given(any_turn=ANY_TURN)
def test_every_column_can_hold_what_comes_of_any_turn(any_turn: Turn) -> None:
    row = trace_row(any_turn)
    assert [name for name, kind in COLUMNS.items() if not fits(kind, getattr(row, name))] == []
    assert row.total_tokens == min(row.input_tokens + row.output_tokens, 2**32 - 1)


def test_what_is_no_utf_8_and_what_is_no_number_has_a_place_too() -> None:
    row = trace_row(turn(model="a\ud800b", filter_ms=float("nan"), engine_ms=float("inf"), total_ms=float("-inf")))
    assert (row.model, row.filter_latency_ms, row.total_latency_ms) == ("a?b", 0.0, 0)
    assert 3e38 < row.assemble_latency_ms < float("inf")


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("http://127.0.0.1:8123", ClickHouseServer("http", "127.0.0.1", 8123, "", "", "")),
        ("http://clickhouse", ClickHouseServer("http", "clickhouse", 8123, "", "", "")),
        ("https://u:p%40ss%2F@ch.example/base/", ClickHouseServer("https", "ch.example", 8443, "u", "p@ss/", "base")),
        ("http://[::1]:9", ClickHouseServer("http", "::1", 9, "", "", "")),
    ],
)
def test_a_url_names_a_server(url: str, server: ClickHouseServer) -> None:
    assert ClickHouseServer.parse(url) == server


@pytest.mark.parametrize(
    "url",
    ["", "secret-word", "tcp://h:secret-word", "http://:secret-word@", "http://h:0x/?secret-word", "http://[secret"],
)
def test_a_url_that_cannot_be_used_is_not_repeated(url: str) -> None:
    with pytest.raises(SettingsError, match="IBEX_CLICKHOUSE_URL") as caught:
        ClickHouseTraces(url, 90)
    assert "secret" not in str(caught.value)


def test_a_server_shows_neither_user_nor_password() -> None:
    assert str(ClickHouseServer.parse("http://user:secret-word@host:1")) == "ClickHouse at host:1"


def raised(error: Exception) -> Exception:
    with pytest.raises((Unavailable, Refused)) as caught, ClickHouseServer.parse("http://u:p@host:1").failures():
        raise error
    return caught.value


VALUE = "the-value-of-a-row"


@pytest.mark.parametrize("code", [6, 27, 33, 53, 62, 70, 117, 131, 349, 376, 469])
def test_errors_about_values_types_and_syntax_are_refusals(code: int) -> None:
    error = raised(DatabaseError(f"Code: {code}. DB::Exception: {VALUE}", code=code, name="NAME"))
    assert isinstance(error, Refused)
    assert VALUE not in str(error)
    assert str(code) in str(error)


@pytest.mark.parametrize(
    "code", [3, 16, 57, 60, 81, 159, 164, 202, 210, 241, 242, 243, 252, 319, 497, 516, 999, 1001, 99_999]
)
def test_every_other_error_may_pass(code: int) -> None:
    error = raised(DatabaseError(f"Code: {code}. DB::Exception: {VALUE}", code=code, name="NAME"))
    assert isinstance(error, Unavailable)
    assert VALUE not in str(error)


@pytest.mark.parametrize("code", [192, 193, 194, 516])
def test_wrong_credentials_are_named_and_may_pass(code: int) -> None:
    assert "does not accept the user and password" in str(raised(DatabaseError("no", code=code)))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DatabaseError("HTTP driver received HTTP status 502"), "ClickHouse at host:1 does not answer: status 502"),
        (ConnectionResetError(VALUE), "ClickHouse at host:1 does not answer: ConnectionResetError"),
        (ClickHouseError(VALUE), "ClickHouse at host:1 does not answer: ClickHouseError"),
    ],
)
def test_transport_errors_may_pass(error: Exception, text: str) -> None:
    caught = raised(error)
    assert isinstance(caught, Unavailable)
    assert str(caught) == text


def test_a_wrapped_error_is_named_by_its_cause() -> None:
    timeout = ConnectTimeoutError()
    wrapped = OperationalError(VALUE)
    wrapped.__cause__ = MaxRetryError(None, "/", timeout)  # type: ignore[arg-type]  # without a pool
    assert str(raised(wrapped)).endswith("does not answer: ConnectTimeoutError")


@pytest.mark.parametrize("error", [DataError(VALUE), struct.error(VALUE), OverflowError(VALUE), ValueError(VALUE)])
def test_a_value_that_cannot_be_encoded_is_a_refusal(error: Exception) -> None:
    caught = raised(error)
    assert isinstance(caught, Refused)
    assert VALUE not in str(caught)


def test_an_empty_batch_needs_no_server() -> None:
    ClickHouseTraces("http://127.0.0.1:1", 90).insert([], "token")


def test_the_table_is_what_the_contract_says() -> None:
    [[create]] = trace._migrations(30)
    for part in (
        "CREATE TABLE IF NOT EXISTS ibex.llm_traces",
        "ENGINE = MergeTree\n",
        "PARTITION BY toYYYYMM(requested_at)",
        "ORDER BY (org_id, agent_id, requested_at)",
        "TTL toDateTime(requested_at) + INTERVAL 30 DAY",
    ):
        assert part in create
