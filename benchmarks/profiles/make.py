"""Makes sim/profiles/*.json from aiconfigurator's tables (Apache-2.0), and measures how close they are.

    pip install aiconfigurator==0.12.0        # in a virtual environment that has twinpool too, or with PYTHONPATH=src
    python benchmarks/profiles/make.py [--only h100_sxm/llama-3.1-8b/tp1] [--check]

Without ``--check`` the files are made anew. Then, and with ``--check`` only, 500 random points a profile that are no
knots of its grids are compared with aiconfigurator; results.md is written. How tables become grids: tables.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

from compare import Comparison, compare, report
from tables import Source, fitted, measure

from twinpool.sim.profiles import Profile, decoded

HERE = Path(__file__).parent
PROFILES = HERE.parents[1] / "sim" / "profiles"
VERSION = "0.12.0"
BACKEND = "vllm"
RESERVE_BYTES = 2.48e9  # a GPU: activations of a full step, graphs, communication buffers
MEMORY_SHARE = 0.9  # of a GPU's memory that the engine takes
LINK_BYTES_PER_S = 25e9

PRICE_SOURCE = (
    "Runpod, docs.runpod.io/serverless/pricing, active (always running) worker, US dollars a second x 3600, list price "
    "without commitment, as of 2026; clouds differ by a factor of three"
)
POWER_SOURCE = (
    "busy: TDP of NVIDIA's data sheet (an upper bound). idle, with a CUDA context: data sheets give none; median of "
    "nvidia-smi listings of empty GPUs in public repositories (A100 61, H100 70, H200 77 W, B200 140 W with no more "
    "known) plus what a CUDA context adds on HBM GPUs, 26 to 50 W (arXiv 2605.23918; 26 taken for A100, 50 for Hopper)"
)


class Device(NamedTuple):
    """Figures of one GPU; memory as the data sheet counts it."""

    memory_bytes: float
    idle_watts: float
    busy_watts: float
    price: float | None  # US dollars an hour


class Model(NamedTuple):
    """One model as it is served: bfloat16 weights and KV."""

    path: str
    tp: int
    parameters: float
    layers: int
    kv_heads: int
    head_size: int

    @property
    def kv_bytes(self) -> int:
        """Of one token, over all GPUs of a worker."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


DEVICES = {
    "a100_sxm": Device(80e9, 87.0, 400.0, 2.16),
    "h100_sxm": Device(80e9, 120.0, 700.0, 3.348),
    "h200_sxm": Device(141e9, 127.0, 700.0, 4.464),
    "b200_sxm": Device(180e9, 140.0, 1000.0, 6.84),
}
MODELS = {
    "llama-3.1-8b/tp1": Model("meta-llama/Meta-Llama-3.1-8B", 1, 8.03e9, 32, 8, 128),
    "llama-3.1-70b/tp4": Model("meta-llama/Meta-Llama-3.1-70B", 4, 70.55e9, 80, 8, 128),
    "qwen3-32b/tp2": Model("Qwen/Qwen3-32B", 2, 32.76e9, 64, 8, 128),
}


def kv_tokens(device: Device, model: Model) -> int:
    """What a worker's memory holds: (share of memory - reserve - weights) / bytes a token, down to a thousand."""
    free = model.tp * (MEMORY_SHARE * device.memory_bytes - RESERVE_BYTES) - 2 * model.parameters
    return int(free / model.kv_bytes) // 1000 * 1000


def sources(device: str, model: Model) -> dict[str, str]:
    """Where each figure of a profile is from."""
    return {
        "grids": f"aiconfigurator {VERSION} (Apache-2.0), system {device}, backend {BACKEND}, {model.path}, bfloat16, "
        "made monotone and thinned by benchmarks/profiles/tables.py",
        "kv_tokens": f"({MEMORY_SHARE} x memory of the data sheet - {RESERVE_BYTES / 1e9} GB a GPU for activations, "
        "graphs and buffers - bfloat16 weights) / kv_bytes_per_token, rounded down to 1,000",
        "link_bytes_per_s": "assumed: one 200 Gb/s RDMA port a worker",
        "price_per_gpu_hour": PRICE_SOURCE,
        "watts_per_gpu": POWER_SOURCE,
        "fit": "least relative squared error of cost.py's formula to aiconfigurator's steps (sim/fit.py)",
    }


def compiled(device: str, model: Model) -> Source | None:
    """aiconfigurator's engine; None where its tables do not have the combination."""
    from aiconfigurator.sdk.engine import EngineHandle

    try:
        engine = EngineHandle.compile(model.path, device, BACKEND, tp_size=model.tp)
        engine.decode_step_latency(1, 64, 2)
    except Exception as error:  # aiconfigurator has no error type of its own for a missing table
        print(f"{device} {model.path}: not in the tables: {error}")
        return None
    return Source(engine)


def profile(name: str, device: Device, model: Model, source: Source) -> dict[str, Any]:
    """The content of one file."""
    tokens = kv_tokens(device, model)
    fit = fitted(source, tokens)
    return {
        "name": name,
        "gpus": model.tp,
        "kv_bytes_per_token": model.kv_bytes,
        "kv_tokens": tokens,
        "link_bytes_per_s": LINK_BYTES_PER_S,
        "price_per_gpu_hour": device.price,
        "idle_watts_per_gpu": device.idle_watts,
        "busy_watts_per_gpu": device.busy_watts,
        "fit": {key: float(f"{getattr(fit.cost, key):.5g}") for key in ("c0", "a", "b", "d0", "d1", "d2")},
        "fit_mean_error": round(fit.mean_error, 4),
        "fit_worst_error": round(fit.worst_error, 4),
        "source": sources(name.split("/")[0], model),
        "grids": measure(source),
    }


def compact(content: dict[str, Any]) -> str:
    """JSON with one line a field and a line a row of a table."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "grids"]
    tables = [f"  {json.dumps(key)}: {rows(value)}" for key, value in content["grids"].items()]
    return "{\n" + ",\n".join([*lines, '"grids": {\n' + ",\n".join(tables) + "\n}"]) + "\n}\n"


def rows(value: Any) -> str:
    """A table with a line a row; anything else on one line."""
    if isinstance(value, list) and isinstance(value[0], list):
        return "[\n" + ",\n".join(f"    {json.dumps(row, separators=(',', ':'))}" for row in value) + "\n  ]"
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one profile")
    parser.add_argument("--check", action="store_true", help="compare, do not make")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # aiconfigurator's
    compared: list[Comparison] = []
    for device_name, device in DEVICES.items():
        for model_name, model in MODELS.items():
            name = f"{device_name}/{model_name}"
            if arguments.only in (None, name) and (source := compiled(device_name, model)):
                path = PROFILES / f"{name.replace('/', '-')}.json"
                if not arguments.check:
                    path.write_text(compact(profile(name, device, model, source)))
                text = path.read_bytes()
                compared.append(compare(Profile(decoded(text)), source, decoded(text).grids, len(text)))
                print(compared[-1].line(), flush=True)
    if arguments.only is None:
        (HERE / "results.md").write_text(report(compared, VERSION, BACKEND))
    if not all(one.good for one in compared):
        sys.exit("not all profiles are as close as they must be")


if __name__ == "__main__":
    main()
