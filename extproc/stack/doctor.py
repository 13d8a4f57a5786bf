"""`extproc doctor`: look for what would keep an installation from working, and say what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import typer

from extproc.settings import (
    AuthSettings,
    EngineSettings,
    FilterSettings,
    GateSettings,
    ObserverSettings,
    SettingsError,
    StoreSettings,
    WorkerSettings,
    load,
    unknown_variables,
)
from extproc.stack import envoy, keys
from extproc.stack.up import is_running

__all__ = ["Finding", "State", "examine", "show"]

_ENVOY_LIMIT_S = 20


class State(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Not in use right now, or worth a look; nothing that has to be mended."""
    PROBLEM = "problem"


_KINDS = (FilterSettings, ObserverSettings, EngineSettings, GateSettings, AuthSettings, WorkerSettings, StoreSettings)


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    state: State
    text: str
    """What was seen and, for a problem, what to do."""

    @property
    def is_problem(self) -> bool:
        return self.state is State.PROBLEM


def examine(data: Path | None) -> list[Finding]:
    """Every check, none of which can raise; a check that breaks is a finding itself."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _settings,
        _variables,
        _envoy_binary,
        lambda: _envoy_configuration("envoy.yaml"),
        lambda: _envoy_configuration("dropin.yaml"),
        lambda: _store(data),
        lambda: _stack(data),
        lambda: _listener("gate", lambda: load(GateSettings).gate_listen),
        lambda: _listener("auth", lambda: load(GateSettings).auth_address),
        lambda: _listener("filter", lambda: load(FilterSettings).filter_listen),
        lambda: _listener("observer", lambda: load(ObserverSettings).observer_listen),
        lambda: _listener("engine", lambda: load(FilterSettings).engine_address),
    ]
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a doctor that faints helps nobody
        return Finding("doctor", State.PROBLEM, f"a check failed by itself: {type(error).__name__}: {error}")


def show(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
        return
    colours = {State.OK: typer.colors.GREEN, State.NOTE: typer.colors.YELLOW, State.PROBLEM: typer.colors.RED}
    for finding in findings:
        typer.echo(
            typer.style(f"{finding.state:<8}", fg=colours[finding.state]) + f" {finding.subject}: {finding.text}"
        )


def _python() -> Finding:
    return Finding("python", State.OK, f"{sys.version.split()[0]} at {sys.executable}")


def _settings() -> Finding:
    mistakes: list[str] = []
    for kind in _KINDS:
        try:
            load(kind)
        except SettingsError as error:
            mistakes += [line for line in str(error).splitlines() if line not in mistakes]
    if mistakes:
        return Finding("settings", State.PROBLEM, "; ".join(mistakes))
    return Finding("settings", State.OK, "the environment can be read")


_OURS = {"IBEX_ENVOY", "IBEX_TOKEN", keys.OTHER_PROVIDER}
"""Read by commands, or by the user's own shell, not by a process."""


def _variables() -> Finding:
    unknown = [name for name in unknown_variables(*_KINDS) if name not in _OURS]
    if unknown:
        return Finding("variables", State.NOTE, f"nothing reads {', '.join(unknown)}: misspelt?")
    return Finding("variables", State.OK, "no unknown IBEX_ variable")


def _envoy_binary() -> Finding:
    try:
        binary = envoy.find_envoy(os.environ.get("IBEX_ENVOY"))
    except envoy.EnvoyError as error:
        return Finding("envoy", State.PROBLEM, str(error))
    code, output = _run([str(binary), "--version"])
    if code:
        return Finding("envoy", State.PROBLEM, f"{binary} does not run: {output}")
    return Finding("envoy", State.OK, f"{binary}, {output.rpartition('version: ')[2]}")


def _envoy_configuration(name: str) -> Finding:
    try:
        binary = envoy.find_envoy(os.environ.get("IBEX_ENVOY"))
        file = envoy.shipped("envoy.yaml" if name == "envoy.yaml" else "dropin.yaml")
    except envoy.EnvoyError as error:
        return Finding(name, State.NOTE, f"not checked: {error}")
    code, output = _run([str(binary), "--mode", "validate", "--config-path", str(file), "--log-level", "error"])
    if code:
        return Finding(name, State.PROBLEM, f"this Envoy refuses {file}: {output}")
    return Finding(name, State.OK, f"this Envoy takes {file}")


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and the last line of output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ENVOY_LIMIT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, lines[-1].strip() if lines else ""


def _store(data: Path | None) -> Finding:
    from sqlalchemy import text

    from extproc.memory.database import Database, shown_url
    from extproc.memory.store import StoreError, store_url

    settings = load(StoreSettings, data=data)
    if not settings.database_url and not settings.data.exists():
        return Finding(
            "store", State.NOTE, f"{settings.data} does not exist yet; the first command that needs it makes it"
        )
    try:
        database = Database(store_url(settings))
        database.run(lambda connection: connection.execute(text("SELECT count(*) FROM sweeps")))
        database.close()
    except StoreError as error:
        return Finding("store", State.PROBLEM, str(error))
    return Finding("store", State.OK, f"{shown_url(settings)} can be read")


def _stack(data: Path | None) -> Finding:
    state_dir = load(StoreSettings, data=data).data
    if is_running(state_dir):
        return Finding("up", State.OK, f"`extproc up` runs in {state_dir}, with its processes on ports of its own")
    return Finding("up", State.NOTE, f"no `extproc up` runs in {state_dir}")


def _listener(process: str, address_of: Callable[[], str]) -> Finding:
    """Whether somebody listens where the settings say that a process does."""
    address = address_of()
    if address.startswith("unix:"):
        is_there = Path(address.removeprefix("unix:")).exists()
        return Finding(
            process, State.OK if is_there else State.NOTE, f"{address} {'exists' if is_there else 'is absent'}"
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return Finding(process, State.OK, f"something answers at {address}")
    except (OSError, ValueError):
        return Finding(process, State.NOTE, f"nothing answers at {address}; `extproc {process}` is not running there")
