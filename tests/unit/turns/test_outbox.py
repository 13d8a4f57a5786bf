"""The outbox and its file, without delivery: what is put, taken, done, lost and found again."""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from typing_extensions import override

from extproc.turns._file import OutboxFile
from extproc.turns._outside import look, retry_set_aside, set_aside_entries
from extproc.turns._slot import Slot, claim_left_behind, claim_new, is_held
from extproc.turns._tables import Batch, Consumer, FileTrouble, FileUnusable, Mark, NewRow
from extproc.turns.outbox import Backoff, Outbox, OutboxError
from extproc.turns.turn import End, TurnText
from tests.unit.turns.outbox_side import ORG, TEXT, turn, wait_for

CHECKPOINT, ENQUEUE, TRACE = Consumer.CHECKPOINT, Consumer.ENQUEUE, Consumer.TRACE
MiB = 1024**2
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where a commit does not wait for a disk: the search for a failing order makes thousands."""


def row(number: int = 0, *, checkpoint: bool = True, text: bytes | None = b"text", size: int = 0) -> NewRow:
    return NewRow(time.time(), checkpoint, text is not None and checkpoint, b"%d" % number + b" " * size, text)


def numbers(batch: Batch | None) -> list[int]:
    return [] if batch is None else [int(one.turn) for one in batch.rows]


def taken(file: OutboxFile, consumer: Consumer, most: int = 100) -> Batch:
    batch = file.take(consumer, most)
    assert batch is not None
    return batch


def write(file: OutboxFile, most: int = 100, index: int | None = 0) -> None:
    batch = taken(file, CHECKPOINT, most)
    file.written(batch, [Mark(index, "", "")] * len(batch.rows))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OutboxFile]:
    opened = OutboxFile(tmp_path / "outbox-0.db")
    yield opened
    opened.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


MakeOutbox = Callable[..., Outbox]


@pytest.fixture
def make_outbox(tmp_path: Path) -> Iterator[MakeOutbox]:
    made: list[Outbox] = []

    def make(max_bytes: int = 64 * MiB, registry: CollectorRegistry | None = None, **given: Any) -> Outbox:
        made.append(Outbox(tmp_path / "state", max_bytes, registry or CollectorRegistry(), **given))
        return made[-1]

    yield make
    for outbox in made:
        if not outbox._is_closed:
            outbox.close()


def dropped(registry: CollectorRegistry, what: str, why: str) -> float:
    return registry.get_sample_value("ibex_outbox_dropped_total", {"what": what, "why": why}) or 0.0


# -- the file


def test_each_consumer_goes_its_own_way_and_the_last_one_clears_up(file: OutboxFile) -> None:
    file.append([row(1), row(2), row(3)])
    file.done(taken(file, TRACE, 2))
    write(file)
    assert numbers(file.take(TRACE, 9)) == [3]
    assert numbers(file.take(ENQUEUE, 9)) == [1, 2, 3]
    assert [file.state(consumer).depth for consumer in Consumer] == [0, 3, 1]
    file.done(taken(file, TRACE))
    file.done(taken(file, ENQUEUE))
    assert [file.state(consumer).depth for consumer in Consumer] == [0, 0, 0]
    assert [file.state(consumer).oldest_at for consumer in Consumer] == [None, None, None]
    assert file.waiting_bytes == 0


def test_a_task_never_comes_before_its_checkpoint(file: OutboxFile) -> None:
    file.append([row(1), row(2)])
    assert file.take(ENQUEUE, 9) is None
    write(file, most=1, index=7)
    (only,) = taken(file, ENQUEUE).rows
    assert (int(only.turn), only.turn_index, only.text) == (1, 7, None)


@pytest.mark.parametrize("without", [row(1, text=None), row(1, checkpoint=False)])
def test_a_turn_without_text_or_checkpoint_asks_for_no_task(file: OutboxFile, without: NewRow) -> None:
    file.append([without, row(2)])
    while file.state(CHECKPOINT).depth:
        write(file)
    assert numbers(file.take(ENQUEUE, 9)) == [2]


def test_a_checkpoint_without_an_index_asks_for_no_task(file: OutboxFile) -> None:
    file.append([row(1)])
    write(file, index=None)
    assert file.take(ENQUEUE, 9) is None
    assert file.state(ENQUEUE).depth == 0


def test_a_trace_batch_keeps_its_rows_and_its_token_over_a_crash(tmp_path: Path) -> None:
    first = OutboxFile(tmp_path / "outbox-0.db")
    first.append([row(1), row(2)])
    batch = taken(first, TRACE, 2)
    first.append([row(3)])
    again = crashed(first, tmp_path / "crashed")
    assert taken(again, TRACE, 500) == batch
    again.done(batch)
    later = taken(again, TRACE, 500)
    assert numbers(later) == [3]
    assert later.token != batch.token
    again.close()
    first.close()


def test_a_refused_trace_batch_travels_in_smaller_ones(file: OutboxFile) -> None:
    file.append([row(1), row(2)])
    batch = taken(file, TRACE, 2)
    file.give_up(batch)
    smaller = taken(file, TRACE, 1)
    assert numbers(smaller) == [1]
    assert smaller.token != batch.token


def test_what_is_set_aside_is_passed_over_and_keeps_no_text(file: OutboxFile, tmp_path: Path) -> None:
    file.append([row(1), row(2, text=b"the user's words")])
    second = taken(file, CHECKPOINT).rows[1]
    file.set_aside(CHECKPOINT, second, "Refused")
    assert numbers(taken(file, CHECKPOINT)) == [1]
    write(file)
    assert numbers(file.take(ENQUEUE, 9)) == [1]
    file.tidy()
    assert all(b"the user's words" not in path.read_bytes() for path in tmp_path.iterdir())


def test_erased_text_is_in_no_file_once_it_is_tidied(file: OutboxFile, tmp_path: Path) -> None:
    secret = b"the user's words " * 1000
    file.append([row(1, text=secret)])
    assert any(secret[:17] in path.read_bytes() for path in tmp_path.iterdir())
    write(file)
    file.tidy()
    assert all(secret[:17] not in path.read_bytes() for path in tmp_path.iterdir())


def test_text_that_a_killed_process_erased_is_in_no_file_after_the_next_start(file: OutboxFile, tmp_path: Path) -> None:
    secret = b"the user's words " * 1000
    file.append([row(1, text=secret)])
    file.make_log_reusable()
    write(file)
    again = crashed(file, tmp_path / "crashed")
    again.tidy()
    assert all(secret[:17] not in path.read_bytes() for path in (tmp_path / "crashed").iterdir())
    again.close()


def test_room_is_given_back_to_the_disk(file: OutboxFile, tmp_path: Path) -> None:
    file.append([row(number, text=b"x" * 10_000) for number in range(200)])
    for consumer in (CHECKPOINT, ENQUEUE, TRACE):
        while file.pass_all(consumer):
            pass
    file.tidy()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200_000


def test_a_batch_of_long_texts_is_cut_by_its_bytes(file: OutboxFile) -> None:
    file.append([row(number, text=b"x" * 3 * MiB) for number in range(4)])
    assert numbers(file.take(CHECKPOINT, 100)) == [0, 1, 2]


def test_eviction_takes_the_oldest_that_wait_for_their_trace_alone(file: OutboxFile) -> None:
    file.append([row(number, size=1000) for number in range(5)])
    write(file, most=3)
    file.done(taken(file, ENQUEUE))
    assert numbers(taken(file, TRACE, 1)) == [0]  # in flight: stays
    assert file.evict_traces(1) == 1
    assert file.evict_traces(1_000_000) == 1  # 3 and 4 still wait for their checkpoints
    assert file.evict_traces(1) == 0
    file.done(taken(file, TRACE))
    assert numbers(file.take(TRACE, 9)) == [3, 4]


def test_a_consumer_that_is_not_there_is_done_with_everything(file: OutboxFile) -> None:
    file.append([row(1), row(2)])
    assert [file.pass_all(consumer) for consumer in (CHECKPOINT, ENQUEUE, TRACE)] == [True, True, True]
    assert not file.pass_all(TRACE)
    assert file.waiting_bytes == 0


def test_a_corrupt_file_is_put_away_and_numbers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "outbox-0.db"
    path.write_bytes(b"this is no database, " * 1000)
    with capture_logs() as logs:
        file = OutboxFile(path)
    assert [line["log_level"] for line in logs] == ["error"]
    assert any(other.name.startswith("outbox-0.corrupt-") for other in tmp_path.iterdir())
    file.append([row(1)])
    batch = taken(file, CHECKPOINT)
    with capture_logs(), pytest.raises(FileTrouble), file._translated():
        damage(file)
    file.append([row(2)])
    assert taken(file, CHECKPOINT).rows[0].seq > batch.rows[0].seq
    file.written(batch, [Mark(0, "", "")])
    assert numbers(file.take(CHECKPOINT, 9)) == [2]
    assert file.corrupted == 2
    file.close()


def damage(file: OutboxFile) -> None:
    """Overwrite what the file holds; SQLite finds out with the next read."""
    assert file._quick is not None
    assert file._durable is not None
    file._quick.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    size = file.path.stat().st_size
    with file.path.open("r+b") as raw:
        raw.write(b"x" * size)
    for connection in (file._quick, file._durable):
        connection.execute("PRAGMA shrink_memory")
    file._quick.execute("SELECT * FROM entries").fetchall()


def test_a_file_of_another_version_is_left_alone(file: OutboxFile) -> None:
    assert file._quick is not None
    file._quick.execute("PRAGMA user_version = 99")
    file.close()
    with pytest.raises(FileUnusable, match="version 99"):
        OutboxFile(file.path)


def test_a_full_disk_is_trouble_until_there_is_room(file: OutboxFile) -> None:
    file.append([row(1)])
    assert file._durable is not None
    file._durable.execute(f"PRAGMA max_page_count = {page_count(file)}").fetchall()
    with pytest.raises(FileTrouble) as caught:
        file.append([row(2, size=100_000)])
    assert caught.value.is_disk_full
    file._durable.execute("PRAGMA max_page_count = 1000000").fetchall()
    file.append([row(2, size=100_000)])
    assert numbers(file.take(CHECKPOINT, 9)) == [1, 2]


def test_the_last_of_a_disk_is_for_noting_what_was_delivered(file: OutboxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that the outbox itself has filled becomes free again only through deliveries."""
    file.append([row(number, size=100_000) for number in range(200)])
    nearly_full = shutil.disk_usage(file.path)._replace(free=MiB)
    monkeypatch.setattr("extproc.turns._file.shutil.disk_usage", lambda _path: nearly_full)
    with pytest.raises(FileTrouble) as caught:
        file.append([row(1)])
    assert caught.value.is_disk_full
    for consumer in Consumer:
        while file.pass_all(consumer):
            pass
    file.append([row(1)])  # into pages that are free by now
    assert numbers(file.take(CHECKPOINT, 9)) == [1]


