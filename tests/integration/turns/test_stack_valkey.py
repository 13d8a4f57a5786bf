"""The Valkey of `extproc up`, as it is started there."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from extproc.stack import valkey
from extproc.turns.enqueue import RedisTasks
from extproc.turns.sinks import ExtractionTask
from tests.integration.turns.valkey_side import eventually

TASK = ExtractionTask("task", "session", "org")


@contextmanager
def started(state_dir: Path) -> Iterator[valkey.Valkey]:
    running = valkey.start(state_dir)
    try:
        eventually(lambda: running.is_ready() or running.child.has_ended())
        assert running.is_ready(), running.child.log_end()
        yield running
    finally:
        running.child.stop(5)


def client(running: valkey.Valkey) -> Redis:
    return Redis.from_url(running.url)


def test_tasks_outlive_a_stop_and_a_kill(tmp_path: Path) -> None:
    sent = 0
    for ending in ("stop", "kill", "stop"):
        with started(tmp_path) as running:
            with client(running) as reader:
                assert reader.llen("extraction") == sent
            sink = RedisTasks(running.url)
            sink.send([TASK, TASK])
            sink.close()
            sent += 2
            if ending == "kill":
                running.child.process.kill()


def test_it_listens_on_loopback_alone_and_evicts_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as running, client(running) as reader:
        wanted = {
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": str(64 * 1024**2),
            "maxmemory-policy": "noeviction",
            "enable-debug-command": "no",
            "enable-module-command": "no",
        }
        assert {name: reader.config_get(name)[name] for name in wanted} == wanted


def test_its_directory_is_its_owners_alone(tmp_path: Path) -> None:
    with started(tmp_path):
        assert stat.S_IMODE((tmp_path / "valkey").stat().st_mode) == 0o700
        assert (tmp_path / "valkey" / "appendonlydir").is_dir()


def test_it_is_not_ready_before_it_answers(tmp_path: Path) -> None:
    with started(tmp_path) as running:
        pass
    assert not running.is_ready()
    with socket.create_server(running.address) as silent:
        silent.listen()
        assert not running.is_ready()


def test_a_binary_that_may_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.access(valkey.find_valkey(), os.X_OK)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(valkey.ValkeyError, match="not executable"):
        valkey.find_valkey()


def test_a_missing_wheel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(valkey.ValkeyError, match=r"ibex-extproc\[stack\]"):
        valkey.find_valkey()
