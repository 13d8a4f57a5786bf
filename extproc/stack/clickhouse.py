"""ClickHouse's engine behind ClickHouse's HTTP interface, in a process of its own, for one machine.

The engine (chDB) can have its directory open in one process only; behind the interface every process reaches it with
the client, the SQL and the errors of a ClickHouse server. What clickhouse-connect and curl use is answered: `/ping`,
queries in the `query` parameter or the body, `database`, `default_format`, `query_id`, settings and `param_…` as
parameters, inserts with their rows behind the statement, compressed as HTTP says. Sessions are not kept, answers are
not compressed, and ClickHouse's own block compression and multipart forms are answered with 501.

Whoever reaches the port can do what this process may, reading files included: keep it on loopback, or give a password.

Run it: `python -m extproc.stack.clickhouse --listen 127.0.0.1:8123 --data DIR [--password-file FILE]`. It ends with 0
after SIGTERM, with 1 when the directory or the port cannot be used.

Source: https://clickhouse.com/docs/interfaces/http
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hmac
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from typing_extensions import override

from extproc.stack.envoy import Address

__all__ = ["Answer", "Engine", "EngineError", "Query", "QueryError", "create_app", "decompress", "main", "read_query"]

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Largest body that is read, and largest one after decompression."""
MAX_STATEMENT_BYTES = 256 * 1024
"""Of a statement without its rows: ClickHouse's own `max_query_size`."""
MAX_IN_FLIGHT = 16
"""Requests that are read, wait or run; the engine runs one at a time."""
BODY_TIMEOUT_S = 30.0
CLOSE_LIMIT_S = 5.0
"""What a running query gets to end after SIGTERM, when its client was already cut off."""

ENGINE_SETTINGS = {
    "max_server_memory_usage": str(1024**3),
    "mark_cache_size": str(8 * 1024**2),
    "memory_worker_period_ms": "2000",
}
"""Of the whole engine. By default it looks at its own memory 20 times a second, which is most of what it does when
idle: 0.4 % of a core, and 0.07 % with this."""
QUERY_SETTINGS = {"max_threads": "1", "max_memory_usage": str(512 * 1024**2), "max_execution_time": "60"}
"""Of each query, unless it brings its own: the machine has other work."""

TRANSPORT_PARAMETERS = frozenset(
    {
        "query", "database", "default_format", "query_id", "user", "password", "session_id", "session_timeout",
        "session_check", "quota_key", "role", "compress", "decompress", "wait_end_of_query", "buffer_size",
        "client_protocol_version", "stacktrace",
    }
)  # fmt: skip
"""Parameters of the interface itself; every other one is a setting of the query."""

NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,127}")
PYTHON_FORMATS = {"arrowtable", "dataframe", "datastore", "debug"}
"""What chDB makes Python objects of; a server has no such formats."""
ROWS_FOLLOW = re.compile(rb"[ \t]*(?:\r?\n)?")
"""Between an insert's format and its rows."""
TOKEN = re.compile(
    rb"""(?P<blank>\s+|--[^\n]*|/\*.*?\*/)
    |(?P<quoted>'(?:[^'\\]|\\.)*'|`(?:[^`\\]|\\.)*`|"(?:[^"\\]|\\.)*")
    |(?P<word>[A-Za-z_0-9]+)
    |(?P<other>.)""",
    re.DOTALL | re.VERBOSE,
)
READS = {b"SELECT", b"WITH", b"SHOW", b"DESCRIBE", b"DESC", b"EXISTS", b"EXPLAIN", b"CHECK", b"FROM", b"("}
"""First words of statements that have a result, even an empty one."""

SYNTAX_ERROR, NOT_IMPLEMENTED, UNKNOWN_FORMAT, UNKNOWN_SETTING = 62, 48, 73, 115
TOO_MANY_QUERIES, TIMEOUT_EXCEEDED, AUTHENTICATION_FAILED, STD_EXCEPTION = 202, 159, 516, 1001
STATUS_OF_CODE = {
    **dict.fromkeys([6, 26, 27, 36, 38, 41, 43, 44, 50, 53, 62, 69, 70, 72, 73, 117, 131, 457], 400),
    **dict.fromkeys([46, 47, 56, 60, 81, 115], 404),
    NOT_IMPLEMENTED: 501,
    TOO_MANY_QUERIES: 503,
    TIMEOUT_EXCEEDED: 408,
    AUTHENTICATION_FAILED: 403,
}
"""As ClickHouse answers them: what cannot be read is 400, what is unknown 404; any other code is 500."""


