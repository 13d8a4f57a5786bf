"""`extproc memory …`: managing memories by hand. A running engine sees each change at once.

`search` is in `extproc.context.commands`, `forget` in `extproc.turns.forget_commands`: they need what lies above.
"""

from __future__ import annotations

import io
import json
import stat
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Protocol

import typer

from extproc.settings import EmbeddingSettings, SettingsError, StoreSettings, load

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from extproc.memory.database import Database
    from extproc.memory.features import Indexer
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.store import MemoryStore

__all__ = [
    "AgentOption",
    "DataOption",
    "JsonOption",
    "OrgOption",
    "UserOption",
    "app",
    "fail",
    "json_text",
    "open_indexer",
    "opened",
    "opened_database",
    "org_id_of",
    "printable",
    "whose",
]

IMPORT_BATCH = 500
"""Lines in one transaction: short enough that other writers hardly wait."""
MANY = 1_000
"""New memories of an organisation, after which a database plans its searches badly until it has counted again."""
TOLD_EVERY_S = 10.0
"""Progress, where standard error is no terminal."""
PAGE = 500
MOST_LISTED = 10_000
"""They are read at once; `export` has no limit."""


class Tell(Protocol):
    def __call__(self, done: int, words: str, total: int | None = None, /) -> None: ...


app = typer.Typer(help="Add, find, move and forget memories.", no_args_is_help=True)

OrgOption = Annotated[str, typer.Option("--org", help="organisation, a UUID; none: that of `extproc up`")]
AgentOption = Annotated[str, typer.Option("--agent", help="agent, a UUID; none: that of `extproc up`")]
UserOption = Annotated[str, typer.Option("--user", help="end user inside the agent; none: the agent's own memories")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="directory that holds memories.db; else IBEX_DATABASE_URL or IBEX_DATA")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
CategoryOption = Annotated[
    str, typer.Option("--category", help="factual, preference, behavioral, episodic or procedural")
]
ConfidenceOption = Annotated[float, typer.Option("--confidence", help="0 to 1")]


