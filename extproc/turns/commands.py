"""`extproc outbox …`: what waits in the outboxes of a state directory, and what was set aside. No content is shown.

Every command works beside running observers. It looks at their files through SQLite's own locks, from another process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from extproc.settings import OutboxSettings, SettingsError, load
from extproc.turns._outside import Contents, SetAside, look, retry_set_aside, set_aside_entries
from extproc.turns._slot import is_held, outbox_files
from extproc.turns._tables import Consumer, FileTrouble, FileUnusable
from extproc.turns.forget_commands import forget_in_outboxes

__all__ = ["app"]

app = typer.Typer(help="What waits for database, queue and trace table, and what was set aside.")
app.command("forget")(forget_in_outboxes)

StateOption = Annotated[
    Path | None, typer.Option("--state", help="directory of the outboxes; else IBEX_STATE_DIR", metavar="DIR")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
ConsumerOption = Annotated[
    Consumer | None, typer.Option("--consumer", help="only what this one refused", show_default=False)
]
FileArgument = Annotated[str, typer.Argument(help="one outbox, such as outbox-0; none: all", show_default=False)]


@dataclass(frozen=True, slots=True)
class _Outbox:
    name: str
    is_held: bool
    contents: Contents | None
    """None: it cannot be read."""
    problem: str = ""


@app.callback(invoke_without_command=True)
def outboxes(context: typer.Context, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show every outbox: how much waits for whom, since when and why, and how much was set aside."""
    if context.invoked_subcommand is not None:
        return
    found = [_look(file) for file in _files(state)]
    if as_json:
        typer.echo(json.dumps([_as_json(outbox) for outbox in found]))
        return
    for outbox in found:
        for line in _lines(outbox):
            typer.echo(line)
    if not found:
        typer.echo("No outbox here: no observer has run with this state directory.", err=True)


@app.command("show-aside")
def show_aside(
    name: FileArgument = "", consumer: ConsumerOption = None, state: StateOption = None, as_json: JsonOption = False
) -> None:
    """Show what a system refused for good, by its ids."""
    entries = [
        {"outbox": file.stem, **_ids(entry)}
        for file in _files(state, name)
        for entry in _read(file)
        if consumer is None or entry.consumer is consumer
    ]
    if as_json:
        typer.echo(json.dumps(entries))
        return
    for entry in entries:
        typer.echo("  ".join(f"{key}={value}" for key, value in entry.items() if value not in {"", None}))
    if not entries:
        typer.echo("Nothing is set aside.", err=True)


@app.command("retry-aside")
def retry_aside(
    name: FileArgument = "",
    ids: Annotated[list[int] | None, typer.Option("--id", help="only this one, as show-aside gives it")] = None,
    consumer: ConsumerOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deliver again what was set aside, once its reason is mended. Texts are gone: such a turn is not extracted.

    An observer takes it up within seconds: its own, or any other of the same state directory.
    """
    if ids and not name:
        _fail("--id counts within one outbox; name it, such as: extproc outbox retry-aside outbox-0 --id 1")
    moved = 0
    for file in _files(state, name):
        with _failing(file):
            moved += retry_set_aside(file, consumer, ids or [])
    if as_json:
        typer.echo(json.dumps({"retried": moved}))
    else:
        typer.echo(f"{moved} {'entry' if moved == 1 else 'entries'} brought back")


def _files(state: Path | None, name: str = "") -> list[Path]:
    try:
        directory = load(OutboxSettings, state_dir=state).state_dir
        files = outbox_files(directory)
    except SettingsError as error:
        _fail(str(error))
    except FileNotFoundError:
        files = []
    except OSError as error:
        _fail(f"the state directory cannot be read: {error}")
    chosen = [file for file in files if not name or file.stem == name]
    if name and not chosen:
        _fail(f"there is no {name} here; `extproc outbox` shows what there is")
    return chosen


def _look(file: Path) -> _Outbox:
    try:
        return _Outbox(file.stem, is_held(file), look(file))
    except (FileTrouble, FileUnusable, OSError) as error:
        return _Outbox(file.stem, is_held=False, contents=None, problem=str(error))


def _read(file: Path) -> list[SetAside]:
    with _failing(file):
        return set_aside_entries(file)
    raise AssertionError


@contextmanager
def _failing(file: Path) -> Iterator[None]:
    try:
        yield
    except (FileTrouble, FileUnusable) as error:
        _fail(f"{file.name}: {error}")


def _as_json(outbox: _Outbox) -> dict[str, object]:
    contents = outbox.contents
    if contents is None:
        return {"outbox": outbox.name, "problem": outbox.problem}
    return {
        "outbox": outbox.name,
        "in_use": outbox.is_held,
        "bytes": contents.waiting_bytes,
        "set_aside": contents.set_aside,
        "consumers": {
            consumer.value: {
                "depth": state.depth,
                "oldest_s": _age_s(state.oldest_at),
                "problem": state.problem,
                "problem_s": _age_s(state.problem_since) if state.problem else None,
            }
            for consumer, state in contents.states.items()
        },
    }


def _lines(outbox: _Outbox) -> Iterator[str]:
    contents = outbox.contents
    if contents is None:
        yield f"{outbox.name}  cannot be read: {outbox.problem}"
        return
    owner = "in use" if outbox.is_held else "left behind; an observer of this directory takes it over"
    yield f"{outbox.name}  {owner}  {contents.waiting_bytes:,} bytes  {contents.set_aside} set aside"
    for consumer, state in contents.states.items():
        age = f"oldest {_age_s(state.oldest_at)} s" if state.oldest_at is not None else ""
        problem = f"waits since {_age_s(state.problem_since)} s: {state.problem}" if state.problem else ""
        yield f"  {consumer.value:<10}  {state.depth:>9,} waiting  {age:<16}  {problem}".rstrip()


def _age_s(at: float | None) -> float | None:
    return None if at is None else round(max(0.0, time.time() - at), 1)


class _Ids(msgspec.Struct):
    org_id: str = ""
    agent_id: str = ""
    session_id: str = ""
    request_id: str = ""


def _ids(entry: SetAside) -> dict[str, object]:
    try:
        ids = msgspec.json.decode(entry.turn, type=_Ids)
    except msgspec.MsgspecError:
        ids = _Ids()
    at = datetime.fromtimestamp(entry.set_aside_at, UTC).isoformat(timespec="seconds")
    about = {"id": entry.id, "consumer": entry.consumer.value, "at": at, "error": entry.error}
    return {**about, **msgspec.structs.asdict(ids)}


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