class EngineError(Exception):
    """The directory cannot be opened. The message says what to do."""


class QueryError(Exception):
    """A query that is not answered: ClickHouse's code, and its text for the client."""

    def __init__(self, code: int, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.status = status or STATUS_OF_CODE.get(code, 500)


@dataclass(frozen=True, slots=True)
class Query:
    """One statement, ready to run."""

    statement: bytes
    """UTF-8; of an insert with rows only what is before FORMAT."""
    rows: bytes | None
    """Of an insert, in `format`; None: there are none behind the statement."""
    format: str
    """Of the rows, or of the result."""
    has_result: bool
    settings: dict[str, str]
    parameters: dict[str, str]
    """Values of `{name:Type}`, escaped as in a TabSeparated field."""
    database: str
    """Empty: `default`."""
    query_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    rows_read: int
    bytes_read: int
    elapsed_ns: int


class Decompressor(Protocol):
    """What zlib, lz4 and zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class Engine:
    """One open directory. Its methods block, and are called by one thread at a time."""

    def __init__(self, directory: Path) -> None:
        """Raises EngineError."""
        self._incoming = directory / "incoming"
        """Rows on their way into the engine."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(f"{directory} cannot be used: {error.strerror}") from None
        place = str(directory.resolve())
        if set(place) & set("?&%#="):
            raise EngineError(f"{directory} cannot be used: its path must have none of the characters ?&%#=")
        self._place = f"{place}?" + "&".join(f"{name}={value}" for name, value in ENGINE_SETTINGS.items())
        # Held until the end: the engine closes its directory with the last of its connections.
        self._connection = self._connect()
        # What a killed process left there is of no use; while the directory is ours, nobody else's is there.
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(mode=0o700)
        [(self.version, self.timezone)] = [
            self._connection.query("SELECT version(), timezone()", "TabSeparated").bytes().decode().strip().split("\t")
        ]

    def run(self, query: Query) -> Answer:
        """Raises QueryError. A connection of its own, about 0.2 ms: no setting outlives its query."""
        connection = self._connect()
        try:
            connection.query(f"SET {assignments({**QUERY_SETTINGS, **query.settings})}", "Null")
            if query.database:
                connection.query(f"USE {quoted(query.database, '`')}", "Null")
            with self._statement(query) as statement:
                result = connection.query(statement, query.format, params=query.parameters)
            return Answer(
                result.bytes() or b"", result.rows_read(), result.bytes_read(), int(result.elapsed() * 1_000_000_000)
            )
        except RuntimeError as error:
            raise _query_error(str(error)) from None
        finally:
            connection.close()

    def close(self) -> None:
        self._connection.close()

    def _connect(self) -> Any:
        import chdb

        try:
            return chdb.connect(self._place)
        except RuntimeError:
            raise EngineError(
                f"{self._incoming.parent} cannot be opened: another process uses it, or it is no directory of this "
                "engine. End the other process, or name another directory."
            ) from None

    @contextmanager
    def _statement(self, query: Query) -> Iterator[bytes]:
        """The rows of an insert reach the engine in a file: they are bytes, and a statement is text."""
        if query.rows is None:
            yield query.statement
            return
        descriptor, name = tempfile.mkstemp(dir=self._incoming)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor)
                file.write(query.rows)
            into, settings = split_settings(query.statement)
            source = f" FROM INFILE {quoted(name)} COMPRESSION 'none' ".encode()
            yield into + source + settings + f" FORMAT {query.format}".encode()
        finally:
            Path(name).unlink(missing_ok=True)


