"""Why torch.export failed, in the words of whoever wrote the model, at a line of theirs."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import torch

from ...errors import DiluError, Loc

#: Folders whose lines say nothing to the author of a model.
_NOT_THEIRS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent.parent),
    sysconfig.get_paths()["stdlib"] + "/",
    "<",
)
_LIBRARIES = sysconfig.get_paths()["purelib"]  # may lie in the standard library's folder
_DATA = ("GuardOnDataDependentSymNode", "DataDependentOutputException",
         "DynamicOutputShapeException", "UserErrorType.DYNAMIC_CONTROL_FLOW")  # fmt: skip
_ON_DATA = "control flow and sizes must not depend on the values of tensors"


def export_error(error: Exception, otherwise: Loc | None = None) -> DiluError:
    """Return the error that says why torch.export failed; at `otherwise` if no line is known."""
    text, hint = _reason(error)
    message = f"torch.export cannot capture the model: {text}"
    return DiluError(message, user_line(error) or otherwise, hint)


def user_line(error: BaseException) -> Loc | None:
    """Return the innermost line of a traceback that is neither torch's, Python's nor ours."""
    found: Loc | None = None
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        library = file.startswith(_LIBRARIES) and not file.startswith(_NOT_THEIRS[:2])
        if library or not file.startswith(_NOT_THEIRS):
            found = Loc(file, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _reason(error: Exception) -> tuple[str, str | None]:
    """Return what torch says and what to do about it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind = type(error).__name__
    text = re.sub(r"\.? *For more information.*", "", lines[0]).strip()
    if kind in _DATA or "data-dependent" in text or "data dependent" in text:
        return text, _ON_DATA
    if text.startswith("Constraints violated"):
        reasons = [line.strip(" -") for line in lines[1:] if line.startswith("  - ")]
        fixes = [line.strip() for line in lines if re.match(r"\s+_?\w+ = ", line)]
        hint = f"torch suggests: {', '.join(fixes)}" if fixes else "restrict dynamic_shapes"
        return f"not every size of dynamic_shapes fits: {'; '.join(reasons) or text}", hint
    if kind == "ConstraintViolationError":
        return f"an example's size does not fit dynamic_shapes: {text}", "change one of them"
    if re.search(r"\bdynamic_shapes\b|\bDim\b", text):
        return text, "dynamic_shapes has the structure of the inputs, a size for each axis"
    if "uninitialized parameter" in text:
        return (
            "a lazy module has parameters without a shape",
            "call the module once before compiling it",
        )
    if kind == "FakeTensorDeviceMismatchError":
        return text, "move the module and its example inputs to one device"
    if "numpy" in text:
        return text, "compute with torch; numpy cannot be captured"
    if isinstance(error, (AttributeError, TypeError, NameError, IndexError, KeyError)):
        return f"{kind}: {text}", "does the module run with these inputs in PyTorch?"
    return text, None
