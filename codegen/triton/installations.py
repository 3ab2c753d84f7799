"""Where Triton is installed: the one beside dilu, and older ones apart for the devices that newer
ones left behind. Nothing here imports it."""

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
        found = sorted(place.glob("triton-*.dist-info"))
        if (place / "triton").is_dir() and found:
            return place, found[-1].name.removeprefix("triton-").removesuffix(".dist-info")
    raise DiluError(
        f"compiling for {target.name} needs Triton {wanted}, installed apart: newer ones have no"
        " matrix instructions for it",
        hint=f"pip install --no-deps --target {places[-1]} 'triton=={wanted}.*', or set"
        f" {knobs.TRITON_OLD.name} to the folder where it is",
    )


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