def read_query(method: str, parameters: Mapping[str, str], body: bytes, default_format: str = "") -> Query:
    """What a request asks for. Its body is already decompressed. Raises QueryError."""
    if any(parameters.get(name, "0") not in {"0", "false", ""} for name in ("compress", "decompress")):
        raise QueryError(NOT_IMPLEMENTED, "This server does not speak ClickHouse's block compression")
    in_url = parameters.get("query", "").encode()
    text = in_url + b"\n" + body if in_url and body else in_url or body
    statement, output_format, rows, first_word = parse_statement(text)
    chosen = output_format or parameters.get("default_format") or default_format or "TabSeparated"
    if not NAME.fullmatch(chosen) or chosen.lower() in PYTHON_FORMATS:
        raise QueryError(UNKNOWN_FORMAT, "Unknown format")
    settings = {
        name: value
        for name, value in parameters.items()
        if name not in TRANSPORT_PARAMETERS and not name.startswith("param_")
    }
    if bad := [name for name in settings if not NAME.fullmatch(name)]:
        raise QueryError(UNKNOWN_SETTING, f"Unknown setting {bad[0]!r}")
    if method != "POST":
        settings["readonly"] = "2"
    return Query(
        statement=statement,
        rows=rows,
        format=chosen,
        has_result=first_word in READS,
        settings=settings,
        parameters={name[6:]: value for name, value in parameters.items() if name.startswith("param_")},
        database=parameters.get("database", ""),
        query_id=parameters.get("query_id") or str(uuid.uuid4()),
    )


def parse_statement(text: bytes) -> tuple[bytes, str, bytes | None, bytes]:
    """The statement, the format it names, the rows behind it, and its first word in capitals.

    The statement of an insert with rows ends before FORMAT. Raises QueryError for none, several, or one too long.
    """
    top: list[bytes] = []
    """What stands outside of parentheses, in capitals."""
    depth = format_at = 0
    for match in _tokens(text):
        token = match[0].upper()
        depth += (token == b"(") - (token == b")")
        if top and top[-1] == b";":
            raise QueryError(SYNTAX_ERROR, "Syntax error (Multi-statements are not allowed)")
        if top and top[0] == b"INSERT" and match.lastgroup == "word" and not depth:
            if top[-1] == b"FORMAT":
                return text[:format_at], match[0].decode("ascii"), _rows(text, match.end()), top[0]
            if token in {b"VALUES", b"SELECT", b"WITH"}:
                return text, "", None, top[0]
        if token == b"FORMAT":
            format_at = match.start()
        if not depth or not top:
            top.append(token)
    if top and top[-1] == b";":
        top.pop()
    if not top:
        raise QueryError(SYNTAX_ERROR, "Syntax error: Empty query")
    if top[0] in {b"DROP", b"DETACH", b"TRUNCATE"} and top[-1] in {b"SYNC", b"DELAY"}:
        raise QueryError(NOT_IMPLEMENTED, "The embedded engine would wait for ever: leave SYNC or NO DELAY out")
    return text, _format_at_end(top, text), None, top[0]


def _tokens(text: bytes) -> Iterator[re.Match[bytes]]:
    """Without blanks and comments. Raises QueryError where a statement is too long."""
    for match in TOKEN.finditer(text):
        if match.start() > MAX_STATEMENT_BYTES:
            raise QueryError(SYNTAX_ERROR, "The statement is longer than max_query_size", 413)
        if match.lastgroup != "blank":
            yield match


def _rows(text: bytes, format_end: int) -> bytes:
    gap = ROWS_FOLLOW.match(text, format_end)
    return text[gap.end() if gap else format_end :]


def _format_at_end(top: list[bytes], text: bytes) -> str:
    """The name behind a closing FORMAT; `format` may be a column too."""
    end = next((at for at in range(len(top) - 1, 1, -1) if top[at] == b"SETTINGS"), len(top))
    for last in (len(top), end):
        if last >= 3 and top[last - 2] == b"FORMAT":
            return _as_written(top[last - 1], text)
    return ""


def _as_written(word: bytes, text: bytes) -> str:
    """Names of formats mind their capitals."""
    matches = [match[0] for match in _tokens(text) if match[0].upper() == word]
    return matches[-1].decode("ascii", "replace")


def split_settings(statement: bytes) -> tuple[bytes, bytes]:
    """An insert before and from its SETTINGS: where its rows come from is said between the two."""
    for match in TOKEN.finditer(statement):
        if match.lastgroup == "word" and match[0].upper() == b"SETTINGS":
            return statement[: match.start()], statement[match.start() :]
    return statement, b""


def quoted(text: str, mark: str = "'") -> str:
    """A literal, or with a back-tick an identifier."""
    return mark + text.replace("\\", "\\\\").replace(mark, "\\" + mark) + mark


def assignments(settings: Mapping[str, str]) -> str:
    """As SET takes them. The names are checked before; ClickHouse turns texts into numbers where it wants them."""
    return ", ".join(f"{name} = {quoted(value)}" for name, value in settings.items())


