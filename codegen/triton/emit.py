"""Program → one Triton module per target: the kernel library and a function for every launch."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from ..target import Target
from .emit_plan import Run

#: Where the library ends and what was made for the graph begins.
MARK = "# ---- generated from the graph "
LIBRARY = ("elementary", "formats", "matmul", "experts", "attention", "topk")

_HEAD = "import triton\nimport triton.language as tl\n"
_IMPORTS = re.compile(r'\A""".*?"""\n+(?:import [^\n]*\n)+', re.DOTALL)


@cache
def library_text() -> str:
    """Return the kernel library, one file after another, without their heads."""
    folder = resources.files(__name__.rpartition(".")[0]).joinpath("lib")
    parts = [folder.joinpath(f"{name}.py").read_text("utf-8") for name in LIBRARY]
    return "\n\n".join(_IMPORTS.sub("", part).strip("\n") for part in parts) + "\n"


def source_of(runs: list[Run]) -> str:
    """Return a module that has the functions of `runs` and all that they call."""
    functions = "\n\n".join(run.launch.text for run in runs)
    return f"{_HEAD}\n\n{library_text()}\n\n{MARK}{'-' * 40}\n\n\n{functions}"


def module_text(runs: list[Run], target: Target) -> str:
    """Return the text of a target's module, for people and for compiling again."""
    rows = [f"    {run.name!r}: {[a.type for a in run.launch.arguments]!r},\n" for run in runs]
    head = f'"""Made by dilu for {target.name}."""\n\n{source_of(runs)}\n\n'
    types = "#: The types of the run-time arguments of every kernel.\nSIGNATURES = {\n"
    return f"{head}{types}{''.join(rows)}}}\n"


def generated_part(source: str) -> str:
    """Return a module's text without the library."""
    return source[source.index(MARK) :]
