"""The doors by which models come in.

Invariant: whichever takes a model, what comes in is a graph in the stage `captured`, whose weights
are places in files, or held by the graph; no weight was read to capture it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import DiluError
from ..options import Options
from ..runtime.progress import Progress
from .door import Captured, Door, ExampleCall
from .language.door import CheckpointDoor
from .program.door import ProgramDoor

#: The first that takes a model captures it; the last one takes, or refuses, whatever is left.
DOORS: tuple[Door, ...] = (CheckpointDoor(), ProgramDoor())


def find_model(model: Any) -> Any:
    """Return a model as doors take it: a Path for a path; raise DiluError where nothing is."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = Path(model)
    if not path.exists():
        raise DiluError(f"no such path: {path}", hint="give the directory of a checkpoint")
    return path


def capture(model: Any, call: ExampleCall, options: Options, progress: Progress) -> Captured:
    """Let a model in that `find_model` returned; raise DiluError where it cannot be captured."""
    door = next(door for door in DOORS if door.takes(model))
    return door.capture(model, call, options, progress)
