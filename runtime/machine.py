"""What this machine has: cores that we may use, and memory that is free.

Invariant: limits of the container count as much as the machine's own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .. import knobs

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 where there is no limit


def default_threads() -> int:
    """Return DILU_THREADS, else the number of physical cores that this process may use."""
    wanted = knobs.THREADS.get()
    if wanted is not None:
        return wanted
    quota = _cpu_quota()
    cores = physical_cores()
    return max(1, min(cores, quota) if quota else cores)


def physical_cores() -> int:
    """Return how many cores this process may run on, hyper-threads counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    return len({_read(_CPUS / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed})


def available_memory() -> int | None:
    """Return the bytes that can still be used without swapping, or None where that is unknown.

    The page cache counts as free, since the kernel gives it up, and a mapped weight is in it.
    """
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")))
    machine = int(found[1]) * 1024 if found else None
    limits = [free for folder in _cgroup_folders() if (free := _cgroup_free(folder)) is not None]
    return min(limits if machine is None else [machine, *limits], default=None)


def resident_memory() -> tuple[int, int] | None:
    """Return this process's memory in RAM now, in bytes: (all, without mapped files)."""
    text = _read(Path("/proc/self/status"))
    found = {key: int(kb) * 1024 for key, kb in re.findall(r"(VmRSS|RssFile):\s+(\d+) kB", text)}
    if "VmRSS" not in found:
        return None
    return found["VmRSS"], found["VmRSS"] - found.get("RssFile", 0)


def _cgroup_free(folder: Path) -> int | None:
    for limit_file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
        if limit.isdecimal() and usage.isdecimal() and int(limit) < _UNLIMITED:
            stat = dict(re.findall(r"(\w+) (\d+)", _read(folder / "memory.stat")))
            cached = sum(int(stat.get(f"{prefix}{k}_file", 0)) for k in ("active", "inactive"))
            return max(0, int(limit) - int(usage) + cached)
    return None


def _cgroup_folders() -> list[Path]:
    """Return the folders of this process's memory cgroups, itself and all above it."""
    folders: list[Path] = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        own = root / path.lstrip("/")
        folders += [f for f in (own, *own.parents) if f == root or f.is_relative_to(root)]
    return folders


def _cpu_quota() -> int | None:
    quotas = [
        -(-int(quota) // int(period))
        for folder in _cgroup_folders()
        for quota, _, period in [_read(folder / "cpu.max").strip().partition(" ")]
        if quota.isdecimal() and period.isdecimal()
    ]
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
