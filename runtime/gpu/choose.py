"""Which GPU target of an artifact runs on which device.

NVIDIA's machine code runs on the compute capability it was made for and higher ones of the same
major version; its text (PTX) on everything newer. From 9.0 on the code is of one architecture only
(`sm_90a` and the like) and runs nowhere else. AMD's runs on the very architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from ... import knobs
from ...errors import DiluError
from ..artifact.artifact import Artifact
from ..artifact.manifest import GpuTargetEntry
from ..choice import Choice, how_to_add
from .device import Device, DeviceInfo
from .open_device import find_devices, open_device

_FIRST_SPECIFIC = 90  # from this compute capability on, code is for one architecture alone


@dataclass(frozen=True)
class Fit:
    """How a target runs on a device: `text` says that its driver compiles it. Larger is better."""

    rank: tuple[bool, int]
    text: bool
    reason: str


def fit(target: GpuTargetEntry, info: DeviceInfo) -> Fit | None:
    """Return how a target of an artifact runs on a device, or None where it does not."""
    if target["backend"] != info.backend:
        return None
    if info.backend != "cuda":
        same = str(target["arch"]) == info.arch.partition(":")[0]
        return Fit((True, 0), False, f"code for {info.arch}") if same else None
    arch = int(target["arch"])
    major, minor = (int(part) for part in info.arch.split("."))
    here = f"on compute capability {info.arch}"
    if arch >= _FIRST_SPECIFIC:
        runs = arch == major * 10 + minor
    else:
        runs = arch // 10 == major and arch % 10 <= minor
    if runs:
        return Fit((True, arch), False, f"code {here}")
    if arch < _FIRST_SPECIFIC and arch <= major * 10 + minor:
        return Fit((False, arch), True, f"PTX {here}, compiled by its driver")
    return None


def choose_device(
    artifact: Artifact, names: list[str], device: str | Device | None, *, named: bool
) -> Choice | dict[str, str]:
    """Return the first device that one of the GPU targets `names` fits, with the best one for it;
    of several processes on this machine, the n-th takes the n-th such device, and so on in turn.

    Where a device or targets were asked for (`named`) and nothing fits, raises DiluError; else
    returns what stands in the way of each target.
    """
    if device is not None:
        opened = _asked_for(device) if isinstance(device, str) else device
        choice = _best(artifact, names, opened)
        if choice is None:
            opened.close()
            raise _nothing_for(artifact, opened.info)
        return choice
    obstacles: dict[str, str] = {}
    for backend in dict.fromkeys(artifact.gpu_target(name)["backend"] for name in names):
        devices, problem = find_devices(backend)
        choices = [_best(artifact, names, opened) for opened in devices]
        fitting = [choice for choice in choices if choice is not None]
        taken = fitting[knobs.LOCAL_RANK.get() % len(fitting)] if fitting else None
        _close_others(devices, taken and taken.device)
        if taken is not None:
            return taken
        if named and devices:
            raise _nothing_for(artifact, devices[0].info)
        found = ", ".join(f"{d.info.text} is {d.info.arch}" for d in devices)
        why = f"fits no device here ({found})" if devices else f"has no device here: {problem}"
        for name in names:
            if artifact.gpu_target(name)["backend"] == backend:
                obstacles[name] = why
    return obstacles


def _asked_for(place: str) -> Device:
    """Open a device by its name; a name without a number is the first, or a later process's own."""
    number = knobs.LOCAL_RANK.get()
    found = find_devices(place)[0] if number and ":" not in place else []
    if not found:
        return open_device(place)
    mine = found[number % len(found)]
    _close_others(found, mine)
    return mine


def _close_others(devices: list[Device], kept: Device | None) -> None:
    for device in devices:
        if device is not kept:
            device.close()


def own_target(info: DeviceInfo) -> str:
    """Return the name of the target made for a device."""
    arch = info.arch.replace(".", "") if info.backend == "cuda" else info.arch.partition(":")[0]
    return f"{info.backend}:{arch}"


def _best(artifact: Artifact, names: list[str], device: Device) -> Choice | None:
    fits = {name: fit(artifact.gpu_target(name), device.info) for name in names}
    ranked = [(found.rank, name, found) for name, found in fits.items() if found is not None]
    if not ranked:
        return None
    _, name, found = max(ranked, key=lambda entry: entry[:2])
    return Choice(name, f"{name} {found.reason} of {device.info.text}", device, found.text)


def _nothing_for(artifact: Artifact, info: DeviceInfo) -> DiluError:
    return DiluError(
        f"no target of {artifact.name} runs on {info.text}, which is {info.arch}: "
        f"it has {', '.join(artifact.targets)}",
        hint=how_to_add(artifact, own_target(info)),
    )
