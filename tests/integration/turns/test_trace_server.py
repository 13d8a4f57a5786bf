"""The embedded ClickHouse, as clickhouse-connect and curl's kind of client see it, and through what ends it."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import clickhouse_connect
import httpx2
import pytest
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError

from extproc.stack.envoy import Address, free_port
from tests.integration.turns.clickhouse_side import START_LIMIT_S, ClickHouse, answers, running
from tests.integration.turns.valkey_side import eventually

AT = datetime(2025, 3, 1, 12, 0, 0, 123_000, tzinfo=UTC)
COLUMNS = ["number", "word", "id", "is_good", "part", "at"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    with running(tmp_path_factory.mktemp("clickhouse")) as server:
        server.command("CREATE DATABASE d")
        yield server


@pytest.fixture
def client(server: ClickHouse) -> Iterator[Client]:
    """With every default that clickhouse-connect has."""
    client = clickhouse_connect.get_client(host=server.address.host, port=server.address.port, database="d")
    client.command(
        "CREATE OR REPLACE TABLE t (number UInt32, word LowCardinality(String), id Nullable(UUID), is_good Bool, "
        "part Float32, at DateTime64(3, 'UTC')) ENGINE = MergeTree ORDER BY number "
        "SETTINGS non_replicated_deduplication_window = 100"
    )
    yield client
    client.close()


def ask(
    server: ClickHouse, method: str = "POST", headers: Any = None, body: bytes = b"", **parameters: str
) -> httpx2.Response:
    return httpx2.request(
        method, f"http://{server.address}/", params=parameters, content=body, headers=headers, timeout=30
    )


class TestClient:
    @pytest.mark.parametrize("compress", [True, False, "lz4", "zstd", "gzip", "br"])
    def test_rows_come_back_as_they_went_in(self, server: ClickHouse, client: Client, compress: bool | str) -> None:
        row = [7, "it's; a `wörd`\n\\", uuid.UUID(int=5), True, 0.5, AT]
        with clickhouse_connect.get_client(
            host=server.address.host, port=server.address.port, database="d", compress=compress
        ) as other:
            other.insert("t", [row, [8, "", None, False, -1.0, AT]], column_names=COLUMNS)
            [first, second] = other.query(
                "SELECT * FROM t ORDER BY number", query_tz="UTC", tz_mode="aware"
            ).result_rows
        assert list(first) == row
        assert list(second) == [8, "", None, False, -1.0, AT]

    def test_many_rows_in_several_blocks(self, client: Client) -> None:
        rows = [[number, f"w{number % 7}", None, True, 0.0, AT] for number in range(30_000)]
        client.insert("t", rows, column_names=COLUMNS)
        assert client.command("SELECT count() FROM t WHERE word = 'w3'") == sum(row[1] == "w3" for row in rows)

    def test_a_token_is_taken_once(self, client: Client) -> None:
        for _ in range(3):
            client.insert("t", [[1]], column_names=["number"], settings={"insert_deduplication_token": "it's"})
        client.insert("t", [[1]], column_names=["number"], settings={"insert_deduplication_token": "other"})
        assert client.command("SELECT count() FROM t") == 2

    @pytest.mark.parametrize("value", ["' OR 1 = 1 --", "\\' OR 1 = 1", "a\tb\nc\\n", "{x:String}", "é\u2028", "\x00"])
    def test_a_bound_value_is_a_value(self, client: Client, value: str) -> None:
        bound = client.query("SELECT {value:String} AS value", parameters={"value": value})
        assert bound.result_rows == [(value,)]

    def test_settings_end_with_their_query(self, client: Client) -> None:
        query = "SELECT getSetting('max_block_size')"
        assert client.query(query, settings={"max_block_size": 123}).result_rows == [(123,)]
        assert client.query(query).result_rows != [(123,)]

    def test_an_empty_result_is_one(self, client: Client) -> None:
        assert client.query("SELECT * FROM t").result_rows == []
        assert client.query("SELECT * FROM t LIMIT 0").column_names == tuple(COLUMNS)
        assert client.command("SELECT 1 LIMIT 0") == ""

    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ("SELECT (1", 62),
            ("DROP TABLE t SYNC", 48),
            ("SELECT * FROM nowhere.t", 81),
            ("SELECT * FROM nothing", 60),
            ("SELECT nothing FROM t", 47),
            ("SELECT 1; SELECT 2", 62),
            ("INSERT INTO t (number) VALUES ('x')", 6),
            ("SELECT throwIf(1)", 395),
            ("SELECT count() FROM numbers(100000000) GROUP BY number SETTINGS max_memory_usage = 1000000", 241),
        ],
    )
    def test_errors_have_clickhouses_code(self, client: Client, query: str, code: int) -> None:
        with pytest.raises(DatabaseError) as caught:
            client.command(query)
        assert caught.value.code == code

    def test_an_unknown_setting_is_an_error(self, client: Client) -> None:
        with pytest.raises(DatabaseError) as caught:
            client.command("SELECT 1", settings={"no_such_setting": 1})
        assert caught.value.code == 115

    def test_rows_that_are_no_rows_are_an_error_and_nothing_is_stored(self, client: Client) -> None:
        with pytest.raises(DatabaseError) as caught:
            client.raw_insert("t", insert_block=b"\x01\x05 not Native at all", fmt="Native")
        assert caught.value.code is not None
        assert client.command("SELECT count() FROM t") == 0


class TestHttp:
    def test_a_query_in_the_address_or_in_the_body(self, server: ClickHouse) -> None:
        assert ask(server, "GET", query="SELECT 1 + 1").text == "2\n"
        assert ask(server, body=b"SELECT 1 + 1").text == "2\n"
        assert ask(server, body=b"1 + 1", query="SELECT").text == "2\n"
        assert ask(server, body=b"SELECT 1 AS a", default_format="JSONEachRow").json() == {"a": 1}

    def test_rows_behind_an_insert_in_any_format(self, server: ClickHouse, client: Client) -> None:
        query = "INSERT INTO d.t (number, word) SETTINGS async_insert = 0 FORMAT TSV"
        ask(server, body=b"1\tone\n2\ttwo\n", query=query).raise_for_status()
        ask(server, body=b"INSERT INTO d.t (number, word) VALUES (3, 'th;ree')").raise_for_status()
        ask(server, body=b'INSERT INTO d.t FORMAT JSONEachRow {"number": 4, "word": "four"}').raise_for_status()
        zipped = gzip.compress(b"5\tfive\n")
        ask(server, body=zipped, query=query, headers={"content-encoding": "gzip"}).raise_for_status()
        rows = ask(server, body=b"SELECT number, word FROM d.t ORDER BY number").text
        assert rows == "1\tone\n2\ttwo\n3\tth;ree\n4\tfour\n5\tfive\n"

    def test_a_get_cannot_write(self, server: ClickHouse, client: Client) -> None:
        answer = ask(server, "GET", query="INSERT INTO d.t (number) VALUES (1)")
        assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (500, "164")
        assert ask(server, "GET", query="SELECT count() FROM d.t").text == "0\n"

    def test_an_error_says_its_code_in_the_header_and_in_the_text(self, server: ClickHouse) -> None:
        answer = ask(server, body=b"SELECT * FROM d.nothing", query_id="mine")
        assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (404, "60")
        assert answer.headers["x-clickhouse-query-id"] == "mine"
        assert answer.text.startswith("Code: 60. DB::Exception: ")
        assert "(UNKNOWN_TABLE)" in answer.text

    def test_ping_answers_while_a_query_runs(self, server: ClickHouse) -> None:
        """Within a few tries: on a busy machine the answer may be later than the query's end."""
        is_running = False
        for _ in range(5):
            slow = threading.Thread(target=ask, args=(server,), kwargs={"body": b"SELECT sleep(2)"})
            slow.start()
            time.sleep(0.3)
            pong = httpx2.get(f"http://{server.address}/ping", timeout=20)
            is_running = slow.is_alive()
            slow.join(30)
            assert pong.text == "Ok.\n"
            if is_running:
                break
        assert is_running


