"""How many cores of the processor this process may use."""

import os
from pathlib import Path


def usable_cores() -> int:
    """Number of cores for workers and threads: more would wait for each other."""
    cores, limit = assigned_cores(), container_cores()
    return cores if limit is None else min(cores, max(1, round(limit)))


def threads_each(processes: int) -> int:
    """Threads for each of several processes: its share of the cores, or ``OMP_NUM_THREADS``.

    The smaller of the two: who sets the variable to 1 has said that other programs run here.
    """
    share = max(1, usable_cores() // max(processes, 1))
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(chosen)) if chosen.isdigit() and int(chosen) else share


def assigned_cores() -> int:
    """Number of cores that the operating system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def container_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores the container may use; ``None`` if it is not limited."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or its content is "max"
        return None
