"""No credential leaves Envoy for the observer: what it is shown is looked at here message by message."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration.conftest import File, StandIn, trust_gate
from tests.integration.http_side import TOKEN
from tests.integration.processor import Processor, serve

SECRET = TOKEN
CARRIERS = ["authorization", "proxy-authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie"]


@pytest.fixture(scope="module")
def recorder() -> Iterator[tuple[Processor, Address]]:
    address, processor = Address("127.0.0.1", envoy.free_port()), Processor()
    server = serve(processor, str(address))
    yield processor, address
    server.stop(0).wait(10)


@pytest.mark.parametrize("file", ["envoy.yaml", "dropin.yaml"])
def test_the_observer_is_shown_no_credential(
    file: File,
    envoy_binary: Path,
    recorder: tuple[Processor, Address],
    processor: Processor,
    processor_address: Address,
    gate_address: Address,
    provider: StandIn,
    tmp_path: Path,
) -> None:
    recorder[0].reset()
    plan = envoy.Plan(
        listen=Address("127.0.0.1", envoy.free_port()),
        admin=Address("127.0.0.1", envoy.free_port()),
        filters=[processor_address],
        gates=[gate_address] if file == "envoy.yaml" else [],
        observers=[recorder[1]],
        provider=envoy.Provider(provider.address),
    )
    config = envoy.render(envoy.load(envoy.shipped(file)), plan)
    if file == "envoy.yaml":
        trust_gate(config)
    envoy._cluster(config, envoy.OBSERVER_CLUSTER).pop("health_checks")  # the recorder has no health service
    proxy = envoy.start(envoy_binary, envoy.write(config, tmp_path / "envoy.yaml"), plan.admin, state_dir=tmp_path)
    try:
        proxy.wait_ready(45)
        with httpx2.Client(base_url=f"http://{plan.listen}", timeout=20) as client:
            headers = dict.fromkeys(CARRIERS, f"Bearer {SECRET}") | {
                "x-standin-response-header": "set-cookie: session=1"
            }
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
            path = f"/v1/chat/completions?key={SECRET}" if file == "envoy.yaml" else "/v1/chat/completions"
            response = client.post(path, json=body, headers=headers)
            assert response.status_code == 200
            assert response.headers["set-cookie"] == "session=1"
            has_passed = {name for name, value in provider.last().headers if SECRET in value}
            assert has_passed == (set() if file == "envoy.yaml" else set(CARRIERS))  # the gateway has keys of its own
            for _ in range(200):
                if any("response_body" in stream.kinds for stream in recorder[0].streams):
                    break
                time.sleep(0.05)
    finally:
        proxy.stop()
    (stream,) = recorder[0].streams
    assert {"request_headers", "request_body", "response_headers", "response_body"} <= set(stream.kinds)
    names = {header.key for one in stream.messages for header in one.response_headers.headers.headers}
    assert "content-type" in names
    assert "set-cookie" not in names
    shown = b"".join(message.SerializeToString() for message in stream.messages)
    assert b"hello" in shown
    assert SECRET.encode() not in shown
