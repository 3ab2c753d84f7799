"""The door for programs: a module or a function of tensors, an ExportedProgram, a .pt2 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import DiluError
from ...options import Options
from ...runtime.progress import Progress
from ..door import Captured, ExampleCall, refuse


class ProgramDoor:
    """Takes whatever there is, and refuses what cannot be called."""

    def takes(self, model: Any) -> bool:
        return True

    def capture(
        self, model: Any, call: ExampleCall, options: Options, progress: Progress
    ) -> Captured:
        refuse(
            "checkpoints",
            "this is a module",
            config_only=options.config_only or None,
            max_seq=options.max_seq,
            mesh=options.mesh,
            dtype=options.dtype,
        )
        progress("load the compiler")
        import torch

        from .capture import capture_call

        name = source = type(model).__name__
        if isinstance(model, Path):
            name, source = model.stem, str(model.resolve())
            try:
                model = torch.export.load(model)
            except Exception as error:  # whatever torch raises for a file that is none of its own
                raise DiluError(f"not an exported program: {source} ({error})") from error
        if isinstance(model, torch.export.ExportedProgram):
            refuse("modules", "an exported program has its own", **vars(call))
        elif isinstance(model, type) or not callable(model):
            raise DiluError(
                f"cannot compile a {name}",
                hint="give a torch.nn.Module, an ExportedProgram or the path of a checkpoint",
            )
        elif not isinstance(model, torch.nn.Module):
            name = source = getattr(model, "__name__", name).strip("<>")
        progress("capture")
        captured = capture_call(model, **vars(call))
        return Captured(captured.graph, name, source, signature=captured.signature)
