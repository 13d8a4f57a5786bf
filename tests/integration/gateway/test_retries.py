"""Sent again only while nothing of it can have been read; a provider's answers never count against it."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from extproc.stack import envoy
from extproc.stack.envoy import Address, Provider
from tests.integration.conftest import StandIn, answers
from tests.integration.conftest import running as process_running
from tests.integration.gateway.gateway_side import fitting, provider_clusters, running
from tests.integration.http_side import check_envelope


@contextmanager
def hanging_up(answer: bytes = b"") -> Iterator[tuple[Address, list[bytes]]]:
    """A provider that reads a request, says this much and closes; and what it has read."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        stopping = threading.Event()

        def serve() -> None:
            while not stopping.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    requests.append(connection.recv(65536))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address(*listener.getsockname()), requests
        finally:
            stopping.set()
            thread.join(10)


def nobody() -> Address:
    return Address("127.0.0.1", envoy.free_port())


class TestRetries:
    @pytest.mark.parametrize("status", [400, 429, 500, 502, 503, 504])
    def test_an_answer_is_the_clients(self, envoy_binary: Path, tmp_path: Path, provider: StandIn, status: int) -> None:
        with running(envoy_binary, tmp_path, fitting(provider=Provider(provider.address))) as gateway:
            assert gateway.chat(headers={"x-standin-status": str(status)}).status_code == status
        assert len(provider.received()) == 1

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"nonsense\r\n\r\n"])
    def test_a_request_that_may_have_been_read_is_not_sent_again(
        self, envoy_binary: Path, tmp_path: Path, answer: bytes
    ) -> None:
        with (
            hanging_up(answer) as (address, requests),
            running(envoy_binary, tmp_path, fitting(provider=Provider(address))) as gateway,
        ):
            check_envelope(gateway.chat(), 503, "PROVIDER_UNAVAILABLE")
            assert len(requests) == 1
            assert gateway.stat("cluster.provider_openai.upstream_rq_retry") == 0

    @pytest.mark.parametrize("order", ["5xx", "gateway-error,reset,retriable-4xx"])
    def test_a_client_cannot_order_one(self, envoy_binary: Path, tmp_path: Path, provider: StandIn, order: str) -> None:
        headers = {
            "x-envoy-retry-on": order,
            "x-envoy-max-retries": "5",
            "x-envoy-hedge-on-per-try-timeout": "true",
            "x-envoy-upstream-rq-per-try-timeout-ms": "1",
            "x-standin-status": "503",
        }
        with running(envoy_binary, tmp_path, fitting(provider=Provider(provider.address))) as gateway:
            assert gateway.chat(headers=headers).status_code == 503
        assert len(provider.received()) == 1

    def test_no_connection_is_tried_at_another_address(
        self, envoy_binary: Path, tmp_path: Path, provider: StandIn
    ) -> None:
        def add_a_dead_one(config: envoy.Node) -> None:
            for cluster in provider_clusters(config):
                envoy.set_cluster(config, cluster["name"], [nobody(), provider.address])

        plan = fitting(provider=Provider(provider.address))
        with running(envoy_binary, tmp_path, plan, change=add_a_dead_one) as gateway:
            answers = [gateway.chat() for _ in range(6)]
            assert [answer.status_code for answer in answers] == [200] * 6
            assert gateway.stat("cluster.provider_openai.upstream_rq_retry_success") > 0
        assert len(provider.received()) == 6

    def test_a_provider_that_is_away_is_tried_three_times(self, envoy_binary: Path, tmp_path: Path) -> None:
        with running(envoy_binary, tmp_path, fitting(provider=Provider(nobody()))) as gateway:
            response = gateway.chat()
            check_envelope(response, 503, "PROVIDER_UNAVAILABLE")
            assert gateway.access_log(response.headers["x-request-id"])["attempts"] == 3


class TestOutliers:
    @pytest.mark.parametrize("status", [400, 429, 500, 503])
    def test_no_answer_puts_an_address_aside(
        self, envoy_binary: Path, tmp_path: Path, provider: StandIn, status: int
    ) -> None:
        second = Address("127.0.0.1", envoy.free_port())

        def add_the_second(config: envoy.Node) -> None:
            for cluster in provider_clusters(config):
                envoy.set_cluster(config, cluster["name"], [provider.address, second])

        command = [sys.executable, "-m", "extproc.stack.provider", "--listen", str(second)]
        plan = fitting(provider=Provider(provider.address))
        with (
            process_running(command, answers(f"http://{second}/received")),
            running(envoy_binary, tmp_path, plan, change=add_the_second) as gateway,
        ):
            for _ in range(24):
                assert gateway.chat(headers={"x-standin-status": str(status)}).status_code == status
            assert gateway.stat("cluster.provider_openai.outlier_detection.ejections_enforced_total") == 0

    def test_an_address_that_cannot_be_connected_to_is_put_aside(
        self, envoy_binary: Path, tmp_path: Path, provider: StandIn
    ) -> None:
        def add_a_dead_one(config: envoy.Node) -> None:
            for cluster in provider_clusters(config):
                envoy.set_cluster(config, cluster["name"], [nobody(), provider.address])

        plan = fitting(provider=Provider(provider.address))
        with running(envoy_binary, tmp_path, plan, change=add_a_dead_one) as gateway:
            for _ in range(40):
                assert gateway.chat().status_code == 200
            assert gateway.stat("cluster.provider_openai.outlier_detection.ejections_enforced_total") == 1
            failures = gateway.stat("cluster.provider_openai.upstream_cx_connect_fail")
            for _ in range(10):
                assert gateway.chat().status_code == 200
            assert gateway.stat("cluster.provider_openai.upstream_cx_connect_fail") == failures

    def test_the_only_address_is_still_tried(self, envoy_binary: Path, tmp_path: Path) -> None:
        """It may be back; and a 503 says so sooner than a provider that was left out."""
        address = nobody()
        with running(envoy_binary, tmp_path, fitting(provider=Provider(address))) as gateway:
            for _ in range(5):
                check_envelope(gateway.chat(), 503, "PROVIDER_UNAVAILABLE")
            with socket.create_server(address) as listener:
                listener.settimeout(10)
                thread = threading.Thread(target=_answer_once, args=(listener,))
                thread.start()
                assert gateway.chat().status_code == 200
                thread.join(10)


def _answer_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
