"""Trace rows reach ClickHouse once, whatever happens to it. The engine and the client are the real ones."""

from __future__ import annotations

import random
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from extproc.stack.envoy import free_port
from extproc.turns import trace
from extproc.turns.sinks import Refused, Unavailable
from extproc.turns.trace import COLUMNS, ClickHouseTraces, migrate_traces
from extproc.turns.turn import End, Entry, Turn, checkpoint_id, session_id
from tests.integration.turns.clickhouse_side import ClickHouse, running
from tests.integration.turns.valkey_side import eventually

ORG, AGENT = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
NOW = datetime.now(UTC).replace(microsecond=123_000)


def entry(request_id: str = "r1", **changes: Any) -> Entry:
    given: dict[str, Any] = {
        "request_id": request_id,
        "org_id": ORG,
        "agent_id": AGENT,
        "external_id": "s1",
        "session_id": session_id(ORG, AGENT, None, "s1"),
        "checkpoint_id": checkpoint_id(ORG, request_id),
        "end": End.COMPLETE,
        "status_code": 200,
        "model": "gpt-4o",
        "requested_at": NOW,
        "completed_at": NOW + timedelta(seconds=1),
    }
    return Entry(seq=1, turn=Turn(**{**given, **changes}))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    with running(tmp_path_factory.mktemp("clickhouse")) as server:
        yield server


@pytest.fixture
def server(shared: ClickHouse) -> ClickHouse:
    """Without a table. For tests that leave it running."""
    shared.command("DROP DATABASE IF EXISTS ibex")
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ClickHouse]:
    """To stop and kill."""
    with running(tmp_path / "clickhouse") as server:
        yield server


@pytest.fixture
def sink(server: ClickHouse) -> Iterator[ClickHouseTraces]:
    sink = ClickHouseTraces(server.url, 90)
    yield sink
    sink.close()


