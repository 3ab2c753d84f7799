"""Attention in Triton, interpreted, against the op's reference in f64; and compiled for GPUs.

This file is also the worker script: the interpreter has to be asked for before Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class Case:
    """Lengths of sequences, how many of each one's last tokens are computed, and how.

    `heads`: query heads, key heads, their numbers, numbers of a value row and of a value.
    `chunk`: numbers of heads that are read at a time, 0: all. `splits` 0: the form for many tokens.
    `order`: of the tokens, the sequences' own or shuffled.
    """

    heads: tuple[int, int, int, int, int]
    lengths: tuple[tuple[int, int], ...] = ((9, 9), (21, 3), (6, 1), (33, 6))
    page: int = 4
    window: int = 0
    same: bool = False
    tile: tuple[int, int, int] = (4, 4, 16)
    chunk: int = 0
    splits: int = 0
    order: str = "own"
    q: str = "float32"
    cache: str = "float32"
    dot: str = "float32"
    bound: float = 2e-6


MIXED = ((9, 9), (21, 3), (6, 1), (33, 6))
CASES = {
    "grouped": Case((8, 2, 32, 32, 32)),
    "alone": Case((4, 4, 16, 16, 16), tile=(16, 1, 16)),
    "remainders": Case((6, 2, 40, 24, 24), tile=(8, 4, 16)),
    "values_wider": Case((3, 1, 24, 48, 40), tile=(8, 2, 16)),
    "below_sixteen": Case((3, 3, 8, 12, 12), tile=(8, 2, 16)),
    "pages_of_steps": Case((8, 2, 32, 32, 32), page=32),
    "window": Case((8, 2, 32, 32, 32), window=5),
    "window_splits": Case((8, 2, 48, 32, 32), window=18, splits=2, page=16),
    "latent": Case((20, 1, 80, 80, 64), same=True, tile=(2, 16, 16)),
    "latent_splits": Case((20, 1, 80, 80, 64), same=True, tile=(1, 16, 16), splits=4),
    "chunks": Case((20, 1, 80, 80, 64), same=True, tile=(2, 16, 16), chunk=32),
    "chunks_splits": Case((8, 2, 72, 48, 40), tile=(1, 4, 16), chunk=32, splits=4),
    "same_part": Case((6, 1, 48, 48, 24), same=True, tile=(4, 8, 16)),
    "splits": Case((8, 2, 40, 40, 40), splits=4),
    "more_splits_than_keys": Case((4, 2, 16, 16, 16), ((1, 1), (3, 2), (17, 1)), splits=8),
    "shuffled": Case((8, 2, 32, 32, 32), order="shuffled"),
    "padding": Case((8, 2, 32, 32, 32), order="padded"),
    "padding_splits": Case((8, 2, 32, 32, 32), order="padded", splits=2),
    "bf16_cache": Case((8, 2, 32, 32, 32), q="bfloat16", cache="bfloat16", bound=1e-2),
    "bf16_cache_splits": Case((8, 2, 96, 32, 32), q="float32", cache="bfloat16", splits=2),
    "f16": Case((8, 2, 32, 32, 32), q="float16", cache="float16", dot="float16", bound=5e-3),
}


# ------------------------------------------------------------------------------ the worker


def split(size: int) -> tuple[int, int]:
    """Return the largest power of two in a head's size, and the rest filled up to one."""
    first = max(16, 1 << size.bit_length() - 1)
    rest = size - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def constants(case: Case) -> dict[str, object]:
    import triton.language as tl

    hq, hkv, dk, dvx, dv = case.heads
    d1, d2 = split(dk)
    v1, v2 = split(dv)
    bt, bh, bn = case.tile
    found = {
        "HQ": hq, "HKV": hkv, "DK": dk, "DV": dv, "DVX": dvx, "G": case.page, "SCALE": 0.25,
        "WINDOW": case.window, "SAME": case.same, "D1": d1, "D2": d2, "V1": v1, "V2": v2,
        "DOT": getattr(tl, case.dot), "PRECISION": "ieee",
    }  # fmt: skip
    more = {"BH": bh, "BN": bn, "BC": case.chunk, "SPLITS": case.splits} if case.splits else {}
    return found | (more or {"BT": bt, "BH": bh, "BN": bn, "BC": case.chunk})


