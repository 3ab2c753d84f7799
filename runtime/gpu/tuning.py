"""The file beside an artifact that says which variant of each kernel is fastest on a device.

    m.dilu.tuning/nvidia-a100-12.4-0123456789abcdef.json

Invariants: a choice holds for one device's kind, driver version and artifact (by its manifest's
hash); the file appears complete or not at all; one that makes no sense is as good as none.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import DiluError
from ..artifact.artifact import Artifact
from ..artifact.replace import write_file
from .device import DeviceInfo

FORMAT = 1


def tuning_file(artifact: Artifact, info: DeviceInfo) -> Path | None:
    """Return where the choices for a device are kept; None for an artifact in memory."""
    if artifact.path is None:
        return None
    folder = artifact.path.resolve()
    slug = re.sub(r"[^a-z0-9]+", "-", info.name.lower()).strip("-")
    name = f"{slug}-{info.driver}-{artifact.manifest.get('manifest_hash', '')[:16]}.json"
    return folder.with_name(f"{folder.name}.tuning") / name


def require_file(artifact: Artifact, info: DeviceInfo) -> Path:
    """Return where the choices for a device are kept; raise DiluError where nothing can be."""
    file = tuning_file(artifact, info)
    if file is None:
        raise DiluError(
            f"{artifact.name} is in memory only, and tuning is kept beside the artifact",
            hint="save it, and load it from there",
        )
    return file


def read_tuning(artifact: Artifact, target: str, info: DeviceInfo, *, nan: bool) -> dict[str, int]:
    """Return kernel → variant, as far as a device was tuned. `nan`: for weights with NaN codes."""
    file = tuning_file(artifact, info)
    if file is None:
        return {}
    chosen = _read(file)["targets"].get(target, {}).get(_key(nan), {})
    return {name: index for name, index in chosen.items() if isinstance(index, int)}


def write_tuning(
    artifact: Artifact, target: str, info: DeviceInfo, chosen: dict[str, int], *, nan: bool
) -> Path:
    """Keep kernel → variant for a device; what is known of other targets stays."""
    file = require_file(artifact, info)
    content = _read(file)
    content["targets"].setdefault(target, {})[_key(nan)] = chosen
    content |= {"device": info.name, "driver": info.driver}
    write_file(file, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    return file


def _key(nan: bool) -> str:
    return "with_nan" if nan else "without_nan"


def _read(file: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"format": FORMAT, "targets": {}}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return empty
    known = isinstance(content, dict) and content.get("format") == FORMAT
    tables = content.get("targets") if known else None
    sound = isinstance(tables, dict) and all(
        isinstance(table, dict) and all(isinstance(c, dict) for c in table.values())
        for table in tables.values()
    )
    return content if sound else empty
