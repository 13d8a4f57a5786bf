"""`extproc org|agent|token …`: who may pass the gate, managed on the database itself.

A running auth service sees each change with its next look-up. Gates that remember a token are told through Redis.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from extproc.memory.commands import (
    DataOption,
    JsonOption,
    fail,
    json_text,
    opened_database,
    printable,
    require_given,
)
from extproc.settings import SettingsError, SharedRedisSettings, StoreSettings, load

if TYPE_CHECKING:
    from extproc.auth.announce import Announcer
    from extproc.auth.store import Agent, AgentStatus, IdentityStore
    from extproc.auth.token import Token

__all__ = ["agents_app", "organizations_app", "tokens_app"]

organizations_app = typer.Typer(help="Organisations: whose agents, tokens and limits there are.", no_args_is_help=True)
agents_app = typer.Typer(help="Agents of an organisation, and whether they may act.", no_args_is_help=True)
tokens_app = typer.Typer(help="Tokens that prove who calls.", no_args_is_help=True)

OrgOption = Annotated[str, typer.Option("--org", help="organisation, a UUID; none: that of `extproc up`")]
AgentArgument = Annotated[str, typer.Argument(help="agent, a UUID", show_default=False)]
IdOption = Annotated[str, typer.Option("--id", help="its UUID; none: a new one")]

_PAGE = 500
_LIFE = re.compile(r"([1-9][0-9]{0,5})([mhdw])", re.ASCII)
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_ANNOUNCE_ATTEMPTS = 3


@organizations_app.command("create")
def create_organization(
    name: Annotated[str, typer.Argument(help="for people")],
    org_id: IdOption = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, max=2**31 - 1, help="requests a minute, 0: any number")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an organisation and show its id."""
    from extproc.auth.store import Organization

    with _opened(data) as store:
        made = Organization(_id_or_new(org_id), _name(name), limit, datetime.now(UTC))
        if not store.add_organization(made):
            fail("an organisation has this id already; `extproc org list` shows it")
    if limit is not None:
        _announce(lambda announcer: announcer.limits({made.id: limit}), _LIMIT_LATER)
    _show(asdict(made), made.id, as_json=as_json)


