"""The command ``twinpool``. One file a group of commands; ``main.py`` puts them together."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC's notes on connections stand in the middle of an answer

from twinpool.cli.main import app

__all__ = ["app"]
