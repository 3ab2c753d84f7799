"""The source root is the repository's root: what is packaged is what is tracked, and no more."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dilu

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = ("frontend", "ir", "passes", "planner", "codegen", "runtime")


def sh(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the repository that exist, git's list of them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return [name for name in sh("git", "ls-files").splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tracked files alone, as a fresh clone would build it."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("dilu-*.whl")
    return built


def test_every_package_is_listed():
    found = {
        ".".join(["dilu", *file.parent.relative_to(ROOT).parts])
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(CONFIG["tool"]["setuptools"]["packages"]) == {"dilu"} | found


def test_every_source_file_is_in_a_package():
    lost = [
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if not (file.parent / "__init__.py").exists()
    ]
    assert lost == []


def test_every_dependency_is_pinned():
    project = CONFIG["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {want.split(">")[0].split("[")[0].lower() for wants in lists for want in wants}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert names - pins == {"dilu"}  # its extra `dev` includes its others


def test_the_wheel_holds_what_is_tracked(wheel, tracked):
    ours = {
        f"dilu/{name}"
        for name in tracked
        if name.endswith((".py", ".h")) and (name.startswith(FOLDERS) or "/" not in name)
    }
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert packed == ours


@pytest.mark.slow
def test_the_wheel_imports_from_elsewhere(wheel, tmp_path):
    sh(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import dilu, dilu.ir, dilu.codegen.c, dilu.runtime.cpu
print(dilu.__file__, dilu.DiluError.__name__, dilu.__version__)
"""
    out = sh(sys.executable, "-P", "-c", code, cwd=tmp_path)
    assert out.split() == [str(tmp_path / "dilu" / "__init__.py"), "DiluError", dilu.__version__]
