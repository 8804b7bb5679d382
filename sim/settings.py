"""What a simulation is told: the cluster, the SLO, the policy. Plain values, so they travel to other processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from twinpool.errors import ConfigError
from twinpool.workers.eviction import RULES

BATCH_TTFT_S = 3600.0
BATCH_ITL_S = 5.0
DEFAULT_PROFILE = "h100_sxm/llama-3.1-70b/tp4"
MOST_SIGMA = 3.0  # one in a thousand is 10,000 times off: beyond that nothing is predicted
MOST_DELAY_S = 3600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that happens to a worker at a time. ``what``: die, return, stall, drain, prefill, decode, both."""

    at: float  # seconds
    what: str
    worker: str  # its name, such as p0
    seconds: float = 0.0  # of a stall


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a run depends on besides its trace."""

    prefill: int = 4
    decode: int = 4
    both: int = 0
    profile: str = DEFAULT_PROFILE
    policy: str = "least_seconds"
    parameters: dict[str, float | str] = field(default_factory=dict)
    ttft_s: float = 1.0
    ttft_factor: float = 2.0
    itl_s: float = 0.05
    chunk_tokens: int = 2048
    max_batch: int = 256
    block_size: int = 16
    kv_tokens: int = 0  # a worker; 0: what the profile says
    eviction: str = "lru"  # rule of workers/eviction.py
    closed_form: bool = False  # the profile's fitted formula in place of its measured grid
    max_tokens: int = 0  # what every request asks for at most; 0: the longest output of the trace
    latency_s: float = 100e-6  # one way between router and workers
    setup_s: float = 200e-6  # of each transfer
    edge_s: float = 0.0  # of the router's edge, added to each time to the first token
    edge_spread_s: tuple[float, ...] = ()  # quantiles of what single first tokens take more or less than that
    gap_spread_s: tuple[float, ...] = ()  # quantiles of what single gaps take more or less: gap_spread.py
    link_bytes_per_s: float = 0.0  # 0: what the profile says
    max_queue: int = 1024
    max_queue_s: float = 60.0
    failures: tuple[Failure, ...] = ()
    prefill_error: float = 0.0  # of prompt work against what is predicted: sigma of its logarithm, by request
    output_error: float = 0.0  # of output lengths against the trace's, likewise
    kv_delay_s: float = 0.0  # that news of prefix caches come late, beyond the latency
    kv_loss: float = 0.0  # share of the messages with them that never come
    error_seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.both) < 0 or self.prefill + self.decode + self.both < 1:
            raise ConfigError("a cluster needs at least one worker: give --prefill, --decode or --both")
        if self.both == 0 and not (self.prefill and self.decode):
            raise ConfigError(
                f"{self.prefill} prefill and {self.decode} decode workers cannot serve: both pools need one, "
                "or give --both workers, which do everything"
            )
        if self.eviction not in RULES:
            raise ConfigError(f"no eviction rule {self.eviction!r}: there are {', '.join(RULES)}")
        for name in ("ttft_s", "itl_s", "chunk_tokens", "max_batch", "block_size", "max_queue"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("ttft_factor", "latency_s", "setup_s", "edge_s", "kv_tokens", "link_bytes_per_s", "max_tokens"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
        if min(self.edge_spread_s, default=0.0) < -self.edge_s:
            least = min(self.edge_spread_s)
            raise ConfigError(f"edge_spread_s: {least} s, together with edge_s, is less than nothing")
        self._check_errors()

    def _check_errors(self) -> None:
        most = {"prefill_error": MOST_SIGMA, "output_error": MOST_SIGMA, "kv_delay_s": MOST_DELAY_S, "kv_loss": 1.0}
        for name, limit in most.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be from 0 to {limit:g}")

    @property
    def foreseen(self) -> bool:
        """Whether all work is what trace and profile say."""
        return not (self.prefill_error or self.output_error)

    @property
    def workers(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.both

    def slo_of(self, klass: str) -> tuple[float, float]:
        """Fixed part of the TTFT and ITL, in seconds, of requests of a class. Those not known are realtime.

        ``streaming`` may take five times as long to begin and twice as long between tokens, ``batch`` has hours.
        """
        if klass == "streaming":
            return 5 * self.ttft_s, 2 * self.itl_s
        if klass == "batch":
            return BATCH_TTFT_S, max(BATCH_ITL_S, self.itl_s)
        return self.ttft_s, self.itl_s

    def names(self) -> list[str]:
        """Names of the workers, by id."""
        pools = (("p", self.prefill), ("d", self.decode), ("b", self.both))
        return [f"{letter}{i}" for letter, count in pools for i in range(count)]

    def roles(self) -> list[tuple[str, ...]]:
        """Roles of the workers, by id."""
        return [("prefill",)] * self.prefill + [("decode",)] * self.decode + [("prefill", "decode")] * self.both
