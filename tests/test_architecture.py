"""What must never be (docs: the design's layering), checked from the imports themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
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


def test_ir_rests_on_element_types_errors_and_knobs_alone():
    def allowed(module: str) -> bool:
        ours = within(module, "dilu.ir", "dilu.element_types", "dilu.errors", "dilu.knobs")
        libraries = within(module, "numpy", "sympy", "networkx")
        return ours or libraries or module.split(".")[0] in sys.stdlib_module_names

    assert violations("ir", allowed, types=True) == []


#: Room → what it may import of the rest of the house, whenever that is imported. The innermost
#: room that a file is in counts, and a room may always import itself.
MAY_IMPORT = {
    "ir": ("element_types", "errors", "knobs"),
    "passes": ("errors", "knobs", "ir"),
    "codegen": ("errors", "knobs", "plugins", "ir", "runtime.progress", "runtime.cpu.features"),
    "planner": (
        "errors", "knobs", "options", "ir.mesh", "ir.types", "codegen.kernel_ir",
        "runtime.artifact", "runtime.mesh.shard", "runtime.mesh.wire",
    ),
    "frontend": (
        "errors", "options", "plugins", "ir", "runtime.artifact.manifest", "runtime.progress",
    ),
    "frontend.formats": ("errors", "ir"),
    "frontend.operators": ("element_types", "errors", "ir"),
    "frontend.checkpoint": ("element_types", "errors", "ir", "frontend.formats"),
    "frontend.program": (
        "errors", "options", "ir", "frontend.door", "frontend.operators", "runtime.progress",
    ),
    "frontend.language": (
        "errors", "options", "ir", "frontend.door", "frontend.operators", "frontend.program",
        "frontend.checkpoint", "frontend.formats", "runtime.artifact.manifest",
        "runtime.progress", "runtime.text.tokenizer",
    ),
    "runtime": ("errors", "knobs"),
    "runtime.artifact": ("element_types", "errors", "knobs", "runtime.progress"),
    "runtime.call": ("element_types", "errors", "runtime.artifact", "runtime.engine"),
    "runtime.mesh": ("element_types", "errors", "knobs", "runtime.artifact"),
    "runtime.text": ("errors", "runtime.artifact", "runtime.call", "runtime.mesh"),
    "runtime.cpu": (
        "errors", "runtime.artifact", "runtime.call", "runtime.mesh", "runtime.machine",
        "runtime.progress",
    ),
    "runtime.gpu": (
        "element_types", "errors", "knobs", "plugins", "runtime.artifact", "runtime.call",
        "runtime.mesh", "runtime.buckets", "runtime.choice", "runtime.progress",
    ),
}  # fmt: skip


def room_of(file: Path) -> str:
    """Return the innermost room of the table that a file is in; "" for the root."""
    parts = file.parent.parts
    rooms = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((room for room in rooms if room in MAY_IMPORT), "")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_what_they_may(room):
    allowed = tuple(f"dilu.{other}" for other in (room, *MAY_IMPORT[room]))
    assert [
        f"{file}:{line} imports {module}"
        for file, tree in TREES.items()
        if room_of(file) == room
        for module, line in imports(tree, file, types=True)
        if within(module, "dilu") and not within(module, *allowed)
    ] == []


def test_what_rooms_may_import_exists():
    there = {".".join(file.with_suffix("").parts) for file in TREES}
    there |= {".".join(file.parent.parts) for file in TREES}
    assert {other for others in MAY_IMPORT.values() for other in others} | {*MAY_IMPORT} <= there


def test_nothing_imports_in_circles():
    """Not even late, or for types alone: two files that need each other are one, or three."""
    names = {".".join(("dilu", *file.with_suffix("").parts)): file for file in TREES}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}

    def known(module: str) -> str:
        while module not in names:
            module = module.rpartition(".")[0]
        return module

    graph = nx.DiGraph()
    for name, file in names.items():
        found = {known(m) for m, _ in imports(TREES[file], file, types=True) if within(m, "dilu")}
        graph.add_edges_from((name, other) for other in found - {name})
    circles = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert [sorted(circle) for circle in circles] == []


def test_runtime_starts_without_the_compiler():
    def allowed(module: str) -> bool:
        compiler = ("dilu.frontend", "dilu.passes", "dilu.ir", "dilu.compiler")
        libraries = ("torch", "transformers", "sympy", "networkx", "safetensors", "triton", "onnx")
        return not within(module, *compiler, *libraries)

    assert violations("runtime", allowed, lazy=False) == []


def test_the_planner_needs_no_framework():
    """What divides experts among machines runs where a mesh is planned, without a compiler."""

    def allowed(module: str) -> bool:
        ours = within(module, "dilu", "numpy", "networkx", "sympy", "yaml", "matplotlib")
        return ours or module.split(".")[0] in sys.stdlib_module_names

    assert violations("planner", allowed) == []


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
        "__init__", "__main__", "calibrate", "cli", "compiler", "element_types", "errors", "knobs",
        "options", "packing", "planning", "plugins", "version",
    }  # fmt: skip
    assert {file.stem for file in TREES if len(file.parts) == 1} <= meant


def test_a_session_loads_no_compiler():
    code = (
        "import sys, dilu, dilu.runtime.session; "
        "print({'torch', 'transformers', 'sympy', 'networkx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_what_other_files_call_says_what_it_does():
    """A docstring for every public function and class, but for those that a table declares: how an
    operator is lowered, and elementwise ops, say it by their names."""
    declared = ("@lowers", "@register")

    def is_declared(node: ast.FunctionDef | ast.ClassDef) -> bool:
        texts = [f"@{ast.unparse(d)}" for d in node.decorator_list]
        return any(t.startswith(declared) for t in texts)

    assert [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in TREES.items()
        if file.parts[:3] != ("codegen", "triton", "lib")
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not is_declared(node)
        and not ast.get_docstring(node)
    ] == []
