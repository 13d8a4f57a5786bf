"""Cases 2.8, 4.6, 7.3 and what surrounds them: a gate as shipped whose auth service is slow, killed or flooded, and
whose Redis is gone. Whoever may not pass does not pass meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest

from extproc.auth.token import mint
from extproc.stack import envoy
from extproc.stack.child import die_with_parent
from extproc.stack.envoy import Address
from tests.integration.conftest import UP_S, StandIn, answers
from tests.integration.flood_side import connection
from tests.integration.gate.gate_side import GateProcess
from tests.integration.turns import valkey_side
from tests.security.conftest import Evidence
from tests.security.security_side import PATH, Caller, Commands, Gateway, Secrets, check_refused, eventually

WRONG_TOKENS = 10_000
CONNECTIONS = 20
AGENT_CACHE_S = 2.0
WAITED_S = 0.3
"""Envoy's patience with the gate, as shipped."""
SLACK_S = 3.0
"""Of a busy machine."""


class SlowLink:
    """TCP to `target`, where each byte on the way there waits for `delay_s` seconds."""

    def __init__(self, target: Address) -> None:
        self.address = Address("127.0.0.1", envoy.free_port())
        self.delay_s = 0.0
        self._target = target
        self._listener = socket.create_server(self.address)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for one in list(self._open):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open += [near, far]
            for source, sink, waits in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._copy, args=(source, sink, waits), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, waits: bool) -> None:
        try:
            while piece := source.recv(65536):
                if waits:
                    time.sleep(self.delay_s)
                sink.sendall(piece)
        except OSError:
            pass
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@dataclass
class AuthProcess:
    """`extproc auth`, killed and started again at the same address."""

    address: Address
    admin: Address
    environment: dict[str, str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "extproc", "auth", "--listen", str(self.address), "--admin", str(self.admin)]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        eventually(answers(f"http://{self.admin}/ready"), UP_S)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def asked(self) -> float:
        """ValidateToken calls that it answered."""
        lines = httpx2.get(f"http://{self.admin}/metrics", timeout=20).text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("ibex_auth_requests_total{") and "ValidateToken" in line
        )

    def cpu_s(self) -> float:
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@dataclass
class Door:
    """Valkey, auth service, two gates (one for each setting of IBEX_RATE_LIMIT_ON_ERROR), an Envoy each."""

    redis: valkey_side.Server
    auth: AuthProcess
    link: SlowLink
    gates: dict[str, GateProcess]
    gateways: dict[str, Gateway]
    commands: Commands

    def caller(self, org_id: str = "", setting: str = "allow") -> Caller:
        org_id = org_id or self.commands.org("outage", limit=1000)
        agent_id = self.commands.agent(org_id)
        return Caller(self.gateways[setting], org_id, agent_id, *self.commands.token(org_id))

    def through(self, setting: str, caller: Caller) -> Caller:
        return Caller(self.gateways[setting], caller.org_id, caller.agent_id, caller.token, caller.token_id)


@pytest.fixture(scope="module")
def shared_door(
    envoy_binary: Path,
    provider_process: StandIn,
    secrets: Secrets,
    evidence: Evidence,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Door]:
    directory = tmp_path_factory.mktemp("outages")
    evidence.directories.append(directory)
    nobody = Address("127.0.0.1", envoy.free_port())
    with ExitStack() as stack:
        redis = stack.enter_context(valkey_side.valkey(directory / "valkey", "--appendfsync", "no"))
        auth_address, auth_admin = (Address("127.0.0.1", envoy.free_port()) for _ in range(2))
        common = {"IBEX_REDIS_URL": redis.url, "IBEX_LOG_LEVEL": "debug", "IBEX_OTLP_ENDPOINT": evidence.spans.url}
        auth_settings = {**common, "IBEX_DATA": str(directory / "data")}
        auth = AuthProcess(auth_address, auth_admin, auth_settings, directory / "auth.log")
        stack.callback(auth.kill)
        auth.start()
        link = SlowLink(auth_address)
        stack.callback(link.close)
        gates, gateways = {}, {}
        for setting in ("allow", "deny"):
            place = directory / setting
            place.mkdir()
            address, admin, listen, envoy_admin = (Address("127.0.0.1", envoy.free_port()) for _ in range(4))
            own = {
                "IBEX_GATE_LISTEN": str(address),
                "IBEX_ADMIN_LISTEN": str(admin),
                "IBEX_AUTH_ADDRESS": str(link.address),
                "IBEX_RATE_LIMIT_ON_ERROR": setting,
            }
            gates[setting] = gate = GateProcess(place, {**common, **own}, address, admin)
            stack.callback(gate.kill)
            gate.start()
            plan = envoy.Plan(
                listen,
                envoy_admin,
                filters=[nobody],
                gates=[address],
                provider=envoy.Provider(provider_process.address),
            )
            config = envoy.render(envoy.load(envoy.shipped("envoy.yaml")), plan)
            process = envoy.start(envoy_binary, envoy.write(config, place / "envoy.yaml"), envoy_admin, state_dir=place)
            stack.callback(process.stop)
            process.wait_ready(45)
            client = stack.enter_context(httpx2.Client(base_url=f"http://{listen}", timeout=20, trust_env=False))
            gateways[setting] = Gateway(listen, client, provider_process)
            eventually(lambda gate=gate: gate.metric("ibex_gate_revocation_channel_alive") == 1)  # type: ignore[misc]
        yield Door(redis, auth, link, gates, gateways, Commands(directory / "data", redis.url, secrets))


