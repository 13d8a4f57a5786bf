"""`extproc worker …`: run a worker, and look after the tasks that failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from extproc.settings import BrokerSettings, StoreSettings, WorkerSettings, load
from extproc.worker.failed import FailedTask, FailedTasks

__all__ = ["app"]

app = typer.Typer(help="Make memories of what was said, and look after the tasks that failed.")

DataOption = Annotated[
    Path | None, typer.Option("--data", help="Directory of the embedded stores; else IBEX_DATABASE_URL or IBEX_DATA.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback(invoke_without_command=True)
def worker(
    context: typer.Context,
    data: DataOption = None,
    processes: Annotated[int | None, typer.Option(help="Processes that extract at the same time.")] = None,
    admin: Annotated[str | None, typer.Option(help="host:port of /health, /ready and /metrics.")] = None,
) -> None:
    """Take extraction tasks from the queue until SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    from extproc.worker.app import run_worker

    raise typer.Exit(run_worker(load(WorkerSettings, data=data, worker_processes=processes, admin_listen=admin)))


@app.command("failed")
def failed(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show the tasks that were set aside, by their ids."""
    with _opened(data) as tasks:
        found = tasks.all()
    if as_json:
        typer.echo(json.dumps([_as_json(task) for task in found]))
        return
    for task in found:
        times = f"{task.attempts} {'attempt' if task.attempts == 1 else 'attempts'}"
        typer.echo(
            f"{task.task_id}  {task.failed_at:%Y-%m-%d %H:%M}  session {task.session_id or '?'}  {times}  {task.error}"
        )
    if not found:
        typer.echo("No task has failed.", err=True)


@app.command("replay")
def replay(
    task_ids: Annotated[list[str] | None, typer.Argument(help="as `failed` shows them; none: all")] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send failed tasks to the queue again, once their reason is mended.

    A session whose texts have expired meanwhile is passed over by the worker.
    """
    from extproc.turns.broker import BrokerUrlError
    from extproc.turns.enqueue import RedisTasks
    from extproc.turns.sinks import ExtractionTask, Unavailable

    url = load(BrokerSettings).broker_url.get_secret_value()
    if not url:
        _fail("IBEX_BROKER_URL is not set: there is no queue to send to")
    with _opened(data) as tasks:
        every = tasks.all()
        if unknown := set(task_ids or ()) - {task.task_id for task in every}:
            _fail(f"no failed task {min(unknown)}; `extproc worker failed` shows what there is")
        chosen = [task for task in every if not task_ids or task.task_id in task_ids]
        sent = [task for task in chosen if task.can_replay]
        try:
            queue = RedisTasks(url)
            queue.send([ExtractionTask(task.task_id, task.session_id, task.org_id) for task in sent])
            queue.close()
        except (BrokerUrlError, Unavailable) as error:
            _fail(str(error))
        # After it is on the queue: sent twice is harmless, lost is not.
        for task in sent:
            tasks.remove(task)
    if as_json:
        typer.echo(json.dumps({"replayed": len(sent), "left": len(chosen) - len(sent)}))
        return
    left = len(chosen) - len(sent)
    typer.echo(f"{len(sent)} sent again" + (f", {left} name no session and stay" if left else ""))


@contextmanager
def _opened(data: Path | None) -> Iterator[FailedTasks]:
    from extproc.memory.database import Database
    from extproc.memory.store import StoreError, store_url

    settings = load(StoreSettings, data=data, database_url="" if data else None)
    try:
        database = Database(store_url(settings))
        try:
            yield FailedTasks(database)
        finally:
            database.close()
    except StoreError as error:
        _fail(str(error))


def _as_json(task: FailedTask) -> dict[str, object]:
    return {
        "task_id": task.task_id, "org_id": task.org_id, "session_id": task.session_id, "error": task.error,
        "attempts": task.attempts, "failed_at": task.failed_at.isoformat(),
    }  # fmt: skip


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
