"""What a caller sees while something behind the gate, or the gate itself, is slow, dead or flooded."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from extproc.stack.envoy import Address
from tests.integration.conftest import StandIn
from tests.integration.flood_side import connection
from tests.integration.gate.conftest import Caller, Door, Opener
from tests.integration.gate.gate_side import new_token, publish_revocation
from tests.integration.gate.test_gate_cases import check_denied
from tests.integration.otlp import receive_spans
from tests.integration.turns.valkey_side import eventually

TRIES = 5
"""The script's auth service may miss its second while a flood is made beside it: that is a 503, and one asks again."""
HEARD_S = 20.0
"""For a revocation to be heard, on a busy machine; unheard, a token would be served from the cache for 30 s."""


@pytest.fixture(scope="module")
def broken_door(open_door: Opener, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("broken"), rate_limit_rpm="100000") as door:
        yield door


@pytest.fixture
def own(broken_door: Door, provider: StandIn) -> Door:
    """A door whose parts a test may break, and mends; each begins with all of them well."""
    broken_door.auth.delay_s = 0.0
    eventually(lambda: broken_door.gate.metric("ibex_gate_revocation_channel_alive") == 1)
    fresh = broken_door.caller()
    eventually(lambda: "x-ratelimit-limit" in fresh.chat().headers)
    return broken_door


@pytest.fixture(params=["allow", "deny"])
def uncounted(request: pytest.FixtureRequest, open_door: Opener, tmp_path: Path, provider: StandIn) -> Iterator[Door]:
    with open_door(tmp_path, rate_limit_on_error=request.param) as door:
        yield door


def test_a_slow_auth_service_is_a_503_and_what_is_cached_goes_on(own: Door, provider: StandIn) -> None:
    warm, cold = own.caller(), own.caller()
    assert warm.chat().status_code == 200
    own.auth.delay_s = 12.0
    started = time.monotonic()
    check_denied(cold.chat(), 503, "SERVICE_DEGRADED")
    assert time.monotonic() - started < 12.0
    own.auth.delay_s = 0.0
    assert warm.chat().status_code == 200


def test_without_the_auth_service_a_cold_token_is_a_503_and_an_expired_entry_is_not_served(own: Door) -> None:  # 2.8
    expires_at = time.time() + 10
    warm = own.caller(expires_at=expires_at)
    cold = own.caller()
    assert warm.chat().status_code == 200
    assert warm.chat().headers["x-ibex-auth-cached"] == "true"
    own.auth.stop()
    check_denied(cold.chat(), 503, "SERVICE_DEGRADED")
    time.sleep(max(0.0, expires_at - 4.5 - time.time()))  # its last five seconds are not served from the cache
    check_denied(warm.chat(), 503, "SERVICE_DEGRADED")
    own.auth.start()
    eventually(lambda: cold.chat().status_code == 200)


class Load:
    """Callers that go on asking, and what they were told."""

    def __init__(self, callers: list[Caller]) -> None:
        self.seen: Counter[tuple[int, str]] = Counter()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(caller,), daemon=True) for caller in callers]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join(20)

    def _run(self, caller: Caller) -> None:
        with httpx2.Client(base_url=caller.door.gateway.url, timeout=20) as client:
            headers = {"authorization": f"Bearer {caller.token}", "x-ibex-agent-id": caller.agent_id}
            body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
            while not self._stopping.is_set():
                response = client.post("/v1/chat/completions", json=body, headers=headers)
                code = response.json()["error"]["code"] if response.status_code != 200 else ""
                self.seen[response.status_code, code] += 1
                time.sleep(0.02)


def test_killed_and_restarted_under_load_the_auth_service_costs_clean_503s_and_nothing_else(own: Door) -> None:
    load = Load([own.caller() for _ in range(4)] + [own.caller(token_id=None) for _ in range(4)])
    with load.running():
        for _ in range(2):
            time.sleep(1)
            own.auth.stop()
            time.sleep(1)
            own.auth.start()
        time.sleep(1.5)
    assert set(load.seen) == {(200, ""), (503, "SERVICE_DEGRADED")}, load.seen
    fresh = own.caller()
    eventually(lambda: fresh.chat().status_code == 200)


