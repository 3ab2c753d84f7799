"""The door for checkpoints: a directory as transformers saves it, or its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import DiluError
from ...options import Options
from ...runtime.progress import Progress
from ..door import Captured, ExampleCall, refuse

_EXPORTED = ".pt2"


class CheckpointDoor:
    """Takes every path that is no exported program's."""

    def takes(self, model: Any) -> bool:
        return isinstance(model, Path) and model.suffix != _EXPORTED

    def capture(
        self, model: Any, call: ExampleCall, options: Options, progress: Progress
    ) -> Captured:
        path: Path = model
        refuse("modules", "this is a checkpoint", **vars(call))
        if path.is_file() and not options.config_only:
            raise DiluError(
                f"not a checkpoint: {path} is a file",
                hint="give the checkpoint's directory, or --config-only to compile without weights",
            )
        progress("load the compiler")
        from ..checkpoint.checkpoint import read_config
        from .language_model import capture_language_model
        from .tokenizer import read_tokenizer

        config = read_config(path)  # its errors come before those of anything that takes long
        progress("capture")
        graph, info = capture_language_model(
            path, dtype=options.dtype or "f32", config_only=options.config_only
        )
        described = info.to_dict()
        if options.max_seq is not None:
            described["max_positions"] = _at_most(options.max_seq, described["max_positions"])
        folder = (path.parent if path.is_file() else path).resolve()
        tokenizer = read_tokenizer(folder, described["vocab_size"])
        described["notes"] = [*described.get("notes", ()), *tokenizer.notes]
        return Captured(
            graph,
            folder.name if path.is_dir() or path.stem == "config" else path.stem,
            str(path.resolve()),
            folder,
            language_model=described,
            files=tokenizer.files,
            expert_groups=config.get("n_group") or 1,
        )


def _at_most(wanted: int, longest: int) -> int:
    if not 1 <= wanted <= longest:
        raise DiluError(
            f"max_seq is {wanted}, and the model takes 1 to {longest} tokens",
            hint="leave --max-seq out for the longest",
        )
    return wanted
