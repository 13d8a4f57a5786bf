"""The shipped files: valid everywhere, and what of a request's headers and body reaches whom."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.names import GATE_METADATA
from extproc.stack import envoy as stack
from extproc.stack.envoy import Address
from tests.integration.conftest import AGENT, ORG, Gateway, StandIn, started
from tests.integration.http_side import (
    AUTHORIZED,
    CONTEXT_HEADERS,
    HEALTHY,
    JSON,
    LIMIT,
    MIB,
    NOT_ASKED,
    TOKEN,
    UUID,
    check_envelope,
    context,
    padded,
)
from tests.integration.processor import Processor, body_answer, default_answer

CLIENT_HEADERS = {
    "x-ibex-agent-id": AGENT,
    "x-ibex-session-id": "session-1",
    "x-ibex-user-id": "user-1",
    "x-ibex-skip-memory": "no",
    "x-ibex-skip-extraction": "no",
}
FORGED_HEADERS = {
    f"x-ibex-{name}": "forged"
    for name in (
        *("org-id", "Org", "principal-id", "token-id", "permissions", "account", "sid", "uid", "a", ""),
        *("memories-injected", "context-tokens", "context-fallback", "auth-cached"),
    )
}


def ibex_headers(response: httpx2.Response) -> set[str]:
    """Without the gate's own, which is there as soon as it knows the token."""
    return {name for name in response.headers if name.startswith("x-ibex")} - {"x-ibex-auth-cached"}


class TestFiles:
    @pytest.mark.parametrize("version", ["1.36.4", "1.37.0", "1.38.3", "1.39.3", "1.40.0"])
    @pytest.mark.parametrize("name", ["envoy.yaml", "dropin.yaml"])
    def test_is_valid_as_shipped(self, name: Any, version: str) -> None:
        binaries = Path(__file__).parents[2].glob(f".envoy/{version}/lib/python*/site-packages/envoy/_bin/envoy")
        binary = next(binaries, None)
        if binary is None:
            assert not os.environ.get("CI"), f"Envoy {version} is missing: run `make setup-envoys`"
            pytest.skip(f"Envoy {version} is not installed (`make setup-envoys`)")
        command = [
            str(binary),
            "--mode",
            "validate",
            "--config-path",
            str(stack.shipped(name)),
            "--disable-hot-restart",
        ]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert checked.returncode == 0, checked.stderr[-2000:]
        assert "deprecated" not in checked.stderr.lower()


