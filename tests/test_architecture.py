"""What must never be (docs: the design's layering), checked from the imports themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("frontend", "ir", "passes", "planner", "codegen", "runtime")
FILES = sorted([*ROOT.glob("*.py"), *(f for d in FOLDERS for f in (ROOT / d).rglob("*.py"))])
TREES = {file.relative_to(ROOT): ast.parse(file.read_text("utf-8")) for file in FILES}
DEVICES = re.compile(
    r"(?i)\b(cuda|hip|rocm|nvidia|amd|avx2?|avx512\w*|amx|neon|sse\d*|gfx\w*|sm_\d+)\b"
)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imports(
    node: ast.AST, file: Path, *, lazy: bool = True, types: bool = False
) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of each import; `dilu.…` for those inside the package.

    With `lazy=False` only what runs at import time; with `types=True` also what only a type
    checker reads. `from ..ir import graph` counts as `dilu.ir.graph`.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if is_type_checking(child) and not types:
            for other in child.orelse:  # type: ignore[attr-defined]
                yield from imports(other, file, lazy=lazy, types=types)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = ("dilu", *file.parent.parts)
                base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [base])])
            yield from ((f"{base}.{alias.name}", child.lineno) for alias in child.names)
        else:
            yield from imports(child, file, lazy=lazy, types=types)


def violations(folder: str, allowed, **options) -> list[str]:
    return [
        f"{file}:{line} imports {module}"
        for file, tree in TREES.items()
        if file.parts[0] == folder
        for module, line in imports(tree, file, **options)
        if not allowed(module)
    ]


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_the_reader_of_imports_sees_what_it_should():
    source = """
import torch
from ..ir.graph import Graph
from . import text
def f():
    from ...errors import Loc
if TYPE_CHECKING:
    import sympy
"""
    file = Path("passes/deep/x.py")
    now = {"torch", "dilu.passes.ir.graph.Graph", "dilu.passes.deep.text"}
    tree = ast.parse(source)
    assert {module for module, _ in imports(tree, file, lazy=False)} == now
    assert {m for m, _ in imports(tree, file)} == now | {"dilu.errors.Loc"}
    assert {m for m, _ in imports(tree, file, types=True)} == now | {"dilu.errors.Loc", "sympy"}


def test_ir_rests_on_errors_and_knobs_alone():
    def allowed(module: str) -> bool:
        ours = within(module, "dilu.ir", "dilu.errors", "dilu.knobs")
        libraries = within(module, "numpy", "sympy", "networkx")
        return ours or libraries or module.split(".")[0] in sys.stdlib_module_names

    assert violations("ir", allowed, types=True) == []


def test_passes_know_targets_but_no_emitters_and_no_runtime():
    def allowed(module: str) -> bool:
        if within(module, "dilu.codegen"):
            return within(module, "dilu.codegen.target", "dilu.codegen.targets")
        return not within(module, "dilu.runtime", "dilu.frontend", "dilu.cli", "dilu.compiler")

    assert violations("passes", allowed, types=True) == []


def test_the_planner_knows_kernels_but_no_graphs():
    def allowed(module: str) -> bool:
        if within(module, "dilu.ir", "dilu.codegen"):
            return within(module, "dilu.codegen.kernel_ir", "dilu.ir.mesh", "dilu.ir.types")
        ours = within(
            module, "dilu.planner", "dilu.errors", "dilu.knobs", "dilu.runtime.artifact.replace"
        )
        # The bytes of rows, and what it describes.
        ours = ours or within(module, "dilu.runtime.mesh.wire", "dilu.planning.Plan")
        libraries = within(module, "numpy", "networkx", "sympy", "yaml", "matplotlib")
        return ours or libraries or module.split(".")[0] in sys.stdlib_module_names

    assert violations("planner", allowed, types=True) == []


def test_runtime_starts_without_the_compiler():
    def allowed(module: str) -> bool:
        compiler = ("dilu.frontend", "dilu.passes", "dilu.ir", "dilu.compiler")
        libraries = ("torch", "transformers", "sympy", "networkx", "safetensors", "triton", "onnx")
        return not within(module, *compiler, *libraries)

    assert violations("runtime", allowed, lazy=False) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_inside_the_package_imports_are_relative(folder):
    ours = ("dilu", *FOLDERS)
    absolute = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        if file.parts[0] == folder
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(within(a.name, *ours) for a in node.names))
        or (
            isinstance(node, ast.ImportFrom) and not node.level and within(node.module or "", *ours)
        )
    ]
    assert absolute == []


def docstrings(tree: ast.AST) -> set[ast.AST]:
    return {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def test_no_device_is_named_in_a_pass():
    named = [
        f"{file}:{node.lineno} {node.value!r}"
        for file, tree in TREES.items()
        if file.parts[0] == "passes"
        for skip in [docstrings(tree)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in skip
        and DEVICES.search(node.value)
    ]
    assert named == []


def test_the_environment_is_read_in_knobs_alone():
    readers = {
        str(file)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "environb", "getenv"}
        )
    }
    assert readers == {"knobs.py"}


def test_every_room_has_a_name():
    vague = {"util", "utils", "misc", "helper", "helpers", "common", "stuff"}
    assert [str(file) for file in TREES if vague & {*file.parts[:-1], file.stem}] == []


def test_the_root_holds_only_the_modules_meant_to_be_there():
    meant = {
        "__init__", "__main__", "calibrate", "cli", "compiler", "errors", "knobs", "planning",
    }  # fmt: skip
    assert {file.stem for file in TREES if len(file.parts) == 1} <= meant


def test_a_session_loads_no_compiler():
    code = (
        "import sys, dilu, dilu.runtime.session; "
        "print({'torch', 'transformers', 'sympy', 'networkx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
