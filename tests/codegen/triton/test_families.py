"""Every form of kernel that small models of the five families have, compiled for GPUs.

Kernels that differ in names and numbers alone have one form, of which one is compiled, by its first
variant: of 210 functions for each of eight targets that leaves what a test run has time for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import checkpoints
import pytest

import dilu
from dilu.codegen.target import Target
from dilu.codegen.targets import find_target
from dilu.codegen.triton import build
from dilu.codegen.triton.driver import Binary, Failure, Job, compile_jobs

pytestmark = pytest.mark.slow

NAMES = (
    "cuda:75", "cuda:80", "cuda:86", "cuda:90", "cuda:120", "hip:gfx90a", "hip:gfx942",
    "hip:gfx1100",
)  # fmt: skip

#: Bytes that a thread of the best variant may spill. Decoding in plain arithmetic, in warps of 32,
#: leaves RDNA 3 no registers for the smallest products with three parts.
SPILLS = {"hip:gfx1100": 256}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Job]]:
    """Return what five small models compile for every target."""
    found: dict[str, list[Job]] = {name: [] for name in NAMES}

    def record(jobs: Sequence[Job], target: Target, **_: Any) -> list[Binary]:
        found[target.name] += jobs
        return [build._uncompiled(job, target) for job in jobs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_jobs", record)
        for family in checkpoints.FIVE:
            folder = tmp_path_factory.mktemp(family)
            made = checkpoints.make_checkpoint(folder / "model", family, tokenizer=True)
            dilu.compile(made.path, target=list(NAMES))
    return found


def form(job: Job) -> tuple[str, ...]:
    """Return a function's text without its name, its arguments' names and all numbers."""
    text = job.source[job.source.index(f"def {job.function}(") :]
    text = re.sub(rf"\b{job.function}\b", "function", text)
    for i, (name, _) in enumerate(job.signature):
        text = re.sub(rf"\b{name}\b", f"argument{i}", text)
    return re.sub(r"\d+", "0", text), *(kind for _, kind in job.signature)


@pytest.mark.parametrize("name", NAMES)
def test_every_form_compiles(jobs: dict[str, list[Job]], name: str):
    firsts = {job.function + job.source: job for job in reversed(jobs[name])}
    forms = {form(job): job for job in firsts.values()}
    assert len(firsts) > 150 and len(forms) > 30
    target = find_target(name)
    outcomes = compile_jobs(list(forms.values()), target)
    failed = [f"{o.job.name}: {o.reason}" for o in outcomes if isinstance(o, Failure)]
    assert not failed, "\n".join(failed)
    for job, outcome in zip(forms.values(), outcomes, strict=True):
        assert isinstance(outcome, Binary)
        if (outcome.spills or 0) > build.SPILL_BOUND:  # then another variant is the default
            found = compile_jobs([j for j in jobs[name] if j.source == job.source], target)
            least = min(o.spills or 0 for o in found if isinstance(o, Binary))
            assert least <= SPILLS.get(name, build.SPILL_BOUND), job.name
    products = [j for j in forms.values() if j.requires_matrix]
    assert len(products) > 10  # which lack no matrix instructions, or had failed