class TestHeaders:
    def test_the_filter_gets_what_a_client_may_say_and_nothing_forged(
        self, either: Gateway, processor: Processor
    ) -> None:
        either.chat(headers=CLIENT_HEADERS | FORGED_HEADERS)
        stream = processor.streams[-1]
        seen = {
            header.key: header.raw_value.decode()
            for header in stream.messages[0].request_headers.headers.headers
            if header.key.startswith("x-ibex")
        }
        assert seen == CLIENT_HEADERS

    def test_no_x_ibex_header_reaches_the_provider(self, either: Gateway, provider: StandIn) -> None:
        either.chat(headers=CLIENT_HEADERS | FORGED_HEADERS)
        assert not {name for name in provider.last().names if name.startswith(("x-ibex", "x-envoy"))}

    def test_no_x_ibex_header_of_the_provider_reaches_the_client(self, either: Gateway) -> None:
        theirs = ["x-ibex-memories-injected: 99", "x-ibex-Context-Fallback: no", "x-ibex-evil: 1", "x-fine: 1"]
        response = either.chat(headers=[("x-standin-response-header", text) for text in theirs])
        assert context(response) == HEALTHY
        assert response.headers["x-fine"] == "1"
        assert ibex_headers(response) == {*CONTEXT_HEADERS, "x-ibex-session-id"}

    def test_no_x_ibex_header_of_the_provider_reaches_the_client_without_the_filter(
        self, unserved_gateway: Gateway, provider: StandIn
    ) -> None:
        theirs = ["x-ibex-memories-injected: 99", "x-ibex-session-id: theirs", "x-ibex-evil: 1"]
        response = unserved_gateway.chat(headers=[("x-standin-response-header", text) for text in theirs])
        assert context(response) == NOT_ASKED
        assert ibex_headers(response) == set(CONTEXT_HEADERS)

    def test_the_filter_gets_the_identity_as_metadata(self, dropin: Gateway, processor: Processor) -> None:
        dropin.chat()
        metadata = processor.streams[-1].messages[0].metadata_context.filter_metadata
        assert dict(metadata["ibex.identity"]) == {"org_id": ORG, "agent_id": AGENT}

    def test_the_filter_gets_the_identity_that_the_gate_found(self, gateway: Gateway, processor: Processor) -> None:
        gateway.chat(headers={"x-ibex-user-id": "u1"})
        found = dict(processor.streams[-1].messages[0].metadata_context.filter_metadata[GATE_METADATA])
        assert (found["org_id"], found["agent_id"], found["user_id"]) == (ORG, AGENT, "u1")

    @pytest.mark.parametrize("name", ["x_ibex_user_id", "x_api_key", "api_key"])
    def test_a_name_with_underscores_reaches_nobody(
        self, gateway: Gateway, processor: Processor, provider: StandIn, name: str
    ) -> None:
        assert gateway.chat(headers={name: "forged"}).status_code == 200
        assert processor.streams[-1].header(name) is None
        assert name not in provider.last().names

    @pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-goog-api-key", "api-key"])
    def test_no_credential_goes_past_the_gate(
        self, gateway: Gateway, processor: Processor, provider: StandIn, name: str
    ) -> None:
        carriers = {"authorization": "", name: f"Bearer {TOKEN}", "cookie": TOKEN, "proxy-authorization": TOKEN}
        assert gateway.chat(headers=carriers).status_code == 200
        assert TOKEN not in str(provider.last())
        assert TOKEN not in str([message for one in processor.streams for message in one.messages])

    @pytest.mark.parametrize("query", ["key={}", "a=b&api_key={}&c=d", "k%65y={}", "anything={}"])
    def test_a_token_in_the_query_is_none_and_goes_nowhere(
        self, gateway: Gateway, processor: Processor, provider: StandIn, query: str
    ) -> None:
        path = f"/v1/chat/completions?{query.format(TOKEN)}"
        body = {"model": "gpt-4o", "messages": []}
        check_envelope(gateway.post(path, json=body, headers={"authorization": ""}), 401, "MISSING_TOKEN")
        assert provider.received() == []
        assert gateway.post(path, json=body).status_code == 200
        assert TOKEN not in str(provider.last())
        assert TOKEN not in str([message for one in processor.streams for message in one.messages])

    @pytest.mark.parametrize("query", ["a=b%2Fc&d&e=f+g", "monkey=1&keys=2", "b=2&a=%26key%3D1"])
    def test_any_other_query_keeps_its_bytes(self, gateway: Gateway, provider: StandIn, query: str) -> None:
        gateway.post(f"/v1/chat/completions?{query}", json={"model": "gpt-4o", "messages": []})
        assert provider.last().path == f"/v1/chat/completions?{query}"

    def test_the_filter_may_change_its_own_headers_only(self, either: Gateway, processor: Processor) -> None:
        def answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
            response = default_answer(message)
            if message.WhichOneof("request") == "response_headers":
                added = response.response_headers.response.header_mutation.set_headers.add()
                added.header.key, added.header.raw_value = "set-cookie", b"evil=1"
            return response

        processor.answer = answer
        response = either.chat()
        assert "set-cookie" not in response.headers
        assert context(response) == HEALTHY

    def test_clients_addresses_stay_here(self, gateway: Gateway, provider: StandIn) -> None:
        gateway.chat()
        assert "x-forwarded-for" not in provider.last().names


class TestRequestId:
    def test_a_uuid_is_kept(self, gateway: Gateway, provider: StandIn) -> None:
        ours = str(uuid.uuid4())
        assert gateway.chat(headers={"x-request-id": ours}).headers["x-request-id"] == ours
        assert ("x-request-id", ours) in provider.last().headers

    @pytest.mark.parametrize("theirs", ["", "mine", "{uuid}x", "{uuid},{uuid}", 'a"b', "x" * 4000])
    def test_anything_else_is_replaced(self, gateway: Gateway, processor: Processor, theirs: str) -> None:
        text = theirs.replace("{uuid}", str(uuid.uuid4()))
        ours = gateway.chat(headers={"x-request-id": text}).headers["x-request-id"]
        assert UUID.fullmatch(ours)
        assert processor.streams[-1].header("x-request-id") == ours

    def test_two_uuids_are_replaced(self, gateway: Gateway) -> None:
        both = [("x-request-id", str(uuid.uuid4())), ("x-request-id", str(uuid.uuid4()))]
        assert UUID.fullmatch(gateway.chat(headers=both).headers["x-request-id"])

    def test_it_is_made_when_absent(self, either: Gateway) -> None:
        assert UUID.fullmatch(either.chat().headers["x-request-id"])

    def test_it_is_kept_on_an_error_of_envoy(self, gateway: Gateway) -> None:
        ours = str(uuid.uuid4())
        response = gateway.client.get("/nowhere", headers={"x-request-id": ours})
        check_envelope(response, 404, "NOT_FOUND")
        assert response.headers["x-request-id"] == ours


