"""Which of an artifact's targets runs here, and why."""

from __future__ import annotations

from typing import Any

from ..errors import DiluError
from .artifact import Artifact
from .cpu.features import architecture, features


def choose_target(artifact: Artifact, wanted: str | None = None) -> tuple[str, str]:
    """Return the name of the best target that this machine can run, and why it is that one.

    `wanted` asks for one by name, or for the best of a family (`cpu`). Raises DiluError, listing
    what the artifact has, where nothing fits.
    """
    table = artifact.targets
    asked = [n for n in table if wanted in (None, n, n.partition(":")[0])]
    if not asked:
        raise DiluError(
            f"the artifact {artifact.name} has no target {wanted!r}",
            hint=f"it has: {', '.join(table)}; {_how_to_add(artifact)}",
        )
    obstacles = {name: obstacle(table[name]) for name in asked}
    fitting = [name for name in asked if obstacles[name] is None]
    if not fitting:
        why = "; ".join(f"{name} {reason}" for name, reason in obstacles.items())
        raise DiluError(
            f"no target of {artifact.name} runs on this machine: {why}", hint=_how_to_add(artifact)
        )
    best = max(fitting, key=lambda name: len(table[name].get("requires", ())))
    if wanted == best:
        return best, "it was asked for"
    needs = ", ".join(table[best].get("requires", ())) or "nothing special"
    return best, f"the best of {', '.join(table)} that runs here (needs {needs})"


def obstacle(target: dict[str, Any]) -> str | None:
    """Return what keeps this machine from running a target, or None."""
    if not target.get("library"):
        return "has no machine code"
    built_for = target.get("architecture")
    if built_for and built_for != architecture():
        return f"is for {built_for}, and this machine is {architecture()}"
    missing = [f for f in target.get("requires", ()) if f not in features()]
    return f"needs {', '.join(missing)}, which this processor lacks" if missing else None


def _how_to_add(artifact: Artifact) -> str:
    source = artifact.manifest.get("options", {}).get("source") or "MODEL"
    kept = " ".join(f"--target {name}" for name in artifact.targets)
    return f"add one that fits: dilu compile {source} {kept} --target cpu"
