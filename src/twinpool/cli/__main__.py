"""``python -m twinpool.cli``: how the supervisor starts its processes."""

from twinpool.cli.main import app

app(prog_name="twinpool")
