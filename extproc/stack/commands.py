"""`extproc envoy`: what an Envoy needs beside its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from extproc.stack import keys

__all__ = ["app"]

app = typer.Typer(help="Files for Envoy: a certificate for trying it out, providers' keys.", no_args_is_help=True)


@app.command("certs")
def make_certificate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where ca.pem, tls.crt and tls.key go.")],
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of the gateway; may be repeated. Default: this machine.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """A certificate for HTTPS, signed by an authority of its own. For trying out; it ends after a year."""
    from extproc.stack import certs

    try:
        pair = certs.Pair.within(directory)
        if not force and any(file.exists() for file in pair):
            raise FileExistsError(f"{directory} has a certificate already; --force replaces it")
        pair = certs.make(directory, host or certs.LOOPBACK)
    except (OSError, ValueError) as error:
        _fail("certs", error)
    typer.echo(f"Certificate {pair.chain}, key {pair.key}. Clients have to trust {pair.authority}:")
    typer.echo(f"  curl --cacert {pair.authority} …    SSL_CERT_FILE={pair.authority} python …")


@app.command("key")
def write_key(
    provider: Annotated[str, typer.Argument(help=f"One of: {', '.join(keys.BY_PROVIDER)}.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where NAME.yaml goes.")],
) -> None:
    """Write a provider's key, read from standard input, into a file for Envoy. A running Envoy takes it at once."""
    try:
        file = keys.write(directory, provider, sys.stdin.readline().strip())
    except (OSError, keys.UnusableKey) as error:
        _fail("key", error)
    typer.echo(f"{file} holds the key of {provider}")


def _fail(command: str, error: Exception) -> NoReturn:
    typer.echo(f"extproc envoy {command}: {error}", err=True)
    raise typer.Exit(1) from None
