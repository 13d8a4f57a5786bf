"""Commands as a shell runs them: what they say, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from extproc.stack import envoy
from tests.integration.conftest import answers, running
from tests.integration.patient_stack import patience
from tests.integration.whole.conftest import Stack


def extproc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "extproc", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )


def check_refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode not in {0, -9}
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_finds_nothing_wrong_here(tmp_path: Path, envoy_binary: Path) -> None:
    done = extproc("doctor", "--json", "--data", str(tmp_path), IBEX_ENVOY=str(envoy_binary))
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert {finding["state"] for finding in findings.values()} <= {"ok", "note"}
    assert findings["envoy.yaml"]["state"] == findings["dropin.yaml"]["state"] == findings["store"]["state"] == "ok"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"IBEX_BUDGET_MS": "soon"}, "IBEX_BUDGET_MS"),
        ({"IBEX_ENVOY": "/nowhere/envoy"}, "/nowhere/envoy"),
        ({"IBEX_DATABASE_URL": "mysql://x"}, "IBEX_DATABASE_URL"),
    ],
)
def test_doctor_says_what_is_wrong(environment: dict[str, str], said: str) -> None:
    done = extproc("doctor", **environment)
    assert done.returncode == 1
    assert said in done.stdout
    assert "problem" in done.stdout


def test_doctor_notices_a_misspelt_variable(tmp_path: Path) -> None:
    done = extproc("doctor", "--data", str(tmp_path), IBEX_BUGDET_MS="45")
    assert "IBEX_BUGDET_MS" in done.stdout


def test_doctor_knows_what_others_read(tmp_path: Path) -> None:
    theirs = {"IBEX_EXTRACTOR": "rules", "IBEX_TOKEN": "x", "IBEX_PROVIDER_KEY": "x", "IBEX_WORKER_LIMIT_S": "60"}
    findings = json.loads(extproc("doctor", "--json", "--data", str(tmp_path), **theirs).stdout)
    assert {"subject": "variables", "state": "ok", "text": "no unknown IBEX_ variable"} in findings
    assert "IBEX_WORKER_LIMIT_S" in extproc("doctor", IBEX_WORKER_LIMIT_S="1").stdout


@pytest.mark.parametrize("command", [["--help"], ["doctor"]])
def test_a_full_disk_behind_the_output_is_said_in_words(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "extproc", *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=50
        )
    assert done.returncode == 1
    assert done.stderr == "extproc: the output cannot be written: No space left on device\n"


def test_migrate_may_run_twice(tmp_path: Path) -> None:
    for _ in range(2):
        done = extproc("migrate", "--data", str(tmp_path))
        assert done.returncode == 0
        assert "up to date" in done.stdout


def test_a_mistake_in_the_settings_is_said_in_words() -> None:
    check_refused(extproc("filter", IBEX_BUDGET_MS="-1"), "IBEX_BUDGET_MS")
    check_refused(extproc("filter", IBEX_IDENTITY_ORG="cookie:org"), "IBEX_IDENTITY_ORG")
    check_refused(extproc("engine", IBEX_DATABASE_URL="mysql://x"), "IBEX_DATABASE_URL")


def test_an_address_in_use_is_said_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        check_refused(extproc("filter", "--listen", address, "--admin", "127.0.0.1:0"), address)
        check_refused(extproc("filter", "--listen", "127.0.0.1:0", "--admin", address), address)
        check_refused(extproc("engine", "--listen", address, "--data", str(tmp_path)), address)
        check_refused(extproc("up", "--listen", address, "--data", str(tmp_path)), f"{address}: address already in use")


def test_a_second_up_in_one_directory_or_at_one_address_is_refused(stack: Stack, tmp_path: Path) -> None:
    state, taken = str(stack.described["state_dir"]), stack.gateway.removeprefix("http://")
    check_refused(extproc("up", "--data", state, "--listen", "127.0.0.1:0"), state)
    assert f"`extproc up` runs in {state}" in extproc("doctor", "--data", state).stdout
    check_refused(extproc("up", "--data", str(tmp_path), "--listen", taken), taken.rpartition(":")[2])


def start_once(envoy_binary: Path, state: Path, token: str | None = None) -> tuple[dict[str, Any], str]:
    """What `extproc up` says of itself, and its standard error; asks the gateway with the token in between.

    Ended with SIGTERM, it leaves no process behind.
    """
    command = [sys.executable, "-m", "extproc", "up", "--json", "--data", str(state)]
    command += ["--listen", f"127.0.0.1:{envoy.free_port()}"]
    environment = {**os.environ, **patience(envoy_binary, state.with_name("patient"))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        described = json.loads(process.stdout.readline())
        deadline = time.monotonic() + 40
        own = {"authorization": f"Bearer {token or described['token']}"}
        url = f"{described['gateway']}/v1/models"
        models = httpx2.get(url, headers=own, timeout=10)
        while models.status_code == 503 and time.monotonic() < deadline:  # which a busy machine's gate may say
            models = httpx2.get(url, headers=own, timeout=10)
        process.terminate()
        assert process.wait(120) == 0
        check_none_left(described)
        assert models.status_code == 200
        assert "x-ratelimit-limit" not in models.headers, "no limit unless asked for"
        return described, process.stderr.read()


@pytest.mark.timeout(300)  # two whole stacks, one after the other
def test_the_token_is_shown_at_the_first_start_and_lasts(envoy_binary: Path, tmp_path: Path) -> None:
    token = start_once(envoy_binary, tmp_path / "state")[0]["token"]
    assert token.startswith("ibex_pat_")
    described, said = start_once(envoy_binary, tmp_path / "state", token)
    assert described["token"] is None
    assert f'token create "another" --agent {described["agent_id"]} --data {tmp_path / "state"}' in said
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert token.encode() not in kept


def test_a_proxy_of_the_environment_is_not_asked_for_our_own_addresses(stack: Stack) -> None:
    """The stack was started with one that nobody listens at."""
    (pid,) = stack.described["pids"]["filter"]
    assert b"http_proxy=http" in Path(f"/proc/{pid}/environ").read_bytes()
    with stack.client() as client:
        assert client.get("/v1/models").status_code == 200


def test_up_leaves_no_process_behind_when_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "extproc", "up", "--json", "--data", str(tmp_path)]
    command += ["--listen", f"127.0.0.1:{envoy.free_port()}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        described = json.loads(process.stdout.readline())
        process.kill()
        assert process.wait(40) == -signal.SIGKILL
    check_none_left(described)


def check_none_left(described: dict[str, Any]) -> None:
    for name, pids in described["pids"].items():
        for pid in pids:
            assert _has_ended(pid), name


def _has_ended(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        signal.sigtimedwait([], 0.05)
    return False


def test_sigterm_lets_a_filter_end_well() -> None:
    admin = f"127.0.0.1:{envoy.free_port()}"
    command = [sys.executable, "-m", "extproc", "filter", "--listen", "127.0.0.1:0", "--admin", admin]
    with running(command, answers(f"http://{admin}/ready")) as process:
        assert httpx2.get(f"http://{admin}/health").json() == {"process": "filter", "status": "ok"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_filter_pod_imports_neither_database_nor_queue() -> None:
    program = "import sys, extproc.cli, extproc.filter.service; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=True)
    for module in ("sqlalchemy", "alembic", "sqlite3", "celery", "redis", "Stemmer", "yaml"):
        assert f"'{module}'" not in done.stdout
