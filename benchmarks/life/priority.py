"""CPU before all other work of the machine, for measurements where there is some. Linux; needs to be root.

Sessions share the CPU by the nice value of their *autogroup* where the kernel has these (sched(7)); the nice value of a
process then counts only inside of its session.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MOST = -19


@contextmanager
def preferred(processes: Iterable[int], wanted: bool) -> Iterator[None]:
    """Their sessions, and that of this process, go first until the block is left; nothing where it is not ``wanted``.

    Raises PermissionError for those who may not.
    """
    if wanted:
        for process in processes:
            _set(process, MOST)
        _set(os.getpid(), MOST)
    try:
        yield
    finally:
        if wanted:
            _set(os.getpid(), 0)


def _set(process: int, nice: int) -> None:
    group = Path(f"/proc/{process}/autogroup")
    if group.exists() and Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1":
        group.write_text(str(nice))
    else:
        os.setpriority(os.PRIO_PROCESS, process, nice)
