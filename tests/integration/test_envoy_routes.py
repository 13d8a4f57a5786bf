"""Which provider gets a request, and what happens to bodies that Envoy cannot read."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc.chat import recognise
from tests.integration.conftest import Gateway, StandIn
from tests.integration.http_side import AUTHORIZED, JSON, check_envelope, raw, request_bytes
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
            ("GET", "/v1/models/gpt-4o", None, {}, "provider_openai"),
            ("GET", "/v1/models/owner%2Fname", None, {}, "provider_openai"),
            ("GET", "/v1/models/claude-x", None, {"anthropic-version": "2023-06-01"}, "provider_anthropic"),
            ("POST", "/v1/embeddings", {"model": "text-embedding-3-small"}, {}, "provider_openai"),
            ("POST", "/v1/embeddings", {"model": "BAAI/bge-m3"}, {}, "provider_selfhosted"),
            ("POST", "/v1/messages/count_tokens", {"model": "claude-x"}, {}, "provider_anthropic"),
            ("POST", "/v1beta/models/gemini-2.5-pro:streamGenerateContent", {}, {}, "provider_gemini"),
            ("POST", "/v1beta/models/gemma-3-27b-it:generateContent", {}, {}, "provider_gemini"),
            ("POST", "/v1/models/gemini-2.5-pro:countTokens", {}, {}, "provider_gemini"),
            ("POST", "/v1beta/models/gemini-embedding-001:embedContent", {}, {}, "provider_gemini"),
            ("GET", "/v1beta/models", None, {}, "provider_gemini"),
            ("GET", "/v1beta/models/gemini-2.5-pro", None, {}, "provider_gemini"),
            ("POST", "/v1/moderations", {"input": ""}, {}, "provider_openai"),
            ("POST", "/v1/images/generations", {"model": "gpt-image-1"}, {}, "provider_openai"),
            ("POST", "/v1/audio/speech", {"model": "tts-1"}, {}, "provider_openai"),
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


class TestWhatProvidersKeep:
    """It belongs to the account of the gateway's key, so to every organisation at once."""

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/responses/resp_1",
            "/v1/responses/resp_1/input_items",
            "/v1/chat/completions/chatcmpl-1",
            "/v1/chat/completions/chatcmpl-1/messages",
            "/v1/conversations/conv_1",
            "/v1/files",
            "/v1/files/file-1/content",
            "/v1/uploads/upload_1",
            "/v1/batches",
            "/v1/messages/batches",
            "/v1/messages/batches/msgbatch_1/results",
            "/v1/vector_stores",
            "/v1/containers/cntr_1/files",
            "/v1/assistants",
            "/v1/threads/thread_1/messages",
            "/v1/threads/thread_1/runs",
            "/v1/fine_tuning/jobs",
            "/v1/evals",
            "/v1/organization/usage/completions",
            "/v1/models/..%2ffiles",
            "/v1/models/%2e%2e/files",
            "/v1/models/x/..%252F..%252Ffiles",
            "/v1/embeddings/../files",
            "/v1beta/files",
            "/v1beta/cachedContents",
            "/v1beta/batches",
            "/v1beta/tunedModels",
            "/v1beta/corpora",
            "/v1beta/models/gemini-2.5-pro:batchGenerateContent",
            "/v1beta/models/..%2Ffiles",
            "/upload/v1beta/files",
        ],
    )
    @pytest.mark.parametrize("given", [{}, {"anthropic-version": "2023-06-01"}], ids=["", "anthropic"])
    def test_it_is_nobodys(self, gateway: Gateway, provider: StandIn, path: str, given: dict[str, str]) -> None:
        for method in ("GET", "POST", "DELETE"):
            asked = request_bytes(method, path, AUTHORIZED | JSON | given, b'{"model":"owner/name"}')
            status, _, body = raw(gateway.address, asked)
            assert (status, json.loads(body)["error"]["code"]) == (404, "NOT_FOUND"), method
        assert provider.received() == []

    @pytest.mark.parametrize("path", ["/v1/models/ft:gpt-4o:acme::id", "/v1/models"])
    @pytest.mark.parametrize("method", ["DELETE", "POST", "PATCH"])
    def test_models_are_read_only(self, gateway: Gateway, provider: StandIn, method: str, path: str) -> None:
        check_envelope(gateway.client.request(method, path), 404, "NOT_FOUND")
        assert provider.received() == []


CHAT_PATHS = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1beta/models/gemini-2.5-pro:generateContent",
    "/v1beta/models/gemma-3-27b-it:streamGenerateContent",
    "/v1/models/gemini-2.5-flash:generateContent",
)
STATELESS = re.compile(
    r"/v1/(models(/[^/]+){0,2}|messages/count_tokens|embeddings|moderations|images/[a-z]+|audio/[a-z]+)"
    r"|/v1(beta)?/models/[^/:]+:(countTokens|embedContent|batchEmbedContents|predict)"
)
"""No request for a chat."""


