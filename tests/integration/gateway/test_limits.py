"""What the gateway refuses, and how: too many headers, too many connections, too little memory."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from extproc.stack import envoy
from extproc.stack.envoy import Provider
from tests.integration.conftest import StandIn
from tests.integration.gateway.gateway_side import Running, eventually, fitting, running
from tests.integration.http_side import AUTHORIZED, CONTEXT_HEADERS, NOT_ASKED, context, raw, request_bytes


@pytest.fixture(scope="module")
def shared(
    envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    plan = fitting(provider=Provider(provider_process.address))
    with running(envoy_binary, tmp_path_factory.mktemp("limits"), plan) as gateway:
        yield gateway


class TestHeaders:
    @pytest.mark.parametrize(
        "headers",
        [{"x-large": "y" * 61 * 1024}, {f"x-{number}": "y" for number in range(101)}],
        ids=["61 KiB", "101 headers"],
    )
    def test_too_large_is_a_431_with_the_envelope(self, shared: Running, headers: dict[str, str]) -> None:
        status, answered, body = raw(shared.plan.listen, request_bytes("GET", "/v1/models", headers))
        assert status == 431
        assert json.loads(body)["error"]["code"] == "VALIDATION_ERROR"
        assert "too large" in json.loads(body)["error"]["message"]
        assert all(name in answered for name in CONTEXT_HEADERS)

    @pytest.mark.parametrize("count", [101, 1000])
    def test_over_http2_it_ends_that_request_alone(self, shared: Running, provider: StandIn, count: int) -> None:
        with httpx2.Client(base_url=shared.client.base_url, http1=False, http2=True, timeout=20) as client:
            client.headers.update(AUTHORIZED)
            assert client.get("/v1/models").status_code == 200
            with contextlib.suppress(httpx2.RemoteProtocolError):
                too_many = client.get("/v1/models", headers={f"x-{number}": "y" for number in range(count)})
                assert too_many.status_code == 431
            assert client.get("/v1/models").status_code == 200
        assert len(provider.received()) == 2

    def test_90_headers_of_50_kib_pass(self, shared: Running, provider: StandIn) -> None:
        headers = {f"x-{number}": "y" * 560 for number in range(85)}
        assert shared.chat(headers=headers).status_code == 200
        assert headers.items() <= dict(provider.last().headers).items()

    def test_one_with_an_underscore_is_dropped(self, shared: Running, provider: StandIn) -> None:
        """For some servers it is the same as the one with dashes."""
        theirs = {"x_ibex_org_id": "forged", "x_api_key": "theirs", "x-fine": "1"}
        assert shared.chat(headers=theirs).status_code == 200
        assert provider.last().names & {"x_ibex_org_id", "x_api_key", "x-fine"} == {"x-fine"}


class TestOverload:
    def test_a_full_heap_is_a_503(self, envoy_binary: Path, tmp_path: Path, provider: StandIn) -> None:
        def shrink(config: envoy.Node) -> None:
            (heap, _) = config["overload_manager"]["resource_monitors"]
            heap["typed_config"]["max_heap_size_bytes"] = 1024 * 1024

        plan = fitting(provider=Provider(provider.address))
        with running(envoy_binary, tmp_path, plan, change=shrink) as gateway:
            name = "overload.envoy.overload_actions.stop_accepting_requests.active"
            assert eventually(lambda: gateway.stat(name) == 1)
            response = gateway.chat()
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "SERVICE_DEGRADED")
            assert error["request_id"] is None, "refused before it gets one"
            assert context(response) == NOT_ASKED
            assert response.headers["retry-after"] == "5"
        assert provider.received() == []

    def test_a_connection_too_many_is_closed(self, envoy_binary: Path, tmp_path: Path, provider: StandIn) -> None:
        def allow_two(config: envoy.Node) -> None:
            (_, connections) = config["overload_manager"]["resource_monitors"]
            connections["typed_config"]["max_active_downstream_connections"] = 2

        plan = fitting(provider=Provider(provider.address))
        asked = request_bytes("GET", "/v1/models", AUTHORIZED)
        with running(envoy_binary, tmp_path, plan, change=allow_two) as gateway, contextlib.ExitStack() as held:
            held_ones = []
            for _ in range(2):
                one = held.enter_context(socket.create_connection(plan.listen, timeout=10))
                one.sendall(asked)
                assert one.recv(12) == b"HTTP/1.1 200"
                held_ones.append(one)
            three = held.enter_context(socket.create_connection(plan.listen, timeout=10))
            with contextlib.suppress(ConnectionError):
                three.sendall(asked)
                assert three.recv(1) == b""
            assert gateway.admin("/ready") == "LIVE\n"
            held_ones[0].close()

            def is_answered() -> bool:
                with contextlib.suppress(OSError, IndexError):
                    return raw(plan.listen, asked)[0] == 200
                return False

            assert eventually(is_answered)
