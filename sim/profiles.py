"""Profiles: what a worker of one (device, model, TP) costs and holds. One small JSON file each in profiles/.

A name is ``device/model/tpN``; its file has ``-`` for ``/``. benchmarks/profiles/make.py makes the files, from public
tables; each says where its figures are from.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.resources import files

import msgspec

from twinpool.cost import StepCost
from twinpool.cost_grid import GridCost, Grids
from twinpool.errors import ConfigError

DEFAULT_PROFILE = "h100_sxm/llama-3.1-70b/tp4"


class ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A profile as its file holds it."""

    name: str
    gpus: int  # a worker has; its tensor-parallel size
    kv_bytes_per_token: int  # of all the worker's GPUs together
    kv_tokens: int  # a worker's KV memory holds
    link_bytes_per_s: float  # each way, between two workers
    price_per_gpu_hour: float | None  # US dollars; None: no public list price known
    idle_watts_per_gpu: float
    busy_watts_per_gpu: float
    fit: StepCost  # the closed form nearest to the grids
    fit_mean_error: float  # share of the tables' seconds
    fit_worst_error: float
    source: dict[str, str]  # figure -> where it is from
    grids: Grids


class Profile:
    """A loaded profile; see ``ProfileFile`` for units. Shared: not to be changed."""

    __slots__ = (
        "busy_watts_per_gpu", "cost", "fit", "fit_mean_error", "fit_worst_error", "gpus", "idle_watts_per_gpu",
        "kv_bytes_per_token", "kv_tokens", "link_bytes_per_s", "name", "price_per_gpu_hour", "source",
    )  # fmt: skip

    def __init__(self, file: ProfileFile) -> None:
        self.name = file.name
        self.cost = GridCost(file.grids)
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


def profile_names() -> list[str]:
    """Names of all profiles, sorted."""
    folder = files("twinpool.sim").joinpath("profiles")
    names = (entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    return sorted(name_of(stem) for stem in names)


def name_of(stem: str) -> str:
    """The profile's name from that of its file: ``h100_sxm-llama-3.1-8b-tp1`` is ``h100_sxm/llama-3.1-8b/tp1``."""
    device, rest = stem.split("-", 1)
    model, tp = rest.rsplit("-", 1)
    return f"{device}/{model}/{tp}"


@cache
def load_profile(name: str) -> Profile:
    """The profile called ``name``. Raises ConfigError, listing the names, for any other."""
    known = profile_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no profile {name!r}{hint} Profiles: {', '.join(known)}")
    return Profile(decoded(files("twinpool.sim").joinpath("profiles", f"{name.replace('/', '-')}.json").read_bytes()))


def decoded(text: bytes) -> ProfileFile:
    """The content of a profile's file. Raises ConfigError, saying where, if it is not one."""
    try:
        return msgspec.json.decode(text, type=ProfileFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a profile file is not usable: {error}; make it anew") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"a profile file is not JSON: {error}; make it anew") from None
