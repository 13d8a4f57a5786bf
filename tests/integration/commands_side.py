"""`extproc org|agent|token|memory|directive …` as operators have them, without the start of a process each."""

from __future__ import annotations

import json
from typing import Any

import typer
from typer.testing import CliRunner

from extproc.auth.commands import agents_app, organizations_app, tokens_app
from extproc.directives.commands import app as directives_app
from extproc.memory.commands import app as memory_app

_app = typer.Typer()
for _name, _commands in {
    "org": organizations_app,
    "agent": agents_app,
    "token": tokens_app,
    "memory": memory_app,
    "directive": directives_app,
}.items():
    _app.add_typer(_commands, name=_name)


def run(*arguments: str, **environment: str) -> Any:
    """What it prints with `--json`. One at a time: it changes this process's environment while it runs."""
    done = CliRunner().invoke(_app, [*arguments, "--json"], env=environment)
    assert done.exit_code == 0, (arguments[:2], done.stderr)
    return json.loads(done.stdout)
