"""The C compiler: find one, and make a shared library of a source text."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from ... import knobs
from ...errors import DiluError
from ..cache import cache_key, cached
from ..target import Target

#: Nothing here changes the value of a floating-point expression. `-fopenmp-simd` lets loops that
#: say so be vectorized, reductions included; it needs no runtime library.
FLAGS = (
    "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off",
    "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fwrapv", "-fopenmp-simd",
)  # fmt: skip
LIBRARIES = ("-pthread", "-lm")

_FIRST_ERRORS = 5
_HINT = "install gcc or clang, or `pip install ziglang`, or set DILU_CC to a C compiler"


def find_compiler() -> tuple[str, ...]:
    """Return the command of the C compiler; raise DiluError when there is none."""
    chosen = knobs.CC.get()
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise DiluError(f"no C compiler: DILU_CC={chosen[0]!r} is not found", hint=_HINT)
        return chosen
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path is not None:
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise DiluError("no C compiler was found", hint=_HINT)


@cache
def compiler_version(command: tuple[str, ...]) -> str:
    """Return what the compiler says of itself, for cache keys."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DiluError(f"the C compiler {' '.join(command)} does not run: {error}") from error
    return done.stdout


def compile_source(source: str, target: Target, *, optimize: str = "-O3") -> bytes:
    """Return the shared library of `source`, from the cache where it is there.

    Raises DiluError with the first errors of the compiler and where the source was kept.
    """
    command = find_compiler()
    machine = (*_general(command), *target.flags)
    options = (optimize, *FLAGS, *machine, *knobs.CFLAGS.get())
    key = cache_key([source, *options, *LIBRARIES, *command, compiler_version(command)])
    return cached(key, ".so", lambda: _compile(source, command, options, key))


def _general(command: tuple[str, ...]) -> tuple[str, ...]:
    """Return what makes a compiler start from the most general machine: zig starts from this one,
    and adds checks of its own."""
    zig = "ziglang" in command or Path(command[0]).name == "zig"
    return ("-mcpu=baseline", "-fno-sanitize=undefined", "-w") if zig else ()


def _compile(source: str, command: tuple[str, ...], options: tuple[str, ...], key: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="dilu-") as name:
        text, library = Path(name, "module.c"), Path(name, "module.so")
        text.write_text(source)
        run = [*command, *options, "-o", str(library), str(text), *LIBRARIES]
        try:
            done = subprocess.run(run, capture_output=True, text=True)
        except OSError as error:
            raise DiluError(f"the C compiler {command[0]} does not run: {error}") from error
        if done.returncode == 0:
            return library.read_bytes()
        raise _failure(source, command, done.stderr, key)


def _failure(source: str, command: tuple[str, ...], stderr: str, key: str) -> DiluError:
    kept = Path(tempfile.gettempdir(), f"dilu-failed-{key[:16]}.c")
    kept.write_text(source)
    lines = [line for line in stderr.splitlines() if "error" in line] or stderr.splitlines()
    return DiluError(
        f"the C compiler {' '.join(command)} failed:\n" + "\n".join(lines[:_FIRST_ERRORS]),
        hint=f"the source was kept as {kept}",
    )
