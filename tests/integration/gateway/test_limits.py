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
from tests.integration.http_side import (
    AUTHORIZED,
    CONTEXT_HEADERS,
    NOT_ASKED,
    check_envelope,
    context,
    raw,
    request_bytes,
)

NOT_THEIRS = (
    "openai-organization",
    "openai-project",
    "x-goog-user-project",
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "fastly-client-ip",
    "forwarded",
    "via",
    "referer",
)
"""A client's headers that no provider is to see."""


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

    def test_none_says_who_pays_which_method_or_where_the_client_is(self, shared: Running, provider: StandIn) -> None:
        theirs = dict.fromkeys(NOT_THEIRS, "203.0.113.7")
        kept = {"openai-beta": "assistants=v2", "anthropic-beta": "context-1m", "user-agent": "official"}
        assert shared.chat(headers=theirs | kept).status_code == 200
        assert not provider.last().names & set(theirs)
        assert kept.items() <= dict(provider.last().headers).items()
        assert "203.0.113.7" not in str(provider.last())


class TestNotForThisGateway:
    @pytest.mark.parametrize(
        ("headers", "word"),
        [
            ({"connection": "upgrade", "upgrade": "websocket"}, "WebSocket"),
            ({"connection": "upgrade", "upgrade": "anything"}, "upgrade"),
            ({"transfer-encoding": "xchunked"}, "valid HTTP"),
        ],
    )
    def test_the_answer_says_what(self, shared: Running, provider: StandIn, headers: dict[str, str], word: str) -> None:
        lines = [f"{name}: {value}" for name, value in (headers | AUTHORIZED).items()]
        sent = "\r\n".join(["GET /v1/realtime HTTP/1.1", "host: x", *lines, "", ""])
        status, answered, body = raw(shared.plan.listen, sent.encode())
        assert (status, json.loads(body)["error"]["code"]) == (400, "VALIDATION_ERROR")
        assert word in json.loads(body)["error"]["message"]
        assert all(name in answered for name in CONTEXT_HEADERS)
        assert provider.received() == []

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
    def test_as_shipped_no_model_leads_to_what_listens_on_this_machine(
        self, shared: Running, provider: StandIn, path: str
    ) -> None:
        check_envelope(shared.chat("owner/name", path), 501, "PROVIDER_NOT_CONFIGURED")
        assert provider.received() == []
        response = shared.chat("owner/name", "/v1/embeddings")
        assert shared.access_log(response.headers["x-request-id"])["cluster"] == "provider_openai"


class TestQuery:
    """Without a token: this is read in front of the gate, by one thread for many connections."""

    @pytest.mark.parametrize("space", ["+", "%20", "%09", "%2B", "&", "=", "k%65y%20"])
    @pytest.mark.parametrize("end", ["", "b", "=b"])
    def test_58_kb_cost_little_whatever_they_hold(self, shared: Running, space: str, end: str) -> None:
        query = "a" + space * (58_000 // len(space)) + end
        before = shared.cpu_s()
        assert raw(shared.plan.listen, request_bytes("GET", f"/v1/models?{query}", {}))[0] == 414
        assert shared.cpu_s() - before < 2, "16 s were seen where each byte is compared with each"

    def test_a_path_of_2048_bytes_passes_and_no_longer_one(self, shared: Running, provider: StandIn) -> None:
        """The memory filter takes a longer one for no chat."""
        path = "/v1/chat/completions?a="
        path += "x" * (2048 - len(path))
        assert shared.chat(path=path).status_code == 200
        check_envelope(shared.chat(path=path + "x"), 414, "VALIDATION_ERROR")
        assert len(provider.received()) == 1

    @pytest.mark.parametrize("name", ["$key", "oauth_token", "$oauth_token", "userProject", "%24userProject", "+key+"])
    def test_no_google_parameter_names_a_credential_or_who_pays(
        self, shared: Running, provider: StandIn, name: str
    ) -> None:
        assert shared.chat(path=f"/v1/chat/completions?a=1&{name}=theirs&alt=sse").status_code == 200
        assert provider.last().path == "/v1/chat/completions?a=1&alt=sse"


class TestOverload:
    def test_a_connection_without_a_request_ends(self, envoy_binary: Path, tmp_path: Path) -> None:
        def hurry(config: envoy.Node) -> None:
            (manager,) = envoy._http_managers(config)
            assert manager["common_http_protocol_options"]["idle_timeout"] == "75s"
            manager["common_http_protocol_options"]["idle_timeout"] = "0.5s"

        with (
            running(envoy_binary, tmp_path, fitting(), change=hurry) as gateway,
            socket.create_connection(gateway.plan.listen, timeout=30) as connection,
        ):
            assert connection.recv(1) == b""

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
            assert error["request_id"] == response.headers["x-request-id"]
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
