"""Check and time models on several processes that share this machine's GPU.

    python benchmarks/gpu/mesh.py prepare [--target cuda:90]   # anywhere: compiles for the GPU
    python benchmarks/gpu/mesh.py run [--device cuda:0]        # there

Small models of three families, sharded in every way, meeting in the host's memory and by NCCL on
the device: logits and tokens are compared with one process on the CPU, and a rank is killed while
others wait for it. Then steps of decode are timed, beside one process on the GPU: processes that
share it take turns, so the times say what a meeting costs at most, and nothing of how a model
scales. NCCL takes the processes to be on machines of their own, and goes by sockets. What is
prepared lies in build/gpu-mesh, weights and all; what is there is not prepared again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-mesh"
sys.path[:0] = [str(ROOT / "tests")]

import numpy as np
import ranks

import dilu

#: Family, dtype, mesh, processes.
CASES = [
    ("qwen3_moe", "f32", "ep=2,tp=2", 4),
    ("qwen3_moe", "f32", "ep=8", 8),
    ("llama", "bf16", "tp=2", 2),
    ("glm4_moe", "f32", "ep=2", 2),
    ("deepseek_v3", "f32", "ep=4", 4),
    ("deepseek_v3", "f32", "dp=2,tp=2", 4),
    ("llama", "f32", "tp=2", 2),
]
WAYS = ("host", "device")
#: Of |error| over |largest|: operands are sums of two 16-bit floats, or bf16.
BOUNDS = {"f32": 1e-4, "bf16": 3e-2}
AT_ONCE = 4


def prepare(target: str) -> None:
    """Compile all, with their weights, and run each on the CPU."""
    import checkpoints

    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        family, dtype, mesh, _ = case
        model, name = FOLDER / family, f"{family}-{dtype}"
        if artifact_of(case).exists():
            continue
        if not model.exists():
            checkpoints.make_checkpoint(model, family, tokenizer=True)
        if not (FOLDER / f"{name}.json").exists():
            alone = dilu.compile(model, target=["cpu", target], dtype=dtype, bundle=True)
            alone.save(FOLDER / f"{name}.dilu")
            with dilu.load(FOLDER / f"{name}.dilu", device="cpu") as session:
                os.environ["DILU_TEST_LONG"] = "1"
                (FOLDER / f"{name}.json").write_text(json.dumps(ranks.found(session)))
        sharded = dilu.compile(model, mesh=mesh, target=target, dtype=dtype, bundle=True)
        sharded.save(artifact_of(case))
        print(f"{name} {mesh}", flush=True)


def artifact_of(case: tuple[str, str, str, int]) -> Path:
    family, dtype, mesh, _ = case
    return FOLDER / f"{family}-{dtype}-{mesh}.dilu"


def environment(device: str, way: str) -> dict[str, str]:
    """Return what makes NCCL take processes on one GPU."""
    return {
        "DILU_TEST_DEVICE": device,
        "DILU_COLLECTIVES": way,
        "NCCL_HOSTID": "machine{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "DILU_TIMEOUT": "60",
        "DILU_TEST_LONG": "1",
    }


def check(case: tuple[str, str, str, int], way: str, device: str) -> str:
    """Return what is wrong, or how far logits are from the CPU's."""
    family, dtype, mesh, world = case
    name = f"{family}-{dtype}"
    alone: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    out = FOLDER / f"out-{name}-{mesh}-{way}"
    each = ranks.run(artifact_of(case), out, world, **environment(device, way))
    worst = 0.0
    for own in each:
        pairs = [*zip(own["logits"], alone["logits"], strict=True), (own["long"], alone["long"])]
        for got, want in pairs:
            worst = max(worst, float(np.abs(np.array(got) - want).max() / np.abs(want).max()))
        if dtype == "f32":
            assert own["tokens"] == alone["tokens"], "other tokens than the CPU's"
            if "ep" in mesh:
                assert own["expert_load"] == alone["expert_load"], "another load of experts"
    assert worst < BOUNDS[dtype], f"logits are off by {worst:.1e}"
    assert all(own["logits"] == each[0]["logits"] for own in each), "ranks differ"
    rounds = each[0]["rounds"]
    return f"error {worst:.0e}; {rounds} rounds; {each[0]['reason']}"


def check_lost(case: tuple[str, str, str, int], way: str, device: str) -> str:
    """Kill a rank while tokens are made; return how long the others took to name it."""
    world, out = case[3], FOLDER / f"out-lost-{way}"
    shutil.rmtree(out, ignore_errors=True)
    options = {**environment(device, way), "DILU_TIMEOUT": "5", "PYTHONFAULTHANDLER": "1"}
    processes = ranks.start(artifact_of(case), out, world, mode="long", **options)
    ranks.until_running(processes, out)
    processes[-1].kill()
    begun = time.perf_counter()
    try:
        ends = [process.communicate(timeout=30)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
        ends = [process.communicate()[1] for process in processes]
    wanted = f"rank {world - 1} of {world} stopped answering"
    for process, errors in zip(processes[:-1], ends, strict=False):
        assert process.returncode == 1 and wanted in errors, f"{process.returncode}: {errors}"
    return f"a rank that died was named after {time.perf_counter() - begun:.0f} s"


def timed(artifact: Path, out: Path, world: int, **options: str) -> dict[str, float]:
    """Return the seconds of a decode step, by the number of sequences."""
    for code, errors in ranks.outputs(ranks.start(artifact, out, world, mode="time", **options)):
        assert code == 0, errors
    return json.loads((out / "0.json").read_text())


def run(device: str, only: str) -> None:
    failed = 0
    cases = [case for case in CASES if artifact_of(case).exists()]
    print(f"{len(cases)} of {len(CASES)} cases are prepared")

    def attempt(job: tuple[Any, tuple[str, str, str, int], str]) -> str:
        look, *rest = job
        begun = time.perf_counter()
        try:
            found = look(*rest, device)
        except Exception as error:
            found = f"FAILED: {str(error)[-1500:]}"
        spent = time.perf_counter() - begun
        return f"{' '.join(map(str, rest[0]))} {rest[1]}: {found} ({spent:.0f} s)"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [(check, case, way) for way in WAYS for case in cases]
        jobs += [(check_lost, case, way) for way in WAYS for case in cases[:1]]
        for text in pool.map(attempt, [job for job in jobs if only in job[0].__name__]):
            failed += "FAILED" in text
            print(text, flush=True)
    for case in cases:
        family, dtype, mesh, world = case
        name = f"{family}-{dtype}"
        if world > 2 or only not in "timed":
            continue
        one = timed(FOLDER / f"{name}.dilu", FOLDER / "out-one", 1, DILU_TEST_DEVICE=device)
        for way in WAYS:
            options = environment(device, way)
            try:
                many = timed(artifact_of(case), FOLDER / f"out-{way}", world, **options)
            except AssertionError as error:
                failed += 1
                print(f"{name} {mesh} {way} FAILED: {str(error)[-1500:]}")
                continue
            for batch, seconds in many.items():
                print(
                    f"{name} {mesh} {way}, {batch} sequences: {seconds * 1e3:.2f} ms a step, "
                    f"one process {one[batch] * 1e3:.2f} ms",
                    flush=True,
                )
    if failed:
        raise SystemExit(f"{failed} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("--target", default="cuda:90")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="", help="check_lost, timed or the like")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.target)
    else:
        run(options.device, options.only)


if __name__ == "__main__":
    main()
