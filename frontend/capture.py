"""Capture of ordinary modules: `torch.export`, then import; parameters keep their values."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from ..errors import DiluError, Loc
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.types import TensorType
from ..ir.weights import Weight
from .importer import Importer
from .operators import dtype_of


def capture_module(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
) -> Graph:
    """Capture a module, or an exported program, as a graph with one function `main`.

    Sizes are those of `example_inputs` unless `dynamic_shapes` (as of `torch.export.export`) makes
    them symbolic. Parameters and buffers become constants. Raises DiluError when torch cannot
    export the module, UnsupportedError for an operator dilu does not have.
    """
    if isinstance(module, ExportedProgram):
        program = functional(module)
    else:
        if example_inputs is None:
            raise DiluError("a module needs example inputs", hint="pass example_inputs=(tensor, …)")
        inputs = tuple(example_inputs)
        program = export(module, inputs, dynamic_shapes)
    importer = Importer(program)
    importer.name_sizes(_size_names(dynamic_shapes))
    importer.take_inputs()
    results = importer.run()
    imported = importer.finish("main", results)
    state: dict[str, Any] = {**program.state_dict, **program.constants}
    weights = {name: weight_of(state[s.parameter]) for name, s in imported.sources.items()}
    return Graph("captured", (imported.function,), weights)


def export(module: torch.nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """Export a module in evaluation mode to a functional program; raise DiluError on failure."""
    with _evaluating(module), torch.no_grad():
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        except DiluError:
            raise
        except Exception as error:
            raise _export_error(error) from error
        return functional(program)


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return the program without in-place operators; composite ones stay."""
    with warnings.catch_warnings():
        # torch copies its own deprecated objects, which is nothing a user could mend.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        return program.run_decompositions({})


def weight_of(tensor: torch.Tensor) -> Weight:
    """Return a tensor's type and raw storage as a constant."""
    t = TensorType(dtype_of(tensor.dtype), tuple(tensor.shape))
    return Weight(t, data=raw(tensor, t.dtype))


def raw(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    """Return a tensor's bits as numpy holds them (bf16 and f8 as unsigned integers)."""
    tensor = tensor.detach().cpu().contiguous()
    if dtype.is_float and dtype.bits < 32 and dtype.storage.kind == "u":
        tensor = tensor.view({8: torch.uint8, 16: torch.uint16}[dtype.bits])
    return tensor.numpy().astype(dtype.storage, copy=True)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Generator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _export_error(error: Exception) -> DiluError:
    """Say why torch.export failed, at the line of the user's model."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text, hint = lines[0], "control flow and sizes must not depend on the values of tensors"
    if text.startswith("Constraints violated"):
        reasons = [line.strip(" -") for line in lines[1:] if line.startswith("  - ")]
        text = f"not every size of dynamic_shapes fits: {'; '.join(reasons) or text}"
        fixes = [line.strip() for line in lines if re.match(r"    ?\s+_?\w+ = ", line)]
        hint = f"torch suggests: {', '.join(fixes)}" if fixes else "restrict dynamic_shapes"
    frames: list[Loc] = []
    trace = error.__traceback__
    root = str(torch.__path__[0])
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((root, "<")) and file != __file__ and "contextlib" not in file:
            frames.append(Loc(file, trace.tb_lineno))
        trace = trace.tb_next
    return DiluError(
        f"torch.export cannot capture the model: {text}",
        frames[-1] if frames else None,
        hint,
    )


def _size_names(shapes: Any) -> list[list[str | None]]:
    """Return the names that `torch.export.Dim` objects have, per input and axis."""
    if not shapes:
        return []
    names: list[list[str | None]] = []
    for entry in shapes.values() if isinstance(shapes, dict) else shapes:
        items = dict(entry) if isinstance(entry, dict) else dict(enumerate(entry or ()))
        axes = [k for k in items if isinstance(k, int)]
        row = [_dim_name(items.get(a)) for a in range(max(axes, default=-1) + 1)]
        names.append(row)
    return names


def _dim_name(size: Any) -> str | None:
    name = getattr(size, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else None
