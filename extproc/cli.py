"""The commands, and nothing else: each reads its settings, imports its process and runs it."""

from __future__ import annotations

import errno
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from extproc.settings import (
    AuthSettings,
    EngineSettings,
    FilterSettings,
    GateSettings,
    ObserverSettings,
    SettingsError,
    StoreSettings,
    TraceSettings,
    load,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="extproc",
    help="A memory filter for Envoy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener,-event_engine_callback_cq"
"""grpcio's older poller: one thread reads all sockets instead of four handing work to each other.

Saves a fifth of the filter's CPU at one request at a time, a tenth under load (docs/decisions/0009). Your own value
wins.
"""

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What writing may end with that is nobody's bug. Files are looked after by the commands: this is standard output."""

EXTRAS = {
    "filter": "filter",
    "observer": "observer",
    "outbox": "observer",
    "traces": "observer",
    "gate": "gate",
    "auth": "auth",
    "org": "auth",
    "agent": "auth",
    "token": "auth",
    "directive": "auth",
    "engine": "engine",
    "memory": "engine",
    "embedding": "minilm",
    "worker": "worker",
    "migrate": "engine",
}
"""What to install for a command; for any other, `stack`."""

DataOption = Annotated[Path | None, typer.Option("--data", help="Directory of the embedded stores.", metavar="DIR")]


def main() -> NoReturn:
    """Entry point of the `extproc` command."""
    _open_standard_streams()
    # Before the first import of grpc, which reads it once.
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
    # Before the first import of numpy and faiss. A search is a few milliseconds of one core: shared among threads, it
    # waits for them on a busy machine (23 ms in place of 3 ms).
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    _mount_optional_commands()
    try:
        app()
    except SettingsError as error:
        typer.echo(f"extproc: {error}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "extproc").startswith("extproc"):
            raise
        extra = EXTRAS.get(sys.argv[1] if len(sys.argv) > 1 else "", "stack")
        typer.echo(f"extproc: {error.name} is not installed; this command needs `ibex-extproc[{extra}]`", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        typer.echo(f"extproc: the output cannot be written: {error.strerror}", err=True)
        sys.exit(1)
    sys.exit(0)


def _open_standard_streams() -> None:
    """A supervisor may start us with standard streams closed; files and sockets would then take their numbers."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)


def _mount_optional_commands() -> None:
    """A pod is installed with what its process needs: it has no command that could only fail."""
    if find_spec("Stemmer") is not None and find_spec("numpy") is not None:
        from extproc.context.commands import app as memory
        from extproc.memory.embedding.commands import embedding_app
        from extproc.turns import forget_commands  # noqa: F401 - `memory forget`

        app.add_typer(memory, name="memory")
        app.add_typer(embedding_app, name="embedding")
    if find_spec("sqlalchemy") is not None and find_spec("clickhouse_connect") is not None:
        from extproc.turns.commands import app as outbox
        from extproc.turns.trace_commands import traces

        app.add_typer(outbox, name="outbox")
        app.command("traces")(traces)
    if find_spec("argon2") is not None and find_spec("sqlalchemy") is not None:
        from extproc.auth.commands import agents_app, organizations_app, tokens_app
        from extproc.directives.commands import app as directives_app

        app.add_typer(organizations_app, name="org")
        app.add_typer(agents_app, name="agent")
        app.add_typer(tokens_app, name="token")
        app.add_typer(directives_app, name="directive")
    if find_spec("celery") is not None and find_spec("Stemmer") is not None:
        from extproc.worker.commands import app as worker

        app.add_typer(worker, name="worker")
    if find_spec("yaml") is not None and find_spec("cryptography") is not None:
        from extproc.stack.commands import app as envoy

        app.add_typer(envoy, name="envoy")


def _fail(command: str, error: Exception) -> NoReturn:
    typer.echo(f"extproc {command}: {error}", err=True)
    raise typer.Exit(1) from None


@app.command("filter")
def run_filter(
    listen: Annotated[str | None, typer.Option(help="host:port or unix:/path for Envoy.")] = None,
    engine: Annotated[str | None, typer.Option(help="gRPC target of the engine.")] = None,
    admin: Annotated[str | None, typer.Option(help="host:port of /health, /ready and /metrics.")] = None,
) -> None:
    """The external processor that Envoy calls."""
    from extproc import serve

    serve.run_filter(load(FilterSettings, filter_listen=listen, engine_address=engine, admin_listen=admin))


@app.command("observer")
def run_observer(
    listen: Annotated[str | None, typer.Option(help="host:port or unix:/path for Envoy.")] = None,
    admin: Annotated[str | None, typer.Option(help="host:port of /health, /ready, /metrics and sessions.")] = None,
    data: DataOption = None,
    state: Annotated[Path | None, typer.Option(help="Directory of the outboxes.", metavar="DIR")] = None,
) -> None:
    """The process that watches answers and brings each turn to database, queue and trace table."""
    from extproc import serve

    serve.run_observer(load(ObserverSettings, observer_listen=listen, admin_listen=admin, data=data, state_dir=state))


@app.command("gate")
def run_gate(
    listen: Annotated[str | None, typer.Option(help="host:port or unix:/path for Envoy.")] = None,
    auth: Annotated[str | None, typer.Option(help="gRPC target of the auth service.")] = None,
    admin: Annotated[str | None, typer.Option(help="host:port of /health, /ready and /metrics.")] = None,
) -> None:
    """Who may pass: Envoy asks it before every request, and takes no answer for a no."""
    from extproc import serve

    serve.run_gate(load(GateSettings, gate_listen=listen, auth_address=auth, admin_listen=admin))


@app.command("auth")
def run_auth(
    listen: Annotated[str | None, typer.Option(help="host:port or unix:/path for the gates.")] = None,
    admin: Annotated[str | None, typer.Option(help="host:port of /health, /ready and /metrics.")] = None,
    data: DataOption = None,
) -> None:
    """The reference auth service: organisations, agents, tokens."""
    from extproc import serve

    serve.run_auth(load(AuthSettings, auth_listen=listen, admin_listen=admin, data=data))


@app.command("engine")
def run_engine(
    listen: Annotated[str | None, typer.Option(help="host:port or unix:/path for the filters.")] = None,
    admin: Annotated[str | None, typer.Option(help="host:port of /health, /ready and /metrics.")] = None,
    data: DataOption = None,
) -> None:
    """The service that finds, scores and renders memories."""
    from extproc import serve

    serve.run_engine(load(EngineSettings, engine_listen=listen, admin_listen=admin, data=data))


@app.command("migrate")
def migrate(data: DataOption = None) -> None:
    """Create the tables of database and traces, or bring them up to this release. Safe to run again."""
    from extproc.memory.database import migrate as bring_up_to_date
    from extproc.memory.database import shown_url
    from extproc.memory.store import StoreError, store_url

    settings, traces = load(StoreSettings, data=data), load(TraceSettings)
    try:
        bring_up_to_date(store_url(settings), adds_vectors=True)
    except StoreError as error:
        _fail("migrate", error)
    typer.echo(f"{shown_url(settings)} is up to date")
    if url := traces.clickhouse_url.get_secret_value():
        from extproc.turns.sinks import Unavailable
        from extproc.turns.trace import migrate_traces

        try:
            migrate_traces(url, traces.trace_retention_days)
        except Unavailable as error:
            _fail("migrate", error)
        typer.echo("the trace table in ClickHouse is up to date")


@app.command("up")
def up(
    listen: Annotated[str, typer.Option(help="host:port of the gateway.")] = "127.0.0.1:8080",
    provider: Annotated[
        str | None, typer.Option(help="URL of a real provider; without it a stand-in answers.", metavar="URL")
    ] = None,
    provider_key: Annotated[
        str | None,
        typer.Option(help="Environment variable with the provider's key. Default: by its host.", metavar="NAME"),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="HTTPS, with a certificate made for this machine.")] = False,
    otlp: Annotated[str | None, typer.Option(help="OTLP/HTTP receiver of all spans.", metavar="URL")] = None,
    worker: Annotated[bool, typer.Option(help="Make memories of turns, or leave the tasks in the queue.")] = True,
    engines: Annotated[
        int, typer.Option(min=1, max=8, help="Engines, each a process; the filter asks them in turn.")
    ] = 1,
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON once everything answers.")] = False,
) -> None:
    """Everything on this machine: a real Envoy, all processes and stores, a stand-in provider. Ctrl-C ends it."""
    from extproc.stack.up import StackError, run

    try:
        run(
            listen=listen,
            provider=provider,
            provider_key=provider_key,
            tls=tls,
            otlp=otlp,
            data=data,
            as_json=as_json,
            has_worker=worker,
            engines=engines,
        )
    except StackError as error:
        _fail("up", error)


@app.command("doctor")
def doctor(
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Look for what would keep this installation from working, and say what to do about it."""
    from extproc.stack.doctor import examine, show

    findings = examine(data)
    show(findings, as_json=as_json)
    raise typer.Exit(1 if any(finding.is_problem for finding in findings) else 0)
