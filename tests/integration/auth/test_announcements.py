"""What gates hear: a real Valkey between the service or a command and a listener."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner

from extproc.auth import gossip
from extproc.auth.announce import REVOCATIONS, Announcer, NotWritten, limit_key
from extproc.auth.commands import organizations_app, tokens_app
from extproc.auth.demo import ensure_demo
from extproc.auth.store import IdentityStore, Organization
from extproc.auth.token import CHAT
from extproc.memory.database import Database
from extproc.settings import SettingsError
from tests.integration.turns import valkey_side
from tests.unit.auth.service_side import running

ORG, TOKEN = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
AT = datetime(2025, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/memories.db")
    yield made
    made.close()


class Listener:
    def __init__(self, client: Redis) -> None:
        self.channel = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self.channel.subscribe(REVOCATIONS)
        self.channel.get_message(timeout=5)

    def next(self, limit_s: float = 45.0) -> Any:
        heard: list[Any] = []

        def has_come() -> bool:
            message = self.channel.get_message(timeout=0.05)
            heard.extend([message] if message else [])
            return bool(heard)

        valkey_side.eventually(has_come, limit_s)
        return json.loads(heard[0]["data"])


@contextmanager
def listening(server: valkey_side.Server) -> Iterator[Listener]:
    with valkey_side.client_of(server) as client:
        listener = Listener(client)
        yield listener
        listener.channel.close()


def limit_of(server: valkey_side.Server, org_id: str) -> bytes | None:
    found: bytes | None = server.execute("GET", limit_key(org_id))
    return found


class TestAnnouncer:
    def test_a_revocation_is_what_the_contract_says(self, valkey: valkey_side.Server) -> None:
        announcer = Announcer(valkey.url)
        with listening(valkey) as listener:
            announcer.revoked(ORG, TOKEN, AT)
            assert listener.next() == {
                "v": 1,
                "token_id": TOKEN,
                "revoked_at": "2025-06-01T12:00:00.250Z",
                "org_id": ORG,
            }
        announcer.close()

    def test_limits_come_and_go(self, valkey: valkey_side.Server) -> None:
        announcer = Announcer(valkey.url)
        orgs = {str(uuid.uuid4()): number for number in range(1200)}
        announcer.limits(orgs)
        assert all(limit_of(valkey, org) == str(orgs[org]).encode() for org in list(orgs)[::300])
        announcer.limits(dict.fromkeys(orgs))
        assert valkey.execute("DBSIZE") == 0
        announcer.close()

    def test_after_a_restart_of_redis_it_goes_on(self, valkey: valkey_side.Server) -> None:
        announcer = Announcer(valkey.url)
        announcer.limits({ORG: 5})
        valkey.kill()
        with pytest.raises(NotWritten, match="did not take it"):
            announcer.limits({ORG: 6})
        valkey.start()
        announcer.limits({ORG: 7})
        assert limit_of(valkey, ORG) == b"7"
        announcer.close()

    def test_a_wrong_password_is_said_and_not_shown(self, tmp_path: Path) -> None:
        with valkey_side.valkey(tmp_path / "locked", "--requirepass", "open-sesame") as server:
            announcer = Announcer(f"redis://:hush@127.0.0.1:{server.port}/0")
            with pytest.raises(NotWritten, match="IBEX_REDIS_URL") as caught:
                announcer.limits({ORG: 5})
            assert "hush" not in str(caught.value)
            announcer.close()

    def test_it_finds_the_primary_behind_sentinels(self, tmp_path: Path) -> None:
        with valkey_side.watched(tmp_path, sentinels=1) as watched:
            announcer = Announcer(watched.url)
            announcer.limits({ORG: 5})
            announcer.revoked(ORG, TOKEN, AT)
            announcer.close()
            assert limit_of(watched.primary, ORG) == b"5"

    def test_a_cluster_gets_limits_in_all_its_nodes(self, tmp_path: Path) -> None:
        with valkey_side.cluster(tmp_path, 0, 8192) as nodes:
            announcer = Announcer(f"redis+cluster://127.0.0.1:{nodes[0].port}")
            orgs = {str(uuid.uuid4()): number for number in range(40)}
            with listening(nodes[1]) as listener:
                announcer.limits(orgs)
                announcer.revoked(ORG, TOKEN, AT)
                assert listener.next()["token_id"] == TOKEN
            announcer.close()
            assert sum(node.execute("DBSIZE") for node in nodes) == 40

    def test_a_url_that_cannot_be_used_names_its_variable(self) -> None:
        with pytest.raises(SettingsError, match="IBEX_REDIS_URL") as caught:
            Announcer("http://hush")
        assert "hush" not in str(caught.value)


class TestService:
    async def test_a_revocation_is_heard(self, valkey: valkey_side.Server, database: Database) -> None:
        with listening(valkey) as listener:
            async with running(database, Announcer(valkey.url)) as client:
                assert await client.revoke(client.one.admin) == {"x-ibex-revocation": "published"}
                heard = await asyncio.to_thread(listener.next)
                assert (heard["token_id"], heard["org_id"]) == (client.one.row.id, client.one.id)

    async def test_what_redis_does_not_take_is_revoked_all_the_same_and_heard_later(
        self, valkey: valkey_side.Server, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gossip, "_RETRY_S", 0.05)
        with listening(valkey) as listener:
            async with running(database, Announcer(valkey.url)) as client:
                valkey.execute("ACL", "SETUSER", "default", "-publish")
                assert await client.revoke(client.one.admin) == {"x-ibex-revocation": "pending"}
                found = client.store.token_by_prefix(client.one.row.prefix)
                assert found is not None
                assert found.revoked_at is not None
                assert listener.channel.get_message(timeout=0.2) is None
                valkey.execute("ACL", "SETUSER", "default", "+publish")
                heard = await asyncio.to_thread(listener.next)
                assert heard["token_id"] == client.one.row.id

    async def test_a_redis_that_is_dead_or_frozen_holds_up_no_revocation(
        self, valkey: valkey_side.Server, database: Database
    ) -> None:
        async with running(database, Announcer(valkey.url)) as client:
            valkey.freeze()
            try:
                assert await client.revoke(client.one.admin) == {"x-ibex-revocation": "pending"}
            finally:
                valkey.thaw()
            valkey.kill()
            other = client.one.add_token()[0]
            assert await client.revoke(client.one.admin, token_id=other.id) == {"x-ibex-revocation": "pending"}
            assert all(
                token.revoked_at for token in client.store.tokens(client.one.id, 10) if token.permissions == CHAT
            )

    async def test_all_limits_are_there_after_the_start_and_again_after_a_while(
        self, valkey: valkey_side.Server, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gossip, "_LIMITS_INTERVAL_S", 0.1)
        store = IdentityStore(database)
        limited, plain = str(uuid.uuid4()), str(uuid.uuid4())
        store.add_organization(Organization(limited, "a", 7, AT))
        store.add_organization(Organization(plain, "b", None, AT))
        valkey.execute("SET", limit_key(plain), 9)
        async with running(database, Announcer(valkey.url)):
            for _ in range(2):
                await asyncio.to_thread(valkey_side.eventually, lambda: limit_of(valkey, limited) == b"7")
                await asyncio.to_thread(valkey_side.eventually, lambda: limit_of(valkey, plain) is None)
                valkey.execute("FLUSHALL")

    async def test_a_redis_that_is_away_at_the_start_gets_the_limits_later(
        self, valkey: valkey_side.Server, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gossip, "_LIMITS_RETRY_S", 0.1)
        org = str(uuid.uuid4())
        IdentityStore(database).add_organization(Organization(org, "a", 7, AT))
        valkey.kill()
        async with running(database, Announcer(valkey.url)) as client:
            await client.validate(client.one.token)
            valkey.start()
            await asyncio.to_thread(valkey_side.eventually, lambda: limit_of(valkey, org) == b"7")


class TestCommands:
    def test_they_tell_gates_at_once(
        self, valkey: valkey_side.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database = Database(f"sqlite:///{tmp_path}/memories.db")
        ensure_demo(database, ORG, TOKEN)
        (token,) = IdentityStore(database).tokens(ORG, 10)
        database.close()
        monkeypatch.setenv("IBEX_REDIS_URL", valkey.url)
        options = ["--org", ORG, "--data", str(tmp_path), "--json"]
        with listening(valkey) as listener:
            done = CliRunner().invoke(tokens_app, ["revoke", token.id, *options])
            assert json.loads(done.stdout)["published"]
            assert listener.next()["token_id"] == token.id
        for word, value in (("42", b"42"), ("default", None)):
            assert CliRunner().invoke(organizations_app, ["set-limit", word, *options]).exit_code == 0
            assert limit_of(valkey, ORG) == value
