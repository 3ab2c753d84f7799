"""Which devices there are, and how one is opened.

    device = open_device("cuda:0")

The drivers of NVIDIA and AMD are `native.py`. Others plug in by name: an entry point of the group
`dilu.devices` names a backend and a callable that takes an index and returns a `Device`, raising
DiluError where there is none of that index. A program may also put an opener in `OPENERS`, or hand
a `Device` to `load(…, device=…)`.

Invariant: opening a device touches no other; nothing is loaded before one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from ... import plugins
from ...errors import DiluError
from .device import Device

ENTRY_POINTS = "dilu.devices"

Opener = Callable[[int], Device]


def _cuda(index: int) -> Device:
    from .native import CudaDevice

    return CudaDevice(index)


def _hip(index: int) -> Device:
    from .native import HipDevice

    return HipDevice(index)


#: Backend → what opens its device of an index. Entry points add to it when they are asked for.
OPENERS: dict[str, Opener] = {"cuda": _cuda, "hip": _hip}


def parse_place(text: str) -> tuple[str, int]:
    """Return the backend and the index of a device's name, such as `cuda` or `cuda:1`."""
    backend, colon, number = text.partition(":")
    if not backend or (colon and not number.isdecimal()):
        raise DiluError(
            f"not a device: {text!r}", hint="devices are cpu, cuda, cuda:1, hip and the like"
        )
    return backend, int(number) if colon else 0


def backends() -> list[str]:
    """Return the names of all backends, those of other packages after ours."""
    others = [point.name for point in entry_points(group=ENTRY_POINTS)]
    return list(dict.fromkeys([*OPENERS, *others]))


def open_device(place: str) -> Device:
    """Open a device by its name; raise DiluError where there is no such device or driver."""
    backend, index = parse_place(place)
    opener = OPENERS.get(backend) or _plugged_in(backend)
    return opener(index)


def find_devices(backend: str) -> tuple[list[Device], str | None]:
    """Return all devices of a backend, opened, and what stands in the way where there is none."""
    found: list[Device] = []
    while True:
        try:
            found.append(open_device(f"{backend}:{len(found)}"))
        except DiluError as error:
            return found, None if found else error.message


def _plugged_in(backend: str) -> Opener:
    point = next(iter(entry_points(group=ENTRY_POINTS, name=backend)), None)
    if point is None:
        known = ", ".join(["cpu", *backends()])
        raise DiluError(f"there is no kind of device {backend!r}", hint=f"there are: {known}")
    return plugins.load(point, f"devices {backend!r}")
