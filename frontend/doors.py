"""The doors by which models come in.

Invariant: whichever takes a model, what comes in is a graph in the stage `captured`, whose weights
are places in files, or held by the graph; no weight was read to capture it.
"""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from .. import plugins
from ..errors import DiluError
from ..options import Options
from ..runtime.progress import Progress
from .door import Captured, Door, ExampleCall
from .language.door import CheckpointDoor
from .program.door import ProgramDoor

#: The first that takes a model captures it; the last one takes, or refuses, whatever is left.
DOORS: list[Door] = [CheckpointDoor(), ProgramDoor()]

#: Packages that bring doors name them here: an entry point is a callable that returns a Door.
ENTRY_POINTS = "dilu.doors"


def register_door(door: Door) -> None:
    """Ask `door` for every model from now on, before those that were there."""
    DOORS.insert(0, _checked(door, type(door).__qualname__))


def _checked(door: Door, name: str) -> Door:
    if not all(callable(getattr(door, method, None)) for method in ("takes", "capture")):
        raise DiluError(f"{name} is no door", hint="a door has the methods takes and capture")
    return door


def _plugged_in(point: EntryPoint) -> Door:
    door = plugins.make(point, f"the door {point.name}")
    return _checked(door, f"what {point.value} returns")


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
    others = map(_plugged_in, entry_points(group=ENTRY_POINTS))
    door = next(door for door in (*others, *DOORS) if door.takes(model))
    return door.capture(model, call, options, progress)
