"""``twinpool explain``: why a request of a running or past router went where it went, from its decision log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from twinpool.cli.common import ConfigFile, SetOptions, loaded, reporting
from twinpool.cli.sim import Screen
from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError

RequestId = Annotated[str, typer.Argument(metavar="REQUEST_ID", help="As clients and the request log have it.")]
LogFile = Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Decision log; else that of the YAML.")]
Occurrence = Annotated[int, typer.Option(min=0, help="Of several with that id: 1 is the first; 0: the last.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All of it as JSON; - for stdout.")]


def explain(
    request_id: RequestId, log: LogFile = None, occurrence: Occurrence = 0, json_file: JsonFile = None,
    config_file: ConfigFile = None, sets: SetOptions = None,
) -> None:  # fmt: skip
    """Why a request went where it went: candidates, predicted times, the choice, and what came of it."""
    with reporting():
        screen = Screen(json_file)
        config = loaded(config_file, sets).config
        path = log or _log_of(config)
        from twinpool.router import decision_explain

        with _progress(screen) as watch:
            story, notices = decision_explain.explain(
                path, request_id, occurrence=occurrence, trusted=config.scheduling.policy, watch=watch
            )
        screen.notices(notices)
        screen.write(story.figures() | {"log": str(path), "notices": notices})
        if not screen.only_json:
            from twinpool.cli.explain_text import show

            show(story)


def _log_of(config: ClusterConfig) -> Path:
    path = config.scheduling.decision_log
    if path is None:
        raise ConfigError(
            "there is no decision log: name a file in scheduling.decision_log and start the router again; requests "
            "that come from then on can be explained. Where there is one, give its file: --log FILE, or -c YAML"
        )
    return path


@contextmanager
def _progress(screen: Screen) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar once the number of events is known."""
    with screen.progress("replaying the log", 1.0) as bar:

        def begin(total: int) -> Callable[[int], None]:
            return lambda done: bar(done / max(1, total))

        yield begin
