"""Where Triton is installed: the one beside dilu, older ones apart for the devices that newer ones
left behind, and forks of it in folders of their own. Nothing here imports it."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from ... import knobs
from ...errors import DiluError
from ..target import Target


@cache
def imported_version() -> str | None:
    """Return the version of the Triton that can be imported, None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def installation(target: Target) -> tuple[Path | None, str]:
    """Return the folder of the Triton that compiles for a target, None for the imported one, and
    its version. Raises DiluError where it is missing."""
    assert target.gpu is not None
    wanted = target.gpu.triton
    if Path(wanted).is_absolute():
        return _fork(target, Path(wanted))
    version = imported_version()
    if not wanted or (version or "").startswith(f"{wanted}."):
        if version is None:
            raise DiluError(
                f"compiling for {target.name} needs Triton, which is not installed",
                hint="pip install triton",
            )
        return None, version
    places = folders(wanted)
    for place in places:
        found = version_in(place)
        if found is not None:
            return place, found
    raise DiluError(
        f"compiling for {target.name} needs Triton {wanted}, installed apart: newer ones have no"
        " matrix instructions for it",
        hint=f"pip install --no-deps --target {places[-1]} 'triton=={wanted}.*', or set"
        f" {knobs.TRITON_OLD.name} to the folder where it is",
    )


def _fork(target: Target, folder: Path) -> tuple[Path, str]:
    assert target.gpu is not None
    version = version_in(folder)
    if version is None:
        raise DiluError(
            f"compiling for {target.name} needs a Triton of its own, which is not in {folder}",
            hint=f"pip install --no-deps --target {folder} {target.gpu.packages}",
        )
    return folder, version


def version_in(folder: Path) -> str | None:
    """Return the version of the Triton in a folder, with the name of a distribution that brings it
    under another: `3.2.0 (triton-ascend)`. None where there is no Triton."""
    for found in metadata.distributions(path=[str(folder)]):
        if any(file.as_posix() == "triton/__init__.py" for file in found.files or ()):
            name = found.metadata["Name"]
            return found.version if name == "triton" else f"{found.version} ({name})"
    return None


def describe_installation(target: Target) -> str:
    """Return which Triton compiles for a target, or what is missing."""
    try:
        return f"Triton {installation(target)[1]}"
    except DiluError as error:
        return f"Triton is missing: {error.hint}"


def folders(version: str) -> list[Path]:
    """Return where an installation apart is looked for."""
    chosen = knobs.TRITON_OLD.get()
    if chosen is not None:
        return [chosen]
    name = f"triton-{version}"
    return [Path(sys.prefix) / "share" / "dilu" / name, knobs.CACHE.get() / name]
