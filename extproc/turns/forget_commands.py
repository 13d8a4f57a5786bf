"""`extproc memory forget` and `extproc outbox forget`. Here, since to forget a user is also to look into outboxes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from extproc.memory.commands import (
    AgentOption,
    DataOption,
    JsonOption,
    OrgOption,
    UserOption,
    app,
    fail,
    opened,
    opened_database,
    printable,
    whose,
)
from extproc.settings import OutboxSettings, SettingsError, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.memory.forgetting import Forgotten
    from extproc.memory.model import Namespace
    from extproc.turns.forgetting import Erased

__all__ = ["app", "forget_in_outboxes"]

StateOption = Annotated[
    Path | None,
    typer.Option("--state", help="directory of the outboxes; else --data, else IBEX_STATE_DIR", metavar="DIR"),
]
YesOption = Annotated[bool, typer.Option("--yes", help="do not ask")]


@app.command()
def forget(
    org: OrgOption = "",
    agent: AgentOption = "",
    memory_id: Annotated[str, typer.Argument(help="the id that `list` shows")] = "",
    user: UserOption = "",
    everything: Annotated[
        bool, typer.Option("--all", help="all that --user ever said; without --user, all of the agent's own")
    ] = False,
    yes: YesOption = False,
    data: DataOption = None,
    state: StateOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Remove memories for good. With --all also what was said and is not remembered yet, wherever it waits."""
    namespace = whose(org, agent, user, data)
    if bool(memory_id) == everything:
        fail("say what to forget: either the id of a memory or --all")
    owner = _owner(namespace)
    if not everything:
        _forget_one(namespace, memory_id, owner, data, as_json=as_json_)
        return
    if not yes:
        typer.confirm(f"Remove every memory of {owner} (agent {namespace.agent_id})?", abort=True, err=True)
    from extproc.memory.forgetting import forget_owner
    from extproc.turns.forgetting import erase_outbox_texts

    directory, until = _state_directory(state, data), datetime.now(UTC)
    with opened(data, writes=True) as store:
        forgotten = forget_owner(store, namespace, until)
    if forgotten.turn_texts:
        with opened_database(data) as database:
            database.forget_log()
    erased = erase_outbox_texts(directory, namespace, until)
    if as_json_:
        typer.echo(json.dumps(_as_json(forgotten, erased, until)))
    else:
        _tell(owner, namespace, forgotten, erased, directory, until)
    _end(erased)


def forget_in_outboxes(
    org: OrgOption = "",
    agent: AgentOption = "",
    user: UserOption = "",
    until: Annotated[
        str, typer.Option("--until", help="when it was forgotten, as `memory forget` said; none: now")
    ] = "",
    yes: YesOption = False,
    state: StateOption = None,
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Erase the texts of one owner that wait here, after `extproc memory forget --all` on another machine."""
    from extproc.turns.forgetting import erase_outbox_texts

    namespace, moment = whose(org, agent, user, data), _moment(until)
    directory = _state_directory(state, data)
    if not yes:
        whom = f"{_owner(namespace)} (agent {namespace.agent_id})"
        typer.confirm(f"Erase every text of {whom} that waits in {directory}?", abort=True, err=True)
    erased = erase_outbox_texts(directory, namespace, moment)
    if as_json_:
        typer.echo(json.dumps(_outboxes_as_json(erased)))
    else:
        typer.echo(_outboxes(erased, directory))
    _end(erased)


def _owner(namespace: Namespace) -> str:
    return "the agent itself" if namespace.user_id is None else f"user {namespace.user_id}"


def _forget_one(namespace: Namespace, memory_id: str, owner: str, data: Path | None, *, as_json: bool) -> None:
    from extproc.memory.model import InvalidValue, parse_uuid

    try:
        wanted = parse_uuid(memory_id, "the id")
    except InvalidValue as error:
        fail(str(error))
    with opened(data, writes=True) as store:
        if not store.forget(namespace, wanted):
            fail(f"no memory {memory_id} of {owner}; `extproc memory list` shows what there is")
    typer.echo(json.dumps({"removed": 1}) if as_json else f"1 memory of {owner} removed")


def _tell(
    owner: str, namespace: Namespace, forgotten: Forgotten, erased: Sequence[Erased], directory: Path, until: datetime
) -> None:
    options = f"--org {namespace.org_id} --agent {namespace.agent_id}"
    options += f" --user {namespace.user_id}" if namespace.user_id else ""
    for line in (
        f"{_counted(forgotten.memories, 'memory', 'memories')} of {owner} removed, with vectors and index",
        f"{_counted(forgotten.turn_texts, 'text', 'texts')} of turns removed that waited for a worker",
        _outboxes(erased, directory),
        f"Of what {owner} had said until {until.isoformat()} workers learn nothing any more, wherever it waits.",
        "Not reached: state directories of other machines; there run",
        f"  extproc outbox forget {printable(options)} --until {until.isoformat()} --yes",
        "Not reached either: backups, exports and replicas of the database.",
    ):
        typer.echo(line)


def _outboxes(erased: Sequence[Erased], directory: Path) -> str:
    texts = _counted(sum(one.texts for one in erased), "text", "texts")
    return f"{texts} erased in {_counted(len(erased), 'outbox', 'outboxes')} of {directory}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _as_json(forgotten: Forgotten, erased: Sequence[Erased], until: datetime) -> dict[str, object]:
    return {
        "removed": forgotten.memories,
        "turn_texts": forgotten.turn_texts,
        "said_until": until.isoformat(),
        **_outboxes_as_json(erased),
    }


def _outboxes_as_json(erased: Sequence[Erased]) -> dict[str, object]:
    return {
        "outbox_texts": sum(one.texts for one in erased),
        "outboxes": {one.outbox: {"texts": one.texts, "problem": one.problem} for one in erased},
    }


def _end(erased: Sequence[Erased]) -> None:
    """With 1 where an outbox could not be looked into."""
    problems = [one for one in erased if one.problem]
    for one in problems:
        typer.echo(f"{one.outbox} could not be looked into, run this again: {one.problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _state_directory(state: Path | None, data: Path | None) -> Path:
    try:
        return load(OutboxSettings, state_dir=state or data).state_dir
    except SettingsError as error:
        fail(str(error))


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text) if text else datetime.now(UTC)
    except ValueError:
        fail(f"--until {printable(text)!r} is not a time such as 2025-03-01T12:00:00+00:00")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
