"""Time the C products with stored weights against the machine's own limits.

For the shapes of a 1.1B Llama: GB/s of weights read at M = 1..8 rows, as a share of the read
bandwidth, and GF/s at M = 512, as a share of the FMA peak. Both limits are measured right before
each product, and medians over the rounds are printed, so that a busy machine disturbs the shares
less than the rates.

    python benchmarks/kernels/matmul.py [--threads 2] [--rounds 5] [--cc gcc]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-pthread", "-march=x86-64-v3"]


def measure(
    cc: str, threads: int, rounds: int
) -> dict[tuple[str, int, str], list[tuple[float, float]]]:
    """Compile and run the C part; returns (rate, share) pairs per (shape, rows, unit)."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "matmul"
        library = HERE.parents[1] / "codegen" / "c" / "lib"
        subprocess.run(
            [*cc.split(), *FLAGS, f"-I{library}", str(HERE / "matmul.c"), "-o", str(binary), "-lm"],
            check=True,
        )
        output = subprocess.run(
            [str(binary), str(threads), str(rounds)], check=True, capture_output=True, text=True
        ).stdout
    results = defaultdict(list)
    for line in output.splitlines():
        name, rows, unit, rate, share = line.split("|")
        results[name, int(rows), unit].append((float(rate), float(share)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cc", default="gcc")
    options = parser.parse_args()
    print(f"{'weights':>16} {'rows':>5} {'rate':>12} {'of limit':>9}")
    for (name, rows, unit), pairs in measure(options.cc, options.threads, options.rounds).items():
        rate, share = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:>16} {rows:>5} {rate:>7.1f} {unit} {share:>8.0%}")


if __name__ == "__main__":
    main()
