"""How many instructions decoding takes in the inner loop of a product of few rows, on cuda:80.

The loop also multiplies, splits activations into parts and moves addresses on, and its compiler
picks from several opcodes for one thing: a shift is SHF, IMAD.SHL or IMAD.U32. So opcodes that
decoding may consist of are counted, and those that the same product of undecoded weights takes are
taken off; both per weight that a thread has in one turn, since the tiles may differ. With one tile
of 16 rows every warp has columns of its own, so that no weight is decoded twice.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dilu.codegen.lower import lower
from dilu.codegen.target import Target
from dilu.codegen.targets import find_target
from dilu.codegen.triton.build import jobs_of
from dilu.codegen.triton.driver import Binary, Job, compile_jobs
from dilu.codegen.triton.emit_plan import Plans
from dilu.ir.dtypes import BF16, F16
from dilu.ir.text import parse_graph

pytestmark = pytest.mark.slow

N, K = 1024, 2048
#: Permuting, masking, shifting; multiplying by a power of two; converting.
DECODING = re.compile(
    r"(PRMT|LOP3|SHF|SHL|IMAD\.SHL|IMAD\.U32|HFMA2|HMUL2|HADD2|FMUL|I2F|F2F|F2FP|I2FP|SGXT|BFE)\b"
)


def product(form: str) -> str:
    """Return the graph of a product with weights in e4m3 or, as they are, in a 16-bit type."""
    constants = f"%w: u8[{N},{K}], %s: f32[{N // 128},{K // 128}]"
    nodes = f"""
      %d: f32[{N},{K}] = decode(%w) {{format={form}, dtype=f32}}
      %e: f32[{N},{K}] = dequantize(%d, %s) {{block=[128,128], dtype=f32}}"""
    if form != "f8e4m3":
        constants = f"%w: {form}[{N},{K}]"
        nodes = f"%e: f32[{N},{K}] = cast(%w) {{dtype=f32}}"
    names = ", ".join(re.findall(r"%\w+", constants))
    return f"""graph planned
    func @main(%x: f32[T,{K}]) const({constants}) {{
      %y: f32[T,{N}] = kernel(%x, {names})
        {{kind="matmul", body=func @product(%x: f32[T,{K}], {constants}) {{
        {nodes}
        %p: f32[T,{N}] = matmul(%x, %e) {{transpose_b=true}}
        return %p
      }}}}
      return %y
    }}
    """


def first_job(form: str, target: Target) -> Job:
    """Return what is compiled first of a product of few rows."""
    assert target.gpu is not None
    plans = Plans(target.gpu)
    plans.entries(lower(parse_graph(product(form)), target))
    return jobs_of(next(run for run in plans.runs if run.name == "kernel_product_few"))[0]


def disassembled(binary: Binary, folder: Path) -> str:
    """Return machine code as text, by the tool that Triton brings along."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    (folder / "kernel.cubin").write_bytes(binary.code)
    command = [str(tool), "-c", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loop(code: str) -> list[str]:
    """Return the opcodes from a label to the last jump back to it, of the longest such loop."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        opcode = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if opcode is None:
            continue
        opcodes.append(opcode[1])
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if jump and jump[1] in labels:
            longest = max(longest, opcodes[labels[jump[1]] :], key=len)
    return longest


def rates(job: Job, binary: Binary, folder: Path) -> dict[str, float]:
    """Return how many of each opcode for decoding there are per weight."""
    sizes = dict(job.constants)
    assert sizes["BM"] == 16
    weights = int(sizes["BN"]) * int(sizes["BK"]) / (32 * job.warps)
    loop = inner_loop(disassembled(binary, folder))
    assert sum(op.startswith("HMMA") for op in loop) >= 8  # it is the one that multiplies
    found = Counter(m[1] for op in loop if (m := DECODING.match(op)))
    return {op: count / weights for op, count in found.items()}


def test_instructions_per_weight(tmp_path):
    target = find_target("cuda:80")
    assert target.gpu is not None
    kinds = {
        "packed_bf16": ("f8e4m3", {}),
        "portable_bf16": ("f8e4m3", {"decode": "portable"}),
        "bf16": ("bf16", {}),
        "packed_f16": ("f8e4m3", {"dot": F16}),
        "portable_f16": ("f8e4m3", {"dot": F16, "decode": "portable"}),
        "f16": ("f16", {"dot": F16}),
    }
    assert target.gpu.dot == BF16 and target.gpu.decode == "packed"
    jobs = {
        kind: first_job(form, replace(target, gpu=replace(target.gpu, **features)))
        for kind, (form, features) in kinds.items()
    }
    outcomes = compile_jobs(list(jobs.values()), target)
    found: dict[str, dict[str, float]] = {}
    for (kind, job), binary in zip(jobs.items(), outcomes, strict=True):
        assert isinstance(binary, Binary), binary.reason
        found[kind] = rates(job, binary, tmp_path)

    def count(kind: str) -> float:
        plain = found[kind.partition("_")[2]]
        more = (max(0.0, n - plain.get(op, 0.0)) for op, n in found[kind].items())
        return round(sum(more), 1)  # one instruction is a 64th

    # Six and eight instructions for four codes, which is what the inline assembly has.
    assert count("packed_f16") <= 1.5, found
    assert 1.0 <= count("packed_bf16") <= 2.0, found
    assert count("portable_f16") > count("packed_f16"), found
    assert count("portable_bf16") > count("packed_bf16"), found
