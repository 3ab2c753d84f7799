"""One kernel → Triton: its steps in order, each a launch or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import DiluError
from ..kernel_ir import Attention, Experts, Kernel, LoopNest, Matmul, TopK
from ..target import Gpu
from .emit_experts import emit_experts
from .emit_language import emit_attention, emit_topk
from .emit_loops import emit_nest
from .emit_products import emit_matmul
from .frame import Frame

#: The lowering of every kind of step; the text is the beginning of its functions' names.
STEPS: dict[type, Callable[[Any, Frame, str], None]] = {
    LoopNest: emit_nest,
    Matmul: emit_matmul,
    Experts: emit_experts,
    Attention: emit_attention,
    TopK: emit_topk,
}


def emit_kernel(kernel: Kernel, name: str, gpu: Gpu) -> Frame:
    """Return the launches of a kernel, their functions named after `name`."""
    frame = Frame(kernel, name, gpu)
    many = len(kernel.steps) > 1
    try:
        for i, step in enumerate(kernel.steps):
            prefix = f"step{i}_" if many and not isinstance(step, LoopNest) else ""
            what = f"step{i}" if many and isinstance(step, LoopNest) else prefix
            STEPS[type(step)](step, frame, what)
    except DiluError as error:
        raise error.in_pass("emit", f"kernel @{kernel.name}", kernel.loc) from None
    return frame
