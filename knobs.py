"""Every environment variable that dilu reads, typed; `os.environ` appears nowhere else.

Invariant: a variable is read when its knob is asked for, never at import, and an empty variable is
the same as one that is not set.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from .errors import DiluError

T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Knob(Generic[T]):
    """One variable. `parse` maps its text, or "" where it is not set, to the value."""

    name: str
    type: str
    default: str
    doc: str
    parse: Callable[[str], T]

    def get(self) -> T:
        """Read the variable now; raise DiluError naming it where its value makes no sense."""
        text = os.environ.get(self.name, "").strip()
        try:
            return self.parse(text)
        except ValueError as err:
            raise DiluError(
                f"{self.name}={text!r}: {err}",
                hint=f"{self.name} takes: {self.type} (default: {self.default})",
            ) from err


def _bool(text: str) -> bool:
    word = text.lower()
    if word in ("", "0", "false", "no", "off"):
        return False
    if word in ("1", "true", "yes", "on"):
        return True
    raise ValueError("neither yes nor no")


def _yes(text: str) -> bool:
    return _bool(text or "1")


def _threads(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("not a whole number above zero")
    return int(text)


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _cache(text: str) -> Path:
    if text:
        return Path(text).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is invalid and must be ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "dilu"


def _count(text: str, default: int, least: int = 1) -> int:
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ValueError("not a whole number above zero" if least else "not a whole number")
    return int(text)


def _place_of_meeting(text: str) -> str:
    if text not in ("", "auto", "host", "device"):
        raise ValueError("none of auto, host and device")
    return text or "auto"


def _moments(text: str) -> tuple[str, ...]:
    moments = tuple(part.strip() for part in text.split(",") if part.strip())
    for moment in moments:
        when, colon, pass_name = moment.partition(":")
        if moment != "all" and not (when in ("before", "after") and colon and pass_name):
            raise ValueError(f"{moment!r} is not a moment of the pipeline")
    return moments


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


DEBUG = Knob("DILU_DEBUG", "0 or 1", "0", "Show Python tracebacks with errors.", _bool)
PRINT = Knob(
    "DILU_PRINT",
    "all, or before:PASS and after:PASS, comma separated",
    "nothing",
    "Print the graph at these moments of the pipeline.",
    _moments,
)
DUMP = Knob("DILU_DUMP", "a folder", "none", "Write the graph after every pass there.", _path)
CACHE = Knob(
    "DILU_CACHE",
    "a folder",
    "$XDG_CACHE_HOME/dilu, else ~/.cache/dilu",
    "Where compiled kernels are kept.",
    _cache,
)
THREADS = Knob("DILU_THREADS", "a number", "all cores", "Threads of the CPU runtime.", _threads)
CC = Knob("DILU_CC", "a command", "the first compiler found", "The C compiler.", _words)
CFLAGS = Knob("DILU_CFLAGS", "options", "none", "Options added for the C compiler.", _words)
ALLOW_OVERCOMMIT = Knob(
    "DILU_ALLOW_OVERCOMMIT",
    "0 or 1",
    "0",
    "Load a model even if it needs more memory than is free.",
    _bool,
)
GPU_LIBRARY = Knob(
    "DILU_GPU_LIBRARY",
    "a file",
    "libcuda.so.1 or libamdhip64.so",
    "The driver library of GPUs, instead of the system's.",
    _path,
)
GPU_GRAPHS = Knob(
    "DILU_GPU_GRAPHS",
    "0 or 1",
    "1",
    "Record calls that repeat on a GPU as graphs, and replay them.",
    _yes,
)
GPU_SYNC = Knob(
    "DILU_GPU_SYNC",
    "0 or 1",
    "0",
    "Wait after each kernel on a GPU, so that an error names its kernel (slow).",
    _bool,
)
TRITON_OLD = Knob(
    "DILU_TRITON_3_2",
    "a folder",
    "share/dilu/triton-3.2 of the Python environment, else triton-3.2 in the cache",
    "Where Triton 3.2 is installed, which compiles for cuda:70 and cuda:75.",
    _path,
)

TIMEOUT = Knob(
    "DILU_TIMEOUT",
    "seconds",
    "120",
    "How long processes of a sharded model wait for each other.",
    partial(_count, default=120),
)
COLLECTIVES = Knob(
    "DILU_COLLECTIVES",
    "auto, host or device",
    "auto",
    "Whether processes on GPUs meet there (by NCCL or RCCL) or in the host's memory; by itself "
    "there, where each has a GPU of its own.",
    _place_of_meeting,
)
NCCL_HOST = Knob(
    "NCCL_HOSTID",
    "a name",
    "the machine's",
    "Where NCCL takes a process to be: it refuses two on one GPU, unless they differ in this.",
    str,
)
WORLD_SIZE = Knob(
    "WORLD_SIZE",
    "a number",
    "1",
    "How many processes run a sharded model; torchrun sets it, with RANK and MASTER_ADDR.",
    partial(_count, default=1),
)
LOCAL_RANK = Knob(
    "LOCAL_RANK",
    "a number",
    "0",
    "Which of the processes on this machine this one is; torchrun sets it.",
    partial(_count, default=0, least=0),
)
LOCAL_SIZE = Knob(
    "LOCAL_WORLD_SIZE",
    "a number",
    "1",
    "How many processes of a sharded model are on this machine; torchrun sets it.",
    partial(_count, default=1),
)
RESTART = Knob(
    "TORCHELASTIC_RESTART_COUNT",
    "a number",
    "0",
    "How often torchrun has started these processes anew; torchrun sets it.",
    partial(_count, default=0, least=0),
)

KNOBS: tuple[Knob[object], ...] = (
    DEBUG,
    PRINT,
    DUMP,
    CACHE,
    THREADS,
    CC,
    CFLAGS,
    ALLOW_OVERCOMMIT,
    GPU_LIBRARY,
    GPU_GRAPHS,
    GPU_SYNC,
    TRITON_OLD,
    TIMEOUT,
    COLLECTIVES,
    NCCL_HOST,
    WORLD_SIZE,
    LOCAL_RANK,
    LOCAL_SIZE,
    RESTART,
)


def preset(**values: str) -> None:
    """Give variables that libraries read a value, unless they have one."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def inherited(**changes: str | None) -> dict[str, str]:
    """Return the environment of a process to start: this one's, with changes (None: not set)."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def table() -> list[tuple[str, str, str, str]]:
    """Return (name, type, default, what it does) of every knob, for help and documentation."""
    return [(knob.name, knob.type, knob.default, knob.doc) for knob in KNOBS]
