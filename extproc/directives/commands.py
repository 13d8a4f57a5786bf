"""`extproc directive …`: what agents are told with every request, managed on the database itself.

Filters hear of each change through Redis. The text is read and shown here, and is in no log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from extproc.memory.commands import (
    AgentOption,
    DataOption,
    JsonOption,
    OrgOption,
    fail,
    json_text,
    opened_database,
    printable,
    require_given,
    whose,
)
from extproc.settings import SettingsError, SharedRedisSettings, StoreSettings, load

if TYPE_CHECKING:
    from extproc.chat import InjectionMode
    from extproc.directives.store import DirectiveStore, Standing, Version

__all__ = ["app"]

app = typer.Typer(help="Directives: what an agent is told with every request.", no_args_is_help=True)

_MODES = "system_first, system_append or user_prepend"
_PAGE = 500
_ANNOUNCE_ATTEMPTS = 3
_MOST_READ_BYTES = 1024 * 1024
"""Of a file: far above what a directive may have, so that the message says how long it is."""


@app.command("set")
def set_directive(
    text: Annotated[str, typer.Argument(help="the directive; - reads it from standard input")] = "",
    file: Annotated[Path | None, typer.Option("--file", help="read it from this file, UTF-8")] = None,
    mode: Annotated[str, typer.Option("--mode", help=f"where it goes: {_MODES}; none: as before")] = "",
    org: OrgOption = "",
    agent: AgentOption = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new version, which counts from now on. The text that counts already makes none."""
    from extproc.directives.store import parse_content
    from extproc.memory.model import InvalidValue

    try:
        content = parse_content(_read(text, file))
        wanted = _mode(mode) if mode else None
    except InvalidValue as error:
        fail(str(error))
    new_ids = (_new_id(), _new_id())
    _change_and_show(
        lambda store, org_id, agent_id: store.set(org_id, agent_id, content, wanted, new_ids, datetime.now(UTC)),
        org,
        agent,
        data,
        as_json=as_json,
    )


