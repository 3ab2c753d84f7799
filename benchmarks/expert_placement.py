"""Balance of experts' placements beside DeepSeek's EPLB, and the bound that none can beat.

    python benchmarks/expert_placement.py

Figures are the load of the busiest rank over the mean of all (1 is best), mean over 61 layers, and
the seconds that placing all layers took, the two algorithms in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from eplb import eplb

from dilu.planner.place_experts import ExpertPlacement, least_imbalance, place_experts

LAYERS, ROUNDS = 61, 5
CASES = [(256, 32, 288), (256, 32, 256), (256, 64, 320), (256, 320, 640), (128, 16, 144)]


def main() -> None:
    print("load        experts ranks slots     EPLB     dilu    bound     EPLB s   dilu s")
    for exponent in (0.0, 0.5, 1.0, 1.5):
        for experts, ranks, slots in CASES:
            rng = np.random.default_rng(0)
            zipf = np.arange(1, experts + 1) ** -exponent
            load = np.stack([rng.permutation(zipf) for _ in range(LAYERS)])
            load *= rng.uniform(0.8, 1.2, load.shape)
            seconds: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                start = time.perf_counter()
                peer = ExpertPlacement(eplb(load, ranks, slots), experts)
                middle = time.perf_counter()
                ours = place_experts(load, ranks, slots)
                seconds[0].append(middle - start)
                seconds[1].append(time.perf_counter() - middle)
            means = [float(p.imbalance(load).mean()) for p in (peer, ours)]
            bound = float(least_imbalance(load, ranks, slots).mean())
            times = [statistics.median(s) for s in seconds]
            print(
                f"Zipf({exponent})   {experts:7} {ranks:5} {slots:5} "
                f"{means[0]:8.4f} {means[1]:8.4f} {bound:8.4f} {times[0]:10.2f} {times[1]:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