@organizations_app.command("list")
def list_organizations(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show all organisations with their limits."""
    from extproc.auth.store import all_pages

    with _opened(data) as store:
        found = all_pages(lambda after: store.organizations(_PAGE, after))
    _show_all(
        [asdict(one) for one in found],
        [f"{one.id}  {_limit_words(one.rpm_limit):<24}  {printable(one.name)}" for one in found],
        "No organisations here yet; `extproc org create NAME` makes one.",
        as_json=as_json,
    )


@organizations_app.command("set-limit")
def set_limit(
    limit: Annotated[str, typer.Argument(help="requests a minute; 0: any number; default: what the gate is set to")],
    org: OrgOption = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change how many requests an organisation may make each minute."""
    rpm = None if limit == "default" else _number(limit)
    org_id = _org(org, data)
    with _opened(data) as store:
        store.set_rpm_limit(org_id, rpm)
    _announce(lambda announcer: announcer.limits({org_id: rpm}), _LIMIT_LATER)
    _show({"id": org_id, "rpm_limit": rpm}, f"{org_id}: {_limit_words(rpm)}", as_json=as_json)


@agents_app.command("create")
def create_agent(
    name: Annotated[str, typer.Argument(help="for people")],
    org: OrgOption = "",
    agent_id: IdOption = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an active agent and show its id."""
    from extproc.auth.store import Agent, AgentStatus

    now = datetime.now(UTC)
    made = Agent(_org(org, data), _id_or_new(agent_id), _name(name), AgentStatus.ACTIVE, now, now)
    with _opened(data) as store:
        if not store.add_agent(made):
            fail("the organisation has an agent of this id already; `extproc agent list` shows it")
    _show(asdict(made), made.id, as_json=as_json)


@agents_app.command("list")
def list_agents(org: OrgOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show an organisation's agents and whether they may act."""
    from extproc.auth.store import all_pages

    org_id = _org(org, data)
    with _opened(data) as store:
        found: list[Agent] = all_pages(lambda after: store.agents(org_id, _PAGE, after))
    _show_all(
        [asdict(one) for one in found],
        [f"{one.id}  {one.status:<9}  {printable(one.name)}" for one in found],
        "No agents here yet; `extproc agent create NAME` makes one.",
        as_json=as_json,
    )


@agents_app.command()
def pause(agent: AgentArgument, org: OrgOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """Refuse an agent's requests until it is resumed. Gates see it within IBEX_AGENT_CACHE_S (2 s)."""
    _set_status(agent, "paused", org, data, as_json=as_json)


@agents_app.command()
def suspend(agent: AgentArgument, org: OrgOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """As pause, for an agent that has done something wrong."""
    _set_status(agent, "suspended", org, data, as_json=as_json)


@agents_app.command()
def resume(agent: AgentArgument, org: OrgOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """Let an agent act again."""
    _set_status(agent, "active", org, data, as_json=as_json)


@agents_app.command()
def archive(agent: AgentArgument, org: OrgOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """As pause, for an agent that is done."""
    _set_status(agent, "archived", org, data, as_json=as_json)


@tokens_app.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="for people")],
    org: OrgOption = "",
    agent: Annotated[str, typer.Option("--agent", help="the only agent it is good for; none: all of the org")] = "",
    user: Annotated[str, typer.Option("--user", help="the only end user it is good for; none: any")] = "",
    description: Annotated[str, typer.Option("--description", help="for people")] = "",
    permissions: Annotated[
        str,
        typer.Option(
            "--permissions",
            help="chat, memory-read, session-create, session-read, session-terminate, token-admin, none, "
            "several with commas; or a number",
        ),
    ] = "chat",
    expires: Annotated[
        str, typer.Option("--expires", help="how long it is valid, such as 12h, 30d or 8w; none: until revoked")
    ] = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and show it, once: only its hash is kept."""
    from extproc.auth.hashing import hash_token
    from extproc.auth.new_token import new_token
    from extproc.memory.model import InvalidValue

    now = datetime.now(UTC)
    org_id = _org(org, data)
    try:
        token, plaintext = new_token(
            id=_new_id(),
            now=now,
            hash_of=hash_token,
            org_id=org_id,
            name=name,
            description=description,
            permissions=_permissions(permissions),
            agent_id=agent,
            user_id=user,
            expires_at=_expiry(expires, now),
        )
    except InvalidValue as error:
        fail(str(error))
    with _opened(data) as store:
        store.add_token(token)
    if as_json:
        typer.echo(_json({"token": plaintext, **_as_json(token, now)}))
        return
    typer.echo(plaintext)
    typer.echo(f"Its id is {token.id}. Keep the token now: it is shown this once.", err=True)


@tokens_app.command("list")
def list_tokens(org: OrgOption = "", data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show an organisation's tokens, also those that are no longer valid."""
    from extproc.auth.store import all_pages

    now, org_id = datetime.now(UTC), _org(org, data)
    with _opened(data) as store:
        found: list[Token] = all_pages(lambda after: store.tokens(org_id, _PAGE, after))
    _show_all(
        [_as_json(token, now) for token in found],
        [
            f"{token.id}  {token.prefix}…  {_state(token, now):<8}  {token.permissions:>10}  {printable(token.name)}"
            for token in found
        ],
        "No tokens here yet; `extproc token create NAME` makes one.",
        as_json=as_json,
    )


@tokens_app.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(help="the id that `list` shows", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", help="for people")] = "",
    org: OrgOption = "",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token invalid for good, and tell the gates. Again does no harm."""
    from extproc.auth.new_token import parse_reason
    from extproc.memory.model import InvalidValue, parse_uuid

    org_id = _org(org, data)
    try:
        its_id, why = parse_uuid(token_id, "the id"), parse_reason(reason)
    except InvalidValue as error:
        fail(str(error))
    with _opened(data) as store:
        revoked_at = store.revoke_token(org_id, its_id, why, datetime.now(UTC))
    published = _announce(
        lambda announcer: announcer.revoked(org_id, its_id, revoked_at),
        "the token is revoked, but gates that remember it may take it for up to IBEX_TOKEN_CACHE_S (30 s)",
    )
    shown = {"id": its_id, "revoked_at": revoked_at.isoformat(), "published": published}
    _show(shown, f"{its_id} is revoked since {revoked_at:%Y-%m-%d %H:%M:%S} UTC", as_json=as_json)


_LIMIT_LATER = "the limit is stored, and gates get it from a running auth service within a minute"


def _announce(tell: Callable[[Announcer], None], otherwise: str) -> bool:
    """Whether the gates were told through Redis; if not, why and what follows is a warning on standard error."""
    from extproc.auth.announce import Announcer, NotAnnounced

    try:
        url = load(SharedRedisSettings).redis_url.get_secret_value()
        if not url:
            typer.echo(f"warning: IBEX_REDIS_URL is not set: {otherwise}", err=True)
            return False
        announcer = Announcer(url)
    except SettingsError as error:
        typer.echo(f"warning: {error}: {otherwise}", err=True)
        return False
    problem = ""
    try:
        for _ in range(_ANNOUNCE_ATTEMPTS):
            try:
                tell(announcer)
            except NotAnnounced as error:
                problem = str(error)
            else:
                return True
    finally:
        announcer.close()
    typer.echo(f"warning: {problem}: {otherwise}", err=True)
    return False


def _set_status(agent: str, status: str, org: str, data: Path | None, *, as_json: bool) -> None:
    from extproc.auth.store import AgentStatus
    from extproc.memory.model import InvalidValue, parse_uuid

    org_id = _org(org, data)
    try:
        agent_id = parse_uuid(agent, "the agent")
    except InvalidValue as error:
        fail(str(error))
    new: AgentStatus = AgentStatus(status)
    with _opened(data) as store:
        store.set_agent_status(org_id, agent_id, new, datetime.now(UTC))
    _show({"org_id": org_id, "id": agent_id, "status": new}, f"{agent_id} is {new}", as_json=as_json)


@contextmanager
def _opened(data: Path | None) -> Iterator[IdentityStore]:
    """As `opened_database`; what is not there ends the command with a word, too."""
    from extproc.auth.store import IdentityStore, NoSuch

    with opened_database(data) as database:
        try:
            yield IdentityStore(database)
        except NoSuch as error:
            fail(f"{error}; `extproc org|agent|token list` shows what there is")


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


def _permissions(text: str) -> int:
    """Raises InvalidValue."""
    from extproc.auth.token import CHAT, Permission
    from extproc.memory.model import InvalidValue

    if text.isascii() and text.isdigit():
        return int(text[:20])
    words = {
        "chat": CHAT,
        "none": 0,
        **{one.name.lower().replace("_", "-"): one.value for one in Permission if one.name},
    }
    permissions = 0
    for word in text.split(","):
        if word.strip() not in words:
            raise InvalidValue(f"permissions are not of {', '.join(words)}")
        permissions |= words[word.strip()]
    return permissions


def _expiry(life: str, now: datetime) -> datetime | None:
    """Raises InvalidValue."""
    from extproc.memory.model import InvalidValue

    if not life:
        return None
    match = _LIFE.fullmatch(life)
    try:
        return now + timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else _not_a_life()
    except OverflowError:
        raise InvalidValue("--expires is beyond the year 9999") from None


def _not_a_life() -> NoReturn:
    from extproc.memory.model import InvalidValue

    raise InvalidValue("--expires is not a number of minutes, hours, days or weeks such as 90m, 12h, 30d or 8w")


def _as_json(token: Token, now: datetime) -> dict[str, object]:
    row = {name: value for name, value in asdict(token).items() if name != "hash"}
    return {**row, "state": _state(token, now)}


def _state(token: Token, now: datetime) -> str:
    from extproc.auth.token import refusal_of

    return refusal_of(token, now) or "valid"


def _name(text: str) -> str:
    from extproc.auth.new_token import parse_name
    from extproc.memory.model import InvalidValue

    try:
        return parse_name(text)
    except InvalidValue as error:
        fail(str(error))


def _id_or_new(text: str) -> str:
    from extproc.memory.model import InvalidValue, parse_uuid

    try:
        return parse_uuid(text, "--id") if text else _new_id()
    except InvalidValue as error:
        fail(str(error))


def _new_id() -> str:
    import uuid_utils

    return str(uuid_utils.uuid7())


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:20]) < 2**31):
        fail("the limit is not a number from 0 to 2,147,483,647, nor `default`")
    return int(text)


def _limit_words(rpm: int | None) -> str:
    if rpm is None:
        return "the gate's limit"
    return f"{rpm} requests a minute" if rpm else "no limit"


def _show(row: dict[str, object], line: str, *, as_json: bool) -> None:
    typer.echo(_json(row) if as_json else line)


def _show_all(rows: list[dict[str, object]], lines: list[str], nothing: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(_json(rows))
        return
    for line in lines:
        typer.echo(line)
    if not lines:
        typer.echo(nothing, err=True)


def _json(value: object) -> str:
    plain = json.loads(json.dumps(value, default=lambda one: one.isoformat()))
    return json_text(plain, sys.stdout.encoding)
