"""What is asked of the embedded ClickHouse, before its engine sees it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import threading
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import brotli
import httpx2
import lz4.frame  # type: ignore[import-untyped]  # it has no stubs
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from extproc.stack import clickhouse
from extproc.stack.clickhouse import (
    Answer,
    Engine,
    EngineError,
    Query,
    QueryError,
    create_app,
    decompress,
    main,
    quoted,
    read_query,
    split_settings,
)


class TestStatements:
    def test_the_query_parameter_comes_before_the_body(self) -> None:
        query = read_query("POST", {"query": "INSERT INTO t FORMAT TSV"}, b"1\t2\n")
        assert (query.statement, query.format, query.rows) == (b"INSERT INTO t ", "TSV", b"1\t2\n")

    @pytest.mark.parametrize(
        "text",
        [
            "SELECT 1",
            "  -- a comment; with a mark\n SELECT ';' /* ; */;  \n",
            "SELECT format FROM t",
            "SELECT x AS format",
            "SELECT 'a\\';b'",
            "SELECT (SELECT 1)",
        ],
    )
    def test_a_select_without_a_format_is_tab_separated(self, text: str) -> None:
        query = read_query("POST", {}, text.encode())
        assert (query.statement, query.format, query.rows, query.has_result) == (
            text.encode(),
            "TabSeparated",
            None,
            True,
        )

    @pytest.mark.parametrize(
        "text",
        ["SELECT 1 FORMAT JSONEachRow", "SELECT 1\nformat JSONEachRow;", "SELECT 1 FORMAT JSONEachRow SETTINGS a=1"],
    )
    def test_a_format_at_the_end_is_that_of_the_result(self, text: str) -> None:
        assert read_query("POST", {"default_format": "Native"}, text.encode()).format == "JSONEachRow"

    def test_a_format_may_come_as_parameter_or_header(self) -> None:
        assert read_query("POST", {"default_format": "Native"}, b"SELECT 1").format == "Native"
        assert read_query("POST", {}, b"SELECT 1", "JSON").format == "JSON"

    @pytest.mark.parametrize("text", ["INSERT INTO t VALUES (1, ')')", "INSERT INTO t SELECT 1 FORMAT Null"])
    def test_an_insert_without_a_format_is_one_text(self, text: str) -> None:
        query = read_query("POST", {}, text.encode())
        assert (query.statement, query.rows, query.has_result) == (text.encode(), None, False)

    @given(rows=st.binary())
    def test_any_bytes_may_follow_an_insert(self, rows: bytes) -> None:
        query = read_query("POST", {}, b"INSERT INTO `a;b` (`format`, `x``y`) FORMAT Native\n" + rows)
        assert query.rows == rows
        assert query.statement == b"INSERT INTO `a;b` (`format`, `x``y`) "

    @pytest.mark.parametrize("text", ["", "  ", "-- nothing", "SELECT 1; SELECT 2", "SELECT 1;;"])
    def test_none_and_several_statements_are_errors(self, text: str) -> None:
        with pytest.raises(QueryError) as caught:
            read_query("POST", {}, text.encode())
        assert (caught.value.code, caught.value.status) == (62, 400)

    def test_a_statement_has_a_limit_and_rows_have_none_here(self) -> None:
        long = b" " + b"x," * 200_000
        with pytest.raises(QueryError):
            read_query("POST", {}, b"SELECT" + long)
        assert read_query("POST", {}, b"INSERT INTO t FORMAT TSV" + long).rows == long[1:]

    @given(text=st.binary(max_size=200))
    def test_whatever_is_sent_is_read_or_refused(self, text: bytes) -> None:
        with suppress(QueryError):
            read_query("POST", {}, text)

    def test_rows_come_from_a_file_that_is_named_before_the_settings(self) -> None:
        assert split_settings(b"INSERT INTO t (settings_) ") == (b"INSERT INTO t (settings_) ", b"")
        assert split_settings(b"INSERT INTO t SETTINGS a=1 ") == (b"INSERT INTO t ", b"SETTINGS a=1 ")

    @pytest.mark.parametrize(("text", "literal"), [("a'b", "'a\\'b'"), ("a\\", "'a\\\\'"), ("é\n", "'é\n'")])
    def test_a_literal_cannot_be_left(self, text: str, literal: str) -> None:
        assert quoted(text) == literal


class TestParameters:
    def test_what_is_no_transport_is_a_setting(self) -> None:
        query = read_query(
            "POST", {"database": "d", "session_id": "s", "max_threads": "2", "param_x": "1"}, b"SELECT 1"
        )
        assert (query.settings, query.parameters, query.database) == ({"max_threads": "2"}, {"x": "1"}, "d")

    def test_a_get_only_reads(self) -> None:
        assert read_query("GET", {"query": "SELECT 1", "readonly": "0"}, b"").settings == {"readonly": "2"}

    @pytest.mark.parametrize(
        ("parameters", "code"),
        [
            ({"a = 1, b": "1"}, 115),
            ({"compress": "1"}, 48),
            ({"decompress": "1"}, 48),
            ({"default_format": "DataFrame"}, 73),
            ({"default_format": "x' --"}, 73),
        ],
    )
    def test_what_is_not_there_is_refused(self, parameters: dict[str, str], code: int) -> None:
        with pytest.raises(QueryError) as caught:
            read_query("POST", parameters, b"SELECT 1")
        assert caught.value.code == code


ENCODERS = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "lz4": lz4.frame.compress,
    "zstd": zstd.compress,
    "br": brotli.compress,
}


class TestCompression:
    @pytest.mark.parametrize("name", ENCODERS)
    @given(body=st.binary(max_size=2000))
    def test_a_body_comes_back(self, name: str, body: bytes) -> None:
        assert decompress(ENCODERS[name](body), name.upper()) == body

    @pytest.mark.parametrize("name", ["gzip", "lz4", "zstd"])
    def test_frames_may_follow_each_other(self, name: str) -> None:
        assert decompress(ENCODERS[name](b"one ") + ENCODERS[name](b"two"), name) == b"one two"

    @pytest.mark.parametrize("name", [name for name in ENCODERS if name not in {"", "identity"}])
    def test_a_bomb_is_refused(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(clickhouse, "MAX_BODY_BYTES", 100_000)
        assert len(decompress(ENCODERS[name](bytes(100_000)), name)) == 100_000
        with pytest.raises(QueryError) as caught:
            decompress(ENCODERS[name](bytes(100_001)), name)
        assert caught.value.status == 413

    @pytest.mark.parametrize("name", [name for name in ENCODERS if name not in {"", "identity"}])
    def test_what_is_broken_or_cut_is_refused(self, name: str) -> None:
        whole = ENCODERS[name](bytes(range(256)) * 20)
        for body in (b"not compressed at all", whole[:-5], whole[: len(whole) // 2]):
            with pytest.raises(QueryError) as caught:
                decompress(body, name)
            assert caught.value.status == 400

    def test_an_unknown_encoding_is_refused(self) -> None:
        with pytest.raises(QueryError) as caught:
            decompress(b"x", "snappy")
        assert caught.value.status == 501


class StandInEngine(Engine):
    """Answers with the statement, when it is let."""

    def __init__(self) -> None:
        self.version, self.timezone = "26.5", "UTC"
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_closed = False

    @override
    def run(self, query: Query) -> Answer:
        assert self.may_go_on.wait(10)
        return Answer(query.statement, 1, 2, 3)

    @override
    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def engine() -> StandInEngine:
    return StandInEngine()


@pytest.fixture
async def client(engine: StandInEngine) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=create_app(engine))
    async with httpx2.AsyncClient(transport=transport, base_url="http://clickhouse") as client:
        yield client


class TestInterface:
    async def test_an_answer_says_which_query_it_answers(self, client: httpx2.AsyncClient) -> None:
        answer = await client.post("/", params={"query_id": "q1", "database": "d"}, content=b"SELECT 1 FORMAT JSON")
        assert (answer.status_code, answer.content) == (200, b"SELECT 1 FORMAT JSON")
        assert answer.headers["x-clickhouse-query-id"] == "q1"
        assert answer.headers["x-clickhouse-format"] == "JSON"
        assert answer.headers["x-clickhouse-timezone"] == "UTC"
        assert '"read_rows": "1"' in answer.headers["x-clickhouse-summary"]

    async def test_it_answers_to_those_who_ask_whether_it_is_there(self, client: httpx2.AsyncClient) -> None:
        assert (await client.get("/ping")).text == "Ok.\n"
        assert (await client.get("/")).text == "Ok.\n"

    async def test_a_page_in_a_browser_is_refused(self, client: httpx2.AsyncClient) -> None:
        answer = await client.post("/", content=b"SELECT 1", headers={"origin": "http://evil.example"})
        assert answer.status_code == 403

    async def test_a_form_is_refused(self, client: httpx2.AsyncClient) -> None:
        answer = await client.post("/", files={"query": b"SELECT 1"})
        assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (501, "48")

    async def test_a_long_body_is_refused(self, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(clickhouse, "MAX_BODY_BYTES", 10)
        assert (await client.post("/", content=b"SELECT 123456")).status_code == 413

    async def test_too_many_at_once_are_refused_and_ping_still_answers(
        self, client: httpx2.AsyncClient, engine: StandInEngine
    ) -> None:
        engine.may_go_on.clear()
        running = [asyncio.create_task(client.post("/", content=b"SELECT 1")) for _ in range(clickhouse.MAX_IN_FLIGHT)]
        await asyncio.sleep(0.2)
        refused = await client.post("/", content=b"SELECT 1")
        pong = await client.get("/ping")
        engine.may_go_on.set()
        answers = await asyncio.gather(*running)
        assert (refused.status_code, refused.headers["x-clickhouse-exception-code"]) == (503, "202")
        assert pong.text == "Ok.\n"
        assert {answer.status_code for answer in answers} == {200}
        assert (await client.post("/", content=b"SELECT 1")).status_code == 200

    async def test_a_password_may_come_in_each_of_clickhouses_ways(self, engine: StandInEngine) -> None:
        transport = httpx2.ASGITransport(app=create_app(engine, password="pass:wörd"))
        async with httpx2.AsyncClient(transport=transport, base_url="http://clickhouse") as client:

            async def status(headers: dict[str, str] | None = None, **parameters: str) -> int:
                return (await client.post("/", content=b"SELECT 1", headers=headers, params=parameters)).status_code

            basic = base64.b64encode("default:pass:wörd".encode()).decode()
            assert await status({"authorization": f"Basic {basic}"}) == 200
            assert await status(user="default", password="pass:wörd") == 200
            for wrong in ({"authorization": "Basic ###"}, {"authorization": "Bearer x"}, {"x-clickhouse-key": "x"}, {}):
                assert await status(wrong) == 403
            assert await status(password="") == 403
            assert (await client.get("/ping")).status_code == 200


class TestCommand:
    def test_a_password_file_that_is_empty_or_absent_is_no_open_door(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.write_text("\n")
        for file in (empty, tmp_path / "absent"):
            with pytest.raises(SystemExit) as caught:
                main(["--data", str(tmp_path / "data"), "--password-file", str(file)])
            assert caught.value.code == 1
        assert not (tmp_path / "data").exists()

    def test_a_directory_that_cannot_be_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(EngineError, match="cannot be used"):
            Engine(tmp_path / "file" / "data")
        with pytest.raises(EngineError, match="none of the characters"):
            Engine(tmp_path / "a?b")