def test_without_redis_the_setting_decides(uncounted: Door, provider: StandIn) -> None:  # 4.6
    caller = uncounted.caller()
    assert "x-ratelimit-limit" in caller.chat().headers
    provider.clear()
    uncounted.redis.kill()
    allows = uncounted.gate.environment["IBEX_RATE_LIMIT_ON_ERROR"] == "allow"
    for _ in range(3):
        response = caller.chat()
        assert not [name for name in response.headers if name.startswith("x-ratelimit-")]
        if allows:
            assert response.status_code == 200
        else:
            check_denied(response, 503, "SERVICE_DEGRADED")
            assert response.headers["retry-after"] == "5"
    assert bool(provider.received()) is allows
    eventually(lambda: "requests cannot be counted" in uncounted.gate.log_file.read_text())
    assert uncounted.gate.log_file.read_text().count("requests cannot be counted") == 1
    uncounted.redis.start()
    eventually(lambda: "x-ratelimit-limit" in caller.chat().headers)


def test_a_redis_that_stands_still_costs_no_more_than_its_deadline(own: Door) -> None:
    caller = own.caller()
    caller.chat()
    own.redis.freeze()
    try:
        started = time.monotonic()
        for _ in range(20):
            assert caller.chat().status_code == 200
        assert time.monotonic() - started < 30
    finally:
        own.redis.thaw()
    eventually(lambda: "x-ratelimit-limit" in caller.chat().headers)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_a_revocation_channel_nothing_is_cached(own: Door, how: str) -> None:  # 7.3
    caller = own.caller()
    caller.chat()
    assert caller.chat().headers["x-ibex-auth-cached"] == "true"
    own.redis.kill() if how == "killed" else own.redis.freeze()
    try:
        eventually(lambda: own.gate.metric("ibex_gate_revocation_channel_alive") == 0)
        before = len(own.auth.calls_for(caller.token))
        for _ in range(3):
            response = caller.chat()
            assert response.status_code == 200
            assert "x-ibex-auth-cached" not in response.headers
        assert len(own.auth.calls_for(caller.token)) == before + 3
        own.auth.tokens[caller.token].is_revoked = True
        check_denied(caller.chat(), 401, "INVALID_TOKEN")
    finally:
        own.redis.start() if how == "killed" else own.redis.thaw()
    other = own.caller()
    eventually(lambda: other.chat().headers.get("x-ibex-auth-cached") == "true")


def test_a_revocation_that_nobody_can_read_empties_the_cache(own: Door) -> None:
    caller = own.caller()
    caller.chat()
    own.redis.execute("PUBLISH", "ibex:token:revocations", "rubbish")
    eventually(lambda: "x-ibex-auth-cached" not in caller.chat().headers)


def test_a_flushed_script_is_sent_again(own: Door) -> None:
    caller = own.caller()
    caller.chat()
    own.redis.execute("SCRIPT", "FLUSH")
    assert "x-ratelimit-limit" in caller.chat().headers


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_gate_that_is_gone_is_a_clean_503_and_the_provider_sees_nothing(
    open_door: Opener, tmp_path: Path, provider: StandIn, how: str
) -> None:
    with open_door(tmp_path, timeout_s=0.5, watchdog_s="0") as door:
        caller = door.caller()
        eventually(lambda: caller.chat().status_code == 200)
        provider.clear()
        door.gate.kill() if how == "killed" else door.gate.signal(signal.SIGSTOP)
        for _ in range(3):
            started = time.monotonic()
            check_denied(caller.chat(), 503, "SERVICE_DEGRADED")
            assert time.monotonic() - started < 15
        assert provider.received() == []
        door.gate.start() if how == "killed" else door.gate.signal(signal.SIGCONT)
        eventually(lambda: caller.chat().status_code == 200)


def test_a_frozen_gate_is_found_and_then_a_503_waits_for_nothing(
    open_door: Opener, tmp_path: Path, provider: StandIn
) -> None:
    """With the health check as shipped; several gates would be left with those that answer."""
    with open_door(tmp_path, timeout_s=15.0, unhealthy_after=2, watchdog_s="0") as door:
        caller = door.caller()
        eventually(lambda: caller.chat().status_code == 200)
        provider.clear()
        door.gate.signal(signal.SIGSTOP)
        eventually(lambda: door.gateway.stat("cluster.extproc_gate.membership_healthy") == 0)
        started = time.monotonic()
        check_denied(caller.chat(), 503, "SERVICE_DEGRADED")
        assert time.monotonic() - started < 15.0, "the answer that nobody gives was not waited for"
        assert provider.received() == []
        door.gate.signal(signal.SIGCONT)
        eventually(lambda: caller.chat().status_code == 200)


