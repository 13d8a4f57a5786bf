"""`extproc traces`: the last requests, as ClickHouse has them."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import uuid
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extproc.memory.commands import fail, printable
from extproc.settings import OutboxSettings, SettingsError, TraceSettings, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clickhouse_connect.driver.client import Client
    from rich.table import Table

__all__ = ["TraceFilter", "trace_query", "traces"]

URL_FILE = "clickhouse.url"
"""In the state directory; `extproc up` writes where its ClickHouse is."""
POLL_INTERVAL_S = 1.0
LATE = timedelta(minutes=5)
"""With `--follow`: how long after its end a row may still come and be shown."""
MOST_ROWS = 10_000
MOST_REMEMBERED = 100_000
"""Rows that `--follow` knows it has shown."""

_SINCE = re.compile("([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Row = dict[str, Any]
"""One row by column, with its times as aware datetimes."""


def traces(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MOST_ROWS, help="most rows to show")] = 20,
    org: Annotated[str, typer.Option("--org", help="only of this organisation, a UUID")] = "",
    agent: Annotated[str, typer.Option("--agent", help="only of this agent, a UUID")] = "",
    session: Annotated[
        str,
        typer.Option("--session", help="only of this session: its UUID, or with --org and --agent the client's own id"),
    ] = "",
    user: Annotated[str, typer.Option("--user", help="end user to whom the client's session id belongs")] = "",
    since: Annotated[str, typer.Option("--since", help="only that old: 30s, 15m, 1h, 7d")] = "",
    errors: Annotated[bool, typer.Option("--errors", help="only what failed or broke off")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on showing new ones until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON Lines")] = False,
    url: Annotated[
        str, typer.Option("--url", help="ClickHouse; else IBEX_CLICKHOUSE_URL, else that of `extproc up`")
    ] = "",
) -> None:
    """Show the last requests: status, model, what the context filter did, tokens, times. Oldest first."""
    wanted = TraceFilter(
        org=_parse_uuid("--org", org),
        agent=_parse_uuid("--agent", agent),
        sessions=_sessions(session, org, agent, user),
        since=_moment(since),
        only_errors=errors,
    )
    show = _show_json if as_json else _show_table
    for number, rows in enumerate(_batches(url, wanted, limit, follow=follow)):
        show(rows, with_header=number == 0)
        if not rows and not follow and not as_json:
            typer.echo("No traces here yet that match; they come within a second of a request's end.", err=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFilter:
    """What a row must have to be shown."""

    org: str = ""
    """Empty, as for the others: any."""
    agent: str = ""
    sessions: Sequence[str] = ()
    """Rows of sessions, of which it is any."""
    since: datetime | None = None
    """Least `requested_at`."""
    completed_since: datetime | None = None
    only_errors: bool = False


def trace_query(wanted: TraceFilter, limit: int) -> tuple[str, dict[str, Any]]:
    """The statement and the values that the server binds into it; newest rows first."""
    values: dict[str, Any] = {"limit": limit}
    conditions = ["1"]

    def require(condition: str, name: str, value: Any) -> None:
        if value:
            conditions.append(condition)
            values[name] = value

    require("org_id = {org:UUID}", "org", wanted.org)
    require("agent_id = {agent:UUID}", "agent", wanted.agent)
    require("has({sessions:Array(UUID)}, assumeNotNull(session_id))", "sessions", list(wanted.sessions))
    require("requested_at >= fromUnixTimestamp64Milli({since:Int64})", "since", _epoch_ms(wanted.since))
    require(
        "completed_at >= fromUnixTimestamp64Milli({completed:Int64})", "completed", _epoch_ms(wanted.completed_since)
    )
    if wanted.sessions:
        conditions.append("session_id IS NOT NULL")
    if wanted.only_errors:
        conditions.append("(status_code >= 400 OR status_code = 0 OR error_code != '' OR NOT is_complete)")
    # Only the fixed texts above are joined here; every value is bound by the server.
    statement = (
        f"SELECT * FROM ibex.llm_traces WHERE {' AND '.join(conditions)} "  # noqa: S608
        "ORDER BY requested_at DESC, request_id LIMIT {limit:UInt32}"
    )
    return statement, values


def read_traces(client: Client, wanted: TraceFilter, limit: int) -> list[Row]:
    """Oldest first. Raises clickhouse-connect's errors."""
    statement, values = trace_query(wanted, limit)
    found = client.query(statement, parameters=values, query_tz="UTC", tz_mode="aware")
    return list(reversed(list(found.named_results())))


def _batches(url: str, wanted: TraceFilter, limit: int, *, follow: bool) -> Iterator[list[Row]]:
    """What there is, and with `follow` what comes until Ctrl-C.

    A generator, so that a closed pipe, which is met where rows are shown, is not taken for trouble with ClickHouse.
    """
    with _connected(url) as client:
        rows = read_traces(client, wanted, limit)
        yield rows
        if follow:
            yield from _new_rows(client, wanted, rows, _interrupted())


def _interrupted() -> threading.Event:
    """Set by Ctrl-C. A KeyboardInterrupt may be raised inside a destructor, where Python drops it."""
    interrupted = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    return interrupted


def _new_rows(
    client: Client, wanted: TraceFilter, shown: Sequence[Row], stopping: threading.Event
) -> Iterator[list[Row]]:
    """What comes until we are stopped, each row once. Rows come after their end, in batches, not always in order."""
    seen = dict.fromkeys(map(_key, shown))
    started = datetime.now(UTC)
    while not stopping.wait(POLL_INTERVAL_S):
        since = max(started, datetime.now(UTC) - LATE)
        recent = TraceFilter(
            org=wanted.org,
            agent=wanted.agent,
            sessions=wanted.sessions,
            completed_since=since,
            only_errors=wanted.only_errors,
        )
        rows = [row for row in read_traces(client, recent, MOST_ROWS) if _key(row) not in seen]
        seen.update(dict.fromkeys(map(_key, rows)))
        for key in list(seen)[: max(0, len(seen) - MOST_REMEMBERED)]:
            del seen[key]
        if rows:
            yield rows


