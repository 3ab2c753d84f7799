"""Where ranks meet while a function runs on a device: sums, gathering, rows for experts.

Invariant: all ranks of a group do the same in the same order, whatever their devices are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..buckets import padded_tokens
from .bind import BoundCollective, BoundRouted
from .device import Device
from .pinned import Pinned

if TYPE_CHECKING:
    from ..host import Host

_BYTE, _INDEX = np.dtype(np.uint8), np.dtype(np.int64)


class Meetings(Protocol):
    """What ranks do together between two kernels."""

    def begin(self) -> None:
        """Get ready for a run of a function."""
        ...

    def collect(self, bound: BoundCollective, rows: int, width: int) -> None:
        """Do what ranks do together with `[rows, width]` numbers."""
        ...

    def route(self, bound: BoundRouted, tokens: int, work: Callable[[int], None]) -> None:
        """Send this rank's rows, of so many tokens, to experts and put back what they become.

        `work(n)` launches what is done for the first n rows that came. n may be more than have
        come, so that there are few different ones: then rows that hold anything follow.
        """
        ...

    def close(self) -> None: ...


class ThroughHost:
    """Everything passes through pinned memory of the host, whatever the device."""

    def __init__(self, device: Device, host: Host) -> None:
        self._device, self._host = device, host
        self._out, self._back, self._indices = (Pinned(device) for _ in range(3))
        self._placements: dict[int, np.ndarray] = {}

    def begin(self) -> None:
        self._host.begin()

    def collect(self, bound: BoundCollective, rows: int, width: int) -> None:
        from ..host import Collective
        from ..ranks import AXES

        step = bound.step
        nbytes = rows * width * step.itemsize
        count = len(self._host.ranks.groups[step.axis]) if step.gather else 1
        x, result = self._out.take(nbytes), self._back.take(nbytes * count)
        self._device.download(x[:nbytes], bound.x)
        self._device.synchronize()
        collective = Collective(
            int(step.gather), AXES.index(step.axis), step.itemsize, int(step.bfloat),
            rows, width, x.ctypes.data, result.ctypes.data,
        )  # fmt: skip
        self._host.collect(None, ctypes.addressof(collective))
        self._host.finish()
        self._device.upload(bound.result, result[: nbytes * count])

    def route(self, bound: BoundRouted, tokens: int, work: Callable[[int], None]) -> None:
        from ..exchange import Routed, view

        step, device = bound.step, self._device
        size = step.width * step.itemsize
        x = self._out.take(tokens * size)[: tokens * size]
        indices = self._indices.take(8 * tokens * step.choices)[: 8 * tokens * step.choices]
        result = self._back.take(tokens * step.choices * size)[: tokens * step.choices * size]
        device.download(x, bound.x)
        device.download(indices, bound.indices)
        placement = self._placement(bound)
        device.synchronize()
        routed = Routed(
            tokens, step.choices, step.width, step.itemsize, step.ranks, step.slots, step.capacity,
            x.ctypes.data, indices.ctypes.data, placement.ctypes.data, result.ctypes.data,
        )  # fmt: skip
        while (rows := self._host.next(None, ctypes.addressof(routed))) >= 0:
            if not rows:
                continue
            came, made = (view(a, (rows * size,), _BYTE) for a in (routed.rows, routed.made))
            slots = view(routed.slots_of, (step.capacity,), _INDEX)
            padded = min(padded_tokens(rows), step.capacity)
            slots[rows:padded] = slots[rows - 1]  # an expert whose weights are read anyway
            device.upload(bound.rows, came)
            device.upload(bound.slots, slots)
            work(padded)
            device.download(made, bound.made)
            device.synchronize()
        self._host.finish()
        device.upload(bound.result, result)

    def _placement(self, bound: BoundRouted) -> np.ndarray:
        """Return i64[ranks · slots], which lies among the weights, on the host."""
        if bound.placement not in self._placements:
            found = np.empty(bound.step.ranks * bound.step.slots, np.int64)
            self._device.download(found, bound.placement)
            self._device.synchronize()
            self._placements[bound.placement] = found
        return self._placements[bound.placement]

    def close(self) -> None:
        for pinned in (self._out, self._back, self._indices):
            pinned.free()