@pytest.fixture
def door(shared_door: Door, provider: StandIn) -> Iterator[Door]:
    yield shared_door
    shared_door.link.delay_s = 0.0


def settled(caller: Caller) -> Caller:
    eventually(lambda: caller.once().status_code == 200)
    return caller


def test_2_8_a_slow_auth_service_is_a_clean_503_within_envoys_patience(door: Door, provider: StandIn) -> None:
    cold, warm = door.caller(), settled(door.caller())
    door.link.delay_s = 0.5
    provider.clear()
    began = time.monotonic()
    refused = cold.once()
    assert time.monotonic() - began < WAITED_S + SLACK_S
    check_refused(refused, 503, "SERVICE_DEGRADED")
    assert int(refused.headers["retry-after"]) >= 1
    assert provider.received() == []
    time.sleep(AGENT_CACHE_S + 0.1)
    check_refused(warm.once(), 503, "SERVICE_DEGRADED")
    assert provider.received() == [], "the token is remembered, its agent no longer"
    door.link.delay_s = 0.0
    settled(cold)
    settled(warm)


def test_2_8_without_an_auth_service_nothing_cold_passes_and_nothing_that_ran_out(
    door: Door, provider: StandIn
) -> None:
    cold, warm = door.caller(), settled(door.caller())
    door.auth.kill()
    killed = time.monotonic()
    try:
        provider.clear()
        check_refused(cold.once(), 503, "SERVICE_DEGRADED")
        assert provider.received() == []
        late: Counter[int] = Counter()
        while (since := time.monotonic() - killed) < AGENT_CACHE_S + 1.5:
            status = warm.once().status_code
            if since > AGENT_CACHE_S + 0.1:
                late[status] += 1
            time.sleep(0.1)
        assert set(late) == {503}
        gateway = door.gateways["allow"]
        wrong = gateway.patiently(lambda: gateway.chat(headers={"authorization": "Bearer ibex_pat_wrong!"}))
        check_refused(wrong, 401, "INVALID_TOKEN")
    finally:
        door.auth.start()
    settled(cold)
    settled(warm)


def test_2_8_killed_and_restarted_under_load_it_lets_nobody_pass_who_may_not(door: Door, provider: StandIn) -> None:
    """Nor does it tell anybody good that the token were wrong."""
    good = [settled(door.caller()) for _ in range(2)]
    revoked, stranger = settled(door.caller()), door.caller()
    seen: dict[str, Counter[int]] = {"good": Counter(), "revoked": Counter(), "stranger": Counter()}
    has_ended = threading.Event()

    def load(kind: str, caller: Caller, headers: dict[str, str]) -> None:
        with caller.gateway.connect() as client:
            here = Caller(
                Gateway(caller.gateway.address, client, caller.gateway.provider),
                caller.org_id,
                caller.agent_id,
                caller.token,
            )
            while not has_ended.is_set():
                seen[kind][here.once(headers).status_code] += 1
                time.sleep(0.02)

    door.auth.kill()
    door.commands.run("token", "revoke", revoked.token_id, "--org", revoked.org_id)
    time.sleep(0.5)
    threads = [threading.Thread(target=load, args=("good", one, {})) for one in good]
    threads.append(threading.Thread(target=load, args=("revoked", revoked, {})))
    threads.append(threading.Thread(target=load, args=("stranger", stranger, {"x-ibex-agent-id": good[0].agent_id})))
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.7)
        door.auth.start()
        eventually(lambda: all(one.once().status_code == 200 for one in good))
        door.auth.kill()
        time.sleep(0.7)
    finally:
        door.auth.start()
        eventually(lambda: all(one.once().status_code == 200 for one in good))
        has_ended.set()
        for thread in threads:
            thread.join(30)
    assert set(seen["good"]) <= {200, 503}
    assert seen["good"][200]
    assert seen["good"][503]
    assert set(seen["revoked"]) <= {401, 503}
    assert set(seen["stranger"]) <= {403, 503}