class TestBodies:
    @pytest.fixture
    def patient_gateway(
        self, envoy_binary: Path, processor_address: Address, gate_address: Address, provider: StandIn, tmp_path: Path
    ) -> Iterator[Gateway]:
        """It waits for the filter for as long as 10 MiB take there and back on a busy machine."""

        def wait_longer(config: stack.Node) -> None:
            stack._http_filter(config, "ibex.context")["typed_config"]["message_timeout"] = "10s"

        filters, where = [processor_address], provider.address
        with started(envoy_binary, "envoy.yaml", tmp_path, filters, where, wait_longer, gate=gate_address) as gateway:
            yield gateway

    def test_the_filter_changes_the_body(self, either: Gateway, processor: Processor, provider: StandIn) -> None:
        changed = b'{"model":"gpt-4o","messages":[{"role":"user","content":"remembered"}]}'

        def answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
            return body_answer(changed) if message.WhichOneof("request") == "request_body" else default_answer(message)

        processor.answer = answer
        response = either.chat()
        assert "remembered" in response.text
        assert provider.last().body == changed
        assert ("content-length", str(len(changed))) in provider.last().headers

    @pytest.mark.parametrize("http2", [False, True])
    def test_a_body_at_the_limit_passes(
        self, either: Gateway, provider: StandIn, processor: Processor, http2: bool
    ) -> None:
        body = padded(LIMIT - 1)
        with httpx2.Client(base_url=either.url, http1=not http2, http2=http2, timeout=30, headers=AUTHORIZED) as client:
            response = client.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code == 200
        assert provider.last().body == body

    @pytest.mark.parametrize("http2", [False, True])
    def test_a_body_over_the_limit_is_a_413(self, either: Gateway, provider: StandIn, http2: bool) -> None:
        with httpx2.Client(base_url=either.url, http1=not http2, http2=http2, timeout=30, headers=AUTHORIZED) as client:
            response = client.post("/v1/chat/completions", content=padded(LIMIT + 4096), headers=JSON)
        assert response.status_code == 413
        context(response)
        assert UUID.fullmatch(response.headers["x-request-id"])
        assert provider.received() == []

    def test_a_413_of_the_gateway_has_the_envelope(self, gateway: Gateway) -> None:
        response = gateway.post("/v1/chat/completions", content=padded(LIMIT + MIB), headers=JSON)
        check_envelope(response, 413, "PAYLOAD_TOO_LARGE")

    @pytest.mark.parametrize(("size", "status"), [(LIMIT - 1, 200), (LIMIT + MIB, 413)])
    def test_the_filter_must_not_make_a_body_larger_than_the_limit(
        self, patient_gateway: Gateway, processor: Processor, provider: StandIn, size: int, status: int
    ) -> None:
        """Envoy refuses it, fail-open or not: the filter has to measure before it replies."""
        changed = padded(size)

        def answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
            return body_answer(changed) if message.WhichOneof("request") == "request_body" else default_answer(message)

        processor.answer = answer
        response = patient_gateway.post("/v1/chat/completions", content=padded(LIMIT - 5000), headers=JSON)
        assert response.status_code == status
        assert [request.body == changed for request in provider.received()] == ([True] if status == 200 else [])

    @pytest.mark.parametrize("over", [1, 4096, 64 * 1024, MIB, 5 * MIB, 20 * MIB])
    @pytest.mark.parametrize("headers", [JSON, {}])
    def test_a_body_that_arrives_while_the_gate_is_asked_is_measured_too(
        self, gateway: Gateway, provider: StandIn, headers: dict[str, str], over: int
    ) -> None:
        """Without the filter `body` a fast client is never read on, and waits for minutes."""
        for _ in range(5):
            response = gateway.post("/v1/chat/completions", content=padded(LIMIT + over), headers=headers)
            check_envelope(response, 413, "PAYLOAD_TOO_LARGE")
        assert provider.received() == []

    @pytest.mark.parametrize("headers", [JSON, {}])
    def test_so_is_one_without_a_length(self, gateway: Gateway, headers: dict[str, str]) -> None:
        def pieces() -> Iterator[bytes]:
            yield padded(LIMIT + MIB)

        for _ in range(5):
            response = gateway.post("/v1/chat/completions", content=pieces(), headers=headers)
            check_envelope(response, 413, "PAYLOAD_TOO_LARGE")

    def test_an_upload_may_be_larger_than_the_limit(self, gateway: Gateway, provider: StandIn) -> None:
        body = b"x" * (LIMIT + MIB)
        headers = {"content-type": "application/octet-stream"}
        response = gateway.post("/v1/audio/transcriptions", content=body, headers=headers)
        assert response.status_code == 404  # the stand-in hears nothing
        assert len(provider.last().body) == len(body)

    def test_a_stream_arrives_as_it_is_made(self, either: Gateway) -> None:
        """Its first events are here long before its last one, which the client's own time-out does not wait for."""
        body = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "x " * 3000}]}
        headers = {"x-standin-chunk-delay-ms": "200"}
        with either.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            assert context(response) == HEALTHY
            lines = (line for line in response.iter_lines() if line)
            assert next(lines).startswith("data: {")
            assert next(lines).startswith("data: {")
