"""Which of an artifact's targets runs here, on which device, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from ..errors import DiluError
from .artifact.artifact import Artifact
from .artifact.manifest import CpuTargetEntry, GpuTargetEntry, TargetEntry
from .choice import Choice, how_to_add
from .cpu.features import architecture, features

if TYPE_CHECKING:
    from .gpu.device import Device


def choose_target(
    artifact: Artifact, wanted: str | None = None, device: str | Device | None = None
) -> Choice:
    """Return the best target that this machine can run.

    `wanted` asks for one by name, or for the best of a family (`cpu`, `cuda`); `device` says where
    it has to run. With neither, a GPU is taken where a target fits one, else the CPU. Raises
    DiluError, listing what the artifact has, where nothing fits.
    """
    table = artifact.targets
    asked = [n for n in table if wanted in (None, n, n.partition(":")[0])]
    if not asked:
        raise DiluError(
            f"the artifact {artifact.name} has no target {wanted!r}",
            hint=f"it has: {', '.join(table)}; {how_to_add(artifact, 'cpu')}",
        )
    gpus = [name for name in asked if is_gpu(table[name])]
    if device == "cpu":
        asked = [name for name in asked if name not in gpus]
        if not asked:
            raise DiluError(
                f"no target of {artifact.name} runs on the CPU: it has {', '.join(table)}",
                hint=how_to_add(artifact, "cpu"),
            )
    elif device is not None or gpus:
        from .gpu.choose import choose_device  # only here: it looks for drivers

        choice = choose_device(artifact, gpus, device, named=wanted is not None)
        if isinstance(choice, Choice):
            return choice
        return _choose_cpu(artifact, [n for n in asked if n not in gpus], wanted, choice)
    return _choose_cpu(artifact, asked, wanted, {})


def is_gpu(target: TargetEntry) -> TypeGuard[GpuTargetEntry]:
    """Return whether a target's kernels run on a device of their own."""
    return "program" in target


def obstacle(target: CpuTargetEntry) -> str | None:
    """Return what keeps this machine's CPU from running a target, or None."""
    if not target.get("library"):
        return "has no machine code"
    built_for = target.get("architecture")
    if built_for and built_for != architecture():
        return f"is for {built_for}, and this machine is {architecture()}"
    missing = [f for f in target.get("requires", ()) if f not in features()]
    return f"needs {', '.join(missing)}, which this processor lacks" if missing else None


def _choose_cpu(
    artifact: Artifact, asked: list[str], wanted: str | None, others: dict[str, str]
) -> Choice:
    """Choose among targets of the CPU. `others`: what stands in the way of those that are not."""
    table = artifact.targets
    obstacles = others | {name: obstacle(artifact.cpu_target(name)) for name in asked}
    fitting = [name for name in asked if obstacles[name] is None]
    if not fitting:
        why = "; ".join(f"{name} {reason}" for name, reason in obstacles.items())
        raise DiluError(
            f"no target of {artifact.name} runs on this machine: {why}",
            hint=how_to_add(artifact, "cpu"),
        )
    best = max(fitting, key=lambda name: len(table[name].get("requires", ())))
    if wanted == best:
        return Choice(best, "it was asked for")
    needs = ", ".join(table[best].get("requires", ())) or "nothing special"
    return Choice(best, f"the best of {', '.join(table)} that runs here (needs {needs})")
