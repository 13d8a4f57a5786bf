"""The sink against one real Valkey: what lands there, and what is said when it cannot."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from prometheus_client import REGISTRY
from redis import Redis

from extproc.turns.enqueue import RedisTasks
from extproc.turns.sinks import ExtractionTask, Unavailable
from tests.integration.turns.valkey_side import Server, eventually, server, valkey

PASSWORD = "p@ss/w:ör?d#1"
QUOTED = "p%40ss%2Fw%3A%C3%B6r%3Fd%231"
LIMIT_S = 30.0
"""Above the sink's own 3 s, for a busy machine."""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Server]:
    with valkey(tmp_path / "valkey") as running:
        yield running


@pytest.fixture
def sink(broker: Server) -> Iterator[RedisTasks]:
    sink = RedisTasks(broker.url)
    yield sink
    sink.close()


def tasks(count: int) -> list[ExtractionTask]:
    return [ExtractionTask(str(uuid.uuid4()), str(uuid.uuid4()), str(uuid.uuid4())) for _ in range(count)]


def queued(broker: Server) -> list[str]:
    """Ids of the waiting tasks, in the order in which workers take them."""
    return [json.loads(message)["id"] for message in reversed(broker.execute("LRANGE", "extraction", 0, -1))]


def send(url: str, batch: list[ExtractionTask]) -> None:
    sink = RedisTasks(url)
    try:
        sink.send(batch)
    finally:
        sink.close()


def refused(sink: RedisTasks) -> str:
    """The words with which a send fails, soon."""
    began = time.monotonic()
    with pytest.raises(Unavailable) as error:
        sink.send(tasks(1))
    assert time.monotonic() - began < LIMIT_S
    return str(error.value)


