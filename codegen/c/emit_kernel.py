"""One kernel → C: its steps in order, with a barrier where one reads what another wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import DiluError
from ..kernel_ir import Attention, Experts, Kernel, LoopNest, Matmul, TopK
from .emit_language import emit_attention, emit_topk
from .emit_loops import emit_nest
from .emit_products import emit_experts, emit_matmul
from .expressions import Expressions
from .frame import Frame
from .writer import Writer


def _emit_loop_nest(w: Writer, step: LoopNest, frame: Frame) -> None:
    frame.row_buffers(w, step)
    emit_nest(w, step, Expressions())


#: The lowering of every kind of step.
STEPS: dict[type, Callable[[Writer, Any, Frame], None]] = {
    LoopNest: _emit_loop_nest,
    Matmul: emit_matmul,
    Experts: emit_experts,
    Attention: emit_attention,
    TopK: emit_topk,
}


def emit_kernel(kernel: Kernel, name: str) -> tuple[str, Frame]:
    """Return the C text of a kernel as the function `name`, and its frame."""
    frame = Frame(kernel, name, kernel.symbols)
    frame.scratch_buffers()
    body = Writer()
    try:
        for i, step in enumerate(kernel.steps):
            with body.block():
                STEPS[type(step)](body, step, frame)
            if i + 1 < len(kernel.steps) and kernel.scratch:
                frame.barrier(body)
    except DiluError as error:
        raise error.in_pass("emit", f"kernel @{kernel.name}", kernel.loc) from None
    return frame.assemble(body), frame