def _query_error(message: str) -> QueryError:
    start = message.find("Code: ")
    code = re.match(r"Code: (\d+)\. (?:DB::Exception: )?", message[start:]) if start >= 0 else None
    if code is None:
        return QueryError(STD_EXCEPTION, message.strip())
    return QueryError(int(code[1]), message[start + code.end() :].strip())


def decompress(body: bytes, encoding: str) -> bytes:
    """A body as its Content-Encoding says; frames may follow each other. Raises QueryError."""
    name = encoding.strip().lower()
    if name in {"", "identity"}:
        return body
    try:
        plain = _unbrotli(body) if name == "br" else _inflate(body, _decompressors()[name])
    except KeyError:
        raise QueryError(NOT_IMPLEMENTED, "Unknown Content-Encoding") from None
    except Exception as error:  # noqa: BLE001 - each codec has errors of its own
        raise QueryError(STD_EXCEPTION, f"The body cannot be decompressed: {type(error).__name__}", 400) from None
    if len(plain) > MAX_BODY_BYTES:
        raise _too_large()
    return plain


def _inflate(body: bytes, make: Callable[[], Decompressor]) -> bytes:
    """At most one byte more than the limit. Raises EOFError when a frame is not whole."""
    plain = bytearray()
    while body and len(plain) <= MAX_BODY_BYTES:
        stream = make()
        plain += stream.decompress(body, MAX_BODY_BYTES + 1 - len(plain))
        if not stream.eof and len(plain) <= MAX_BODY_BYTES:
            raise EOFError
        body = stream.unused_data or b""
    return bytes(plain)


def _decompressors() -> dict[str, Callable[[], Decompressor]]:
    return {"gzip": _zlib, "deflate": _zlib, "lz4": _lz4, "zstd": _zstd}


def _zlib() -> Decompressor:
    return zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, as its first bytes say


def _lz4() -> Decompressor:
    from lz4.frame import LZ4FrameDecompressor  # type: ignore[import-untyped]  # it has no stubs

    made: Decompressor = LZ4FrameDecompressor()
    return made


def _zstd() -> Decompressor:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor
    else:
        from backports.zstd import ZstdDecompressor
    return ZstdDecompressor()


def _unbrotli(body: bytes) -> bytes:
    import brotli

    stream, plain = brotli.Decompressor(), bytearray()
    try:
        plain += stream.process(body, output_buffer_limit=MAX_BODY_BYTES + 1)
        while not stream.is_finished() and len(plain) <= MAX_BODY_BYTES and (more := stream.process(b"")):
            plain += more
    except brotli.error:
        raise ValueError from None
    if not stream.is_finished() and len(plain) <= MAX_BODY_BYTES:
        raise EOFError
    return bytes(plain)


def create_app(engine: Engine, password: str = "") -> Starlette:
    """The interface to one engine, which it closes at the end. An empty password lets everybody in."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="engine")
    in_flight = 0

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        closing = asyncio.get_running_loop().run_in_executor(worker, engine.close)
        await asyncio.wait([closing], timeout=CLOSE_LIMIT_S)
        if not closing.done():
            # A query that does not end. What was answered is on disk, as after SIGKILL.
            print("extproc.stack.clickhouse: ended in the middle of a query", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
        worker.shutdown()

    async def ping(_: Request) -> Response:
        return PlainTextResponse("Ok.\n")

    async def serve(request: Request) -> Response:
        nonlocal in_flight
        query_id = request.query_params.get("query_id") or str(uuid.uuid4())
        in_flight += 1
        try:
            return await answer(request)
        except QueryError as error:
            return _failed(error, engine, query_id)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            in_flight -= 1

    async def answer(request: Request) -> Response:
        _admit(request, password, in_flight)
        body = await _read_body(request)
        if not body and not request.query_params.get("query"):
            return PlainTextResponse("Ok.\n")
        return await asyncio.get_running_loop().run_in_executor(worker, _perform, engine, request, body)

    return Starlette(
        routes=[Route("/ping", ping, methods=["GET"]), Route("/", serve, methods=["GET", "POST"])], lifespan=lifespan
    )


def _perform(engine: Engine, request: Request, body: bytes) -> Response:
    """In the engine's thread, decompression too: the loop stays free for `/ping`. Raises QueryError."""
    plain = decompress(body, request.headers.get("content-encoding", ""))
    given_format = request.headers.get("x-clickhouse-format", "")
    query = read_query(request.method, dict(request.query_params), plain, given_format)
    return _answered(query, engine.run(query), engine)


