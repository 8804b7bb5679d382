"""The commands of ``twinpool``, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from twinpool import __version__
from twinpool.cli import (  # noqa: F401  # they add their commands to sim's
    bench,
    cluster,
    configs,
    demo,
    explain,
    generate,
    process,
    sim,
    sim_calibrate,
    sim_explain,
    sim_report,
    sim_search,
    status,
    trace,
    workers,
)

app = typer.Typer(
    name="twinpool",
    help="Serves a language model from a prefill pool and a decode pool of workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")]


@app.callback()
def root(version: VersionOption = False) -> None:
    """Serves a language model from a prefill pool and a decode pool of workers."""


app.command("up")(cluster.up)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("bench")(bench.bench)
app.command("status")(status.status)
app.command("drain")(workers.drain)
app.command("role")(workers.role)
app.command("explain")(explain.explain)
app.add_typer(configs.app, name="config")
app.add_typer(sim.app, name="sim")
app.add_typer(trace.app, name="trace")
app.command("router")(process.router)
app.command("worker")(process.worker)
