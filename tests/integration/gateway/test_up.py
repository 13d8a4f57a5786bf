"""`extproc up --tls --provider URL` as a user starts it: HTTPS, and the provider's key is in Envoy's hands alone."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from extproc.stack import envoy
from tests.integration.conftest import StandIn

KEY = "sk-canary-of-up"
STOP_LIMIT_S = 120


@dataclass(frozen=True)
class Up:
    described: dict[str, Any]
    state: Path


@pytest.fixture(scope="module")
def up(envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    state = tmp_path_factory.mktemp("up")
    command = ["up", "--json", "--tls", "--listen", f"127.0.0.1:{envoy.free_port()}", "--data", str(state)]
    command += ["--provider", f"http://{provider_process.address}"]
    environment = {"IBEX_ENVOY": str(envoy_binary), "PATH": "/usr/bin:/bin"}
    given = {"IBEX_PROVIDER_KEY": KEY, "OPENAI_API_KEY": f"{KEY}-openai"}
    process = subprocess.Popen(
        [sys.executable, "-m", "extproc", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, **given, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "extproc up ended"
        yield Up(json.loads(line), state)
    finally:
        process.terminate()
        code = process.wait(STOP_LIMIT_S)
        if process.stdout is not None:
            process.stdout.close()
        assert code == 0


def ask(up: Up) -> httpx2.Response:
    trust = ssl.create_default_context(cafile=up.described["ca_file"])
    credential = {"authorization": f"Bearer {up.described['token'] or 'none'}"}
    with httpx2.Client(base_url=up.described["gateway"], verify=trust, http1=False, http2=True, timeout=20) as client:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
        return client.post("/v1/chat/completions", json=body, headers=credential)


def test_it_answers_in_https_and_sends_the_key(up: Up, provider: StandIn) -> None:
    assert up.described["gateway"].startswith("https://127.0.0.1:")
    response = ask(up)
    assert (response.status_code, response.http_version) == (200, "HTTP/2")
    assert dict(provider.last().headers)["authorization"] == f"Bearer {KEY}"


def test_no_process_but_envoy_has_the_key(up: Up) -> None:
    """Of its children; `up` itself was started with it."""
    has_it = set()
    for name, (pid, *_) in up.described["pids"].items():
        if KEY.encode() in Path(f"/proc/{pid}/environ").read_bytes():
            has_it.add(name)
    assert {"filter", "observer", "engine", "envoy"} <= set(up.described["pids"])
    assert has_it == {"envoy", "up"}


def test_the_key_is_in_no_file(up: Up) -> None:
    assert ask(up).status_code == 200
    files = [file for file in up.state.rglob("*") if file.is_file()]
    assert any(file.name == "envoy.rendered.yaml" for file in files)
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_the_certificates_key_is_ours_alone(up: Up) -> None:
    assert (up.state / "tls" / "tls.key").stat().st_mode & 0o777 == 0o600
