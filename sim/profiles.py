"""Profiles: what a worker of one (device, model, TP) costs and holds. One small JSON file each in profiles/.

A name is ``device/model/tpN``; its file has ``-`` for ``/``. benchmarks/profiles/make.py makes the files, from public
tables; each says where its figures are from. Where a name is wanted the path of a profile file may be given instead:
``twinpool sim calibrate`` writes such files, of what was measured here.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec

from twinpool.cost import Cost, StepCost
from twinpool.cost_grid import GridCost, Grids
from twinpool.errors import ConfigError
from twinpool.sim.settings import DEFAULT_PROFILE, Settings

__all__ = [
    "DEFAULT_PROFILE", "Edge", "Profile", "ProfileFile", "decoded", "load_profile", "name_of", "profile_names",
    "with_measured",
]  # fmt: skip


class Edge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What messages, transfers and the router itself take besides steps, in seconds; None: not measured."""

    edge_s: float | None = None  # of the router, in each time to the first token; its median
    edge_spread_s: tuple[float, ...] = ()  # quantiles, evenly spaced, of what single ones take more or less than that
    gap_spread_s: tuple[float, ...] = ()  # the same of what single gaps take more or less than simulated
    latency_s: float | None = None  # one way between router and workers
    setup_s: float | None = None  # of each transfer


class ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A profile as its file holds it."""

    name: str
    gpus: int  # a worker has; its tensor-parallel size
    kv_bytes_per_token: int  # of all the worker's GPUs together
    kv_tokens: int  # a worker's KV memory holds
    link_bytes_per_s: float  # each way, between two workers
    price_per_gpu_hour: float | None  # US dollars; None: no public list price known
    idle_watts_per_gpu: float | None
    busy_watts_per_gpu: float | None
    fit: StepCost  # the closed form nearest to the grids
    fit_mean_error: float  # share of the tables' seconds
    fit_worst_error: float
    source: dict[str, str]  # figure -> where it is from
    grids: Grids | None = None  # None: the closed form is all there is
    edge: Edge = Edge()
    planned: StepCost | None = None  # what workers and router take a step to last when they plan; None: what it lasts


class Profile:
    """A loaded profile; see ``ProfileFile`` for units. Shared: not to be changed."""

    __slots__ = (
        "busy_watts_per_gpu", "cost", "edge", "fit", "fit_mean_error", "fit_worst_error", "gpus", "idle_watts_per_gpu",
        "kv_bytes_per_token", "kv_tokens", "link_bytes_per_s", "name", "planned", "price_per_gpu_hour", "source",
    )  # fmt: skip

    def __init__(self, file: ProfileFile) -> None:
        self.name = file.name
        self.cost: Cost = file.fit if file.grids is None else GridCost(file.grids)
        self.edge = file.edge
        self.fit = file.fit
        self.fit_mean_error = file.fit_mean_error
        self.fit_worst_error = file.fit_worst_error
        self.gpus = file.gpus
        self.kv_bytes_per_token = file.kv_bytes_per_token
        self.kv_tokens = file.kv_tokens
        self.link_bytes_per_s = file.link_bytes_per_s
        self.price_per_gpu_hour = file.price_per_gpu_hour
        self.idle_watts_per_gpu = file.idle_watts_per_gpu
        self.busy_watts_per_gpu = file.busy_watts_per_gpu
        self.source = file.source
        self.planned = file.planned


def profile_names() -> list[str]:
    """Names of all profiles, sorted."""
    return list(_names())


@cache
def _names() -> tuple[str, ...]:
    folder = files("twinpool.sim").joinpath("profiles")
    names = (entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    return tuple(sorted(name_of(stem) for stem in names))


def name_of(stem: str) -> str:
    """The profile's name from that of its file: ``h100_sxm-llama-3.1-8b-tp1`` is ``h100_sxm/llama-3.1-8b/tp1``."""
    device, rest = stem.split("-", 1)
    model, tp = rest.rsplit("-", 1)
    return f"{device}/{model}/{tp}"


def load_profile(name: str) -> Profile:
    """The profile called ``name``, or of the file of that path. Raises ConfigError, listing the names, for others."""
    known = _names()
    if name in known:
        return _known(name)
    path = Path(name)
    if name.endswith(".json") or path.is_file():
        try:
            stat = path.stat()
        except OSError as error:
            raise ConfigError(f"{name}: this profile cannot be read ({error.strerror})") from None
        return _of_file(path.resolve(), stat.st_mtime_ns, stat.st_size)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"there is no profile {name!r}{hint} Give a file of `twinpool sim calibrate`, or one of: {', '.join(known)}"
    )


def with_measured(settings: Settings) -> Settings:
    """The settings with what their profile knows of edge, messages and transfers in place of the defaults."""
    edge = load_profile(settings.profile).edge
    defaults = Settings()
    known = {name: value for name in edge.__struct_fields__ if (value := getattr(edge, name)) not in (None, ())}
    return replace(settings, **{n: v for n, v in known.items() if getattr(settings, n) == getattr(defaults, n)})


@cache
def _known(name: str) -> Profile:
    return Profile(decoded(files("twinpool.sim").joinpath("profiles", f"{name.replace('/', '-')}.json").read_bytes()))


@cache
def _of_file(path: Path, mtime_ns: int, size: int) -> Profile:
    """Read once, unless it changes."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: this profile cannot be read ({error.strerror})") from None
    try:
        return Profile(decoded(text))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def decoded(text: bytes) -> ProfileFile:
    """The content of a profile's file. Raises ConfigError, saying where, if it is not one."""
    try:
        return msgspec.json.decode(text, type=ProfileFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a profile file is not usable: {error}; make it anew") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"a profile file is not JSON: {error}; make it anew") from None
