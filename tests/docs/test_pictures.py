"""The pictures of the documentation are of the passes and of the memory plan that there are."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT, environment

pytest.importorskip("matplotlib")

FOLDER = ROOT / "docs" / "pictures"
LARGEST = 60_000


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(picture: Path) -> list[str]:
    """Return the texts of a picture, which no version of the library changes."""
    return re.findall(r"<text[^>]*>([^<]*)", picture.read_text("utf-8"))


@pytest.mark.parametrize("name", ["stages", "memory_plan"])
def test_pictures_are_small_and_name_no_date(name: str):
    content = (FOLDER / f"{name}.svg").read_text("utf-8")
    assert len(content) < LARGEST
    assert "<dc:date>" not in content


def test_every_pass_and_stage_is_in_the_picture(draw: ModuleType):
    text = " ".join(words(FOLDER / "stages.svg"))
    for stage, names in draw.passes_by_stage().items():
        assert {stage, *names} <= set(re.findall(r"\w+", text))


def test_the_same_code_draws_the_same_bytes(draw: ModuleType, tmp_path: Path):
    made = []
    for number in range(2):
        with draw.rc_context(draw.STYLE):
            draw._save(draw.stages(), tmp_path / f"{number}.svg")
        made.append((tmp_path / f"{number}.svg").read_bytes())
    assert made[0] == made[1]
    assert words(tmp_path / "0.svg") == words(FOLDER / "stages.svg")


@pytest.mark.slow
def test_the_script_draws_what_is_committed(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "draw.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory_plan.svg", "stages.svg"]
    for name in ("memory_plan.svg", "stages.svg"):
        assert words(tmp_path / name) == words(FOLDER / name), "draw it anew"
