"""``config check|show|schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from twinpool.cli.common import ConfigFile, SetOptions, loaded, reporting
from twinpool.config_load import schema_text, show

app = typer.Typer(help="Check, show and describe the cluster YAML.", no_args_is_help=True)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Cluster YAML.")], sets: SetOptions = None) -> None:
    """Say what is wrong with a YAML, one line for each mistake; exit status 2 where anything is."""
    with reporting():
        loaded(file, sets)
        typer.echo(f"{file}: good")


@app.command("show")
def show_command(
    config_file: ConfigFile = None,
    sets: SetOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON: values and origins.")] = False,
) -> None:
    """Print every value and where it came from: default, FILE:LINE or a flag."""
    with reporting():
        result = loaded(config_file, sets)
        if as_json:
            values = result.config.model_dump(mode="json", by_alias=True)
            values["link"]["token"] = "***" if result.config.link.token else ""
            typer.echo(json.dumps({"values": values, "origins": result.origins}))
        else:
            typer.echo(show(result), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of the YAML (deploy/cluster.schema.json)."""
    typer.echo(schema_text(), nl=False)
