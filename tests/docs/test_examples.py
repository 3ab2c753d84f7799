"""The programs of the documentation run, and print what the pages say."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, difference, expected, run_dilu, run_python

from dilu.codegen.targets import X86_64_V3, host_target

HOW = ROOT / "docs/how_it_works.md"
SHOWN = [b for b in blocks(HOW) if b.language == "console" and "inspect" in b.text]


def workplace(folder: Path) -> Path:
    """Return a folder in which pages find the examples."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which README's program was run; the bundled model is compiled in it."""
    folder = workplace(tmp_path_factory.mktemp("readme"))
    run_python(ROOT / "README.md", folder)
    return folder


@pytest.mark.slow
def test_the_program_of_readme(compiled: Path):
    assert (compiled / "stdlib-moe.dilu/manifest.json").exists()


@pytest.mark.slow
def test_the_programs_of_python(compiled: Path):
    run_python(ROOT / "docs/python.md", compiled)


@pytest.mark.slow
@pytest.mark.skipif(host_target() != X86_64_V3, reason="the page shows code for AVX2")
def test_how_it_works_prints_what_it_says(compiled: Path):
    printed = {block.line: text for block, text in run_python(HOW, compiled)}
    pairs = list(expected(HOW))
    assert len(pairs) >= 6
    for code, output in pairs:
        assert printed[code.line] == output.text, f"{HOW}:{output.line}"


@pytest.mark.slow
@pytest.mark.skipif(host_target() != X86_64_V3, reason="the page shows code for AVX2")
@pytest.mark.parametrize("block", SHOWN, ids=lambda b: b.text.split()[5])
def test_the_stages_are_what_commands_print(compiled: Path, block):
    command, _, shown = block.text.partition("\n")
    prompt, name, *arguments = shlex.split(command)
    assert (prompt, name) == ("$", "dilu")
    assert difference(shown, run_dilu(arguments, compiled)) is None


def test_all_stages_are_shown():
    for word in ("captured", "normalized", "legalized", "fused", "planned", "--kernel"):
        assert any(word in block.text.partition("\n")[0] for block in SHOWN)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_excerpts_are_of_their_files(page: Path):
    for block in blocks(page):
        if len(block.words) == 2:
            real = (ROOT / block.words[1]).read_text("utf-8")
            assert difference(block.text, real, part=True) is None, f"{page}:{block.line}"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the page's target is of x86")
def test_the_examples_of_extending(tmp_path: Path):
    run_python(ROOT / "docs/extend.md", workplace(tmp_path))
