"""Which Triton compiles for a target, and targets that other packages bring with one of theirs."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from dilu.codegen import targets
from dilu.codegen.target import Gpu, Target
from dilu.codegen.targets import find_target
from dilu.codegen.triton import driver
from dilu.codegen.triton.driver import Job, compile_jobs
from dilu.codegen.triton.installations import describe_installation, installation, version_in
from dilu.errors import DiluError
from dilu.ir.dtypes import BF16

JOB = Job("f.1", "f", "the source", (("x", "*fp32"),))


def plugged_in(folder: Path) -> Target:
    gpu = Gpu(
        "npu", "N1", warp=0, shared=1 << 17, dot=BF16, decode="portable", matrix=(),
        triton=str(folder), packages="triton-npu==3.2.0 pybind11", code=("bin", "ir"),
    )  # fmt: skip
    return Target("npu:N1", language="triton", gpu=gpu)


def install(folder: Path, name: str, version: str, *files: str) -> None:
    """Leave in a folder what pip would."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_a_fork_is_found_under_its_own_name(tmp_path):
    install(tmp_path, "pybind11", "3.0", "pybind11/__init__.py")
    assert version_in(tmp_path) is None
    install(tmp_path, "triton-npu", "3.2.0", "triton/__init__.py", "triton/compiler.py")
    target = plugged_in(tmp_path)
    assert installation(target) == (tmp_path, "3.2.0 (triton-npu)")
    assert describe_installation(target) == "Triton 3.2.0 (triton-npu)"


def test_triton_itself_has_a_version_alone(tmp_path, monkeypatch):
    install(tmp_path, "triton", "3.2.0", "triton/__init__.py")
    assert installation(plugged_in(tmp_path)) == (tmp_path, "3.2.0")
    monkeypatch.setenv("DILU_TRITON_3_2", str(tmp_path))
    assert installation(find_target("cuda:75")) == (tmp_path, "3.2.0")


def test_a_fork_that_is_missing(tmp_path):
    target = plugged_in(tmp_path / "none")
    with pytest.raises(DiluError, match="npu:N1 needs a Triton of its own, which is not in") as no:
        compile_jobs([JOB], target)
    command = f"pip install --no-deps --target {tmp_path}/none triton-npu==3.2.0 pybind11"
    assert no.value.hint == command
    assert describe_installation(target) == f"Triton is missing: {command}"


def test_what_is_kept_of_a_kernel_and_its_key(tmp_path):
    gpu = plugged_in(tmp_path).gpu
    assert gpu is not None and gpu.kept == ("bin", "ir")
    known = {name: find_target(name).gpu for name in ("cuda:80", "hip:gfx90a")}
    assert [each.kept for each in known.values() if each] == [("cubin", "ptx"), ("hsaco",)]
    changed = [gpu, replace(gpu, code=("ir",)), replace(gpu, toolkit="8.1"), replace(gpu, code=())]
    keys = {driver._key(JOB, each, version) for each in changed for version in ("1", "1 (fork)")}
    assert len(keys) == 8


def brought(value: str) -> EntryPoint:
    return EntryPoint("npu:N1", value, targets.ENTRY_POINTS)


def test_a_target_of_another_package(tmp_path, monkeypatch):
    points = [brought("a_package_of_mine:target")]
    monkeypatch.setattr(targets, "entry_points", lambda **by: EntryPoints(points).select(**by))
    with pytest.raises(DiluError, match=r"brings the target npu:N1 cannot be loaded: No module"):
        find_target("npu:N1")
    target = plugged_in(tmp_path)
    monkeypatch.setattr(EntryPoint, "load", lambda _: lambda: target)
    assert find_target("npu:N1") is target
    monkeypatch.setattr(EntryPoint, "load", lambda _: lambda: "no target")
    with pytest.raises(DiluError, match="a_package_of_mine:target returned no Target for npu:N1"):
        find_target("npu:N1")
    with pytest.raises(DiluError, match="unknown target 'npu:N2'") as unknown:
        find_target("npu:N2")
    assert unknown.value.hint is not None and unknown.value.hint.endswith("npu:N1")
