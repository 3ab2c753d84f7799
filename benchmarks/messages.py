"""What a message between processes of one machine costs: Gloo's collectives, and ours beside them.

    torchrun --standalone --nproc-per-node 2 benchmarks/messages.py

Both are timed in turn, after half a millisecond of work each; medians and means in microseconds.
"Before" are Gloo's collectives with its threads as they start, which preempt a thread that sends;
then processes are bound to their cores, as those that run a model are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

REPEATS = 300
SIZES = (1 << 13, 1 << 16, 1 << 20)


def _timed(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            end = time.perf_counter() + 5e-4
            while time.perf_counter() < end:
                pass
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return times


def main() -> None:
    import torch
    import torch.distributed as dist

    from dilu import knobs
    from dilu.runtime.machine import take_share
    from dilu.runtime.mesh.ranks import Ranks

    count = knobs.WORLD_SIZE.get()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)

    def gloo(size: int) -> Callable[[], object]:
        own = torch.zeros(size, dtype=torch.uint8)
        parts = [torch.zeros(size, dtype=torch.uint8) for _ in range(count)]
        return lambda: dist.all_gather(parts, own)

    before = {size: _timed({"before": gloo(size)}) for size in SIZES}
    ranks = Ranks({"dp": 1, "ep": 1, "tp": count})
    take_share()
    for size in SIZES:
        own = np.zeros(size, np.uint8)
        calls = {"gloo": gloo(size), "ours": lambda own=own: ranks.gather_along("tp", own, "it")}
        times = before[size] | _timed(calls)
        if ranks.rank == 0:
            print(f"all-gather of {size} bytes among {count}")
            for name, found in times.items():
                mean, median = statistics.mean(found) * 1e6, statistics.median(found) * 1e6
                print(f"  {name:8}median {median:8.0f}   mean {mean:8.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
