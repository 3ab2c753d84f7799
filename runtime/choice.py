"""What was chosen to run, and how an artifact gets more to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .artifact.artifact import Artifact

if TYPE_CHECKING:
    from .gpu.device import Device


@dataclass(frozen=True)
class Choice:
    """The target to run, why it is that one, and the device (None: the CPU).

    `text`: the device takes the target's code as text only, which its driver compiles.
    """

    target: str
    reason: str
    device: Device | None = None
    text: bool = False


def how_to_add(artifact: Artifact, target: str) -> str:
    """Return the command that adds a target to an artifact."""
    source = artifact.manifest.get("options", {}).get("source") or "MODEL"
    kept = " ".join(f"--target {name}" for name in artifact.targets)
    return f"add one that fits: dilu compile {source} {kept} --target {target}"
