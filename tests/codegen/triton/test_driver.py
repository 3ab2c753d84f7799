"""Ahead-of-time compiling: what machine code takes, the cache, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from dilu.codegen.targets import find_target
from dilu.codegen.triton import driver, installations
from dilu.codegen.triton.driver import Binary, Failure, Job, compile_jobs, raise_failure
from dilu.errors import DiluError

SOURCE = """import triton
import triton.language as tl


@triton.jit
def product(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a = tl.load(x + at, mask=at < n, other=0.0)
    b = tl.load(y + at)
    tl.store(out + at, tl.dot(a, b))


@triton.jit
def broken(x, n, BLOCK: tl.constexpr):
    tl.store(x, missing_name)
"""

JOB = Job(
    "product.32",
    "product",
    SOURCE,
    (("x", "*fp16"), ("y", "*fp16"), ("out", "*fp32"), ("n", "i32")),
    (("BLOCK", 32),),
    frozenset({"x", "y", "out"}),
    what="matmul kernel p",
    requires_matrix=True,
)
BROKEN = Job("broken", "broken", SOURCE, (("x", "*fp32"), ("n", "i32")), (("BLOCK", 32),), what="b")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DILU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one(job: Job, target: str = "cuda:80") -> Binary | Failure:
    (outcome,) = compile_jobs([job], find_target(target))
    return outcome


def test_what_machine_code_takes_and_the_cache(cache, monkeypatch):
    steps = []
    twice = [JOB, replace(JOB, name="again"), BROKEN]
    first, second, failed = compile_jobs(
        twice, find_target("cuda:80"), progress=lambda *step: steps.append(step)
    )
    assert first == second and isinstance(first, Binary)
    assert first.code.startswith(b"\x7fELF") and b".target sm_80" in first.text
    assert first.symbol == "product" and first.threads == 128
    assert first.instructions["HMMA"] > 0 and first.registers and first.spills == 0
    assert first.scratch_pointers in (0, 1, 2)
    assert steps == [("compile kernels for cuda:80", i, 2) for i in range(2)]  # one is a double
    assert isinstance(failed, Failure) and "missing_name" in failed.reason
    with pytest.raises(DiluError, match=r"b does not compile for cuda:80(.|\n)*source was kept"):
        raise_failure(failed, find_target("cuda:80"))
    monkeypatch.setattr(driver, "_Pool", None)  # nothing is started for what the cache has
    assert one(JOB) == first


@pytest.mark.slow
def test_a_worker_that_dies_loses_its_job_alone(cache, monkeypatch, tmp_path):
    fatal = replace(
        JOB, name="fatal", source=SOURCE + "\n\nimport os\nos.abort()\n", requires_matrix=False
    )
    lost, made = compile_jobs([fatal, JOB], find_target("cuda:80"), workers=1)
    assert isinstance(lost, Failure) and "aborted" in lost.reason
    assert isinstance(made, Binary)


@pytest.mark.slow
def test_what_a_device_cannot_run_is_refused(cache):
    target = find_target("cuda:80")
    assert target.gpu is not None
    small = replace(target, gpu=replace(target.gpu, shared=64))
    (outcome,) = compile_jobs([JOB], small)
    assert isinstance(outcome, Failure) and "bytes of shared memory, of 64" in outcome.reason
    other = replace(target, gpu=replace(target.gpu, matrix=("QMMA",)))
    (outcome,) = compile_jobs([JOB], other)
    assert isinstance(outcome, Failure) and "no matrix instructions (QMMA)" in outcome.reason


def test_triton_missing(monkeypatch):
    monkeypatch.setattr(installations, "imported_version", lambda: None)
    with pytest.raises(DiluError, match=r"cuda:80 needs Triton(.|\n)*pip install triton"):
        compile_jobs([JOB], find_target("cuda:80"))


def test_an_old_triton_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("DILU_TRITON_3_2", str(tmp_path))
    with pytest.raises(DiluError, match=r"cuda:75 needs Triton 3.2(.|\n)*--target .*'triton==3.2"):
        compile_jobs([JOB], find_target("cuda:75"))
    assert "Triton is missing: pip install" in installations.describe_installation(
        find_target("cuda:75")
    )


@pytest.mark.slow
def test_an_architecture_that_triton_lacks(cache):
    target = find_target("cuda:80")
    assert target.gpu is not None
    unknown = replace(target, name="cuda:33", gpu=replace(target.gpu, arch=33))
    (outcome,) = compile_jobs([JOB], unknown)
    assert isinstance(outcome, Failure)
    with pytest.raises(DiluError, match="does not compile for cuda:33"):
        raise_failure(outcome, unknown)


def test_the_compiler_is_loaded_in_no_process_but_the_workers():
    code = (
        "import sys, dilu.codegen.triton.build, dilu.codegen.triton.driver;"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    ["cuda:75", "cuda:86", "cuda:90", "cuda:120", "hip:gfx90a", "hip:gfx942", "hip:gfx1100"],
)
def test_other_targets(cache, target):
    outcome = one(JOB, target)
    assert isinstance(outcome, Binary), outcome.reason
    assert outcome.instructions and outcome.code.startswith(b"\x7fELF")