@app.command()
def add(
    text: Annotated[str, typer.Argument(help="what to remember; - reads it from standard input")],
    org: OrgOption = "",
    agent: AgentOption = "",
    user: UserOption = "",
    category: CategoryOption = "factual",
    confidence: ConfidenceOption = 0.8,
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Remember a text. The same text again gives the same memory."""
    from extproc.memory.model import InvalidValue, new_memory, parse_category

    namespace = whose(org, agent, user, data)
    content = _standard_input().read() if text == "-" else text
    try:
        memory = new_memory(
            namespace,
            content,
            id=_new_id(),
            now=datetime.now(UTC),
            category=parse_category(category),
            confidence=confidence,
        )
    except InvalidValue as error:
        fail(str(error))
    with opened(data, writes=True) as store:
        added = store.add(memory)
    if as_json_:
        typer.echo(json.dumps({"id": added.id, "is_new": added.is_new}))
    else:
        typer.echo(added.id if added.is_new else f"{added.id} (was there already)")


@app.command("list")
def list_(
    org: OrgOption = "",
    agent: AgentOption = "",
    user: UserOption = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=MOST_LISTED, help="most memories to show")] = 100,
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Show what a user of an agent can be reminded of: the user's own memories and the agent's."""
    from extproc.memory.lines import as_json

    with opened(data) as store:
        memories = store.page(whose(org, agent, user, data), limit)
    if as_json_:
        typer.echo(json_text([as_json(memory) for memory in memories], sys.stdout.encoding))
        return
    for memory in memories:
        about = f"{memory.created_at:%Y-%m-%d}  {memory.category:<10}  {memory.user_id or '(agent)'}"
        typer.echo(f"{memory.id}  {about}  {printable(memory.content)}")
    if not memories:
        typer.echo("No memories here yet; `extproc memory add` makes one.", err=True)


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="JSON Lines, as `export` writes them; - is standard input")],
    org: Annotated[str, typer.Option("--org", help="for lines without org_id")] = "",
    agent: Annotated[str, typer.Option("--agent", help="for lines without agent_id")] = "",
    user: Annotated[str, typer.Option("--user", help="for lines without user_id")] = "",
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Add many memories, one JSON object with at least `content` a line. Bad lines are reported and left out.

    What is there already is known again, so an import that was stopped goes on when it is run a second time.
    """
    counts = {"added": 0, "known": 0, "bad": 0}
    new: Counter[str] = Counter()
    with (
        opened(data, writes=True) as store,
        _reading(file) as lines,
        _progress("bytes", _size(file)) as tell,
    ):
        read = _Counted(lines)
        for batch in _batches(_parsed(read, {"org_id": org, "agent_id": agent, "user_id": user}, counts)):
            for (number, memory), added in zip(batch, store.add_many([one for _, one in batch]), strict=True):
                if added is None:
                    _bad_line(number, "another memory has this id already", counts)
                else:
                    counts["added" if added.is_new else "known"] += 1
                    new[memory.org_id] += added.is_new
            tell(read.bytes, f"{counts['added']:,} added, {counts['known']:,} known, {counts['bad']:,} bad")
        _tell_planner(store, [org_id for org_id, many in new.items() if many >= MANY])
    if as_json_:
        typer.echo(json.dumps(counts))
    else:
        typer.echo(f"{counts['added']} added, {counts['known']} there already, {counts['bad']} bad")
    if counts["bad"]:
        raise typer.Exit(1)


def _tell_planner(store: MemoryStore, org_ids: Iterable[str]) -> None:
    from extproc.memory.store import StoreError

    with suppress(StoreError):  # the import is done; the database finds it out by itself
        for org_id in org_ids:
            store.refresh_statistics(org_id)


@app.command()
def export(
    org: OrgOption = "",
    agent: AgentOption = "",
    file: Annotated[str, typer.Argument(help="where to write JSON Lines; - is standard output")] = "-",
    user: UserOption = "",
    data: DataOption = None,
    as_json_: Annotated[bool, typer.Option("--json", help="the summary as JSON, on standard error")] = False,
) -> None:
    """Write the memories that a user of an agent can see, one JSON object a line. `import` makes the same of them."""
    from extproc.memory.lines import as_json

    written = 0
    with opened(data) as store, _writing(file) as out, _progress("memories", None) as tell:
        for memory in _all(store, whose(org, agent, user, data)):
            out.write(json_text(as_json(memory), out.encoding) + "\n")
            written += 1
            if written % PAGE == 0:
                tell(written, f"{written:,} written")
    typer.echo(json.dumps({"written": written}) if as_json_ else f"{written} written", err=True)


@app.command()
def pin(
    memory_id: Annotated[str, typer.Argument(help="the id that `list` shows")],
    org: OrgOption = "",
    agent: AgentOption = "",
    user: UserOption = "",
    off: Annotated[bool, typer.Option("--off", help="take it back")] = False,
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Put a memory into every block, whatever is asked, as far as the share for such memories goes."""
    from extproc.memory.model import InvalidValue, parse_uuid

    namespace = whose(org, agent, user, data)
    with opened(data) as store:
        try:
            is_there = store.pin(namespace, parse_uuid(memory_id, "the id"), is_pinned=not off)
        except InvalidValue as error:
            fail(str(error))
    if not is_there:
        owner = f"user {user}" if user else "the agent itself"
        fail(f"no memory {memory_id} of {owner}; `extproc memory list` shows what there is")
    typer.echo(json.dumps({"pinned": not off}) if as_json_ else f"{memory_id} {'no longer ' if off else ''}pinned")