@app.command()
def show(org: OrgOption = "", agent: AgentOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show an agent's directive with its text."""
    owner = whose(org, agent, "", data)
    with _opened(data) as store:
        standing = store.standing(owner.org_id, owner.agent_id)
        [version] = store.history(owner.org_id, owner.agent_id, 1, before=standing.version + 1)
    if as_json:
        _print({**asdict(standing), "content": version.content})
        return
    typer.echo(_line(standing), err=True)
    typer.echo("\n".join(printable(line) for line in version.content.split("\n")))


@app.command("list")
def list_directives(
    org: OrgOption = "", agent: AgentOption = "", data: DataOption = None, as_json: JsonOption = False
) -> None:
    """Show which agents of an organisation have a directive, without the texts. `--agent` shows one."""
    org_id = _org(org, data)
    found: list[Standing] = []
    with _opened(data) as store:
        while page := store.all_of(org_id, _PAGE, found[-1].agent_id if found else ""):
            found += page
    found = [one for one in found if not agent or one.agent_id == agent.lower()]
    if as_json:
        _print([asdict(one) for one in found])
        return
    for one in found:
        typer.echo(_line(one))
    if not found:
        typer.echo("No directives here yet; `extproc directive set TEXT --agent …` makes one.", err=True)


@app.command()
def history(org: OrgOption = "", agent: AgentOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show every version of an agent's directive, newest first; with `--json` also the texts."""
    owner = whose(org, agent, "", data)
    found: list[Version] = []
    with _opened(data) as store:
        standing = store.standing(owner.org_id, owner.agent_id)
        while page := store.history(owner.org_id, owner.agent_id, _PAGE, found[-1].version if found else None):
            found += page
    if as_json:
        _print([{**asdict(one), "is_current": one.id == standing.version_id} for one in found])
        return
    for one in found:
        current = "*" if one.id == standing.version_id else " "
        size = len(one.content.encode())
        typer.echo(
            f"{current} {one.version:>4}  {one.id}  {one.created_at:%Y-%m-%d %H:%M}  {size:>6} bytes  "
            f"sha256 {one.content_hash}"
        )


@app.command()
def activate(
    org: OrgOption = "", agent: AgentOption = "", data: DataOption = None, as_json: JsonOption = False
) -> None:
    """Put the directive into requests again."""
    _change_and_show(
        lambda store, org_id, agent_id: store.switch(org_id, agent_id, datetime.now(UTC), on=True),
        org,
        agent,
        data,
        as_json=as_json,
    )


@app.command()
def deactivate(
    org: OrgOption = "", agent: AgentOption = "", data: DataOption = None, as_json: JsonOption = False
) -> None:
    """Put the directive into no more requests; it is kept."""
    _change_and_show(
        lambda store, org_id, agent_id: store.switch(org_id, agent_id, datetime.now(UTC), on=False),
        org,
        agent,
        data,
        as_json=as_json,
    )


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option("--to", min=1, help="number of the version; none: the one before")] = None,
    org: OrgOption = "",
    agent: AgentOption = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an older version count again. Whether the directive is switched on stays as it is."""
    _change_and_show(
        lambda store, org_id, agent_id: store.roll_back(org_id, agent_id, to, datetime.now(UTC)),
        org,
        agent,
        data,
        as_json=as_json,
    )


@app.command("mode")
def change_mode(
    mode: Annotated[str, typer.Argument(help=_MODES, show_default=False)],
    org: OrgOption = "",
    agent: AgentOption = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change where the directive goes."""
    from extproc.memory.model import InvalidValue

    try:
        wanted = _mode(mode)
    except InvalidValue as error:
        fail(str(error))
    _change_and_show(
        lambda store, org_id, agent_id: store.set_mode(org_id, agent_id, wanted, datetime.now(UTC)),
        org,
        agent,
        data,
        as_json=as_json,
    )


def _change_and_show(
    change: Callable[[DirectiveStore, str, str], Standing], org: str, agent: str, data: Path | None, *, as_json: bool
) -> None:
    owner = whose(org, agent, "", data)
    with _opened(data) as store:
        standing = change(store, owner.org_id, owner.agent_id)
    is_published = _announce(standing)
    if as_json:
        _print({**asdict(standing), "published": is_published})
    else:
        typer.echo(_line(standing))


def _announce(standing: Standing) -> bool:
    """Whether filters were told through Redis; if not, why and what follows is a warning on standard error."""
    from extproc.directives.announce import DirectiveAnnouncer, NotWritten

    later = "the change is stored, but filters may use what was before for up to two minutes"
    try:
        url = load(SharedRedisSettings).redis_url.get_secret_value()
        if not url:
            typer.echo(f"warning: IBEX_REDIS_URL is not set: {later}", err=True)
            return False
        announcer = DirectiveAnnouncer(url)
    except SettingsError as error:
        typer.echo(f"warning: {error}: {later}", err=True)
        return False
    version_id = standing.version_id if standing.is_active else None
    problem = ""
    try:
        for _ in range(_ANNOUNCE_ATTEMPTS):
            try:
                announcer.changed(standing.org_id, standing.agent_id, version_id)
            except NotWritten as error:
                problem = str(error)
            else:
                return True
    finally:
        announcer.close()
    typer.echo(f"warning: {problem}: {later}", err=True)
    return False


@contextmanager
def _opened(data: Path | None) -> Iterator[DirectiveStore]:
    """As `opened_database`; what is not there ends the command with a word, too."""
    from extproc.directives.store import DirectiveStore, NoDirective

    with opened_database(data) as database:
        try:
            yield DirectiveStore(database)
        except NoDirective as error:
            fail(f"{error}; `extproc directive list|history` shows what there is")


def _read(text: str, file: Path | None) -> str:
    """What is to be the directive, without line breaks at its end. Raises InvalidValue."""
    from extproc.memory.model import InvalidValue

    if bool(text) == (file is not None):
        raise InvalidValue("give the directive as an argument, as - for standard input, or with --file")
    try:
        if file is not None:
            with file.open("rb") as opened:
                raw = opened.read(_MOST_READ_BYTES)
        elif text == "-":
            raw = sys.stdin.buffer.read(_MOST_READ_BYTES)
        else:
            return text
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise InvalidValue(f"{file or 'standard input'} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidValue("the directive is not UTF-8") from None


def _org(org: str, data: Path | None) -> str:
    """The organisation that the option names, or that of the `extproc up` in the data directory."""
    from extproc.memory.demo import Demo, DemoError
    from extproc.memory.model import InvalidValue, parse_uuid

    try:
        if not org and (demo := Demo.find(load(StoreSettings, data=data).data)) is not None:
            return demo.org_id
        require_given(data, org=org)
        return parse_uuid(org, "--org")
    except (InvalidValue, DemoError, SettingsError) as error:
        fail(str(error))


def _mode(text: str) -> InjectionMode:
    """Raises InvalidValue."""
    from extproc.directives.store import parse_mode

    return parse_mode(text)


def _line(one: Standing) -> str:
    state = "on " if one.is_active else "off"
    return (
        f"{one.agent_id}  {state}  {one.injection_mode:<13}  version {one.version} {one.version_id}  "
        f"sha256 {one.content_hash}"
    )


def _new_id() -> str:
    import uuid_utils

    return str(uuid_utils.uuid7())


def _print(value: object) -> None:
    plain = json.loads(json.dumps(value, default=lambda one: one.isoformat()))
    typer.echo(json_text(plain, sys.stdout.encoding))
