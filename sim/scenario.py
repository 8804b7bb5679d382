"""Where settings come from besides flags: a cluster's YAML, and a YAML of what goes wrong and when.

A scenario::

    apiVersion: twinpool/v1
    kind: Scenario
    events:
      - {at_s: 60, worker: p0, what: die}
      - {at_s: 90, worker: p0, what: return}
      - {at_s: 120, worker: d1, what: stall, seconds: 5}
      - {at_s: 300, worker: d0, what: prefill}       # from now on in this pool: prefill, decode or both
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinpool import config_yaml
from twinpool.config import WorkerConfig
from twinpool.config_load import load, parse_set
from twinpool.errors import ConfigError
from twinpool.sim.settings import DEFAULT_PROFILE, Failure, Settings

EMULATED = {"llama-70b-h100-tp4": DEFAULT_PROFILE, "llama-8b-h100-tp1": "h100_sxm/llama-3.1-8b/tp1"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScenarioEvent(_Section):
    """One thing that happens to one worker."""

    at_s: float = Field(ge=0)
    worker: str
    what: Literal["die", "return", "stall", "drain", "prefill", "decode", "both"]
    seconds: float = Field(0.0, ge=0)


class Scenario(_Section):
    """The whole file."""

    apiVersion: Literal["twinpool/v1"] = "twinpool/v1"
    kind: Literal["Scenario"] = "Scenario"
    events: list[ScenarioEvent]


def with_scenario(settings: Settings, path: Path) -> Settings:
    """The settings with the events of a scenario file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    document = config_yaml.parse(text, str(path))
    try:
        scenario = Scenario.model_validate(document.value)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'top'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    names = settings.names()
    for event in scenario.events:
        if event.worker not in names:
            raise ConfigError(f"{path}: there is no worker {event.worker!r}, only {', '.join(names)}")
        if event.what == "stall" and not event.seconds:
            raise ConfigError(f"{path}: a stall of {event.worker} needs its length: seconds: 5")
    return replace(settings, failures=tuple(Failure(e.at_s, e.what, e.worker, e.seconds) for e in scenario.events))


def from_config(path: Path | None, sets: list[str] | None, profile: str | None = None) -> Settings:
    """Pools, SLO of the default class, chunks and limits of a cluster's YAML, on its emulated profile or another.

    An emulated worker takes the time that the closed form says, so that is what is simulated, with its KV memory; a
    ``profile`` that is given stands for other hardware, with its own memory and measured grid. What real engines run on
    no YAML says: the default profile, if none is given. Raises ConfigError.
    """
    config = load(path, [parse_set(text) for text in sets or ()]).config
    slo = config.scheduling.classes[config.scheduling.default_class]
    emulated = profile is None and config.worker.engine == "emulated"
    settings = Settings(
        prefill=config.pools.prefill.workers,
        decode=config.pools.decode.workers,
        both=config.pools.both.workers,
        profile=profile or DEFAULT_PROFILE,
        parameters={"paths": config.scheduling.path, "fetch": "on" if config.scheduling.fetch else "off"},
        ttft_s=slo.ttft_ms / 1000.0,
        ttft_factor=slo.ttft_factor,
        itl_s=slo.itl_ms / 1000.0,
        chunk_tokens=config.worker.chunk_tokens,
        max_batch=config.worker.max_batch,
        block_size=config.worker.block_size,
        eviction=config.worker.eviction,
        max_queue=config.scheduling.max_queue,
        max_queue_s=slo.max_queue_ms / 1000.0,
    )
    return _emulated(settings, config.worker) if emulated else settings


def _emulated(settings: Settings, worker: WorkerConfig) -> Settings:
    """On the profile that the YAML's emulated workers imitate. Raises ConfigError where that takes no time."""
    name = worker.emulated.profile
    if name not in EMULATED:
        raise ConfigError(
            f"worker.emulated.profile is {name}, whose steps take no time, so there is nothing to simulate: give "
            f"--profile, or one of {', '.join(EMULATED)}"
        )
    memory = worker.kv_memory_mib
    blocks = 0 if memory is None else max(1, (memory << 20) // worker.emulated.block_bytes)  # 0: the profile's
    return replace(settings, profile=EMULATED[name], closed_form=True, kv_tokens=blocks * worker.block_size)
