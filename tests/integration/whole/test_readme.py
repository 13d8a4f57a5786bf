"""Every command of the README runs, in its order, as it stands there; only ports and directories are this test's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from extproc.stack import envoy
from tests.integration.conftest import StandIn
from tests.integration.patient_stack import patience

ROOT = Path(__file__).parents[3]


def commands() -> list[str]:
    """The shell commands of all `sh` blocks, continuation lines joined."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r" +", " ", line).strip() for line in lines]


def shown_token(printed: Path) -> str:
    """Waits until `make run` has shown it."""
    for _ in range(1200):
        if found := re.search(r"Bearer (ibex_pat_[A-Za-z0-9_-]+)", printed.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(printed.read_text())


def is_answered(url: str) -> bool:
    """With whatever status: a gateway answers 401 to who has no token."""
    try:
        httpx2.get(url, timeout=1)
    except httpx2.TransportError:
        return False
    return True


@pytest.mark.timeout(600)  # two whole stacks, and every command
def test_the_readme_is_true(envoy_binary: Path, provider: StandIn, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    found = commands()
    assert len(found) >= 12
    port = envoy.free_port()
    state = str(tmp_path / "state")
    places = {"IBEX_DATA": state, "IBEX_STATE_DIR": state, "IBEX_OTLP_ENDPOINT": ""}
    environment = {**os.environ, **places}
    patient = patience(envoy_binary, tmp_path)
    printed = tmp_path / "printed"
    started: list[subprocess.Popen[bytes]] = []

    def run(command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start(command: str, url: str) -> None:
        with printed.open("ab") as file:
            process = subprocess.Popen(
                ["sh", "-c", command], cwd=ROOT, env=environment | patient, start_new_session=True, stdout=file
            )
        started.append(process)
        for _ in range(1800):
            if is_answered(url):
                return
            assert started[-1].poll() is None, command
            time.sleep(0.05)
        raise AssertionError(f"{command} does not answer at {url}")

    def stop() -> None:
        while started:
            process = started.pop()
            with suppress(ProcessLookupError):  # one that ended by itself is told of by whoever waits for it
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
            process.wait(120)

    outputs: dict[str, str] = {}
    try:
        for command in found:
            here = command.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace(
                "memories.jsonl", f"{tmp_path}/m.jsonl"
            )
            match re.sub(r"^[A-Z_]+=\S+ ", "", command).split():  # a key before it is a real provider's
                case ["make", "run", *arguments]:
                    stop()
                    # A real provider cannot be had in a test: the stand-in's URL takes the place of its URL.
                    url = f"http://{provider.address}" if arguments else ""
                    given = f"--listen 127.0.0.1:{port}" + (f" --provider {url}" if url else "")
                    start(f"make run ARGS='{given}'", f"http://127.0.0.1:{port}")
                    # What it printed at its first start, as the text says; at others, a line how to make another.
                    environment.setdefault("IBEX_TOKEN", shown_token(printed))
                case [_, "engine" | "filter" | "observer" | "gate" | "auth", *_]:
                    admin = f"127.0.0.1:{envoy.free_port()}"
                    own = f"{here.replace('/var/lib/ibex', str(tmp_path / 'lib'))} --admin {admin}"
                    listen = f"127.0.0.1:{envoy.free_port()}"
                    start(f"{own} --listen {listen}", f"http://{admin}/health")
                case _:
                    outputs[command] = run(here)
    finally:
        stop()
    [asked] = [output for command, output in outputs.items() if command.startswith("curl")]
    assert "x-ibex-memories-injected: 1\r\n" in asked or "x-ibex-memories-injected: 1\n" in asked
    assert "Ada" in asked
    [found_units] = [output for command, output in outputs.items() if "memory search" in command]
    assert "metric units" in found_units


@pytest.mark.parametrize("file", ["README.md", "ARCHITECTURE.md", *(str(p) for p in Path("docs").rglob("*.md"))])
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / file).parent / target).exists(), (file, target)
