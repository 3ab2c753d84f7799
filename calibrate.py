"""Measure this machine with dilu's own kernels, as a cluster that plans are made for.

A small model shows what a kernel and a step cost beside their work, a larger one (more than caches
hold) what a weight costs at any number of rows. Several ranks on this machine measure at the same
time, since they share its memory. Then they run the larger model together: what it takes beyond its
kernels is what messages cost, waiting for the others included.

As a script under torchrun, one of those ranks: `python -m dilu.calibrate FOLDER`.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DiluError
from .planner.cluster import Cluster, Device, Level
from .runtime.machine import available_memory, default_threads
from .runtime.progress import Progress, silent

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SMALL = {"hidden": 128, "inner": 128, "layers": 8}
_LARGE = {"hidden": 2048, "inner": 5632, "layers": 4}  # 180 MB in FP8
_VOCABULARY, _HEADS = 256, 8  # of keys and values, in the larger one
_REPEATS = 9
_MESSAGES = (1 << 10, 1 << 20)  # bytes


def measure_machine(
    *, processes: int = 1, dtype: str = "f32", progress: Progress | None = None
) -> Cluster:
    """Return this machine as a cluster of `processes` devices, each an equal part of its cores.

    `dtype` is what activations are computed in. Takes about a minute. Raises DiluError where the
    machine has fewer cores.
    """
    report = progress or silent
    threads = default_threads() // processes
    if processes < 1 or threads < 1:
        raise DiluError(
            f"{processes} processes cannot share {default_threads()} cores",
            hint=f"give --processes 1 to {default_threads()}",
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kernels = _compile_models(folder, dtype, processes, report)
        report("measure")
        if processes == 1:
            found = [_measure(folder, threads, None)]
        else:
            found = _measure_together(folder, processes, threads)
    return _cluster(found, kernels, threads, processes, dtype)


# ------------------------------------------------------------------------------------ models


def _compile_models(folder: Path, dtype: str, processes: int, report: Progress) -> dict[str, int]:
    """Compile the two models into a folder, the larger one also divided among the processes;
    return how many kernels a step of each runs."""
    from .compiler import compile as compile_model

    kernels: dict[str, int] = {}
    for name, sizes in (("small", _SMALL), ("large", _LARGE)):
        report(f"compile a {name} model")
        _write_checkpoint(folder / name, **sizes)
        artifact = compile_model(folder / name, dtype=dtype)
        artifact.save(folder / f"{name}.dilu")
        (target,) = artifact.targets.values()
        in_layers = [k["name"].startswith("layer_") for k in target["kernels"]]
        kernels[name] = sum(sizes["layers"] if inside else 1 for inside in in_layers)
    if processes > 1 and _HEADS % processes == 0:
        report("compile the large model for several processes")
        artifact = compile_model(folder / "large", dtype=dtype, mesh=f"tp={processes}")
        artifact.save(folder / "divided.dilu")
    return kernels


def _write_checkpoint(folder: Path, *, hidden: int, inner: int, layers: int) -> None:
    """Write a Llama of random FP8 weights."""
    import torch
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)
    block, heads, kv_heads = 128, hidden // 64, max(1, hidden // 256)

    def codes(rows: int, columns: int) -> torch.Tensor:
        bits = rng.integers(0, 0x70, (rows, columns), np.uint8)
        signs = rng.integers(0, 2, (rows, columns), np.uint8) << 7
        return torch.from_numpy(bits | signs).view(torch.float8_e4m3fn)

    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * 64, hidden),
        "self_attn.v_proj": (kv_heads * 64, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    table = torch.full((_VOCABULARY, hidden), 0.01, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table.clone(),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in linears.items():
            blocks = (-(-rows // block), -(-columns // block))
            tensors[f"{prefix}{name}.weight"] = codes(rows, columns)
            tensors[f"{prefix}{name}.weight_scale_inv"] = torch.full(blocks, 1e-4)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = ones.clone()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
        },
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _weights(sizes: dict[str, int]) -> int:
    """Return how many weights a token is multiplied with."""
    hidden, inner = sizes["hidden"], sizes["inner"]
    kv = max(1, hidden // 256) * 64
    layer = hidden * (2 * hidden + 2 * kv + 3 * inner)
    return sizes["layers"] * layer + hidden * _VOCABULARY


# ----------------------------------------------------------------------------------- one rank


def _measure(folder: Path, threads: int, ranks: Any) -> dict[str, Any]:
    """Return seconds: `call` and `token` of the small model, `rows` of the large one, and what
    `messages` take."""
    from .runtime.session import load

    found: dict[str, Any] = {}
    with load(folder / "small.dilu", threads=threads, device="cpu") as session:
        found["call"] = _forward(session, [1], ranks)[0]
        loop = session.language.loop
        times: list[float] = []
        for _ in range(3):
            begun = time.perf_counter()
            made = sum(1 for _ in loop.generate([[5]], max_tokens=65))
            times.append((time.perf_counter() - begun) / made)
        found["token"] = statistics.median(times)
        if ranks is not None:
            found["messages"] = [_message(session, ranks, size) for size in _MESSAGES]
    with load(folder / "large.dilu", threads=threads, device="cpu") as session:
        found["rows"] = _forward(session, _ROWS, ranks)
    if (folder / "divided.dilu").exists():
        with load(folder / "divided.dilu", threads=threads, device="cpu") as session:
            found["divided"] = _forward(session, [1], ranks, repeats=5 * _REPEATS)[0]
    return found


def _forward(
    session: Any, rows: Sequence[int], ranks: Any, *, repeats: int = _REPEATS
) -> list[float]:
    """Return the seconds of a call for as many sequences of one token, or a few longer ones."""
    from .runtime.text.sequences import PagePool, Step, batch
    from .runtime.text.sequences import Sequence as Tokens

    function = session.function("main")
    page_size = session.artifact.manifest["language_model"]["page_size"]
    function.allocate({"B": max(rows)})
    found: list[float] = []
    for count in rows:
        each = max(1, count // 32)
        pages = PagePool(max(rows))
        made = [Tokens([7] * each, pages.take(-(-each // page_size))) for _ in range(count // each)]
        arguments = batch([Step(s, each, (each - 1,)) for s in made], page_size)
        times: list[float] = []
        for _ in range(repeats):
            if ranks is not None:
                ranks.gather(None)  # all at the same time
            begun = time.perf_counter()
            function.run(*arguments)
            times.append(time.perf_counter() - begun)
        found.append(statistics.median(times))
    return found


def _message(session: Any, ranks: Any, size: int) -> float:
    """Return the seconds in which every rank gets so many bytes of every other, after some work:
    ranks are not as far with it at the same time, and wait for the last."""
    content = np.zeros(size, np.uint8)
    times: list[float] = []
    for _ in range(5 * _REPEATS):
        _forward(session, [1], None, repeats=1)
        begun = time.perf_counter()
        ranks.gather_along("tp", content, "measuring")
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


# --------------------------------------------------------------------------------- many ranks


def _measure_together(folder: Path, processes: int, threads: int) -> list[dict[str, Any]]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "-m", "dilu.calibrate", str(folder), str(threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "rror: " in line]
        reason = said[0] if said else "no reason given"
        raise DiluError(f"measuring with {processes} processes failed: {reason}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _main(folder: Path, threads: int) -> None:
    from . import knobs
    from .runtime.mesh.ranks import Ranks

    ranks = Ranks({"dp": 1, "ep": 1, "tp": knobs.WORLD_SIZE.get()})
    found = _measure(folder, threads, ranks)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------------- the outcome


def _cluster(
    found: list[dict[str, Any]], kernels: dict[str, int], threads: int, processes: int, dtype: str
) -> Cluster:
    """Return a cluster of what its ranks measured; the slowest counts, as ranks wait for it."""
    call, token = (max(f[name] for f in found) for name in ("call", "token"))
    rows = [max(column) for column in zip(*(f["rows"] for f in found), strict=True)]
    # The small model's weights take a part of its time; what they take is found with the rest.
    weights, few = _weights(_LARGE), _weights(_SMALL)
    seconds, kernel = [s / weights for s in rows], 0.0
    for _ in range(4):
        kernel = max(0.0, call - few * seconds[0]) / kernels["small"]
        seconds = [max(s - kernel * kernels["large"], s / 2) / weights for s in rows]
    bandwidth = 1 / seconds[0]
    memory = available_memory() or 0
    device = Device(
        f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}",
        memory / processes,
        bandwidth,
        {dtype: 2 * _ROWS[-1] / seconds[-1]},
        reach=1.0,
        efficiency=1.0,
        kernel=kernel,
        step=max(0.0, token - call),
        products=tuple(zip(map(float, _ROWS), seconds, strict=True)),
    )
    levels: tuple[Level, ...] = ()
    if processes > 1:
        short, long = (max(times) for times in zip(*(f["messages"] for f in found), strict=True))
        sent = (_MESSAGES[1] - _MESSAGES[0]) * (processes - 1)
        latency = short
        if "divided" in found[0]:
            took = max(f["divided"] for f in found)
            alone = weights / processes * seconds[0] + kernel * kernels["large"]
            latency = max(short, (took - alone) / (2 * _LARGE["layers"] + 2))
        levels = (Level("machine", processes, sent / max(long - short, 1e-9), latency),)
    return Cluster(f"this machine, {processes} × {threads} threads", device, levels)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