def test_a_gate_that_stood_still_does_not_serve_what_was_revoked_meanwhile(own: Door) -> None:
    caller = own.caller()
    caller.chat()
    assert caller.chat().headers["x-ibex-auth-cached"] == "true"
    own.gate.signal(signal.SIGSTOP)
    own.auth.tokens[caller.token].is_revoked = True
    publish_revocation(own.redis.url, own.auth.tokens[caller.token])
    time.sleep(0.2)
    own.gate.signal(signal.SIGCONT)
    eventually(lambda: caller.chat().status_code == 401, HEARD_S)
    check_denied(caller.chat(), 401, "INVALID_TOKEN")


def check_served(caller: Caller, seen: Counter[int]) -> None:
    for _ in range(TRIES):
        status = caller.chat().status_code
        seen[status] += 1
        if status == 200:
            return
    raise AssertionError("a token that was good before is not locked out")


def test_ten_thousand_wrong_tokens_neither_drown_the_auth_service_nor_lock_anybody_out(own: Door) -> None:
    warm, proven, fresh = own.caller(), own.caller(token_id=None), own.caller()
    assert warm.chat().status_code == proven.chat().status_code == 200
    warm_seen: Counter[int] = Counter()
    proven_seen: Counter[int] = Counter()
    fresh_seen: list[int] = []
    wrong_seen: Counter[int] = Counter()
    before = len(own.auth.calls)
    started = time.monotonic()

    async def flood(count: int) -> None:
        async with connection(own.gateway.address) as ask:
            for _ in range(count):
                wrong_seen[await ask(f"authorization: Bearer {new_token()}")] += 1

    async def run() -> None:
        async with asyncio.TaskGroup() as floods:
            running = [floods.create_task(flood(500)) for _ in range(20)]
            while not all(one.done() for one in running):
                for caller, seen in ((warm, warm_seen), (proven, proven_seen)):
                    await asyncio.to_thread(check_served, caller, seen)
                if 200 not in fresh_seen and sum(wrong_seen.values()) > 1000:
                    fresh_seen.append((await asyncio.to_thread(fresh.chat)).status_code)
                await asyncio.sleep(0.25)

    asyncio.run(run())
    took_s = time.monotonic() - started
    assert sum(wrong_seen.values()) == 10_000
    assert set(wrong_seen) <= {401, 503}
    calls = own.auth.calls[before:]
    asked = len([call for call in calls if call.method == "ValidateToken"]) - sum(proven_seen.values())
    assert asked < 150 + 20 * took_s, f"{asked} questions in {took_s:.0f} s"
    assert set(warm_seen) | set(proven_seen) <= {200, 503}
    assert warm_seen[503] + proven_seen[503] < 0.2 * (warm_seen[200] + proven_seen[200])
    assert fresh_seen[-1] == 200, fresh_seen
    assert len(fresh_seen) <= 20, fresh_seen


def test_no_token_is_in_any_log_metric_span_or_answer(open_door: Opener, tmp_path: Path, provider: StandIn) -> None:
    with receive_spans() as receiver:
        host, port = receiver.url.removeprefix("http://").rsplit(":", 1)
        collector = Address(host, int(port))
        with open_door(tmp_path, collector=collector, otlp_endpoint=receiver.url, log_level="debug") as door:
            caller = door.caller()
            answers = [caller.chat(), caller.chat(), caller.chat({"x-ibex-agent-id": caller.token})]
            answers.append(door.gateway.client.get(f"/v1/models?key={caller.token}"))
            answers.append(door.gateway.chat(headers={"x-api-key": new_token()}))
            answers.append(caller.chat({"x-ibex-user-id": f"{caller.token} x"}))
            answers.append(caller.chat({"x-request-id": caller.token}))
            door.auth.behaviour = lambda _method, subject: subject.encode()
            answers.append(door.caller().chat())
            door.auth.behaviour = None
            door.auth.stop()
            answers.append(door.caller().chat())
            door.redis.kill()
            answers.append(caller.chat())
            assert {answer.status_code for answer in answers} >= {200, 400, 401, 503}
            span = receiver.wait_for(lambda span: span.name == "gate.check")
            assert span.attributes["ibex.request.id"]
            eventually(lambda: '"event":"denied"' in door.gate.log_file.read_text())
            metrics = httpx2.get(f"http://{door.gate.admin}/metrics").text
            assert "ibex_gate_checks_total" in metrics
            door.gate.signal(signal.SIGTERM)
            assert door.gate.process is not None
            assert door.gate.process.wait(60) == 0
            logs = "".join(file.read_text() for file in tmp_path.rglob("*.log"))
            told = "".join(answer.text + str(answer.headers) for answer in answers)
            received = b"".join(receiver.raw).decode("latin-1")
            for text in (logs, metrics, told, received, str(provider.received())):
                assert "CANARY" not in text
