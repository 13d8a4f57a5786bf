"""Against a real server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from typing_extensions import override

from extproc.memory.embedding import EmbedderUnavailable, EmbeddingChoice, ModelUnusable, open_embedder

Answer = Callable[[dict[str, Any]], bytes]


class Service(ThreadingHTTPServer):
    daemon_threads = True
    status = 200
    drip_s = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.answer: Answer = embeddings

    @override
    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of these tests

    @property
    def choice(self) -> EmbeddingChoice:
        url = f"http://127.0.0.1:{self.server_address[1]}/v1/"
        return EmbeddingChoice("openai", url=url, key=SecretStr("sk-1"), model="small", dimension=3, timeout_ms=10_000)


class Requests(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        content = self.server.answer(body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not self.server.drip_s:
            self.wfile.write(content)
            return
        try:
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(self.server.drip_s)
        except OSError:
            pass  # the client has gone, as it should

    @override
    def log_message(self, *_: object) -> None:
        pass


def embeddings(body: dict[str, Any]) -> bytes:
    """In reverse, as a service may: the index counts."""
    items = [{"index": n, "embedding": [3.0, 4.0 * n, 0.0]} for n, _ in enumerate(body["input"])]
    return json.dumps({"data": items[::-1]}).encode()


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_vectors_come_back_in_order_and_of_length_one(service: Service) -> None:
    vectors = open_embedder(service.choice).embed(["a", " ", "b"])
    assert np.allclose(vectors, np.array([[1, 0, 0], [0, 0, 0], [0.6, 0.8, 0]]))
    assert service.requests == [
        ("/v1/embeddings", "Bearer sk-1", {"model": "small", "input": ["a", "b"], "encoding_format": "float"})
    ]


def test_many_texts_go_in_several_calls(service: Service) -> None:
    assert open_embedder(service.choice).embed(["tea"] * 130).any(axis=1).all()
    assert [len(body["input"]) for _, _, body in service.requests] == [64, 64, 2]


def test_nothing_to_ask_is_no_call(service: Service) -> None:
    assert open_embedder(service.choice).embed([]).shape == (0, 3)
    assert not service.requests


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>", "not a list of embeddings"),
        (b'{"data": 7}', "not a list of embeddings"),
        (b'{"data": [{"index": 0, "embedding": "AAAA"}]}', "not a list of embeddings"),
        (b'{"data": []}', "another number"),
        (b'{"data": [{"index": 0, "embedding": [1, 2]}]}', "IBEX_EMBEDDING_DIMENSION"),
        (b'{"data": [{"index": 0, "embedding": [1e300, 0, 0]}]}', "not finite"),
        (b'{"data": [{"index": 0, "embedding": [NaN, 0, 0]}]}', "not finite"),
        (b" " * 200_000, "longer than"),
        (b"[" * 60_000, "not a list of embeddings"),
    ],
)
def test_a_wrong_answer_is_a_typed_error(service: Service, content: bytes, reason: str) -> None:
    service.answer = lambda _: content
    with pytest.raises(EmbedderUnavailable, match=reason):
        open_embedder(service.choice).embed(["private"])


def test_an_error_holds_neither_text_nor_key(service: Service) -> None:
    service.status, service.answer = 401, lambda _: b"sk-1 private"
    with pytest.raises(EmbedderUnavailable) as caught:
        open_embedder(service.choice).embed(["private"])
    assert str(caught.value) == "the embedder answered with status 401"
    assert "sk-1" not in repr(service.choice)
    assert "sk-1" not in repr(open_embedder(service.choice))


def test_a_service_that_answers_in_drops_meets_the_deadline(service: Service) -> None:
    service.drip_s = 0.1
    choice = EmbeddingChoice("openai", url=service.choice.url, model="small", dimension=3, timeout_ms=500)
    began = time.monotonic()
    with pytest.raises(EmbedderUnavailable, match="did not answer"):
        open_embedder(choice).embed(["tea"])
    assert time.monotonic() - began < 10  # all of it would take twelve seconds


def test_a_service_that_is_gone_is_a_typed_error(service: Service) -> None:
    choice = EmbeddingChoice("openai", url="http://127.0.0.1:1/v1", model="small", dimension=3)
    with pytest.raises(EmbedderUnavailable, match="did not answer"):
        open_embedder(choice).embed(["tea"])


def test_documents_may_take_longer() -> None:
    choice = EmbeddingChoice("openai", url="http://h", model="m", dimension=3)
    assert choice.for_documents().timeout_ms > 100 * choice.timeout_ms


@pytest.mark.parametrize(
    ("choice", "hint"),
    [
        (EmbeddingChoice("openai", url="ftp://h", model="m", dimension=3), "IBEX_EMBEDDING_URL"),
        (EmbeddingChoice("openai", url="http://h", dimension=3), "IBEX_EMBEDDING_MODEL"),
        (EmbeddingChoice("openai", url="http://h", model="m"), "IBEX_EMBEDDING_DIMENSION"),
        (EmbeddingChoice("minilm"), "IBEX_EMBEDDING_DIR"),
    ],
)
def test_an_unfinished_choice_says_what_to_set(choice: EmbeddingChoice, hint: str) -> None:
    with pytest.raises(ModelUnusable, match=hint):
        open_embedder(choice)


def test_names_tell_models_apart(service: Service) -> None:
    assert open_embedder(service.choice).name == "openai:small:3"
    assert open_embedder(EmbeddingChoice()).name == "static-minilm-256-v1"