def command(data: Path, address: Address) -> list[str]:
    return [sys.executable, "-m", "extproc.stack.clickhouse", "--listen", str(address), "--data", str(data)]


class TestProcess:
    def test_a_signal_ends_it_with_success_and_the_rows_are_there_again(self, tmp_path: Path) -> None:
        with running(tmp_path / "data") as server:
            server.command("CREATE TABLE t (n UInt8) ENGINE = MergeTree ORDER BY n")
            server.command("INSERT INTO t VALUES (1)")
            assert server.stop() == 0
            server.start()
            assert server.query("SELECT n FROM t") == [(1,)]

    def test_a_query_that_does_not_end_does_not_keep_it_from_ending(self, tmp_path: Path) -> None:
        with running(tmp_path / "data") as server:
            server.command("CREATE TABLE t (n UInt8) ENGINE = MergeTree ORDER BY n")
            server.command("INSERT INTO t VALUES (1)")

            def run_long() -> None:
                with suppress(httpx2.HTTPError):
                    ask(server, body=b"SELECT sleepEachRow(1) FROM numbers(55) SETTINGS max_block_size = 1")

            slow = threading.Thread(target=run_long)
            slow.start()
            time.sleep(0.5)
            assert server.stop() in {0, 1}
            slow.join(20)
            server.start()
            assert server.query("SELECT n FROM t") == [(1,)]

    def test_a_directory_in_use_is_an_error(self, server: ClickHouse) -> None:
        second = subprocess.run(
            command(server.data, Address("127.0.0.1", free_port())), capture_output=True, timeout=90
        )
        assert second.returncode == 1
        assert b"another process uses it" in second.stderr
        assert server.query("SELECT 1") == [(1,)]

    def test_a_port_in_use_is_an_error(self, server: ClickHouse, tmp_path: Path) -> None:
        second = subprocess.run(command(tmp_path / "data", server.address), capture_output=True, timeout=90)
        assert second.returncode == 1
        assert b"address already in use" in second.stderr

    def test_it_writes_nowhere_but_in_its_directory(self, tmp_path: Path) -> None:
        data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
        elsewhere.mkdir()
        address = Address("127.0.0.1", free_port())
        root = Path(__file__).parents[3]
        places = {name: str(elsewhere) for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
        process = subprocess.Popen(
            command(data, address), cwd=elsewhere, env={**os.environ, **places, "PYTHONPATH": str(root)}
        )
        try:
            server = ClickHouse(data, address=address)
            eventually(lambda: answers(address), START_LIMIT_S)
            server.command("CREATE TABLE t (n UInt64) ENGINE = MergeTree ORDER BY n")
            ask(server, body=b"1\n2\n", query="INSERT INTO t FORMAT TSV").raise_for_status()
            assert server.query("SELECT count() FROM t") == [(2,)]
        finally:
            process.terminate()
            assert process.wait(60) == 0
        assert list(elsewhere.iterdir()) == []
        assert list((data / "incoming").iterdir()) == []

    def test_a_password_keeps_others_out(self, tmp_path: Path) -> None:
        with running(tmp_path / "data", password="w0rd") as server:
            assert server.query("SELECT 1") == [(1,)]
            assert ask(server, body=b"SELECT 1").status_code == 403
            with pytest.raises(DatabaseError) as caught:
                clickhouse_connect.get_client(host=server.address.host, port=server.address.port, password="guess")
            assert caught.value.code == 516
