"""Decode and prefill of one model on several processes, beside one process and beside the plan.

    python benchmarks/ranks.py [--cores 2] [--rounds 3] [--json build/ranks.json]

A dense model and one with experts, each run by one process with all cores and by as many processes
as cores, one thread each, in turn. Ratios are medians of the rounds' own. Predictions are the
planner's for this machine, measured anew in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import random_checkpoint

MODELS: dict[str, dict[str, int]] = {
    "dense": {"hidden": 2048, "layers": 8, "ffn": 5632, "heads": 32, "kv_heads": 4},
    "experts": {"hidden": 1024, "layers": 8, "ffn": 512, "heads": 16, "kv_heads": 4, "experts": 64},
}
MESHES = {"dense": ("one", "tp"), "experts": ("one", "tp", "ep")}
BATCHES = (1, 8)
CONTEXT, STEPS, PREFILL = 64, 24, 512


def _rank(artifact: str, threads: int, out: str) -> None:
    """Be one of the processes: time decode steps at every batch, and two prompts; write JSON."""
    import dilu

    found: dict[str, float] = {}
    with dilu.load(artifact, threads=threads, device="cpu") as session:
        loop = session.language.loop
        for batch in BATCHES:
            prompts = [[(7 * i + j) % 999 + 3 for j in range(CONTEXT)] for i in range(batch)]
            times = []
            last = None
            for number, _ in enumerate(loop.generate(prompts, max_tokens=STEPS)):
                if number % batch == batch - 1:
                    now = time.perf_counter()
                    times += [now - last] if last is not None else []
                    last = now
            found[f"decode {batch}"] = statistics.median(times)
        prompts = [[(7 * n + i) % 999 + 3 for i in range(PREFILL // 2)] for n in range(2)]
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            list(loop.generate(prompts, max_tokens=1))
            times.append(time.perf_counter() - begun)
        found["prefill"] = min(times)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


def _run(artifact: Path, processes: int, threads: int) -> dict[str, float]:
    out = artifact.with_suffix(".json")
    script = [__file__, "--rank", str(artifact), str(threads), str(out)]
    command = [sys.executable, *script]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(processes), *script]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(out.read_text())


def _predicted(model: Any, cluster: Any, mesh: str, cores: int) -> dict[str, float]:
    """Return what the planner says of a divided model, by what is timed."""
    from dilu.ir.mesh import Mesh
    from dilu.planner.simulate import Demand, simulate

    place = Mesh() if mesh == "one" else Mesh(**{mesh: cores})
    demands = {f"decode {n}": Demand(n, CONTEXT + STEPS // 2, CONTEXT) for n in BATCHES}
    demands["prefill"] = Demand(2, PREFILL // 2, PREFILL // 2)
    found: dict[str, float] = {}
    for what, demand in demands.items():
        e = simulate(model, place, cluster, demand)
        found[what] = e.prefill.seconds if what == "prefill" else e.decode.seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("build/ranks.json"))
    options = parser.parse_args()
    import dilu
    from dilu.calibrate import measure_machine
    from dilu.planning import prepare

    cores = options.cores
    models: dict[tuple[str, str], Any] = {}
    artifacts: dict[tuple[str, str], Path] = {}
    for model, sizes in MODELS.items():
        folder = Path(f"build/ranks-{model}")
        if not (folder / "config.json").exists():
            random_checkpoint.write(folder, vocab=1024, **sizes)
        prepared = prepare(folder, "f32")
        for mesh in MESHES[model]:
            key = model, mesh
            artifacts[key] = folder.with_name(f"{folder.name}-{mesh}.dilu")
            given = None if mesh == "one" else f"{mesh}={cores}"
            dilu.compile(folder, mesh=given).save(artifacts[key])
            models[key] = prepared.sharded(cores if mesh == "tp" else 1, mesh == "ep")
    times: dict[Any, list[float]] = {}
    ratios: dict[Any, list[float]] = {}
    for _ in range(options.rounds):
        # The machine is measured in every round, as it is not as fast in all of them.
        clusters = {n: measure_machine(processes=n) for n in (1, cores)}
        for (model, mesh), artifact in artifacts.items():
            processes = 1 if mesh == "one" else cores
            plan = _predicted(models[model, mesh], clusters[processes], mesh, cores)
            for what, seconds in _run(artifact, processes, cores // processes).items():
                times.setdefault((model, mesh, what), []).append(seconds)
                ratios.setdefault((model, mesh, what), []).append(plan[what] / seconds)
    print(f"{'model':9}{'processes':16}{'step':12}{'ms':>9}{'of one':>9}{'predicted':>21}")
    rows: list[dict[str, Any]] = []
    for (model, mesh, what), own in times.items():
        beside = zip(own, times[model, "one", what], strict=True)
        of_one = statistics.median(a / b for a, b in beside)
        predicted = ratios[model, mesh, what]
        where = f"1 × {cores} threads" if mesh == "one" else f"{mesh}={cores}, 1 each"
        print(
            f"{model:9}{where:16}{what:12}{statistics.median(own) * 1e3:9.2f}{of_one:8.2f}x"
            f"{statistics.median(predicted):10.2f}x ({min(predicted):.2f}-{max(predicted):.2f})"
        )
        rows.append({"model": model, "mesh": mesh, "what": what, "seconds": own,
                     "of one": of_one, "predicted": predicted})  # fmt: skip
    options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