class TestRows:
    def test_a_row_has_every_column(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert(
            [entry(input_tokens=100, output_tokens=20, total_ms=999.6, engine_ms=7.25, outcome="injected")], "t"
        )
        [row] = server.query("SELECT * FROM ibex.llm_traces")
        found = dict(zip(COLUMNS, row, strict=True))
        assert found["request_id"] == "r1"
        assert found["org_id"] == uuid.UUID(ORG)
        assert found["session_id"] == uuid.UUID(session_id(ORG, AGENT, None, "s1"))
        assert found["checkpoint_id"] == uuid.UUID(checkpoint_id(ORG, "r1"))
        assert (found["input_tokens"], found["output_tokens"], found["total_tokens"]) == (100, 20, 120)
        assert (found["total_latency_ms"], found["assemble_latency_ms"]) == (1000, 7.25)
        assert (found["context_outcome"], found["context_fallback"], found["is_complete"]) == ("injected", True, False)
        assert found["requested_at"] == NOW.replace(tzinfo=None)

    def test_the_columns_have_the_contracts_types(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert([entry()], "t")
        described = server.query("DESCRIBE TABLE ibex.llm_traces")
        assert {row[0]: row[1] for row in described} == COLUMNS

    def test_a_denied_request_has_neither_session_nor_checkpoint(
        self, server: ClickHouse, sink: ClickHouseTraces
    ) -> None:
        sink.insert([entry(end=End.DENIED, status_code=403)], "t")
        assert server.query("SELECT session_id, checkpoint_id FROM ibex.llm_traces") == [(None, None)]

    def test_values_beyond_every_range_are_stored(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        for number, (big, real) in enumerate([(2**80, float("inf")), (-(2**80), float("-inf")), (7, float("nan"))]):
            odd = entry(
                f"r{number}",
                status_code=big,
                memories_injected=big,
                input_tokens=big,
                output_tokens=big,
                cached_input_tokens=big,
                context_tokens=big,
                auth_ms=real,
                ttfb_ms=real,
                total_ms=real,
                model="m" * 100_000,
                provider="\ud800",
                error_code="\x00'\\",
                org_id="no UUID",
                completed_at=datetime(9999, 1, 1, tzinfo=UTC),
            )
            sink.insert([odd], f"t{number}")
        assert server.request_ids() == ["r0", "r1", "r2"]
        assert server.query("SELECT max(total_tokens), max(length(model)), any(provider) FROM ibex.llm_traces") == [
            (2**32 - 1, 128, "?")
        ]

    def test_a_row_goes_when_its_time_is_over(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert([entry("old", requested_at=NOW - timedelta(days=91)), entry("new")], "t")
        server.command("OPTIMIZE TABLE ibex.llm_traces FINAL")
        assert server.request_ids() == ["new"]


class TestOnce:
    def test_a_token_a_second_time_adds_nothing(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        batch = [entry(f"r{number:03}") for number in range(500)]
        for _ in range(3):
            sink.insert(batch, "one")
        assert server.request_ids() == [f"r{number:03}" for number in range(500)]

    def test_equal_rows_with_another_token_are_added(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert([entry()], "one")
        sink.insert([entry()], "two")
        assert server.request_ids() == ["r1", "r1"]

    def test_a_batch_over_the_end_of_a_month_is_taken_once(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        batch = [entry(f"r{days}", requested_at=NOW - timedelta(days=days)) for days in (0, 20, 40, 60)]
        for _ in range(2):
            sink.insert(batch, "one")
        assert server.request_ids() == ["r0", "r20", "r40", "r60"]

    def test_a_token_is_known_to_another_sink_and_after_merges(
        self, server: ClickHouse, sink: ClickHouseTraces
    ) -> None:
        sink.insert([entry("r1")], "one")
        sink.insert([entry("r2")], "two")
        server.command("OPTIMIZE TABLE ibex.llm_traces FINAL")
        other = ClickHouseTraces(server.url, 90)
        other.insert([entry("r1")], "one")
        other.close()
        assert server.request_ids() == ["r1", "r2"]

    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_a_token_is_known_after_a_restart(self, own: ClickHouse, end: str) -> None:
        sink = ClickHouseTraces(own.url, 90)
        sink.insert([entry("r1"), entry("r2")], "one")
        getattr(own, end)()
        own.start()
        for _ in range(2):
            _until_inserted(sink, [entry("r1"), entry("r2")], "one")
        sink.close()
        assert own.request_ids() == ["r1", "r2"]


class TestAway:
    def test_what_is_written_while_it_is_away_comes_later_and_once(self, own: ClickHouse) -> None:
        sink = ClickHouseTraces(own.url, 90)
        batches = {f"t{number}": [entry(f"r{number}{part}") for part in "abc"] for number in range(6)}
        for token in ("t0", "t1"):
            sink.insert(batches[token], token)
        own.stop()
        for token in ("t2", "t3"):
            with pytest.raises(Unavailable, match="does not answer: NewConnectionError"):
                sink.insert(batches[token], token)
        own.start()
        for token, batch in batches.items():  # the first two a second time, as after a lost position
            sink.insert(batch, token)
        sink.close()
        assert own.request_ids() == sorted(one.turn.request_id for batch in batches.values() for one in batch)

    def test_killed_at_any_moment_it_doubles_nothing_and_loses_no_batch_but_one_that_it_was_committing(
        self, own: ClickHouse
    ) -> None:
        """A MergeTree notes a token before it commits the rows. Killed in between, it takes the same batch for known.

        Seen once in some 200 kills, on a busy machine.
        """
        sink = ClickHouseTraces(own.url, 90)
        wanted: list[str] = []
        under_way: set[str] = set()
        stopping = threading.Event()

        def write() -> None:
            while not stopping.is_set():
                batch = [entry(f"{len(wanted) + part:06}") for part in range(20)]
                _until_inserted(sink, batch, f"token-{len(wanted)}")
                wanted.extend(one.turn.request_id for one in batch)

        writer = threading.Thread(target=write)
        writer.start()
        dice = random.Random(7)
        try:
            for _ in range(5):
                before = len(wanted)
                eventually(lambda before=before: len(wanted) > before)  # type: ignore[misc]
                time.sleep(dice.random() * 0.3)
                first = len(wanted)
                own.kill()
                under_way |= {f"{number:06}" for number in range(first, len(wanted) + 40)}
                own.start()
        finally:
            stopping.set()
            writer.join(120)
        sink.close()
        assert len(wanted) >= 100
        stored = Counter(own.request_ids())
        assert [one for one, times in stored.items() if times > 1] == [], "doubled"
        assert set(stored) <= set(wanted)
        lost = set(wanted) - set(stored)
        assert lost <= under_way
        assert len(lost) <= 40

    def test_a_server_that_says_nothing_is_left_after_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trace, "TIMEOUT_S", 1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            sink = ClickHouseTraces(f"http://127.0.0.1:{silent.getsockname()[1]}", 90)
            began = time.monotonic()
            with pytest.raises(Unavailable, match="ReadTimeoutError"):
                sink.insert([entry()], "t")
            assert time.monotonic() - began < 15

    def test_no_proxy_is_asked_for_this_machine(
        self, server: ClickHouse, sink: ClickHouseTraces, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
        sink.insert([entry()], "t")
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name)
        assert server.request_ids() == ["r1"]

    def test_a_table_that_is_gone_is_made_again(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert([entry("r1")], "one")
        server.command("DROP TABLE ibex.llm_traces")
        with pytest.raises(Unavailable, match="60"):
            sink.insert([entry("r2")], "two")
        sink.insert([entry("r2")], "two")
        assert server.request_ids() == ["r2"]

    def test_a_new_server_in_its_place_gets_the_table(self, own: ClickHouse, tmp_path: Path) -> None:
        sink = ClickHouseTraces(own.url, 90)
        sink.insert([entry("r1")], "one")
        own.stop()
        with pytest.raises(Unavailable):
            sink.insert([entry("r2")], "two")
        own.data = tmp_path / "other"
        own.start()
        sink.insert([entry("r2")], "two")
        sink.close()
        assert own.request_ids() == ["r2"]


class TestErrors:
    def test_a_wrong_password_is_named_and_not_shown(self, tmp_path: Path) -> None:
        with running(tmp_path / "data", password="right-word") as server:
            wrong = ClickHouseTraces(server.url.replace("right-word", "wrong-word"), 90)
            with pytest.raises(Unavailable, match="does not accept the user and password") as caught:
                wrong.insert([entry()], "t")
            assert "word@" not in str(caught.value)
            assert "wrong-word" not in str(caught.value)
            right = ClickHouseTraces(server.url, 90)
            right.insert([entry()], "t")
            right.close()
            assert server.request_ids() == ["r1"]

    def test_what_the_table_forbids_is_refused_without_its_values(
        self, server: ClickHouse, sink: ClickHouseTraces
    ) -> None:
        sink.insert([entry("r1")], "one")
        server.command("ALTER TABLE ibex.llm_traces ADD CONSTRAINT short CHECK model != 'forbidden-model'")
        with pytest.raises(Refused, match="469") as caught:
            sink.insert([entry("r2", model="forbidden-model")], "two")
        assert "forbidden-model" not in str(caught.value)
        sink.insert([entry("r3")], "three")
        assert server.request_ids() == ["r1", "r3"]

    def test_too_many_parts_may_pass(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert([entry("r1")], "one")
        server.command("SYSTEM STOP MERGES ibex.llm_traces")
        server.command(
            "ALTER TABLE ibex.llm_traces MODIFY SETTING parts_to_throw_insert = 1, parts_to_delay_insert = 1"
        )
        with pytest.raises(Unavailable, match="TOO_MANY_PARTS"):
            sink.insert([entry("r2")], "two")
        server.command("ALTER TABLE ibex.llm_traces RESET SETTING parts_to_throw_insert, parts_to_delay_insert")
        sink.insert([entry("r2")], "two")
        assert server.request_ids() == ["r1", "r2"]

    def test_a_table_without_our_columns_may_be_corrected(self, server: ClickHouse, sink: ClickHouseTraces) -> None:
        sink.insert([entry("r1")], "one")
        server.command("ALTER TABLE ibex.llm_traces DROP COLUMN provider")
        with pytest.raises(Unavailable, match="16"):
            sink.insert([entry("r2")], "two")
        server.command("ALTER TABLE ibex.llm_traces ADD COLUMN provider LowCardinality(String) AFTER model")
        sink.insert([entry("r2")], "two")
        assert server.request_ids() == ["r1", "r2"]


class TestMigration:
    def test_it_may_run_again_and_by_several_at_once(self, server: ClickHouse) -> None:
        problems: list[str] = []

        def run() -> None:
            try:
                migrate_traces(server.url, 90)
            except Unavailable as error:
                problems.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        migrate_traces(server.url, 90)
        assert problems == []
        assert server.query("SELECT version FROM ibex.schema_migrations") == [(1,)]
        assert server.query("SELECT count() FROM ibex.llm_traces") == [(0,)]

    def test_another_retention_changes_the_table_and_what_is_in_it(self, server: ClickHouse) -> None:
        migrate_traces(server.url, 90)
        sink = ClickHouseTraces(server.url, 90)
        sink.insert([entry("old", requested_at=NOW - timedelta(days=20)), entry("new")], "t")
        sink.close()
        migrate_traces(server.url, 10)
        assert "toIntervalDay(10)" in server.query("SHOW CREATE TABLE ibex.llm_traces")[0][0]
        server.command("OPTIMIZE TABLE ibex.llm_traces FINAL")
        assert server.request_ids() == ["new"]

    def test_a_sink_brings_its_own_retention(self, server: ClickHouse) -> None:
        migrate_traces(server.url, 90)
        sink = ClickHouseTraces(server.url, 7)
        sink.insert([entry()], "t")
        sink.close()
        assert "toIntervalDay(7)" in server.query("SHOW CREATE TABLE ibex.llm_traces")[0][0]

    def test_a_table_that_is_up_to_date_is_only_read(self, server: ClickHouse) -> None:
        migrate_traces(server.url, 90)
        server.command("DROP TABLE ibex.schema_migrations")
        migrate_traces(server.url, 90)
        before = server.query("SELECT applied_at FROM ibex.schema_migrations")
        migrate_traces(server.url, 90)
        assert server.query("SELECT applied_at FROM ibex.schema_migrations") == before

    def test_without_a_server_it_says_so(self) -> None:
        with pytest.raises(Unavailable, match="does not answer"):
            migrate_traces(f"http://127.0.0.1:{free_port()}", 90)


def _until_inserted(sink: ClickHouseTraces, batch: Sequence[Entry], token: str) -> None:
    """As the delivery does: the same again until it is taken. 90 s at most."""
    deadline = time.monotonic() + 90
    while True:
        try:
            sink.insert(batch, token)
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return
