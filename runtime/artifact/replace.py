"""A directory, or a file, that appears complete or not at all.

Invariant: at no moment is there a half-written one under the final name, and what a killed writer
of a directory left beside it is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from ...errors import DiluError, Loc

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def new_directory(target: Path, may_replace: Callable[[Path], bool]) -> Generator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block succeeds.

    Raise DiluError, having written nothing, where `target` is something that `may_replace`
    refuses or its folder cannot be written.
    """
    _refuse(target, may_replace)
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, target.name)
        temporary = parent / f".{target.name}.{os.getpid()}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise DiluError(f"cannot write here: {error.strerror}", Loc(str(parent))) from error
    try:
        yield temporary
        _sync(temporary)
        _refuse(target, may_replace)
        _swap(temporary, target)
        _sync(parent)
    except OSError as error:
        raise DiluError(f"cannot write the artifact: {error.strerror}", Loc(str(target))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and its folder where there is none, replacing the one that is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DiluError(f"cannot write this file: {error.strerror}", Loc(str(path))) from error
    _sync(path.parent)


def _refuse(target: Path, may_replace: Callable[[Path], bool]) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and (may_replace(target) or not any(target.iterdir())):
        return
    raise DiluError(
        "this exists and is not a dilu artifact, so it is not replaced",
        Loc(str(target)),
        hint="choose another name with -o, or remove it first",
    )


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; afterwards `new` is the old content, or gone."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = new.with_suffix(".old")
        target.rename(old)
        new.rename(target)
        old.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where the system can (Linux, most file systems)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(a), os.fsencode(b)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _sweep(parent: Path, name: str) -> None:
    """Remove what writers of the same name left here that are no longer alive."""
    for left in parent.glob(f".{_escaped(name)}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(directory: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
