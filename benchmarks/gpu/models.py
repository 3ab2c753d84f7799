"""Decode of a whole model on the device, with and without replaying captured graphs."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from checks import open_tested
from random_checkpoint import matmul_weights, write

import dilu
from dilu.runtime.text.sequences import PagePool, Sequence, Step, batch

CONTEXT, STEPS, WARM_UP = 128, 48, 4


def measure_decode(target: str, graphs: bool, options: Any) -> dict[str, Any]:
    """Return the median seconds of a token of one sequence after a context of 128 tokens."""
    checkpoint = Path("build/tiny-llama" if options.interpret else "build/llama-1b")
    if not checkpoint.exists():
        small = {"hidden": 128, "layers": 1, "ffn": 128, "vocab": 512, "heads": 4, "kv_heads": 2}
        write(checkpoint, **(small if options.interpret else {}))
    artifact = checkpoint.with_name(f"{checkpoint.name}-{target.replace(':', '-')}.dilu")
    if not artifact.exists():
        dilu.compile(checkpoint, target=[target], dtype="bf16").save(artifact)
    os.environ["DILU_GPU_GRAPHS"] = "1" if graphs else "0"
    device = open_tested(options)
    context, steps = (6, 3) if options.interpret else (CONTEXT, STEPS)
    with dilu.load(artifact, target=target, device=device) as session:
        seconds = decode_seconds(session, context, steps)
    nbytes = matmul_weights(checkpoint)[2]
    return {
        "model": checkpoint.name, "target": target, "graphs": graphs,
        "seconds": statistics.median(seconds[min(WARM_UP, steps - 1) :]), "nbytes": nbytes,
    }  # fmt: skip


def decode_seconds(session: Any, context: int, steps: int) -> list[float]:
    function = session.function("main")
    page_size = session.artifact.manifest["language_model"]["page_size"]
    count = -(-(context + steps + 1) // page_size)
    function.allocate({"B": count})
    pages = PagePool(count).take(count)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 500, context + steps + 1).tolist()

    def run(done: int, length: int) -> float:
        step = Step(Sequence(tokens[:length], pages, done), length, (length - 1,))
        arguments = batch([step], page_size)
        start = time.perf_counter()
        function.run(*arguments)
        return time.perf_counter() - start

    run(0, context)
    return [run(context + i, context + i + 1) for i in range(steps)]