@pytest.mark.parametrize("setting", ["allow", "deny"])
def test_4_6_and_7_3_without_redis(door: Door, provider: StandIn, setting: str) -> None:
    """Counting is the setting's matter; no token is from the cache, so that nothing revoked passes."""
    caller = settled(door.caller(setting=setting))
    doomed = settled(door.through(setting, door.caller(caller.org_id)))
    eventually(lambda: caller.once().headers.get("x-ibex-auth-cached") == "true")
    assert "x-ratelimit-limit" in caller.chat().headers
    door.redis.kill()
    try:
        # Until the gate knows that its channel is gone.
        eventually(lambda: door.gates[setting].metric("ibex_gate_revocation_channel_alive") == 0)
        provider.clear()
        if setting == "deny":
            eventually(lambda: caller.once().headers.get("retry-after") == "5")
            check_refused(caller.once(), 503, "SERVICE_DEGRADED")
            assert provider.received() == []
        else:
            before = door.auth.asked()
            for _ in range(3):
                response = caller.chat()
                assert response.status_code == 200
                assert not {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"} & set(response.headers)
                assert "x-ibex-auth-cached" not in response.headers
            assert door.auth.asked() >= before + 3
            eventually(lambda: "requests cannot be counted" in door.gates[setting].log_file.read_text())
            revoke_without_redis(door, doomed)
            check_refused(doomed.chat(), 401, "INVALID_TOKEN")
    finally:
        door.redis.start()
    eventually(lambda: door.gates[setting].metric("ibex_gate_revocation_channel_alive") == 1)
    eventually(lambda: "x-ratelimit-limit" in caller.once().headers)


def revoke_without_redis(door: Door, caller: Caller) -> None:
    """The command says on standard error that it could tell no gate, and revokes all the same."""
    shown = door.commands.run("token", "revoke", caller.token_id, "--org", caller.org_id)
    assert shown["published"] is False


def test_ten_thousand_wrong_tokens_neither_drown_the_auth_service_nor_keep_others_out(door: Door) -> None:
    warm, fresh = settled(door.caller()), door.caller()
    asked, cpu_s, began = door.auth.asked(), door.auth.cpu_s(), time.monotonic()
    flood = Flood(door.gateways["allow"].address)
    thread = threading.Thread(target=flood.run)
    thread.start()
    statuses: Counter[int] = Counter()
    newcomers: list[int] = []
    while thread.is_alive():
        statuses[warm.chat().status_code] += 1  # again, where a busy gate missed its 0.3 s
        if 200 not in newcomers and sum(flood.seen.values()) > 1000:
            newcomers.append(fresh.once().status_code)
        time.sleep(0.1)
    thread.join()
    took_s = time.monotonic() - began
    assert sum(flood.seen.values()) == WRONG_TOKENS
    assert set(flood.seen) <= {401, 503}, "no wrong token passes"
    assert set(statuses) == {200}, (statuses, "those who are known are served meanwhile")
    # The gate asks for at most 200, and 50 a second more; each regular client once in two seconds for its agent.
    questions = door.auth.asked() - asked
    assert questions <= 250 + 60 * took_s, f"{questions} questions in {took_s:.0f} s"
    assert questions < WRONG_TOKENS / 2
    assert door.auth.cpu_s() - cpu_s < 0.05 * questions + 0.2 * took_s + 1, "no hash is computed for what is unknown"
    eventually(lambda: fresh.once().status_code == 200)


class Flood:
    """Wrong tokens, each another one, on a few connections."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.seen: Counter[int] = Counter()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        await asyncio.gather(*(self._one_connection(WRONG_TOKENS // CONNECTIONS) for _ in range(CONNECTIONS)))

    async def _one_connection(self, count: int) -> None:
        async with connection(self.address, f"POST {PATH}") as ask:
            for _ in range(count):
                self.seen[await ask(f"authorization: Bearer {mint()[0]}")] += 1