def page_count(file: OutboxFile) -> int:
    assert file._quick is not None
    return int(file._quick.execute("PRAGMA page_count").fetchone()[0])


def test_a_failed_note_leaves_the_counts_as_the_tables_are(file: OutboxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    file.append([row(1), row(2)])
    batch, traces = taken(file, CHECKPOINT), taken(file, TRACE)
    assert file._quick is not None
    file._quick.execute("PRAGMA query_only = ON")
    with pytest.raises(FileTrouble):
        file.written(batch, [Mark(0, "", "")] * 2)
    file._quick.execute("PRAGMA query_only = OFF")
    with monkeypatch.context() as broken:
        broken.setattr(file, "_find_oldest", fail)  # the last thing before the commit
        with pytest.raises(FileTrouble):
            file.done(traces)
    assert taken(file, TRACE) == traces
    assert file.state(TRACE).depth == 2
    assert taken(file, CHECKPOINT) == batch
    assert file.state(CHECKPOINT).depth == 2


def test_what_another_process_brings_back_is_noticed(file: OutboxFile) -> None:
    """The other process is a connection here: within one process SQLite knows of both."""
    file.append([row(1)])
    file.set_aside(TRACE, taken(file, TRACE).rows[0], "Refused")
    write(file)
    assert file.take(TRACE, 9) is None
    assert look(file.path).set_aside == 1
    assert [entry.consumer for entry in set_aside_entries(file.path)] == [TRACE]
    assert retry_set_aside(file.path, CHECKPOINT, []) == 0
    assert retry_set_aside(file.path, None, []) == 1
    assert retry_set_aside(file.path, None, []) == 0
    assert file.notice_others()
    assert not file.notice_others()
    assert file.state(TRACE).depth == 1
    assert numbers(file.take(TRACE, 9)) == [1]
    assert file.take(CHECKPOINT, 9) is None


def test_a_task_that_is_brought_back_has_its_index(file: OutboxFile) -> None:
    file.append([row(1)])
    write(file, index=4)
    file.set_aside(ENQUEUE, taken(file, ENQUEUE).rows[0], "Refused")
    file.set_aside(TRACE, taken(file, TRACE).rows[0], "Refused")
    assert retry_set_aside(file.path, ENQUEUE, []) == 1
    assert retry_set_aside(file.path, TRACE, []) == 1
    file.append([row(2)])  # notices it too
    assert file.state(TRACE).depth == 2
    write(file, index=5)
    assert [one.turn_index for one in taken(file, ENQUEUE).rows] == [4, 5]


def test_the_row_of_its_session_stays_with_a_task(file: OutboxFile) -> None:
    file.append([row(1)])
    batch = taken(file, CHECKPOINT)
    file.written(batch, [Mark(4, "", "the row")])
    only = taken(file, ENQUEUE).rows[0]
    assert only.session_id == "the row"
    file.set_aside(ENQUEUE, only, "Refused")
    assert retry_set_aside(file.path, ENQUEUE, []) == 1
    assert file.notice_others()
    assert file.pass_all(CHECKPOINT)
    assert [(one.turn_index, one.session_id) for one in taken(file, ENQUEUE).rows] == [(4, "the row")]


def test_a_file_of_the_version_before_goes_on(file: OutboxFile) -> None:
    file.append([row(1), row(2)])
    write(file, most=1, index=3)
    assert file._quick is not None
    for statement in (
        "ALTER TABLE entries DROP COLUMN session_id",
        "ALTER TABLE set_aside DROP COLUMN session_id",
        "PRAGMA user_version = 1",
    ):
        file._quick.execute(statement)
    file.close()
    again = OutboxFile(file.path)
    assert [(one.turn_index, one.session_id) for one in taken(again, ENQUEUE).rows] == [(3, "")]
    assert numbers(taken(again, CHECKPOINT)) == [2]
    again.close()
    OutboxFile(file.path).close()


def crashed(file: OutboxFile, directory: Path) -> OutboxFile:
    """The same file as another process would find it, had this one been killed now."""
    directory.mkdir(exist_ok=True)
    for end in ("", "-wal"):
        source = file.path.with_name(file.path.name + end)
        target = directory / source.name
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copy(source, target)
    return OutboxFile(directory / file.path.name)


class OutboxMachine(RuleBasedStateMachine):
    """Any order of puts, deliveries, refusals, evictions and crashes, against lists."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="outbox", dir=MEMORY))
        self.crashes = 0
        self.file = OutboxFile(self.directory / "outbox-0.db")
        self.number = 0
        # The model: what each consumer still has to get, in order.
        self.due: dict[Consumer, list[int]] = {consumer: [] for consumer in Consumer}
        self.wants_task: set[int] = set()
        self.aside: list[tuple[Consumer, int]] = []
        self.in_flight: tuple[str, list[int]] | None = None

    @override
    def teardown(self) -> None:
        self.file.close()
        shutil.rmtree(self.directory)

    @rule(kinds=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5))
    def put(self, kinds: list[tuple[bool, bool]]) -> None:
        rows = []
        for checkpoint, has_text in kinds:
            self.number += 1
            rows.append(row(self.number, checkpoint=checkpoint, text=b"t" if has_text and checkpoint else None))
            if checkpoint:
                self.due[CHECKPOINT].append(self.number)
            if checkpoint and has_text:
                self.wants_task.add(self.number)
            self.due[TRACE].append(self.number)
        self.file.append(rows)

    @rule(most=st.integers(1, 4), fails=st.booleans(), lacks_index=st.booleans())
    def checkpoint(self, most: int, fails: bool, lacks_index: bool) -> None:
        batch = self.file.take(CHECKPOINT, most)
        assert numbers(batch) == self.due[CHECKPOINT][:most]
        if batch is None or fails:
            return
        assert all(one.text == (b"t" if int(one.turn) in self.wants_task else None) for one in batch.rows)
        self.file.written(batch, [Mark(None if lacks_index else one.seq, "", "") for one in batch.rows])
        done = numbers(batch)
        del self.due[CHECKPOINT][: len(done)]
        if not lacks_index:
            self.due[ENQUEUE] += [number for number in done if number in self.wants_task]

    @rule(most=st.integers(1, 4), fails=st.booleans())
    def enqueue(self, most: int, fails: bool) -> None:
        batch = self.file.take(ENQUEUE, most)
        assert numbers(batch) == self.due[ENQUEUE][:most]
        if batch is not None and not fails:
            self.file.done(batch)
            del self.due[ENQUEUE][: len(batch.rows)]

    @rule(most=st.integers(1, 4), becomes=st.sampled_from(["done", "unavailable", "refused"]))
    def trace(self, most: int, becomes: str) -> None:
        batch = self.file.take(TRACE, most)
        if self.in_flight is not None:
            assert batch is not None
            assert (batch.token, numbers(batch)) == self.in_flight
        else:
            assert numbers(batch) == self.due[TRACE][:most]
        if batch is None:
            return
        self.in_flight = (batch.token, numbers(batch))
        if becomes == "done":
            self.file.done(batch)
            del self.due[TRACE][: len(batch.rows)]
            self.in_flight = None
        elif becomes == "refused" and len(batch.rows) > 1:
            self.file.give_up(batch)
            self.in_flight = None
        elif becomes == "refused":
            self.file.set_aside(TRACE, batch.rows[0], "Refused")
            self.aside.append((TRACE, self.due[TRACE].pop(0)))
            self.in_flight = None

    @rule(consumer=st.sampled_from([CHECKPOINT, ENQUEUE]))
    def refuse(self, consumer: Consumer) -> None:
        batch = self.file.take(consumer, 1)
        assert numbers(batch) == self.due[consumer][:1]
        if batch is not None:
            self.file.set_aside(consumer, batch.rows[0], "Refused")
            self.aside.append((consumer, self.due[consumer].pop(0)))
            if consumer is CHECKPOINT:
                self.wants_task.discard(int(batch.rows[0].turn))

    @rule()
    def evict(self) -> None:
        wait_elsewhere = {*self.due[CHECKPOINT], *self.due[ENQUEUE]}
        in_flight = self.in_flight[1] if self.in_flight else []
        evicted = self.file.evict_traces(1)
        gone = [number for number in self.due[TRACE] if number not in in_flight][:evicted]
        assert evicted <= 1
        assert not wait_elsewhere.intersection(gone)
        self.due[TRACE] = [number for number in self.due[TRACE] if number not in gone]

    @rule()
    def crash(self) -> None:
        self.crashes += 1
        again = crashed(self.file, self.directory / str(self.crashes))
        self.file.close()
        self.file = again

    @rule()
    def tidy(self) -> None:
        self.file.tidy()

    @invariant()
    def the_counts_are_right(self) -> None:
        for consumer in Consumer:
            assert self.file.state(consumer).depth == len(self.due[consumer])
            assert (self.file.state(consumer).oldest_at is None) == (not self.due[consumer])
        assert self.file._quick is not None
        kept = self.file._quick.execute("SELECT total(length(turn) + 64) + total(length(text)) FROM entries").fetchone()
        assert self.file.waiting_bytes == kept[0]


OutboxMachine.TestCase.settings = settings(settings(), stateful_step_count=30)
TestOutboxMachine = OutboxMachine.TestCase


# -- whose file it is


def test_two_claims_have_two_files_and_a_released_one_is_found_again(tmp_path: Path) -> None:
    first, second = claim_new(tmp_path), claim_new(tmp_path)
    assert [first.file.name, second.file.name] == ["outbox-0.db", "outbox-1.db"]
    first.file.touch()
    first.release()
    (found,) = claim_left_behind(tmp_path)
    assert found.file == first.file
    assert list(claim_left_behind(tmp_path)) == []
    found.remove()
    assert not first.file.exists()
    second.release()


def test_a_start_prefers_the_file_with_turns_in_it_and_leaves_what_it_cannot_read(tmp_path: Path) -> None:
    names = ["outbox-0.db", "outbox-1.db", "outbox-2.db"]
    foreign, empty, full = [OutboxFile(tmp_path / name) for name in names]
    assert foreign._quick is not None
    foreign._quick.execute("PRAGMA user_version = 99")
    full.append([row(1)])
    for left in (foreign, empty, full):
        left.close()
    with capture_logs():
        opened = [Outbox(tmp_path, MiB, CollectorRegistry(), look_s=60) for _ in range(3)]
    assert [outbox.files()[0].path.name for outbox in opened] == ["outbox-2.db", "outbox-1.db", "outbox-3.db"]
    for outbox in opened:
        outbox.close()


def test_a_lock_file_that_was_removed_excludes_nobody(tmp_path: Path) -> None:
    first: Slot = claim_new(tmp_path)
    (tmp_path / "outbox-0.lock").unlink()
    second = claim_new(tmp_path)
    assert second.file == first.file
    third = claim_new(tmp_path)
    assert third.file.name == "outbox-1.db"
    for slot in (first, second, third):
        slot.release()


def test_a_lock_that_is_removed_while_it_is_taken_is_not_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner removed file and lock between our opening the lock and our getting it."""
    (tmp_path / "outbox-0.db").touch()
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        (tmp_path / "outbox-0.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr("extproc.turns._slot.fcntl.flock", flock)
    assert list(claim_left_behind(tmp_path)) == []


# -- the outbox


def test_a_turn_is_on_the_disk_after_flush(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox()
    outbox.put(turn("r1"), TEXT)
    assert outbox.flush(5)
    (only,) = taken(outbox.files()[0], CHECKPOINT).rows
    assert b"r1" in only.turn
    assert only.text is not None
    assert msgspec.json.decode(only.text, type=TurnText) == TEXT


def test_many_puts_are_few_commits(make_outbox: MakeOutbox, registry: CollectorRegistry) -> None:
    outbox = make_outbox(registry=registry)
    for _ in range(2000):
        outbox.put(turn(), TEXT)
    assert outbox.flush(10)
    commits = registry.get_sample_value("ibex_outbox_commit_seconds_count")
    assert registry.get_sample_value("ibex_outbox_committed_turns_total") == 2000
    assert commits is not None
    assert commits <= 200


def test_a_put_is_committed_without_being_asked(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox()
    woken = threading.Event()
    outbox.subscribe(woken.set)
    outbox.put(turn(), TEXT)
    assert woken.wait(5)
    assert outbox.files()[0].state(CHECKPOINT).depth == 1


@pytest.mark.parametrize("given", [{"skip_extraction": True}, {"end": End.DENIED, "status_code": 401}])
def test_text_that_nobody_may_keep_does_not_reach_the_disk(make_outbox: MakeOutbox, given: dict[str, Any]) -> None:
    outbox = make_outbox()
    outbox.put(turn(**given), TEXT)
    assert outbox.flush(5)
    assert all(b"Ada" not in path.read_bytes() for path in (outbox.files()[0].path.parent).iterdir())


def test_a_text_that_is_no_unicode_is_kept_with_replacements(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox()
    outbox.put(turn("r", model="gpt\ud800"), TurnText("a\ud800b", "c"))
    assert outbox.flush(5)
    (only,) = taken(outbox.files()[0], CHECKPOINT).rows
    assert only.text is not None
    assert msgspec.json.decode(only.text, type=TurnText) == TurnText("a?b", "c")


def test_what_cannot_be_encoded_is_counted_and_does_not_raise(
    make_outbox: MakeOutbox, registry: CollectorRegistry
) -> None:
    outbox = make_outbox(registry=registry)
    outbox.put(turn(request="r", model=object()), None)
    outbox.close()
    assert dropped(registry, "turn", "bug") == 1


def test_a_turn_after_the_end_is_counted(make_outbox: MakeOutbox, registry: CollectorRegistry) -> None:
    outbox = make_outbox(registry=registry)
    outbox.close()
    outbox.put(turn(), TEXT)
    outbox._report(is_last=True)
    assert dropped(registry, "turn", "closed") == 1


def test_close_commits_what_was_put(make_outbox: MakeOutbox, tmp_path: Path) -> None:
    outbox = make_outbox()
    for _ in range(100):
        outbox.put(turn(), TEXT)
    outbox.close()
    file = OutboxFile(outbox.files()[0].path)
    assert file.state(CHECKPOINT).depth == 100
    file.close()


def test_directory_and_files_are_the_owners_alone(make_outbox: MakeOutbox, tmp_path: Path) -> None:
    outbox = make_outbox()
    outbox.put(turn(), TEXT)
    outbox.flush(5)
    state = tmp_path / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()} == dict.fromkeys(
        ["outbox-0.db", "outbox-0.db-shm", "outbox-0.db-wal", "outbox-0.lock"], 0o600
    )


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError, match="IBEX_STATE_DIR"):
        Outbox(tmp_path / "file" / "state", MiB, CollectorRegistry())


def test_above_the_cap_traces_go_first_then_texts_then_turns(
    make_outbox: MakeOutbox, registry: CollectorRegistry
) -> None:
    outbox = make_outbox(max_bytes=MiB, registry=registry)
    file = outbox.files()[0]
    text = TurnText("u" * 10_000, "a" * 10_000)

    def put(number: int) -> None:
        for _ in range(number):
            outbox.put(turn(), text)
        assert outbox.flush(5)
        outbox._report()

    put(30)
    while (batch := file.take(CHECKPOINT, 100)) is not None:
        file.written(batch, [Mark(0, "", "")] * len(batch.rows))
    file.pass_all(ENQUEUE)
    with capture_logs() as logs:
        put(130)
        assert dropped(registry, "trace", "cap") == 30  # they waited for nothing else
        assert dropped(registry, "text", "cap") > 0
        assert dropped(registry, "turn", "cap") == 0
        put(800)
    assert dropped(registry, "turn", "cap") > 0
    assert file.waiting_bytes <= MiB
    warnings = [line for line in logs if line["log_level"] == "warning"]
    assert len(warnings) == 1, "one for the burst"
    assert warnings[0]["trace_cap"] == 30
    assert (warnings[0]["org_id"], "uuu" in str(warnings)) == (ORG, False)


def test_a_disk_that_takes_nothing_costs_texts_then_turns_and_recovers(
    make_outbox: MakeOutbox, registry: CollectorRegistry
) -> None:
    outbox = make_outbox(registry=registry, memory_bytes=200_000)
    file = outbox.files()[0]
    assert file._durable is not None
    with capture_logs() as logs:
        file._durable.execute(f"PRAGMA max_page_count = {page_count(file)}").fetchall()
        text = TurnText("u" * 5000, "a" * 5000)
        for _ in range(500):
            outbox.put(turn(), text)
        wait_for(lambda: outbox._problem)
        assert not outbox.flush(0.3)
        file._durable.execute("PRAGMA max_page_count = 1000000").fetchall()
        assert outbox.flush(10)
        wait_for(lambda: not outbox._problem)
        outbox.put(turn("last"), text)
        assert outbox.flush(5)
    outbox.close()
    committed = registry.get_sample_value("ibex_outbox_committed_turns_total")
    lost = {why: dropped(registry, "turn", why) for why in ("disk", "behind")}
    assert committed == 501 - sum(lost.values())
    assert sum(lost.values()) > 0
    assert sum(dropped(registry, "text", why) for why in ("disk", "behind")) > 0
    problems = [line["event"] for line in logs if "outbox" in line["event"]]
    assert [event.split()[0] for event in problems] == ["turns", "the"], "said once when it begins and when it is over"


def test_depth_and_age_are_for_the_operator(make_outbox: MakeOutbox, registry: CollectorRegistry) -> None:
    outbox = make_outbox(registry=registry)
    outbox.put(turn(), TEXT)
    outbox.put(turn(end=End.DENIED, status_code=401), None)
    assert outbox.flush(5)

    def sample(name: str, consumer: str) -> float | None:
        return registry.get_sample_value(f"ibex_outbox_{name}", {"consumer": consumer})

    assert [sample("depth", consumer) for consumer in Consumer] == [1, 0, 2]
    assert 0 < (sample("oldest_seconds", "trace") or 0) < 60
    assert sample("oldest_seconds", "enqueue") == 0
    assert (registry.get_sample_value("ibex_outbox_bytes") or 0) > 0


def test_a_file_that_was_left_behind_is_adopted_and_removed_when_empty(make_outbox: MakeOutbox, tmp_path: Path) -> None:
    living = make_outbox(look_s=0.05)
    dead = make_outbox(look_s=60)
    dead.put(turn("r"), TEXT)
    dead.close()
    left = dead.files()[0].path
    wait_for(lambda: len(living.files()) == 2)
    adopted = living.files()[1]
    assert adopted.path == left
    write(adopted)
    adopted.done(taken(adopted, ENQUEUE))
    adopted.done(taken(adopted, TRACE))
    wait_for(lambda: len(living.files()) == 1)
    wait_for(lambda: not left.with_suffix(".lock").exists())
    assert not left.exists()
    assert adopted.state(TRACE).depth == 0


def test_a_file_with_something_set_aside_stays(make_outbox: MakeOutbox) -> None:
    dead = make_outbox()
    dead.put(turn(end=End.DENIED, status_code=401), None)
    dead.flush(5)
    file = dead.files()[0]
    file.set_aside(TRACE, taken(file, TRACE).rows[0], "Refused")
    for consumer in Consumer:
        file.pass_all(consumer)
    dead.close()
    path = file.path
    # Its number is free, so the next process takes it; a second one leaves it alone.
    living = make_outbox(look_s=0.05)
    assert living.files()[0].path == path
    assert not living.files()[0].close_for_removal()


def remove_files(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize("remove", [remove_files, shutil.rmtree])
def test_files_that_are_removed_while_they_are_in_use_are_made_again_with_all_that_was_in_them(
    make_outbox: MakeOutbox, registry: CollectorRegistry, tmp_path: Path, remove: Callable[[Path], None]
) -> None:
    outbox = make_outbox(registry=registry, look_s=0.05)
    outbox.put(turn("r1"), TEXT)
    assert outbox.flush(5)
    file = outbox.files()[0]
    batch = taken(file, TRACE)
    with capture_logs() as logs:
        remove(tmp_path / "state")
        outbox.put(turn("r2"), TEXT)
        wait_for(lambda: [line for line in logs if line["log_level"] == "error"])
        assert outbox.flush(10)
    assert len([line for line in logs if line["log_level"] == "error"]) == 1
    file.done(batch)
    outbox.put(turn("r3"), TEXT)
    assert outbox.flush(5)
    wait_for(lambda: registry.get_sample_value("ibex_outbox_corrupt_files_total") == 1)
    outbox.close()
    again = OutboxFile(tmp_path / "state" / "outbox-0.db")
    assert [one.seq for one in taken(again, CHECKPOINT).rows] == [1, 2, 3]
    assert [one.seq for one in taken(again, TRACE).rows] == [2, 3]
    again.close()


def test_a_file_that_is_replaced_under_its_owner_is_left_to_whose_it_is_now(
    make_outbox: MakeOutbox, tmp_path: Path
) -> None:
    first = make_outbox(look_s=0.05)
    first.put(turn("r1"), TEXT)
    assert first.flush(5)
    with capture_logs() as logs:
        shutil.rmtree(tmp_path / "state")
        second = make_outbox(look_s=60)
        second.put(turn("r2"), TEXT)
        assert second.flush(5)
        wait_for(lambda: logs)
    paths = [outbox.files()[0].path for outbox in (first, second)]
    assert paths[0] != paths[1]
    for outbox, request in ((first, b"r1"), (second, b"r2")):
        outbox.close()
        (only,) = crashed(outbox.files()[0], tmp_path / request.decode())._quick.execute(  # type: ignore[union-attr]
            "SELECT turn FROM entries"
        )
        assert request in only[0]


def test_an_adopted_file_that_is_removed_is_made_again_too(make_outbox: MakeOutbox) -> None:
    living, dead = make_outbox(look_s=0.05), make_outbox(look_s=60)
    dead.put(turn("r"), TEXT)
    dead.close()
    wait_for(lambda: len(living.files()) == 2)
    adopted = living.files()[1]
    with capture_logs() as logs:
        adopted.path.unlink()
        wait_for(lambda: logs)
    assert adopted.path.exists()
    assert adopted.state(TRACE).depth == 1
    assert not is_held(dead.files()[0].path)
    living.close()
    again = make_outbox(look_s=0.05)
    assert again.files()[0].path == adopted.path


def test_a_file_that_cannot_be_made_again_is_said_once_and_tried_again(
    make_outbox: MakeOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_directory: Path) -> Slot:
        tries.append(1)
        raise OSError("no room")

    tries: list[int] = []
    outbox = make_outbox(look_s=0.02)
    outbox.put(turn("r1"), TEXT)
    assert outbox.flush(5)
    with capture_logs() as logs:
        with monkeypatch.context() as broken:
            broken.setattr("extproc.turns.outbox.claim_new", fail)
            outbox.files()[0].path.unlink()
            wait_for(lambda: len(tries) > 2)
        wait_for(outbox.files()[0].is_in_place)
        wait_for(lambda: len(logs) == 2)
    assert [line["log_level"] for line in logs] == ["error", "error"]
    assert numbers_of(outbox.files()[0]) == 1


def numbers_of(file: OutboxFile) -> int:
    return len(taken(file, CHECKPOINT).rows)


def test_a_reserve_is_kept_while_there_is_room_and_goes_with_its_file(
    make_outbox: MakeOutbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=16 * MiB)
    slot = claim_new(tmp_path)
    reserve = tmp_path / "outbox-0.reserve"
    with monkeypatch.context() as full:
        full.setattr("extproc.turns._slot.shutil.disk_usage", lambda _path: nearly_full)
        slot.keep_reserve(16 * MiB)
    assert not reserve.exists()
    slot.release()
    make_outbox(look_s=0.05)
    reserve = tmp_path / "state" / "outbox-0.reserve"
    wait_for(lambda: reserve.exists() and reserve.stat().st_size == MiB)
    assert stat.S_IMODE(reserve.stat().st_mode) == 0o600
    (left,) = [found for found in [claim_new(tmp_path / "state")] if found.file.name == "outbox-1.db"]
    left.keep_reserve(0)
    left.remove()
    assert not (tmp_path / "state" / "outbox-1.reserve").exists()


def test_the_reserve_is_given_up_where_a_file_cannot_be_opened_without(
    make_outbox: MakeOutbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_with_room(path: Path) -> OutboxFile:
        if path.with_suffix(".reserve").exists():
            raise FileTrouble("disk I/O error")
        return OutboxFile(path)

    first = make_outbox()
    first.put(turn("r"), TEXT)
    first.close()
    first._slot.file.with_suffix(".reserve").write_bytes(bytes(MiB))
    monkeypatch.setattr("extproc.turns.outbox.OutboxFile", open_with_room)
    assert make_outbox(look_s=60).files()[0].state(CHECKPOINT).depth == 1


def test_a_disk_without_room_and_reserve_says_what_to_do(
    make_outbox: MakeOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> OutboxFile:
        raise FileTrouble("disk I/O error")

    monkeypatch.setattr("extproc.turns.outbox.OutboxFile", fail)
    with pytest.raises(OutboxError, match="free some megabytes"):
        make_outbox()


def test_every_loss_that_can_occur_is_a_zero_at_first(make_outbox: MakeOutbox, registry: CollectorRegistry) -> None:
    make_outbox(registry=registry)
    samples = {
        (sample.labels["what"], sample.labels["why"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "ibex_outbox_dropped_total"
    }
    assert samples == dict.fromkeys(
        [
            ("trace", "cap"),
            ("trace", "disk"),
            ("text", "cap"),
            ("text", "disk"),
            ("text", "behind"),
            ("turn", "cap"),
            ("turn", "disk"),
            ("turn", "behind"),
            ("turn", "closed"),
            ("turn", "bug"),
        ],
        0.0,
    )


def test_waits_grow_with_jitter_and_start_again() -> None:
    backoff = Backoff()
    waits = [backoff.next_s() for _ in range(12)]
    for number, wait_s in enumerate(waits):
        longest = min(10.0, 0.1 * 2**number)
        assert longest / 2 <= wait_s <= longest
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_sqlite_is_safe_to_use_from_several_threads() -> None:
    assert sqlite3.threadsafety == 3