def has_listener(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def is_sent(sink: RedisTasks, batch: list[ExtractionTask]) -> bool:
    try:
        sink.send(batch)
    except Unavailable:
        return False
    return True


class TestSent:
    def test_a_batch_waits_in_its_order(self, broker: Server, sink: RedisTasks) -> None:
        first, second = tasks(100), tasks(2)
        sink.send(first)
        sink.send(second)
        assert queued(broker) == [task.id for task in [*first, *second]]

    def test_no_batch_is_no_command(self, broker: Server, sink: RedisTasks) -> None:
        sink.send([])
        assert queued(broker) == []

    def test_every_message_has_a_tag_of_its_own(self, broker: Server, sink: RedisTasks) -> None:
        (task,) = tasks(1)
        sink.send([task, task])
        sink.send([task])
        messages = map(json.loads, broker.execute("LRANGE", "extraction", 0, -1))
        assert len({message["properties"]["delivery_tag"] for message in messages}) == 3

    def test_a_consumer_that_knows_only_the_plain_fields_finds_them(self, broker: Server, sink: RedisTasks) -> None:
        (task,) = tasks(1)
        sink.send([task])
        _, taken = broker.execute("BRPOP", "extraction", 1)
        message = json.loads(taken)
        assert {name: message[name] for name in ("id", "task", "args", "kwargs", "retries", "eta")} == {
            "id": task.id,
            "task": "worker.tasks.extraction.extract_session_memories",
            "args": [],
            "kwargs": {"session_id": task.session_id, "org_id": task.org_id},
            "retries": 0,
            "eta": None,
        }

    def test_the_length_of_the_queue_is_a_metric(self, broker: Server, sink: RedisTasks) -> None:
        sink.send(tasks(3))
        sink.send(tasks(2))
        assert REGISTRY.get_sample_value("ibex_extraction_queue_length") == 5


class TestReached:
    def test_by_the_number_of_a_database(self, broker: Server) -> None:
        batch = tasks(1)
        send(f"redis://127.0.0.1:{broker.port}/7", batch)
        assert queued(broker) == []
        with Redis(port=broker.port, db=7) as client:
            assert client.llen("extraction") == 1

    def test_through_a_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "a socket"
        with valkey(tmp_path / "valkey", "--unixsocket", str(path)) as broker:
            batch = tasks(1)
            send(f"unix://{str(path).replace(' ', '%20')}?db=0", batch)
            assert queued(broker) == [batch[0].id]

    def test_over_ipv6(self, tmp_path: Path) -> None:
        with valkey(tmp_path / "valkey", "--bind", "127.0.0.1 -::1") as broker:
            batch = tasks(1)
            try:
                send(f"redis://[::1]:{broker.port}", batch)
            except Unavailable:
                pytest.skip("this machine has no IPv6")
            assert queued(broker) == [batch[0].id]

    @pytest.mark.parametrize("user", ["", "default"])
    def test_with_a_password_of_any_characters(self, tmp_path: Path, user: str) -> None:
        with valkey(tmp_path / "valkey", "--requirepass", PASSWORD) as broker:
            send(f"redis://{user}:{QUOTED}@127.0.0.1:{broker.port}", tasks(2))
            with Redis(port=broker.port, password=PASSWORD) as client:
                assert client.llen("extraction") == 2

    def test_by_no_proxy_of_the_environment(self, broker: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        send(broker.url, tasks(1))
        assert len(queued(broker)) == 1


class TestTls:
    """The wheel's Valkey speaks no TLS, so something stands before it that does."""

    async def test_with_a_client_certificate(self, broker: Server, tmp_path: Path) -> None:
        ca = trustme.CA()
        async with terminator(ca, broker.port) as port:
            own = ca.issue_cert("client")
            own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
            ca.cert_pem.write_to_path(tmp_path / "ca.pem")
            files = f"ssl_ca_certs={tmp_path}/ca.pem&ssl_certfile={tmp_path}/own.pem&ssl_keyfile={tmp_path}/own.pem"
            batch = tasks(2)
            await asyncio.to_thread(send, f"rediss://127.0.0.1:{port}/0?{files}", batch)
        assert queued(broker) == [task.id for task in batch]

    async def test_an_unknown_certificate_is_refused(self, broker: Server) -> None:
        async with terminator(trustme.CA(), broker.port) as port:
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await asyncio.to_thread(send, f"rediss://127.0.0.1:{port}/0", tasks(1))
        assert queued(broker) == []


@asynccontextmanager
async def terminator(ca: trustme.CA, behind: int) -> AsyncIterator[int]:
    """A port that speaks TLS, wants a certificate of `ca`, and passes everything on to the port `behind` it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(context)
    ca.issue_cert("127.0.0.1").configure_cert(context)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while received := await reader.read(65536):
            writer.write(received)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


class TestRefused:
    def test_a_key_of_another_type(self, broker: Server, sink: RedisTasks) -> None:
        broker.execute("SET", "extraction", "x")
        assert "holds something else than a list at the key `extraction`" in refused(sink)
        broker.execute("DEL", "extraction")
        sink.send(tasks(1))

    def test_a_missing_password(self, tmp_path: Path) -> None:
        with valkey(tmp_path / "valkey", "--requirepass", PASSWORD) as broker:
            assert "refuses the user or the password" in refused(RedisTasks(broker.url))

    def test_a_wrong_password_which_is_not_shown(self, tmp_path: Path) -> None:
        with valkey(tmp_path / "valkey", "--requirepass", PASSWORD) as broker:
            problem = refused(RedisTasks(f"redis://:hunter2@127.0.0.1:{broker.port}"))
        assert "refuses the user or the password" in problem
        assert "hunter2" not in problem

    def test_a_user_who_may_not_push(self, broker: Server) -> None:
        broker.execute("ACL", "SETUSER", "ada", "on", ">pw", "~*", "+@all", "-lpush")
        assert "allow it LPUSH" in refused(RedisTasks(f"redis://ada:pw@127.0.0.1:{broker.port}"))

    def test_a_database_that_is_not_there(self, broker: Server) -> None:
        assert "no database of that number" in refused(RedisTasks(f"redis://127.0.0.1:{broker.port}/99"))

    def test_a_full_broker_which_keeps_what_it_has(self, broker: Server, sink: RedisTasks) -> None:
        sink.send(tasks(5))
        broker.execute("CONFIG", "SET", "maxmemory", "1")
        assert "is full" in refused(sink)
        assert len(queued(broker)) == 5
        broker.execute("CONFIG", "SET", "maxmemory", "0")
        sink.send(tasks(1))

    def test_a_broker_that_has_become_a_replica(self, broker: Server, sink: RedisTasks) -> None:
        sink.send(tasks(1))
        broker.execute("REPLICAOF", "127.0.0.1", "1")
        assert "is a replica" in refused(sink)
        broker.execute("REPLICAOF", "NO", "ONE")
        sink.send(tasks(1))

    def test_a_broker_that_wants_replicas(self, broker: Server, sink: RedisTasks) -> None:
        broker.execute("CONFIG", "SET", "min-replicas-to-write", "1")
        assert "too few of its replicas" in refused(sink)

    def test_a_broker_that_is_still_loading(self, tmp_path: Path) -> None:
        broker = server(
            tmp_path / "valkey", "--key-load-delay", "50000", "--loading-process-events-interval-bytes", "1024"
        )
        filled = server(tmp_path / "valkey", port=broker.port)
        try:
            filled.start()
            send(broker.url, tasks(2000))
            for number in range(100):
                filled.execute("SET", f"key-{number}", "x" * 100)
            filled.execute("BGREWRITEAOF")
            eventually(lambda: not filled.execute("INFO", "persistence")["aof_rewrite_in_progress"])
            filled.kill()
            broker.start(wait=False)
            sink = RedisTasks(broker.url)
            eventually(lambda: has_listener(broker.port))
            assert "loading" in refused(sink)
        finally:
            filled.kill()
            broker.kill()


class TestDrills:
    def test_killed_and_started_again(self, broker: Server, sink: RedisTasks) -> None:
        """What was answered is still there, and the same sink goes on."""
        before, after = tasks(10), tasks(10)
        sink.send(before)
        broker.kill()
        assert "cannot be reached" in refused(sink)
        assert "cannot be reached" in refused(sink)
        broker.start()
        sink.send(after)
        assert queued(broker) == [task.id for task in [*before, *after]]

    def test_restarted_between_two_batches(self, broker: Server, sink: RedisTasks) -> None:
        """The connection that was left behind is not used."""
        sink.send(tasks(1))
        broker.kill()
        broker.start()
        sink.send(tasks(1))
        assert len(queued(broker)) == 2

    def test_frozen_and_thawed(self, broker: Server, sink: RedisTasks) -> None:
        sink.send(tasks(1))
        broker.freeze()
        assert "does not answer in time" in refused(sink)
        broker.thaw()
        batch = tasks(1)
        sink.send(batch)
        assert batch[0].id in queued(broker)

    def test_frozen_before_the_first_connection(self, broker: Server, sink: RedisTasks) -> None:
        broker.freeze()
        assert "does not answer in time" in refused(sink)
        broker.thaw()
        eventually(lambda: is_sent(sink, tasks(1)))
