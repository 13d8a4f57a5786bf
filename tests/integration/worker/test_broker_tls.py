"""A worker reaches its broker through TLS, and Sentinels that name the primary through TLS as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from pydantic import SecretStr

from extproc.settings import WorkerSettings, load
from extproc.stack.envoy import free_port
from extproc.turns.enqueue import RedisTasks
from extproc.worker.app import make_app
from tests.integration.turns import valkey_side
from tests.integration.turns.valkey_side import MASTER
from tests.integration.worker.test_worker import TEXTS
from tests.integration.worker.tls_side import Front, fronts
from tests.integration.worker.worker_side import Place, eventually

pytestmark = pytest.mark.timeout(240)  # a worker starts, on a machine that may be busy


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def options(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a client with a certificate of its own."""
    directory = tmp_path_factory.mktemp("tls")
    ca.cert_pem.write_to_path(directory / "ca.pem")
    ca.issue_cert("worker").private_key_and_cert_chain_pem.write_to_path(directory / "own.pem")
    own = f"ssl_certfile={directory}/own.pem&ssl_keyfile={directory}/own.pem"
    return f"ssl_ca_certs={directory}/ca.pem&{own}"


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[valkey_side.Server]:
    """Not started, and it watches nobody yet."""
    directory = tmp_path / "sentinel"
    directory.mkdir()
    port = free_port()
    made = valkey_side.Server(directory, port, [str(directory / "sentinel.conf"), "--sentinel"])
    yield made
    made.kill()


def connect(url: str) -> None:
    """As a worker does."""
    connection = make_app(load(WorkerSettings, broker_url=SecretStr(url))).connection_for_read()
    connection.connect()
    connection.default_channel.client.ping()
    connection.release()


def test_a_certificate_of_somebody_unknown_is_refused(valkey: valkey_side.Server, ca: trustme.CA, options: str) -> None:
    unknown = Front(trustme.CA(), valkey.port)
    known = Front(ca, valkey.port)
    with fronts(known, unknown):
        connect(f"rediss://127.0.0.1:{known.port}/0?{options}")
        with pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
            connect(f"rediss://127.0.0.1:{unknown.port}/0?{options}")
    assert known.secured >= 1


def test_a_worker_takes_tasks_through_tls_from_the_primary_that_sentinels_name_through_tls(
    on_sqlite: Place, sentinel: valkey_side.Server, ca: trustme.CA, options: str
) -> None:
    # A Sentinel here speaks plain text to the primary, at the address that it names to others.
    primary, guard = Front(ca, on_sqlite.valkey.port, takes_plain=True), Front(ca, sentinel.port)
    with fronts(primary, guard):
        (sentinel.directory / "sentinel.conf").write_text(
            f"port {sentinel.port}\nbind 127.0.0.1\ndir {sentinel.directory}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {primary.port} 1\n"
        )
        sentinel.start()
        url = f"rediss+sentinel://127.0.0.1:{guard.port}/{MASTER}/0?{options}"
        on_sqlite.start(IBEX_BROKER_URL=url)
        task = on_sqlite.tell(TEXTS[:1])
        through = RedisTasks(url)
        through.send([task])
        through.close()
        eventually(lambda: on_sqlite.is_extracted(task), on_sqlite.log)
        assert primary.secured >= 2  # the test's own, and the worker's
        on_sqlite.stop_workers()
