"""Plan large deployments: how long planning takes, in how much memory, and what others published.

    python benchmarks/plan.py [--json build/plans.json]

Every plan runs in a process of its own, so that its memory can be told. Published figures stand
beside what is predicted for dilu on the same devices; nothing was run on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEEPSEEK = ROOT / "tests/frontend/configs/deepseek_v3.json"
A800 = ROOT / "examples/clusters/a800.yaml"
H20 = ROOT / "examples/clusters/h20.yaml"
SUPERCOMPUTER = ROOT / "examples/clusters/supercomputer.yaml"

#: name, cluster, machines of it (None: as it is), sequences, context, mesh (None: the best)
PLANS: tuple[tuple[str, Path, int | None, int, int, str | None], ...] = (
    ("16 × H20", H20, 2, 64, 4096, None),
    ("320 × H20", H20, 40, 4096, 4096, None),
    ("4,096 × H20", H20, 512, 65536, 4096, None),
    ("14.5T, 96,000 nodes", SUPERCOMPUTER, None, 96000, 2048, None),
)
#: The same, and the tokens per second that were published. Prompts of 128 tokens and answers of
#: 1,024 where it says so, so that a sequence has 640 on the average.
PUBLISHED: tuple[tuple[str, Path, int, int, int, float, str], ...] = (
    ("3 × 8 A800-40G, batch 1", A800, 3, 1, 640, 22.7, "Chitu 0.1, FP8"),
    ("3 × 8 A800-40G, batch 32", A800, 3, 32, 640, 214.5, "Chitu, FP8"),
    ("6 × 8 A800-40G, batch 1", A800, 6, 1, 640, 29.8, "Chitu 0.1, BF16"),
    ("6 × 8 A800-40G, batch 32", A800, 6, 32, 640, 244.1, "Chitu, BF16"),
    ("4 × 8 H20, batch 1024", H20, 4, 1024, 4096, 16022.0, "32 × H20"),
)


def _config(folder: Path) -> Path:
    """Write the configuration of a model like DeepSeek-V3 with 14.5 trillion parameters."""
    config = json.loads(DEEPSEEK.read_text())
    config["n_routed_experts"] = 5672
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "deepseek_14.5t.json"
    path.write_text(json.dumps(config))
    return path


def _one(given: str) -> None:
    """Plan, and print what came of it as JSON."""
    import dataclasses

    from dilu.planner.cluster import read_cluster
    from dilu.planner.simulate import Demand
    from dilu.planning import plan

    model, path, machines, batch, context, mesh = json.loads(given)
    cluster = read_cluster(path)
    if machines is not None:
        inner, outer = cluster.levels
        levels = (inner, dataclasses.replace(outer, count=machines))
        cluster = dataclasses.replace(cluster, levels=levels)
    begun = time.perf_counter()
    found = plan(model, cluster, mesh=mesh, demand=Demand(batch, context, min(context, 128)))
    best = found.estimates[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begun,
                "gigabytes": peak,
                "parameters": found.parameters,
                "devices": cluster.size,
                "fits": best.fits,
                "mesh": str(best.mesh),
                "memory": sum(best.memory.values()) / 1e9,
                "rate": best.decode_rate,
                "step": best.decode.seconds,
                "parts": dict(best.decode.parts),
            }
        )
    )


def _apart(*given: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", json.dumps(given, default=str)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("build/plans.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(options.one)
        return
    large = _config(options.json.parent)
    rows: list[dict[str, Any]] = []
    print(f"{'':26}{'devices':>9}  {'mesh':24}{'memory':>9}{'tokens/s':>12}{'planned in':>12}")
    for name, cluster, machines, batch, context, mesh in PLANS:
        model = large if cluster == SUPERCOMPUTER else DEEPSEEK
        row = _apart(model, cluster, machines, batch, context, mesh)
        rows.append({"name": name, **row})
        fits = f"{row['rate']:12,.0f}" if row["fits"] else f"{'does not fit':>12}"
        print(
            f"{name:26}{row['devices']:>9,}  {row['mesh']:24}{row['memory']:>6.1f} GB{fits}"
            f"{row['seconds']:>7.1f} s, {row['gigabytes']:.1f} GB",
            flush=True,
        )
    print(f"\n{'':26}{'mesh':20}{'predicted':>10}{'published':>11}{'ratio':>7}   published for")
    for name, cluster, machines, batch, context, rate, whose in PUBLISHED:
        row = _apart(DEEPSEEK, cluster, machines, batch, context, None)
        rows.append({"name": name, "published": rate, **row})
        most = max(row["parts"], key=lambda part: row["parts"][part])
        print(
            f"{name:26}{row['mesh']:20}{row['rate']:>10,.1f}{rate:>11,.1f}"
            f"{row['rate'] / rate:>7.2f}   {whose}; a step of {row['step'] * 1e3:.1f} ms, most of "
            f"it {most}",
            flush=True,
        )
    options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