def tokens(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and sequences of the tokens that are computed."""
    at = [np.arange(n - last, n) for n, last in case.lengths]
    positions = np.concatenate(at)
    sequence = np.repeat(np.arange(len(at)), [len(a) for a in at])
    if case.order == "shuffled":
        order = rng.permutation(len(positions))
        positions, sequence = positions[order], sequence[order]
    if case.order == "padded":
        positions[[2, 5, -1]] = -1
    return positions, sequence


def deviation(module, case: Case, seed: int) -> float:
    """Return how far attention is from its reference, at most."""
    import torch
    import triton

    from dilu.ir.ops.language import Attention

    rng = np.random.default_rng(seed)
    hq, hkv, dk, dvx, dv = case.heads
    positions, sequence = tokens(case, rng)
    T, S, P = len(positions), len(case.lengths), max(-(-n // case.page) for n, _ in case.lengths)
    pages = rng.permutation(S * P).reshape(S, P)

    def some(dtype: str, *shape: int):
        return torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype))

    q = some(case.q, T, hq, dk)
    keys = some(case.cache, S * P, hkv, case.page, dk)
    values = keys if case.same else some(case.cache, S * P, hkv, case.page, dvx)
    unused = torch.from_numpy(unread(case, positions, sequence, pages))
    keys.transpose(1, 2)[unused] = float("nan")
    values.transpose(1, 2)[unused] = float("nan")
    wide = [x.double().numpy() for x in (q, keys, values)]
    op = Attention(scale=0.25, value_dim=dv, window=case.window or None)
    alive = positions >= 0
    want = np.zeros((T, hq, dv))
    want[alive] = op.reference(
        wide[0][alive], wide[1], wide[2], positions[alive], sequence[alive], pages
    )

    out = torch.full((T, hq, dv), float("nan"), dtype=q.dtype)
    where = [torch.from_numpy(x) for x in (positions, sequence, pages)]
    given = constants(case)
    bt, bh, _ = case.tile
    heads = hkv * triton.cdiv(hq // hkv, bh)
    if case.splits:
        shape = (T, hq, case.splits)
        parts = [torch.full(s, float("nan")) for s in (shape, shape, (*shape, dv))]
        grid = (T, heads, case.splits)
        module.attention_split[grid](q, keys, values, *where, *parts, P, **given)
        wide_value = triton.next_power_of_2(dv)
        module.attention_combine[(T * hq,)](*parts, out, DV=dv, BV=wide_value, SPLITS=case.splits)
    else:
        grid = (triton.cdiv(T, bt), heads)
        module.attention_prefill[grid](q, keys, values, *where, out, T, P, **given)
    return float(np.abs(out.double().numpy() - want).max())


def unread(case: Case, positions, sequence, pages) -> np.ndarray:
    """Return which cells [page, slot] no token sees: what they hold must not matter."""
    found = np.ones((pages.size, case.page), bool)
    for last, s in zip(positions, sequence, strict=True):
        place = np.arange(max(0, last + 1 - case.window) if case.window else 0, last + 1)
        found[pages[s, place // case.page], place % case.page] = False
    return found


def compile_both(module, target: str) -> dict[str, int]:
    """Return how many matrix instructions the two forms have, compiled for `target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch = target.split(":")
    cuda = backend == "cuda"
    gpu = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
    cases = {
        "attention_prefill": Case((8, 2, 96, 96, 96), page=64, tile=(16, 4, 32), dot="bfloat16"),
        "attention_split": Case(
            (16, 1, 576, 576, 512),
            page=64,
            same=True,
            tile=(1, 16, 32),
            chunk=64,
            splits=8,
            dot="bfloat16",
        ),
    }
    pointers = {"positions": "*i64", "sequence": "*i64", "pages": "*i64"}
    pointers |= dict.fromkeys(("q", "keys", "values", "out"), "*bf16")
    pointers |= dict.fromkeys(("maxima", "totals", "sums"), "*fp32")
    found: dict[str, int] = {}
    for name, case in cases.items():
        function, given = getattr(module, name), constants(case)
        signature = {
            a: "constexpr" if a in given else pointers.get(a, "i32") for a in function.arg_names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, a in enumerate(function.arg_names)
            if a in pointers
        }
        source = ASTSource(function, signature, given, aligned)
        made = triton.compile(source, target=gpu, options={"num_warps": 4, "num_stages": 2})
        text = made.asm["ptx" if cuda else "amdgcn"]
        found[name] = text.count("mma.sync" if cuda else "v_mfma")
    return found


def work(folder: Path, target: str) -> None:
    from library import load_library

    module = load_library(folder, "formats", "matmul", "attention")
    if target:
        found = compile_both(module, target)
    else:
        found = {name: deviation(module, case, 1) for name, case in CASES.items()}
    print(json.dumps(found))


# ------------------------------------------------------------------------------- the tests


def run_worker(folder: Path, target: str = "") -> dict[str, float]:
    environment = {**os.environ, "TRITON_INTERPRET": "0" if target else "1"}
    command = [sys.executable, __file__, str(folder), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def deviations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return run_worker(tmp_path_factory.mktemp("attention"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_reference(deviations: dict[str, float], name: str):
    assert deviations[name] <= CASES[name].bound


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx90a"])
def test_compiled(tmp_path: Path, target: str):
    found = run_worker(tmp_path, target)
    assert set(found) == {"attention_prefill", "attention_split"} and all(found.values())


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