def _admit(request: Request, password: str, in_flight: int) -> None:
    """Raises QueryError for whom nothing is done."""
    if "origin" in request.headers:
        raise QueryError(AUTHENTICATION_FAILED, "A page in a browser may not ask this server")
    if not hmac.compare_digest(given_password(request).encode(), password.encode()) and password:
        raise QueryError(AUTHENTICATION_FAILED, "Authentication failed: password is incorrect")
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise QueryError(NOT_IMPLEMENTED, "This server does not read forms; send the query in the body")
    if in_flight > MAX_IN_FLIGHT:
        raise QueryError(TOO_MANY_QUERIES, "Too many simultaneous queries")


def given_password(request: Request) -> str:
    """From where ClickHouse looks for it; empty: none."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        return ""
    return request.headers.get("x-clickhouse-key") or request.query_params.get("password", "")


async def _read_body(request: Request) -> bytes:
    """Raises QueryError when it is too long or too slow, and ClientDisconnect."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise QueryError(TIMEOUT_EXCEEDED, "The body did not come in time") from None
    return bytes(body)


def _too_large() -> QueryError:
    return QueryError(STD_EXCEPTION, f"The body is larger than {MAX_BODY_BYTES} bytes", 413)


def _answered(query: Query, answer: Answer, engine: Engine) -> Response:
    counts = {"read_rows": answer.rows_read, "read_bytes": answer.bytes_read}
    written = {"written_rows": 0, "written_bytes": 0}
    if query.rows is not None:
        written = {"written_rows": answer.rows_read, "written_bytes": answer.bytes_read}
    summary = {**counts, **written, "elapsed_ns": answer.elapsed_ns}
    headers = {
        "X-ClickHouse-Query-Id": query.query_id,
        "X-ClickHouse-Timezone": engine.timezone,
        "X-ClickHouse-Summary": json.dumps({name: str(count) for name, count in summary.items()}),
        "Content-Type": "application/octet-stream" if query.format == "Native" else "text/plain; charset=UTF-8",
    }
    if query.has_result:
        headers["X-ClickHouse-Format"] = query.format
    return Response(answer.body, headers=headers)


def _failed(error: QueryError, engine: Engine, query_id: str) -> Response:
    text = f"Code: {error.code}. DB::Exception: {error.text} (version {engine.version})\n"
    headers = {"X-ClickHouse-Exception-Code": str(error.code), "X-ClickHouse-Query-Id": query_id}
    return PlainTextResponse(text, status_code=error.status, headers=headers)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="ClickHouse's engine behind ClickHouse's HTTP interface.")
    parser.add_argument("--listen", default="127.0.0.1:8123", metavar="HOST:PORT", type=Address.parse)
    parser.add_argument("--data", required=True, metavar="DIR", type=Path, help="directory of the tables")
    parser.add_argument(
        "--password-file", metavar="FILE", type=Path, help="first line: what clients must send; none: nothing"
    )
    given = parser.parse_args(arguments)
    try:
        password = _read_password(given.password_file) if given.password_file else ""
        engine = Engine(given.data)
    except EngineError as error:
        print(f"extproc.stack.clickhouse: {error}", file=sys.stderr)  # noqa: T201 (a command's last word)
        sys.exit(1)
    # uvicorn raises the signal that stopped it once more; after a clean close that is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    listen: Address = given.listen
    config = uvicorn.Config(
        create_app(engine, password),
        host=listen.host,
        port=listen.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
    )
    try:
        _Server(config).run()
    except SystemExit:
        sys.exit(1)  # the port; uvicorn has said so


class _Server(uvicorn.Server):
    """uvicorn, with two wake-ups a second instead of ten, which cost more than the idle engine: 0.26 % of a core."""

    @override
    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # noqa: ASYNC110 - uvicorn stops by a flag
            await asyncio.sleep(0.5)


def _read_password(file: Path) -> str:
    """Raises EngineError; an empty file is no password, and no door either."""
    try:
        password = file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        raise EngineError(f"{file} cannot be read") from None
    if not password:
        raise EngineError(f"{file} is empty: write a password into it, or leave --password-file out")
    return password


if __name__ == "__main__":
    main()