def _key(row: Row) -> tuple[str, str, int]:
    return str(row["org_id"]), row["request_id"], _epoch_ms(row["completed_at"])


@contextmanager
def _connected(url: str) -> Iterator[Client]:
    """A client of the ClickHouse that the options and the environment name. Its errors end the command with a word."""
    from extproc.turns.sinks import Refused, Unavailable
    from extproc.turns.trace import ClickHouseServer

    try:
        server = ClickHouseServer.parse(_server_url(url))
        with server.failures():
            client = server.connect()
            try:
                yield client
            finally:
                client.close()
    except SettingsError as error:
        fail(str(error))
    except (Unavailable, Refused) as error:
        fail(_with_advice(str(error)))


def _server_url(url: str) -> str:
    """Raises SettingsError when nothing says where ClickHouse is."""
    if url or (url := load(TraceSettings).clickhouse_url.get_secret_value()):
        return url
    file = load(OutboxSettings).state_dir / URL_FILE
    with suppress(OSError, UnicodeDecodeError):
        if url := file.read_text(encoding="utf-8").strip():
            return url
    raise SettingsError(
        f"no ClickHouse is named: give --url, set IBEX_CLICKHOUSE_URL, or start `extproc up` (it writes {file})"
    )


def _with_advice(problem: str) -> str:
    if "UNKNOWN_TABLE" in problem or "UNKNOWN_DATABASE" in problem:
        return f"{problem}: no trace was ever written there; `extproc migrate` makes the table"
    return problem


def _parse_uuid(option: str, text: str) -> str:
    if not text:
        return ""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        fail(f"{option} is not a UUID")


def _sessions(session: str, org: str, agent: str, user: str) -> list[str]:
    """Rows that the option may mean: a client's own id is often a UUID too."""
    from extproc.turns.turn import session_id

    if not session:
        return []
    rows = []
    with suppress(ValueError):
        rows.append(str(uuid.UUID(session)))
    if org and agent:
        rows.append(session_id(_parse_uuid("--org", org), _parse_uuid("--agent", agent), user or None, session))
    if not rows:
        fail("--session is not a UUID; the client's own id of a session needs --org and --agent too")
    return rows


def _moment(since: str) -> datetime | None:
    if not since:
        return None
    match = _SINCE.fullmatch(since)
    if match is None:
        fail("--since is not a time such as 30s, 15m, 1h or 7d")
    try:
        return datetime.now(UTC) - timedelta(seconds=int(match[1]) * _SECONDS[match[2]])
    except OverflowError:
        return None


def _epoch_ms(moment: datetime | None) -> int:
    return 0 if moment is None else max(1, round(moment.timestamp() * 1000))


def _show_json(rows: Iterable[Row], *, with_header: bool) -> None:  # noqa: ARG001 (as the table has it)
    for row in rows:
        # ASCII, so that nothing in a row can move a terminal's cursor.
        typer.echo(json.dumps({name: _plain(value) for name, value in row.items()}))


def _plain(value: object) -> object:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case uuid.UUID():
            return str(value)
        case float():
            return round(value, 3)
        case _:
            return value


def _show_table(rows: Sequence[Row], *, with_header: bool) -> None:
    from rich.console import Console

    if not rows:
        return
    # What is piped is wide enough for whole rows; a terminal cuts what it has no room for.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_table(rows, with_header=with_header))


def _table(rows: Iterable[Row], *, with_header: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=with_header, pad_edge=False, header_style="bold")
    for heading, width, is_number in _HEADINGS:
        table.add_column(
            heading, min_width=width, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis"
        )
    for row in rows:
        style = "red" if row["status_code"] >= 400 or row["status_code"] == 0 else "yellow" if _is_odd(row) else ""
        table.add_row(*(Text(printable(cell)) for cell in _cells(row)), style=style)
    return table


_HEADINGS = (
    ("TIME", 14, False),
    ("STATUS", 6, True),
    ("MODEL", 20, False),
    ("OUTCOME", 14, False),
    ("MEM", 3, True),
    ("TOKENS IN/OUT", 13, True),
    ("TTFB", 8, True),
    ("TOTAL", 9, True),
    ("AGENT", 8, False),
    ("SESSION", 8, False),
    ("REQUEST", 8, False),
)
"""Name, least width, and whether it is a number. Widths are the same for each batch of `--follow`."""


def _is_odd(row: Row) -> bool:
    return bool(row["context_fallback"] or not row["is_complete"] or row["error_code"])


def _cells(row: Row) -> tuple[str, ...]:
    """In local time; of an id what tells it from others at a glance."""
    status = str(row["status_code"] or "-") + ("" if row["is_complete"] or row["status_code"] >= 400 else "~")
    return (
        f"{row['requested_at'].astimezone():%m-%d %H:%M:%S}",
        status,
        row["model"] or "-",
        row["error_code"] or row["context_outcome"] or "-",
        str(row["memories_injected"]),
        f"{row['input_tokens']}/{row['output_tokens']}",
        f"{row['provider_ttfb_ms']} ms",
        f"{row['total_latency_ms']} ms",
        _short(row["agent_id"]),
        _short(row["session_id"]),
        _short(row["request_id"]),
    )


def _short(identifier: object) -> str:
    """The end of an id: UUIDs of version 7 that are made together begin alike."""
    return "-" if identifier is None else str(identifier)[-8:]