@app.command("reindex")
def reindex_(
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Compute anew what another model or release computed of memories; all organisations, beside running engines."""
    from extproc.memory.embedding import EmbedderUnavailable
    from extproc.memory.reindex import reindex

    with opened(data) as store, _progress("memories", None) as tell:
        try:
            done = reindex(
                store, open_indexer(), tell=lambda made, total: tell(made, f"{made:,} of {total:,} computed", total)
            )
        except EmbedderUnavailable as error:
            fail(f"{error}; what is done is kept, run it again")
    typer.echo(json.dumps({"reindexed": done}) if as_json_ else f"{done} computed anew")


@app.command()
def history(
    memory_id: Annotated[str, typer.Argument(help="the id that `list` shows")],
    org: OrgOption = "",
    agent: AgentOption = "",
    user: UserOption = "",
    data: DataOption = None,
    as_json_: JsonOption = False,
) -> None:
    """Show what a memory took the place of and what took its place, the oldest first."""
    from extproc.memory.lines import as_json
    from extproc.memory.model import InvalidValue, parse_uuid

    namespace = whose(org, agent, user, data)
    with opened(data) as store:
        try:
            memories = store.history(namespace, parse_uuid(memory_id, "the id"))
        except InvalidValue as error:
            fail(str(error))
    if not memories:
        fail(f"no memory {memory_id} here; `extproc memory list` shows what there is")
    if as_json_:
        typer.echo(json_text([as_json(memory) for memory in memories], sys.stdout.encoding))
        return
    for memory in memories:
        since = f"{memory.valid_from or memory.created_at:%Y-%m-%d}"
        until = f"{memory.valid_until:%Y-%m-%d}" if memory.valid_until is not None else ""
        typer.echo(f"{memory.id}  {since} – {until:<10}  {memory.status:<11}  {printable(memory.content)}")


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def whose(org: str, agent: str, user: str, data: Path | None) -> Namespace:
    """The namespace that the options name; without org and agent, that of the `extproc up` in the data directory."""
    from extproc.memory.demo import Demo, DemoError
    from extproc.memory.model import InvalidValue, Namespace

    try:
        if not org and not agent and (demo := Demo.find(load(StoreSettings, data=data).data)) is not None:
            org, agent = demo.org_id, demo.agent_id
        _require_given(data, org=org, agent=agent)
        return Namespace.parse(org, agent, user)
    except InvalidValue as error:
        # The message names the field; the option has the same name without `_id`.
        fail("--" + str(error).replace("_id", "", 1))
    except (DemoError, SettingsError) as error:
        fail(str(error))


def org_id_of(org: str, data: Path | None) -> str:
    """The organisation that the option names, or that of the `extproc up` in the data directory."""
    from extproc.memory.demo import Demo, DemoError
    from extproc.memory.model import InvalidValue, parse_uuid

    try:
        if not org and (demo := Demo.find(load(StoreSettings, data=data).data)) is not None:
            return demo.org_id
        _require_given(data, org=org)
        return parse_uuid(org, "--org")
    except (InvalidValue, DemoError, SettingsError) as error:
        fail(str(error))


def _require_given(data: Path | None, **options: str) -> None:
    """Ends the command with a word when one of these options is empty. Raises SettingsError."""
    absent = [f"--{name}" for name, given in options.items() if not given]
    if len(absent) == len(options):
        state_dir = load(StoreSettings, data=data).data
        fail(f"give {' and '.join(absent)}: no `extproc up` has run in {state_dir}, whose would be taken")
    if absent:
        fail(f"give {' and '.join(absent)} too")


@contextmanager
def opened_database(data: Path | None) -> Iterator[Database]:
    """The database that the options and the environment name, made when absent, for the stores of other rooms.

    Its errors end the command with a word.
    """
    from extproc.memory.database import Database
    from extproc.memory.store import StoreError, store_url

    try:
        database = Database(store_url(load(StoreSettings, data=data, database_url="" if data else None)))
    except (SettingsError, StoreError) as error:
        fail(str(error))
    try:
        yield database
    except StoreError as error:
        fail(str(error))
    finally:
        database.close()


@contextmanager
def opened(data: Path | None, *, writes: bool = False) -> Iterator[MemoryStore]:
    """The store that the options and the environment name, made when absent. Its errors end the command with a word.

    `writes`: memories or their neighbours, for which features are made.
    """
    from extproc.memory.store import StoreError, open_store

    try:
        settings = load(StoreSettings, data=data, database_url="" if data else None)
        # No other service is asked within a transaction: an engine makes such features later.
        is_remote = load(EmbeddingSettings).embedding == "openai"
        store = open_store(settings, open_indexer() if writes and not is_remote else None)
    except (SettingsError, StoreError) as error:
        fail(str(error))
    try:
        yield store
    except StoreError as error:
        fail(str(error))
    finally:
        store.close()


def open_indexer() -> Indexer:
    """As the engine makes them, with the time that a batch may take. Raises SettingsError."""
    from extproc.memory import features
    from extproc.memory.embedding import ModelUnusable, embedding_choice

    try:
        return features.open_indexer(embedding_choice(load(EmbeddingSettings)).for_documents())
    except ModelUnusable as error:
        raise SettingsError(str(error)) from None


def json_text(value: object, encoding: str) -> str:
    """Readable where the encoding can carry it, else escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _parsed(lines: Iterable[str], defaults: dict[str, str], counts: dict[str, int]) -> Iterator[tuple[int, Memory]]:
    """The good lines with their numbers, from 1; empty lines are passed over."""
    from extproc.memory.lines import memory_of_line
    from extproc.memory.model import InvalidValue

    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, memory_of_line(line, defaults, new_id=_new_id(), now=datetime.now(UTC))
        except InvalidValue as error:
            _bad_line(number, str(error), counts)


def _batches(items: Iterable[tuple[int, Memory]]) -> Iterator[list[tuple[int, Memory]]]:
    batch: list[tuple[int, Memory]] = []
    for item in items:
        batch.append(item)
        if len(batch) == IMPORT_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _all(store: MemoryStore, namespace: Namespace) -> Iterator[Memory]:
    after = ""
    while page := store.page(namespace, PAGE, after):
        yield from page
        after = page[-1].id


def _bad_line(number: int, reason: str, counts: dict[str, int]) -> None:
    counts["bad"] += 1
    typer.echo(f"line {number}: {reason}", err=True)


@contextmanager
def _reading(file: str) -> Iterator[TextIO]:
    if file == "-":
        yield _standard_input()
        return
    try:
        # A line that is no UTF-8 is one bad line, not the end of the import; some editors put a mark before the first.
        opened_file = Path(file).open(encoding="utf-8-sig", errors="surrogateescape")  # noqa: SIM115 (closed below)
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}")
    with opened_file:
        yield opened_file


