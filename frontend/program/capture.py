"""Capture of ordinary modules: `torch.export`, then import; parameters keep their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export import AdditionalInputs, ExportedProgram, ShapesCollection

from ...errors import DiluError
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.types import TensorType
from ...ir.weights import Weight
from ..operators import dtype_of
from .assumptions import Branches, conditions, guards_of, ranges_of, recorded_branches
from .examples import (
    Examples,
    definition,
    dynamic_sizes,
    is_fake,
    read_examples,
    require_no_merged_inputs,
)
from .export import export as export
from .export import exported_as_is, functional, module_of
from .export_error import export_error
from .importer import Importer
from .signature import input_slots, input_trees, read_results, result_tree


@dataclass(frozen=True)
class CapturedCall:
    """A captured module: a graph with one function `main`, and how that is called, as the
    manifest says it (`runtime/call/signature.py`)."""

    graph: Graph
    signature: dict[str, Any]


def capture_module(
    module: Any,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Graph:
    """Return the graph of `capture_call`, for those who call it in their own way."""
    return capture_call(module, example_inputs, dynamic_shapes, example_kwargs).graph


def capture_call(
    module: Any,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> CapturedCall:
    """Capture a module, a function of tensors, or an exported program.

    Sizes are those of the examples unless `dynamic_shapes` (as of `torch.export.export`) makes
    them symbolic. Parameters and buffers become constants, plain values among the examples too.
    Raises DiluError for examples that do not fit and when torch cannot export the module,
    UnsupportedError for an operator dilu does not have.
    """
    if isinstance(module, ExportedProgram):
        require_no_merged_inputs(module)
        return _imported(functional(module), Branches(), None, {})
    module = module_of(module)
    given = read_examples(module.forward, example_inputs, example_kwargs)
    shapes = dynamic_shapes
    if isinstance(shapes, (AdditionalInputs, ShapesCollection)):
        shapes = _resolved(module, given, shapes)
    sizes = dynamic_sizes(given, shapes) if shapes else {}
    with recorded_branches() as branches:
        copies = given.copied()
        exported = exported_as_is(module, copies.args, copies.kwargs, shapes)
    return _imported(functional(exported), branches, given, sizes)


def _resolved(module: torch.nn.Module, given: Examples, shapes: Any) -> Any:
    """Return `dynamic_shapes` that are told by tensors or by more examples as plain data."""
    try:
        return shapes.dynamic_shapes(module, given.args, given.kwargs)
    except Exception as error:
        raise export_error(error, definition(module.forward)) from error


def _imported(
    program: ExportedProgram,
    branches: Branches,
    given: Examples | None,
    sizes: Mapping[tuple[int, int], Any],
) -> CapturedCall:
    importer = Importer(program)
    importer.name_sizes(_names(sizes))
    importer.take_inputs()
    results = read_results(program, importer.outputs())
    imported = importer.finish("main", results.values)
    state: dict[str, Any] = {**program.state_dict, **program.constants}
    weights = {
        name: weight_of(state[source.parameter], source.parameter)
        for name, source in imported.sources.items()
    }
    # Decomposing asks for conditions of its own, which the program's environment keeps as well.
    known = [*guards_of(program), *ranges_of(program, sizes)]
    signature = {
        "inputs": input_slots(program, input_trees(program), given),
        "result": result_tree(program, results.trees),
        "writes": results.writes,
        "conditions": conditions(known, branches, importer.not_one, importer.symbols),
    }
    return CapturedCall(Graph("captured", (imported.function,), weights), signature)


def _names(sizes: Mapping[tuple[int, int], Any]) -> list[list[str | None]]:
    """Return the names of sizes per input and axis."""
    rows: list[list[str | None]] = [[] for _ in range(max((i for i, _ in sizes), default=-1) + 1)]
    for (index, axis), size in sizes.items():
        rows[index] += [None] * (axis + 1 - len(rows[index]))
        rows[index][axis] = _dim_name(size)
    return rows


def weight_of(tensor: torch.Tensor, name: str | None = None) -> Weight:
    """Return a tensor's type and raw storage as a constant.

    Raises DiluError for a tensor that has none, by its name.
    """
    if tensor.is_meta or is_fake(tensor):
        raise DiluError(
            f"the parameter {name!r} has no values: it is on the device {tensor.device}",
            hint="load the module's weights before compiling it",
        )
    t = TensorType(dtype_of(tensor.dtype), tuple(tensor.shape))
    return Weight(t, data=raw(tensor, t.dtype))


def raw(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    """Return a tensor's bits as numpy holds them (bf16 and f8 as unsigned integers)."""
    tensor = tensor.detach().cpu().contiguous()
    if dtype.is_float and dtype.bits < 32 and dtype.storage.kind == "u":
        tensor = tensor.view({8: torch.uint8, 16: torch.uint16}[dtype.bits])
    return tensor.numpy().astype(dtype.storage, copy=True)


def _dim_name(size: Any) -> str | None:
    name = getattr(getattr(size, "root", size), "__name__", None)  # 2*N is known by its N
    return name if isinstance(name, str) and name.isidentifier() else None
