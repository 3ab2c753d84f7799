"""Program → what an artifact holds for a GPU target: machine code of every function, the plans.

A function is compiled in several variants. One that takes more than the device has is left out;
the first of those that are left is the default, unless it spills and another one does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.progress import Progress, silent
from ..kernel_ir import Kernel, Program
from ..target import Target
from .driver import Binary, Failure, Job, compile_jobs, raise_failure
from .emit import module_text, source_of
from .emit_plan import Plans, Run
from .frame import Variant

#: Bytes of local memory that a thread may spill before another variant is preferred.
SPILL_BOUND = 64


@dataclass(frozen=True)
class Built:
    """`files` by their names in the target's folder; `kernels` with the function that serves."""

    source: str
    files: Mapping[str, bytes]
    kernels: tuple[tuple[Kernel, str, str], ...]


def build(
    program: Program,
    target: Target,
    names: Mapping[str, str] | None = None,
    *,
    progress: Progress = silent,
) -> Built:
    """Return the files of a target; raise DiluError for a function no variant of which compiles.

    `names` are what callers call the sizes of the program.
    """
    assert target.gpu is not None
    plans = Plans(target.gpu)
    entries = plans.entries(program, names)
    source = module_text(plans.runs, target)
    jobs = [job for run in plans.runs for job in jobs_of(run)]
    compiled = compile_jobs(jobs, target, progress=progress) if target.executable else None
    made = iter(compiled if compiled is not None else [_uncompiled(job, target) for job in jobs])
    files: dict[str, bytes] = {}
    described: list[dict[str, Any]] = []
    for run in plans.runs:
        own = [next(made) for _ in run.launch.variants]
        described.append(_described(run, own, target, files))
    content = {"kernels": described, "plans": plans.plans, "entries": entries}
    files["program.json"] = json.dumps(content, separators=(",", ":")).encode()
    texts = {run.name: run.launch.text for run in plans.runs}
    kernels = tuple((kernel, name, texts.get(name, "")) for kernel, name in plans.kernels)
    return Built(source, files, kernels)


def jobs_of(run: Run) -> list[Job]:
    """Return what there is to compile of a function: a job for every variant."""
    source = source_of([run])
    return [
        Job(
            name=f"{run.name}.{variant.label}",
            function=run.name,
            source=source,
            signature=tuple((a.name, a.type) for a in run.launch.arguments),
            constants=variant.constants,
            aligned=run.aligned,
            warps=variant.warps,
            stages=variant.stages,
            what=f"{run.kernel.kind} kernel {run.kernel.name}",
            requires_matrix=run.launch.matrix,
        )
        for variant in run.launch.variants
    ]


def _uncompiled(job: Job, target: Target) -> Binary:
    """Return what stands for the machine code of a target that has none."""
    assert target.gpu is not None
    return Binary(b"", b"", job.function, job.warps * target.gpu.warp, 0, None, None, 0)


def _described(
    run: Run, made: Sequence[Binary | Failure], target: Target, files: dict[str, bytes]
) -> dict[str, Any]:
    """Return a function's entry in program.json, and put its files into `files`."""
    kept = [
        (variant, binary)
        for variant, binary in zip(run.launch.variants, made, strict=True)
        if isinstance(binary, Binary)
    ]
    if not any(not variant.nan for variant, _ in kept):
        raise_failure(next(m for m in made if isinstance(m, Failure)), target)
    variants = [_variant(run, variant, binary, target, files) for variant, binary in kept]
    return {
        "name": run.name,
        "kernel": run.kernel.name,
        "kind": run.kernel.kind,
        "arguments": ["i32" if a.buffer is None else "pointer" for a in run.launch.arguments],
        "variants": variants,
        "default": _default(variants),
    }


def _variant(
    run: Run, variant: Variant, binary: Binary, target: Target, files: dict[str, bytes]
) -> dict[str, Any]:
    assert target.gpu is not None
    base = f"{run.name}.{variant.label}"
    kind, *texts = target.gpu.kept
    file = f"{base}.{kind}"
    files[file] = binary.code
    text = f"{base}.{texts[0]}" if texts and binary.text else None
    if text is not None:
        files[text] = binary.text
    return {
        "constants": dict(variant.constants),
        "file": file,
        "text": text,
        "symbol": binary.symbol,
        "threads": binary.threads,
        "shared": binary.shared,
        "registers": binary.registers,
        "spills": binary.spills,
        "scratch_pointers": binary.scratch_pointers,
        "instructions": binary.instructions,
        "nan": variant.nan,
    }


def _default(variants: Sequence[Mapping[str, Any]]) -> int:
    """Return the first variant that does not spill much, or the one that spills least."""
    plain = [i for i, v in enumerate(variants) if not v["nan"]]
    good = [i for i in plain if (variants[i]["spills"] or 0) <= SPILL_BOUND]
    return good[0] if good else min(plain, key=lambda i: variants[i]["spills"] or 0)
