from __future__ import annotations

import os

import pytest

from dilu.runtime import machine
from dilu.runtime.cpu import features

GB = 1 << 30


@pytest.fixture
def files(monkeypatch):
    """Replace the system's files by a table."""
    table: dict[str, str] = {
        "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GB // 1024} kB\n"
    }
    monkeypatch.setattr(machine, "_read", lambda path: table.get(str(path), ""))
    return table


def test_available_memory(files):
    assert machine.available_memory() == 8 * GB
    files["/proc/meminfo"] = ""
    assert machine.available_memory() is None


def test_limit_of_a_container(files):
    files["/proc/self/cgroup"] = "0::/a/b\n"
    files["/sys/fs/cgroup/a/memory.max"] = str(4 * GB)
    files["/sys/fs/cgroup/a/memory.current"] = str(3 * GB)
    files["/sys/fs/cgroup/a/memory.stat"] = f"anon 5\nactive_file {GB}\ninactive_file {GB // 2}\n"
    files["/sys/fs/cgroup/a/b/memory.max"] = "max"
    files["/sys/fs/cgroup/a/b/memory.current"] = "0"
    assert machine.available_memory() == 2.5 * GB


def test_limit_of_an_old_container(files):
    files["/proc/self/cgroup"] = "4:memory:/x\n"
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = str(2 * GB)
    files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = str(GB)
    files["/sys/fs/cgroup/memory/x/memory.limit_in_bytes"] = str((1 << 63) - 4096)
    files["/sys/fs/cgroup/memory/x/memory.usage_in_bytes"] = "0"
    assert machine.available_memory() == GB


def test_hyper_threads_count_once(files, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    for cpu, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 5: "1,5"}.items():
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    assert machine.physical_cores() == 3
    monkeypatch.delenv("DILU_THREADS", raising=False)
    assert machine.default_threads() == 3
    files["/proc/self/cgroup"] = "0::/\n"
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    assert machine.default_threads() == 2
    monkeypatch.setenv("DILU_THREADS", "7")
    assert machine.default_threads() == 7


def test_here():
    assert machine.default_threads() >= 1
    resident = machine.resident_memory()
    assert resident is None or resident[0] >= resident[1] > 0


def test_features(monkeypatch, tmp_path):
    features.features.cache_clear()
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu avx2 fma\nflags : x\n")
    monkeypatch.setattr(features, "Path", lambda _: tmp_path / "cpuinfo")
    assert features.features() == {"fpu", "avx2", "fma"}
    features.features.cache_clear()


@pytest.mark.parametrize(
    ("size", "bound"),
    [
        (1, [None]),
        (2, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        (4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        (3, [{0, 4}, {1, 5}, {2, 3, 6, 7}]),
        (5, [None, None, None, {2, 6}, {3, 7}]),  # the first three share two cores
    ],
)
def test_a_share_of_two_sockets(files, monkeypatch, size, bound):
    """Two nodes of two cores of two threads each."""
    allowed = set(range(8))
    files["/sys/devices/system/node/online"] = "0-1"
    files["/sys/devices/system/node/node0/cpulist"] = "0-1,4-5"
    files["/sys/devices/system/node/node1/cpulist"] = "2-3,6-7"
    for cpu in allowed:
        siblings = f"{cpu % 4},{cpu % 4 + 4}"
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    done: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: done[-1] if done else allowed)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: done.append(set(cpus)))
    monkeypatch.delenv("DILU_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    for rank, expected in enumerate(bound):
        done.clear()
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        machine.take_share.cache_clear()
        said = machine.take_share()
        assert machine.take_share() == said  # once: a share is not divided again
        assert (done[0] if done else None) == expected
        if expected is not None:
            cores = len(expected) // 2
            assert machine.default_threads() == cores
            node = 0 if min(expected) < 2 else 1
            assert said == f"bound to {cores} core{'s' * (cores > 1)} of NUMA node {node}"


def test_a_share_of_a_machine_without_nodes(files, monkeypatch):
    done: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: done[-1] if done else {3, 5, 6, 9})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: done.append(set(cpus)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    machine.take_share.cache_clear()
    assert machine.take_share() == "bound to 2 cores"
    machine.take_share.cache_clear()
    assert done == [{6, 9}]
