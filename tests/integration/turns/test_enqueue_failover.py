"""The sink finds the primary behind Sentinels, and the node of a cluster that holds the queue; after a loss too."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from extproc.turns.enqueue import RedisTasks
from extproc.turns.sinks import ExtractionTask, Unavailable
from tests.integration.turns.valkey_side import MASTER, Server, Watched, cluster, eventually, valkey, watched

SLOT = 9748
"""Of the key `extraction`."""
LIMIT_S = 30.0
"""Above the sink's own 3 s for the server, and 0.5 s for each Sentinel, for a busy machine."""


def tasks(count: int) -> list[ExtractionTask]:
    return [ExtractionTask(str(uuid.uuid4()), str(uuid.uuid4()), str(uuid.uuid4())) for _ in range(count)]


def is_sent(sink: RedisTasks) -> bool:
    began = time.monotonic()
    try:
        sink.send(tasks(1))
    except Unavailable:
        assert time.monotonic() - began < LIMIT_S
        return False
    return True


def length(of: Server) -> int:
    found: int = of.execute("LLEN", "extraction")
    return found


class TestSentinel:
    @pytest.fixture
    def group(self, tmp_path: Path) -> Iterator[Watched]:
        with watched(tmp_path) as group:
            yield group

    def test_after_the_primary_died_tasks_go_to_the_new_one(self, group: Watched) -> None:
        sink = RedisTasks(group.url)
        sink.send(tasks(3))
        assert length(group.primary) == 3
        eventually(lambda: length(group.replica) == 3)
        group.primary.kill()
        assert not is_sent(sink)
        eventually(lambda: is_sent(sink))
        assert length(group.replica) == 4
        sink.close()

    def test_one_sentinel_is_enough_and_none_is_said(self, group: Watched) -> None:
        sink = RedisTasks(group.url)
        group.sentinels[0].kill()
        sink.send(tasks(1))
        sink.close()
        group.sentinels[1].freeze()
        with pytest.raises(Unavailable, match="Sentinels cannot be reached"):
            sink.send(tasks(1))
        group.sentinels[1].thaw()
        sink.send(tasks(1))
        with pytest.raises(Unavailable, match="do not know that name"):
            RedisTasks(group.url.replace(MASTER, "another")).send(tasks(1))
        assert length(group.primary) == 2


class TestCluster:
    def test_a_single_node_is_a_cluster(self, tmp_path: Path) -> None:
        with cluster(tmp_path, 0) as (node,):
            sink = RedisTasks(f"redis+cluster://127.0.0.1:{node.port}")
            sink.send(tasks(2))
            assert length(node) == 2
            sink.close()

    def test_tasks_go_to_the_node_that_holds_the_queue(self, tmp_path: Path) -> None:
        with cluster(tmp_path, 0, SLOT) as (first, second):
            sink = RedisTasks(f"redis+cluster://127.0.0.1:{first.port}")
            sink.send(tasks(2))
            assert length(second) == 2
            with pytest.raises(Unavailable, match=r"redis\+cluster://"):
                RedisTasks(first.url).send(tasks(1))
            sink.close()

    def test_a_queue_that_has_moved_is_followed(self, tmp_path: Path) -> None:
        with cluster(tmp_path, 0, SLOT) as (first, second):
            sink = RedisTasks(f"redis+cluster://127.0.0.1:{first.port}")
            sink.send(tasks(1))
            first_id, second_id = (node.execute("CLUSTER", "MYID") for node in (first, second))
            first.execute("CLUSTER", "SETSLOT", SLOT, "IMPORTING", second_id)
            second.execute("CLUSTER", "SETSLOT", SLOT, "MIGRATING", first_id)

            def is_moved() -> bool:
                """The other node may be slow, on a busy machine's disk; a key that came all the same is replaced."""
                try:
                    return bool(second.execute("MIGRATE", "127.0.0.1", first.port, "extraction", 0, 5000, "REPLACE"))
                except ResponseError:
                    return False

            eventually(is_moved)
            sink.send(tasks(2))  # answered with ASK
            for node in (first, second):
                node.execute("CLUSTER", "SETSLOT", SLOT, "NODE", first_id)
            sink.send(tasks(4))  # answered with MOVED
            assert length(first) == 7
            sink.close()

    def test_a_dead_node_is_said_and_its_return_is_noticed(self, tmp_path: Path) -> None:
        with cluster(tmp_path, 0, SLOT) as (first, second):
            sink = RedisTasks(f"redis+cluster://127.0.0.1:{first.port},127.0.0.1:{second.port}")
            sink.send(tasks(1))
            second.kill()
            assert not is_sent(sink)
            assert not is_sent(sink)
            second.start()
            eventually(lambda: is_sent(sink))
            assert length(second) == 2
            sink.close()

    def test_after_a_loss_every_node_of_the_url_is_asked_again(self, tmp_path: Path) -> None:
        """Also one that was away when the cluster's shape was read last."""
        with cluster(tmp_path / "one", 0) as (one,), cluster(tmp_path / "other", 0) as (other,):
            other.kill()
            sink = RedisTasks(f"redis+cluster://127.0.0.1:{one.port},127.0.0.1:{other.port}")
            sink.send(tasks(1))
            one.kill()
            assert not is_sent(sink)
            other.start()
            eventually(lambda: is_sent(sink))
            sink.close()

    def test_a_cluster_without_its_slots_is_said(self, tmp_path: Path) -> None:
        with cluster(tmp_path, 0) as (node,):
            node.execute("CLUSTER", "FLUSHSLOTS")
            with pytest.raises(Unavailable, match="the cluster of"):
                RedisTasks(f"redis+cluster://127.0.0.1:{node.port}").send(tasks(1))

    def test_a_server_that_is_no_cluster_is_said(self, tmp_path: Path) -> None:
        with valkey(tmp_path) as server, pytest.raises(Unavailable, match="is no cluster"):
            RedisTasks(f"redis+cluster://127.0.0.1:{server.port}").send(tasks(1))
