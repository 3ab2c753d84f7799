"""What this machine has: cores that we may use, and memory that is free.

Invariant: limits of the container count as much as the machine's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path

from .. import knobs

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 where there is no limit


def default_threads() -> int:
    """Return DILU_THREADS, else the number of physical cores that this process may use."""
    wanted = knobs.THREADS.get()
    if wanted is not None:
        return wanted
    quota = _cpu_quota()
    cores = physical_cores()
    return max(1, min(cores, quota // knobs.LOCAL_SIZE.get()) if quota else cores)


def physical_cores() -> int:
    """Return how many cores this process may run on, hyper-threads counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len(_cores(os.sched_getaffinity(0)))


@cache
def take_share() -> str | None:
    """Bind this process, once, to its share of the machine, if several run a model on it together.

    As many processes as NUMA nodes are bound to a node each, where their memory will be; fewer have
    several, and more divide the cores of one. Returns what was done, None where nothing was.
    """
    size, rank = knobs.LOCAL_SIZE.get(), knobs.LOCAL_RANK.get()
    if size == 1 or rank >= size or not hasattr(os, "sched_setaffinity"):
        return None
    nodes = _nodes(os.sched_getaffinity(0))
    if size <= len(nodes):
        own = [*range(rank * len(nodes) // size, (rank + 1) * len(nodes) // size)]
        cpus = [cpu for node in own for cpu in nodes[node]]
    else:
        own = [rank * len(nodes) // size]
        beside = [r for r in range(size) if r * len(nodes) // size == own[0]]
        cores, turn = _cores(nodes[own[0]]), beside.index(rank)
        if len(cores) < len(beside):
            return None
        first, last = (n * len(cores) // len(beside) for n in (turn, turn + 1))
        cpus = [cpu for core in cores[first:last] for cpu in core]
    _bind_threads(cpus)
    where = f" of NUMA node {', '.join(map(str, own))}" if len(nodes) > 1 else ""
    count = physical_cores()
    return f"bound to {count} core{'s' if count > 1 else ''}{where}"


def _bind_threads(cpus: Collection[int]) -> None:
    """Bind this thread and those that may run where it may, such as those that wait for sockets."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it may be gone
                if os.sched_getaffinity(int(thread.name)) == allowed:
                    os.sched_setaffinity(int(thread.name), cpus)


def _nodes(allowed: Collection[int]) -> list[list[int]]:
    """Return the CPUs of every NUMA node that this process may use; one node if none is known."""
    files = [_NODES / f"node{n}/cpulist" for n in _numbers(_read(_NODES / "online"))]
    nodes = [[cpu for cpu in _numbers(_read(file)) if cpu in allowed] for file in files]
    return [node for node in nodes if node] or [sorted(allowed)]


def _cores(cpus: Collection[int]) -> list[list[int]]:
    """Return CPUs core by core: those of one core are hyper-threads of it."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        siblings = _read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings or str(cpu), []).append(cpu)
    return list(cores.values())


def _numbers(text: str) -> list[int]:
    """Return what a list such as `0-3,8` names."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


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
