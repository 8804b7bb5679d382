"""What all commands share: options for the configuration, and how failures are told.

Exit status: 0 done, 1 it failed, 2 the command line, the YAML or a model file is wrong.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from twinpool.config_load import Loaded, Override, load, parse_set
from twinpool.errors import ConfigError, TwinpoolError

FAILED = 1
MISCONFIGURED = 2

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Cluster YAML; without it the defaults.")
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A value of the YAML, such as worker.threads=2."),
]
Address = Annotated[
    str | None, typer.Option("--address", "-a", metavar="HOST:PORT", help="Of the router; else that of the YAML.")
]


def loaded(path: Path | None, sets: list[str] | None, flags: tuple[Override, ...] = ()) -> Loaded:
    """The configuration of a command line; ``--set`` wins over the flags. Raises ConfigError."""
    return load(path, (*flags, *(parse_set(text) for text in sets or ())))


@contextmanager
def reporting() -> Iterator[None]:
    """Turns an error of ours into sentences on stderr and an exit status."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"twinpool: {error.message}", err=True)
        raise typer.Exit(MISCONFIGURED) from None
    except TwinpoolError as error:
        typer.echo("\n".join(sentences(error)), err=True)
        raise typer.Exit(FAILED) from None


def sentences(error: TwinpoolError) -> list[str]:
    """Status, reason and sentence of an error, and whether to try again."""
    return [f"{error.code} {error.reason}: {error.message}", advice(error)]


def advice(error: TwinpoolError) -> str:
    """Whether and when repeating the call can help."""
    if error.retry_s is not None:
        return f"Try again in {error.retry_s:.1f} s."
    if error.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
        return "Trying again later may help."
    return "Repeating it as it is will not help."


def log_to_stderr(level: str) -> None:
    """Logging of a router or worker process."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
