"""The port that Prometheus scrapes: a thread of its own, reading the gauges on the router's loop."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app
from prometheus_client.registry import Collector

from twinpool.router.metrics import EdgeState, gauges

SCRAPE_TIMEOUT_S = 2.0
POLL_S = 0.1  # how long closing may take

_log = logging.getLogger(__name__)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape every few seconds is no news."""


class _OnLoop(Collector):
    """Reads the gauges on the router's loop from a scrape's thread; none where the loop does not answer."""

    def __init__(self, state: Callable[[], EdgeState]) -> None:
        self._loop = asyncio.get_running_loop()
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not collect."""
        return ()

    def collect(self) -> Iterable[Metric]:
        async def read() -> EdgeState:
            return self._state()

        try:
            return gauges(asyncio.run_coroutine_threadsafe(read(), self._loop).result(SCRAPE_TIMEOUT_S))
        except TimeoutError:
            _log.warning("a scrape goes without gauges: the router's loop is busy")
            return ()


class MetricsPort:
    """Serves a registry, and the gauges of ``state``, while open. Made on the loop that ``state`` belongs to."""

    def __init__(self, registry: CollectorRegistry, state: Callable[[], EdgeState]) -> None:
        self._all = CollectorRegistry()
        self._all.register(registry)
        self._all.register(_OnLoop(state))
        self._server: WSGIServer | None = None

    def open(self, host: str, port: int) -> int:
        """Listen on the port (0: any free one) and return it. Raises OSError."""
        kind = _Server6 if ":" in host else _Server
        self._server = make_server(host, port, make_wsgi_app(self._all), kind, _Handler)
        threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="metrics", daemon=True).start()
        return int(self._server.server_port)

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.shutdown)  # not here: a scrape under way may want the loop
            server.server_close()
