"""``twinpool sim calibrate``: a profile of the workers that are there, from what their steps took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twinpool.cli import sim
from twinpool.cli.common import reporting
from twinpool.cli.sim import JsonFile, Screen, Seed, SkipBad
from twinpool.errors import ConfigError

if TYPE_CHECKING:  # numpy takes a quarter of a second to import: only this command waits for it
    from twinpool.cost_grid import Grids
    from twinpool.sim.calibrate import CostFound
    from twinpool.sim.calibrate_edge import EdgeFound
    from twinpool.sim.calibrate_logs import Steps, StepWorker

CHUNK_TOKENS = 512  # worker.chunk_tokens, where neither a step log nor a flag says it

StepFiles = Annotated[list[Path] | None, typer.Option("--steps", metavar="LOG", help="Step log; again for each.")]
TableFile = Annotated[Path | None, typer.Option(metavar="CSV", help="Of tokens,cached,batch,context,seconds.")]
RequestFile = Annotated[Path | None, typer.Option(metavar="LOG", help="The router's edge.request_log.")]
ClientFile = Annotated[
    Path | None, typer.Option(metavar="LOG", help="Of clients: ttft_s and router_ttft_s, JSON lines.")
]
Name = Annotated[str | None, typer.Option(help="Of the profile; that of the file if not given.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Profile to write, JSON.")]
Workers = Annotated[list[str] | None, typer.Option("--worker", metavar="NAME", help="Only these; again for each.")]
Like = Annotated[str | None, typer.Option(metavar="PROFILE", help="Where everything is from that is not measured.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs a worker.")]
KvTokens = Annotated[int | None, typer.Option(min=1, help="Tokens that the KV memory of a worker holds.")]
KvBytes = Annotated[int | None, typer.Option("--kv-bytes-per-token", min=0, help="Of all GPUs of a worker.")]
Link = Annotated[float | None, typer.Option("--link-bytes-per-s", min=1.0, help="Of a worker, each way.")]
Chunk = Annotated[int | None, typer.Option("--chunk-tokens", min=1, help="Of the workers; the step log says it too.")]


@sim.app.command()
def calibrate(
    steps: StepFiles = None, table: TableFile = None, request_log: RequestFile = None, client_log: ClientFile = None,
    name: Name = None, output: Output = None, worker: Workers = None, like: Like = None, gpus: Gpus = None,
    kv_tokens: KvTokens = None, kv_bytes_per_token: KvBytes = None, link_bytes_per_s: Link = None,
    chunk_tokens: Chunk = None, seed: Seed = 0, skip_bad: SkipBad = False, json_file: JsonFile = None,
) -> None:  # fmt: skip
    """A profile from a live worker's step log (worker.step_log) or a measured table, for --profile FILE.

    With the router's request log also what messages, transfers and the router itself take; with times of clients also
    what is between them and it. Prints how good the fit is.
    """
    from twinpool.sim.calibrate import Given, fit_steps, make_profile, with_gap_spread, write_profile
    from twinpool.sim.calibrate_grid import measured_grids
    from twinpool.sim.calibrate_logs import read_steps, read_table
    from twinpool.sim.profiles import load_profile

    with reporting():
        screen = Screen(json_file)
        if bool(steps) == (table is not None):
            raise ConfigError("give either --steps, the step log of a worker (worker.step_log), or --table, a CSV")
        with screen.progress("fitting", 2.0) as done:
            read = read_steps(steps, workers=worker or (), skip_bad=skip_bad) if steps else None
            measured = read if read is not None else read_table(_there(table), skip_bad=skip_bad)
            screen.notices(measured.notices)
            done(1.0)
            found = fit_steps(measured)
            tables = measured_grids(measured, found.cost, found.mean_error)
        one = next(iter(measured.workers.values()), None)
        chunk = chunk_tokens or (one.chunk_tokens if one is not None else 0) or CHUNK_TOKENS
        edge = _edge((request_log, client_log), chunk, one, kv_bytes_per_token, skip_bad, screen)
        screen.notices([*found.notices, *_of_tables(tables)])
        figures = {"source": _source(measured), "fit": found.figures(), "edge": edge.figures() if edge else None,
                   "tables_mean_error": tables[1] if tables else None}  # fmt: skip
        if not screen.only_json:
            show(found, edge, Console())
        if output is not None:
            given = Given(gpus, kv_tokens, kv_bytes_per_token, link_bytes_per_s)
            base = load_profile(like) if like is not None else None
            profile = make_profile(name or output.stem, found, edge, one, base, given, tables[0] if tables else None)
            if read is not None:
                profile = with_gap_spread(profile, read, edge)
            write_profile(output, profile)
            figures["profile"] = msgspec.to_builtins(profile)
            if not screen.only_json:
                typer.echo(f"{output}: use it with --profile {output}")
        screen.write(figures)


def _of_tables(tables: tuple[Grids, float] | None) -> list[str]:
    if tables is None:
        return []
    off = f"{tables[1]:.1%} off in the mean; beyond the largest step they go on straight"
    return [f"the profile has tables of what was measured, in place of the formula: {off}"]


def _there(path: Path | None) -> Path:
    assert path is not None
    return path


def _source(steps: Steps) -> dict[str, object]:
    return {"steps": len(steps), "workers": [msgspec.to_builtins(one) for one in steps.workers.values()]}


def _edge(
    logs: tuple[Path | None, Path | None],
    chunk: int,
    worker: StepWorker | None,
    kv_bytes: int | None,
    skip_bad: bool,
    screen: Screen,
) -> EdgeFound | None:
    """From the router's log and the clients'."""
    from twinpool.sim.calibrate_edge import measure_edge
    from twinpool.sim.calibrate_logs import read_clients, read_requests

    of_router, of_clients = logs
    if of_router is None:
        if of_clients is not None:
            raise ConfigError("--client-log says nothing alone: give --request-log, the router's own, too")
        return None
    requests, notices = read_requests(of_router, skip_bad=skip_bad)
    clients, more = read_clients(of_clients, skip_bad=skip_bad) if of_clients is not None else ([], [])
    screen.notices(notices + more)
    per_token = worker.block_bytes / worker.block_tokens if worker is not None else kv_bytes
    return measure_edge(requests, chunk_tokens=chunk, kv_bytes_per_token=per_token, clients=clients)


def show(found: CostFound, edge: EdgeFound | None, console: Console) -> None:
    """The tables of what was found."""
    console.print(_coefficients(found))
    console.print(_errors(found))
    share, ratio, most = found.outlier_time_share, found.time_ratio, found.most
    console.print(
        f"{found.steps} steps, {found.fitted} of them fitted (evenly over their kinds), {found.outliers} outliers "
        f"with {share:.1%} of the time. All of them together are predicted to take {ratio - 1.0:+.1%} of what they "
        f"took; a profile's steps are {1e3 * found.late_s:.2f} ms longer, so that all take as long.\nThe largest "
        f"had {most['tokens']} prompt tokens, {most['batch']} sequences, {most['context']} context tokens: beyond that "
        "nothing was measured.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if edge is not None:
        console.print(_overheads(edge))


def _coefficients(found: CostFound) -> Table:
    """``cost.py`` has the formula."""
    table = Table("coefficient", "value", "of", title="seconds = max(c0 + a n, d0 + d1 n) + d2 K + b attention")
    cost = found.cost
    rows = (
        ("c0", cost.c0 * 1e3, "ms", "a step that computes"), ("a", cost.a * 1e6, "us", "a token, computing"),
        ("d0", cost.d0 * 1e3, "ms", "a step that reads weights"), ("d1", cost.d1 * 1e6, "us", "a token, reading"),
        ("d2", cost.d2 * 1e9, "ns", "a context token of a decode"),
        ("b", cost.b * 1e9, "ns", "a chunk token times a token before it"),
    )  # fmt: skip
    for key, value, unit, what in rows:
        table.add_row(key, f"{value:.4g} {unit}", what)
    return table


def _errors(found: CostFound) -> Table:
    table = Table("steps", "count", "mean error", "95 %", "worst", "bias", "", title="formula against steps")
    for kind in found.kinds:
        shares = [f"{share:.1%}" for share in (kind.mean, kind.p95, kind.worst)]
        table.add_row(kind.kind, str(kind.steps), *shares, f"{kind.bias:+.1%}", "poor" if kind.poor else "")
    return table


def _overheads(edge: EdgeFound) -> Table:
    table = Table("figure", "median", "10 - 90 %", "requests", "", title="besides steps, from the request log")
    names = {"latency_s": "message, one way", "edge_s": "router, a first token", "outside_s": "of it, outside",
             "setup_s": "transfer, set-up"}  # fmt: skip
    for key, name in names.items():
        figure = getattr(edge, key)
        if figure.value is None:
            table.add_row(name, "-", "", str(figure.requests), escape(figure.note))
        else:
            span = f"{1e3 * figure.low:.3f} - {1e3 * figure.high:.3f} ms"
            table.add_row(name, f"{1e3 * figure.value:.3f} ms", span, str(figure.requests), escape(figure.note))
    rate = edge.link_bytes_per_s
    value = "-" if rate.value is None else f"{rate.value / 1e9:.3g} GB/s"
    table.add_row("transfer, rate", value, "", str(rate.requests), escape(rate.note))
    return table