class TestChat:
    @pytest.mark.parametrize("end", ["", "/", "//", "?alt=sse", "/?a=1", "?a=" + "x" * 1_990])
    @pytest.mark.parametrize("path", CHAT_PATHS)
    def test_it_is_shown_to_the_filter_whole(
        self, gateway: Gateway, provider: StandIn, processor: Processor, path: str, end: str
    ) -> None:
        gateway.post(path + end, json={"model": "gpt-4o", "messages": []})
        assert "request_body" in processor.streams[-1].kinds
        seen = processor.streams[-1].header(":path")
        assert seen is not None
        assert recognise("POST", seen, "application/json") is not None
        assert provider.last().path == seen

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/ch%61t/completions",
            "/v1/chat%2Fcompletions",
            "/v1/./chat//completions",
            "/v1/x/../responses",
            "/v1//messages/",
            "/v1beta/models/gemini-2.5-pro%3AgenerateContent",
            "/v1beta/models%2Fgemini-2.5-pro:generateContent",
            "/v1beta/openai/chat/completions",
            "/v1beta/tunedModels/mine:generateContent",
            "/v1beta/tunedModels/models/mine:generateContent",
            "/v1beta/models/a/gemini:generateContent",
            "/openai/deployments/gpt-4o/chat/completions",
            "/v1/completions",
            "/v1/complete",
            "/v1/threads/runs",
            "/V1/chat/completions",
            "/v1/Chat/Completions",
            "/v1/chat/completions;x",
            "/v1/responses/compact",
        ],
    )
    def test_no_spelling_passes_the_filter_by(
        self, gateway: Gateway, provider: StandIn, processor: Processor, path: str
    ) -> None:
        check_passage(gateway, provider, processor, path, "application/json")

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_no_path_that_is_made_of_theirs_does(
        self, gateway: Gateway, provider: StandIn, processor: Processor, data: st.DataObject
    ) -> None:
        check_passage(gateway, provider, processor, data.draw(spelt()), data.draw(st.sampled_from(TYPES)))

    @pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
    @pytest.mark.parametrize("path", [*CHAT_PATHS, "/v1/chat/completions/"])
    def test_another_method_is_a_405_that_says_which(
        self, gateway: Gateway, provider: StandIn, method: str, path: str
    ) -> None:
        response = gateway.client.request(method, path)
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        if method != "HEAD":
            check_envelope(response, 405, "METHOD_NOT_ALLOWED")
        assert provider.received() == []

    def test_what_nobody_can_read_is_refused_for_gemini_too(self, gateway: Gateway, provider: StandIn) -> None:
        path = "/v1beta/models/gemini-2.5-pro:generateContent"
        check_envelope(gateway.post(path, content=b'{"contents":', headers=JSON), 400, "INVALID_JSON")
        foreign = gateway.post(path, content=b"{}", headers={"content-type": "text/plain"})
        check_envelope(foreign, 415, "UNSUPPORTED_MEDIA_TYPE")
        assert provider.received() == []


TYPES = ["application/json", "", "text/plain", "application/a+json", "APPLICATION/JSON ; x", "application/json;,text/x"]


@st.composite
def spelt(draw: st.DrawFn) -> str:
    """A chat path, written in a way that some server may take for the same."""
    path = draw(st.sampled_from(["", "", "/v1", "/v1beta", "/v1beta/openai", "/x"])) + draw(st.sampled_from(CHAT_PATHS))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(1, len(path) - 1))
        before, one, after = path[:at], path[at], path[at + 1 :]
        changed = [
            one.swapcase(),
            f"%{ord(one):02x}",
            f"%25{ord(one):02X}",
            "//" if one == "/" else one,
            "/./" if one == "/" else one,
            "/x/../" if one == "/" else one,
            "%5c" if one == "/" else one,
            ";a" + one,
        ]
        path = before + draw(st.sampled_from(changed)) + after
    return path + draw(
        st.sampled_from(["", "", "/", "//", "/.", "%2F", "?", "?x=/v1/models", ";", "%20", "%00", "%3F"])
    )


def check_passage(gateway: Gateway, provider: StandIn, processor: Processor, path: str, content_type: str) -> None:
    """Whatever reaches a provider has been shown to the filter whole, and was a chat for it; else it is no chat."""
    provider.clear()
    processor.reset()
    headers = AUTHORIZED | ({"content-type": content_type} if content_type else {})
    status, _, _ = raw(gateway.address, request_bytes("POST", path, headers, b'{"model":"gpt-4o","messages":[]}'))
    received = provider.received()
    if not received:
        assert status in {400, 404, 415}
    elif recognise("POST", received[-1].path, content_type) is not None:
        assert "request_body" in processor.streams[-1].kinds
    else:
        assert STATELESS.fullmatch(received[-1].path.partition("?")[0])


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
