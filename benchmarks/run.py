"""Decode and prefill of a random 1.1B FP8 Llama, against the machine's limits and torch.

    python benchmarks/run.py [--checkpoint build/llama-1b] [--threads 2] [--no-torch]

Limits, dilu and the peer are measured in turn in one run; figures are medians. Decode is a share of
the read bandwidth (bytes of weights a token needs over its time), prefill a share of the FMA rate
(two operations per matmul weight and token). Writes build/benchmark.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from limits import fma_rate, read_bandwidth
from random_checkpoint import matmul_weights

PREFILL = 512
CONTEXT = 128
STEPS = 24
ROUNDS = 3


def measure_dilu(path: Path, threads: int) -> dict[str, float]:
    """Return seconds of decode and prefill, and resident bytes beyond the mapped checkpoint."""
    import dilu
    from dilu.runtime.text.sequences import PagePool, Sequence, Step, batch

    before = _resident()
    with dilu.load(path, threads=threads) as session:
        function = session.function("main")
        page_size = session.artifact.manifest["language_model"]["page_size"]
        count = 1024 // page_size
        function.allocate({"B": count})
        pages = PagePool(count).take(count)
        rng = np.random.default_rng(0)

        def run(done: int, tokens: int) -> float:
            sequence = Sequence(rng.integers(3, 30000, done + tokens).tolist(), pages, done)
            step = Step(sequence, done + tokens, (done + tokens - 1,))
            arguments = batch([step], page_size)
            start = time.perf_counter()
            function.run(*arguments)
            return time.perf_counter() - start

        run(0, CONTEXT)
        run(CONTEXT, 1)
        decode, prefill = [], []
        for _ in range(ROUNDS):
            decode += [run(CONTEXT + i, 1) for i in range(STEPS)]
            prefill.append(run(0, PREFILL))
        resident = _resident()
    return {
        "decode": statistics.median(decode),
        "prefill": statistics.median(prefill),
        "resident": resident["RssAnon"] - before["RssAnon"] + resident["RssFile"],
        "anonymous": resident["RssAnon"],
        "cache": function.state_bytes({"B": count}),
    }


def measure_torch(checkpoint: Path, threads: int, dtype: str) -> dict[str, float]:
    """Return seconds of decode and prefill of transformers in eager torch, random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(checkpoint)
    config.quantization_config = None
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        prompt = torch.randint(3, 30000, (1, CONTEXT))
        cache = DynamicCache(config=config)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        decode, prefill = [], []
        for _ in range(STEPS // 4):
            start = time.perf_counter()
            model(prompt[:, :1], past_key_values=cache, logits_to_keep=1)
            decode.append(time.perf_counter() - start)
        for _ in range(2):
            start = time.perf_counter()
            model(torch.randint(3, 30000, (1, PREFILL)), logits_to_keep=1)
            prefill.append(time.perf_counter() - start)
    return {"decode": statistics.median(decode[1:]), "prefill": min(prefill)}


def _resident() -> dict[str, int]:
    """Return the bytes of this process in memory, by kind (RssAnon, RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {a: b for a, _, b in (line.partition(":") for line in lines) if a.startswith("Rss")}
    return {kind: int(size.split()[0]) * 1024 for kind, size in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("build/llama-1b"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-torch", action="store_true", help="leave the peer out")
    options = parser.parse_args()
    checkpoint, threads = options.checkpoint, options.threads
    artifact = checkpoint.with_suffix(".dilu")
    if not checkpoint.exists():
        from random_checkpoint import write

        write(checkpoint)
    if not artifact.exists():
        _compile_apart(checkpoint, artifact)

    count, head, size = matmul_weights(checkpoint)
    bandwidth, rate = read_bandwidth(threads), fma_rate(threads)
    rows = {"dilu fp8": measure_dilu(artifact, threads)}
    bandwidth = statistics.median([bandwidth, read_bandwidth(threads)])
    rate = statistics.median([rate, fma_rate(threads)])
    if not options.no_torch:
        for dtype in ("bfloat16", "float32"):
            rows[f"torch {dtype}"] = measure_torch(checkpoint, threads, dtype)

    print(f"{count / 1e9:.2f}B matmul weights, {size / 1e9:.2f} GB; {threads} threads")
    print(f"limits: read {bandwidth:.1f} GB/s, FMA {rate:.0f} GFLOP/s")
    print(f"{'':16} decode tok/s   of bandwidth   prefill-{PREFILL} tok/s   of FMA rate")
    itemsize = {"dilu fp8": size, "torch bfloat16": 2 * count, "torch float32": 4 * count}
    for name, row in rows.items():
        flop = 2 * ((count - head) * PREFILL + head)  # the head runs for the last row only
        print(
            f"{name:16} {1 / row['decode']:12.1f}"
            f" {itemsize[name] / row['decode'] / 1e9 / bandwidth:13.0%}"
            f" {PREFILL / row['prefill']:20.1f} {flop / row['prefill'] / 1e9 / rate:12.0%}"
        )
    mine = rows["dilu fp8"]
    file = (checkpoint / "model.safetensors").stat().st_size
    beyond = mine["resident"] - file - mine["cache"]
    print(
        f"resident {mine['resident'] / 1e6:.0f} MB: checkpoint {file / 1e6:.0f} MB, cache"
        f" {mine['cache'] / 1e6:.0f} MB, {beyond / 1e6:+.0f} MB beyond"
    )
    result = {"threads": threads, "bandwidth_gb_s": bandwidth, "fma_gflop_s": rate, "rows": rows}
    Path("build").mkdir(exist_ok=True)
    Path("build/benchmark.json").write_text(json.dumps(result, indent=2) + "\n")


def _compile_apart(checkpoint: Path, artifact: Path) -> None:
    """Compile in a process of its own, so that the compiler's memory is not counted as ours."""
    import subprocess
    import sys

    subprocess.run(
        [sys.executable, "-m", "dilu", "compile", str(checkpoint), "-o", str(artifact)], check=True
    )


if __name__ == "__main__":
    main()
