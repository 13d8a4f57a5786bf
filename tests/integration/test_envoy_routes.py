"""Which provider gets a request, and what happens to bodies that Envoy cannot read."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from tests.integration.conftest import Gateway, StandIn
from tests.integration.http_side import JSON, check_envelope
from tests.integration.processor import Processor

DEEP = b'{"model":"gpt-4o","messages":' + b"[" * 300_000 + b"]" * 300_000 + b"}"
ODD_BODIES = {
    "truncated": b'{"model":"gpt-4o","messages":[{"role":"us',
    "nan": b'{"model":"gpt-4o","n":NaN}',
    "lone surrogate": b'{"model":"gpt-4o","n":"\\ud800"}',
    "invalid utf-8": b'{"model":"gpt-4o","n":"\xff\xfe"}',
    "two documents": b'{"model":"gpt-4o"}{"model":"gpt-4o"}',
    "white space": b" \n",
    "gzip": gzip.compress(b'{"model":"gpt-4o","messages":[]}', mtime=0),
    "infinite number": b'{"model":"gpt-4o","n":1e999}',
}
READABLE_BODIES = {
    "byte-order mark": b'\xef\xbb\xbf{"model":"gpt-4o","messages":[]}',
    "big integer": b'{"model":"gpt-4o","n":' + b"9" * 80 + b"}",
    "escaped key": b'{"m\\u006fdel":"gpt-4o"}',
    "duplicate key": b'{"model":"nobody","model":"gpt-4o"}',
    "nested 900 deep": b'{"model":"gpt-4o","n":' + b"[" * 900 + b"]" * 900 + b"}",
}


def has_deep_json_crash(version: str) -> bool:
    """Envoy 1.36.4 and 1.37.0 overflow the stack in json_to_metadata; seen here, and said in envoy.yaml."""
    return version in {"1.36.4", "1.37.0"}


class TestProviderByModel:
    @pytest.mark.parametrize(
        ("model", "cluster"),
        [
            ("gpt-4o", "provider_openai"),
            ("gpt-3.5-turbo-0125", "provider_openai"),
            ("chatgpt-4o-latest", "provider_openai"),
            ("o1", "provider_openai"),
            ("o3-mini", "provider_openai"),
            ("o4-mini", "provider_openai"),
            ("ft:gpt-4o-mini:acme::id", "provider_openai"),
            ("claude-sonnet-4-5", "provider_anthropic"),
            ("meta-llama/Llama-3.1-8B-Instruct", "provider_selfhosted"),
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses?x=1", "/v1/messages"])
    def test_chat_goes_where_the_model_lives(self, gateway: Gateway, path: str, model: str, cluster: str) -> None:
        response = gateway.post(path, json={"model": model, "messages": [], "input": ""})
        assert response.status_code == 200
        assert gateway.access_log(response.headers["x-request-id"])["cluster"] == cluster

    @pytest.mark.parametrize(
        ("method", "path", "body", "headers", "cluster"),
        [
            ("GET", "/v1/models", None, {}, "provider_openai"),
            ("GET", "/v1/models", None, {"anthropic-version": "2023-06-01"}, "provider_anthropic"),
            ("GET", "/v1/chat/completions", None, {}, "provider_openai"),
            ("POST", "/v1/embeddings", {"model": "text-embedding-3-small"}, {}, "provider_openai"),
            ("POST", "/v1/embeddings", {"model": "BAAI/bge-m3"}, {}, "provider_selfhosted"),
            ("POST", "/v1/messages/count_tokens", {"model": "claude-x"}, {}, "provider_anthropic"),
            ("POST", "/v1beta/models/gemini-2.5-pro:streamGenerateContent", {}, {}, "provider_gemini"),
            ("GET", "/v1beta/models", None, {}, "provider_gemini"),
        ],
    )
    def test_the_rest_goes_by_a_clear_rule(
        self, gateway: Gateway, method: str, path: str, body: Any, headers: dict[str, str], cluster: str
    ) -> None:
        response = gateway.client.request(method, path, json=body, headers=headers)
        assert gateway.access_log(response.headers["x-request-id"])["cluster"] == cluster

    @pytest.mark.parametrize("model", ["nobody", "xgpt-4", "gemini-2.5-pro", "5", 5, True, 'a"b\n'])
    def test_a_model_of_nobody_is_a_501(self, gateway: Gateway, provider: StandIn, model: Any) -> None:
        response = gateway.post("/v1/chat/completions", json={"model": model})
        check_envelope(response, 501, "PROVIDER_NOT_CONFIGURED")
        assert provider.received() == []

    @pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}, {"model": {}}, {"model": []}, [], "x", 1])
    def test_a_chat_without_a_model_is_a_400(self, gateway: Gateway, provider: StandIn, body: Any) -> None:
        check_envelope(gateway.post("/v1/chat/completions", json=body), 400, "VALIDATION_ERROR")
        assert provider.received() == []

    def test_an_empty_chat_is_a_400(self, gateway: Gateway) -> None:
        check_envelope(gateway.post("/v1/chat/completions"), 400, "VALIDATION_ERROR")
        check_envelope(gateway.post("/v1/chat/completions", headers=JSON), 400, "VALIDATION_ERROR")

    def test_chat_of_a_foreign_type_is_a_415(self, gateway: Gateway) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
            response = gateway.post(
                "/v1/chat/completions", content=b'{"model":"gpt-4o"}', headers={"content-type": kind}
            )
            check_envelope(response, 415, "UNSUPPORTED_MEDIA_TYPE")

    @pytest.mark.parametrize(
        "kind", ["application/json; charset=utf-8", "Application/JSON;x=y", "application/a+json", None]
    )
    def test_a_type_of_json_is_json(self, gateway: Gateway, kind: str | None) -> None:
        headers = {"content-type": kind} if kind else {}
        response = gateway.post("/v1/chat/completions", content=b'{"model":"gpt-4o"}', headers=headers)
        assert response.status_code == 200

    def test_requests_that_are_no_chat_are_not_read_by_the_filter(self, gateway: Gateway, processor: Processor) -> None:
        gateway.post("/v1/embeddings", json={"model": "text-embedding-3-small"})
        assert [stream.kinds for stream in processor.streams] == [["request_headers", "response_headers"]]

    def test_requests_that_go_nowhere_are_not_read_by_the_filter(
        self, gateway: Gateway, processor: Processor, envoy_version: str
    ) -> None:
        gateway.post("/v1/chat/completions", json={"model": "nobody"})
        gateway.post("/v1/chat/completions", json={})
        # Envoy 1.36 does not show its own answers to ext_proc; the defaults of `strip` stand.
        phases = ["request_headers"] if envoy_version.startswith("1.36.") else ["request_headers", "response_headers"]
        assert [stream.kinds for stream in processor.streams] == [phases] * 2


class TestOddBodies:
    @pytest.mark.parametrize("name", ODD_BODIES)
    def test_chat_that_nobody_can_read_is_a_400(self, gateway: Gateway, provider: StandIn, name: str) -> None:
        headers = JSON | ({"content-encoding": "gzip"} if name == "gzip" else {})
        response = gateway.post("/v1/chat/completions", content=ODD_BODIES[name], headers=headers)
        check_envelope(response, 400, "INVALID_JSON")
        assert provider.received() == []

    def test_chat_nested_300_000_deep_is_a_400(self, gateway: Gateway, envoy_version: str) -> None:
        if has_deep_json_crash(envoy_version):
            pytest.skip("this Envoy crashes on it")
        response = gateway.post("/v1/chat/completions", content=DEEP, headers=JSON)
        check_envelope(response, 400, "INVALID_JSON")

    @pytest.mark.parametrize("name", READABLE_BODIES)
    def test_odd_chat_passes_to_the_byte(self, gateway: Gateway, provider: StandIn, name: str) -> None:
        gateway.post("/v1/chat/completions", content=READABLE_BODIES[name], headers=JSON)
        assert provider.last().body == READABLE_BODIES[name]

    @pytest.mark.parametrize("name", [*ODD_BODIES, *READABLE_BODIES, "deep"])
    def test_beside_your_own_envoy_every_body_passes_to_the_byte(
        self, dropin: Gateway, provider: StandIn, processor: Processor, name: str
    ) -> None:
        body = (ODD_BODIES | READABLE_BODIES | {"deep": DEEP})[name]
        headers = JSON | ({"content-encoding": "gzip"} if name == "gzip" else {})
        response = dropin.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code in {200, 400}
        assert provider.last().body == body
        assert processor.streams[-1].body == body
        assert ("content-length", str(len(body))) in provider.last().headers

    @pytest.mark.parametrize("name", [*ODD_BODIES])
    def test_a_request_that_is_no_chat_passes_to_the_byte(self, gateway: Gateway, provider: StandIn, name: str) -> None:
        response = gateway.post("/v1/embeddings", content=ODD_BODIES[name], headers=JSON)
        assert "request_id" not in response.text
        assert provider.last().body == ODD_BODIES[name]