@contextmanager
def _writing(file: str) -> Iterator[TextIO]:
    """A file is there whole, or as it was before. A pipe or a device is written directly."""
    if file == "-":
        yield sys.stdout
        return
    target = Path(file).resolve()
    try:
        if target.exists() and not target.is_file():
            with target.open("w", encoding="utf-8") as out:
                yield out
            return
        descriptor, name = tempfile.mkstemp(prefix=".export-", dir=target.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as out:  # noqa: PTH123 (a descriptor)
                yield out
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror}")


def _standard_input() -> TextIO:
    """Read like a file: what is no UTF-8 spoils its own line only."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    return sys.stdin


class _Counted:
    """Lines, and how many bytes they were."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.bytes += len(line.encode("utf-8", "surrogateescape"))
            yield line


def _size(file: str) -> int | None:
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Tell]:
    """A bar on a terminal's standard error, else a line now and then. The function takes what is done, words, and a new
    total."""
    if not sys.stderr.isatty():
        yield _told_in_lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total)

        def tell(done: int, words: str, total: int | None = total) -> None:
            bar.update(task, completed=done, description=words, total=total)

        yield tell


def _told_in_lines(total: int | None) -> Tell:
    told_at = time.monotonic()

    def tell(done: int, words: str, total: int | None = total) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= TOLD_EVERY_S:
            told_at = time.monotonic()
            typer.echo(f"{words} ({done / total:.0%})" if total else words, err=True)

    return tell


def printable(text: str) -> str:
    """For a terminal: one line, nothing that moves the cursor."""
    return "".join(char if char.isprintable() else " " for char in text)


def _new_id() -> str:
    import uuid_utils

    return str(uuid_utils.uuid7())
