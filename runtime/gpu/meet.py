"""Where ranks meet while a function runs on a device: sums, gathering, rows for experts.

Invariant: all ranks of a group do the same in the same order, whatever their devices are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..buckets import padded_tokens
from .bind import BoundCollective, BoundRouted
from .device import Device
from .pinned import Pinned
from .program import RoutedStep

if TYPE_CHECKING:
    from ..mesh.exchange import Routed
    from ..mesh.host import Host

_BYTE, _INDEX = np.dtype(np.uint8), np.dtype(np.int64)


class Meetings:
    """What ranks do together between two kernels; who has which expert is for the host to know."""

    def __init__(self, device: Device, host: Host) -> None:
        self._device, self._host = device, host
        self._pinned: dict[str, Pinned] = {}
        self._placements: dict[int, np.ndarray] = {}

    def begin(self) -> None:
        """Get ready for a run of a function."""
        self._host.begin()

    def collect(self, bound: BoundCollective, rows: int, width: int) -> None:
        """Do what ranks do together with `[rows, width]` numbers."""
        raise NotImplementedError

    def route(self, bound: BoundRouted, tokens: int, work: Callable[[int], None]) -> None:
        """Send this rank's rows, of so many tokens, to experts and put back what they become.

        `work(n)` launches what is done for the first n rows that came. n may be more than have
        come, so that there are few different ones: then rows that hold anything follow.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until all that the device was asked for is done; raise DiluError, naming them, where
        ranks that it waits for are gone."""
        self._device.synchronize()

    def close(self) -> None:
        for pinned in self._pinned.values():
            pinned.free()

    def _room(self, name: str, nbytes: int) -> np.ndarray:
        """Return u8[nbytes] on the host, the same memory for the same name."""
        if name not in self._pinned:
            self._pinned[name] = Pinned(self._device, self.settle)
        return self._pinned[name].take(nbytes)[:nbytes]

    def _fetched(self, name: str, address: int, nbytes: int) -> np.ndarray:
        """Return a copy of what lies on the device, which is there after `settle`."""
        room = self._room(name, nbytes)
        self._device.download(room, address)
        return room

    def _placement(self, bound: BoundRouted) -> np.ndarray:
        """Return i64[ranks · slots], which lies among the weights, on the host."""
        if bound.placement not in self._placements:
            found = np.empty(bound.step.ranks * bound.step.slots, np.int64)
            self._device.download(found, bound.placement)
            self.settle()
            self._placements[bound.placement] = found
        return self._placements[bound.placement]

    def rounds(
        self, bound: BoundRouted, tokens: int, x: int, result: int
    ) -> Iterator[tuple[Routed, int]]:
        """Yield what the host lends for each round in which rows have come, and how many; slots are
        on the device, those of rows that are none, too."""
        from ..mesh.exchange import Routed, view

        step = bound.step
        indices = self._fetched("indices", bound.indices, 8 * tokens * step.choices)
        placement = self._placement(bound)
        self.settle()
        routed = Routed(
            tokens, step.choices, step.width, step.itemsize, step.made_itemsize, step.ranks,
            step.slots, step.capacity, x, indices.ctypes.data, placement.ctypes.data, result,
        )  # fmt: skip
        while (rows := self._host.next(None, ctypes.addressof(routed))) >= 0:
            if rows:
                slots = view(routed.slots_of, (step.capacity,), _INDEX)
                slots[rows:] = slots[rows - 1]  # an expert whose weights are read anyway
                self._device.upload(bound.slots, slots[: padded_rows(rows, step)])
                yield routed, rows
        self._host.finish()


def padded_rows(rows: int, step: RoutedStep) -> int:
    """Return for how many rows work is done where so many came."""
    return min(padded_tokens(rows), step.capacity)


class ThroughHost(Meetings):
    """Everything passes through the host's memory, whatever the devices."""

    def collect(self, bound: BoundCollective, rows: int, width: int) -> None:
        from ..mesh.host import Collective
        from ..mesh.ranks import AXES

        step = bound.step
        nbytes = rows * width * step.itemsize
        count = len(self._host.ranks.groups[step.axis]) if step.gather else 1
        result = self._room("result", nbytes * count)
        x = self._fetched("x", bound.x, nbytes)
        self.settle()
        collective = Collective(
            int(step.gather), AXES.index(step.axis), step.itemsize, int(step.bfloat),
            rows, width, x.ctypes.data, result.ctypes.data,
        )  # fmt: skip
        self._host.collect(None, ctypes.addressof(collective))
        self._host.finish()
        self._device.upload(bound.result, result)

    def route(self, bound: BoundRouted, tokens: int, work: Callable[[int], None]) -> None:
        from ..mesh.exchange import view

        step, device = bound.step, self._device
        row, made_row = step.width * step.itemsize, step.width * step.made_itemsize
        x = self._fetched("x", bound.x, tokens * row)
        result = self._room("result", tokens * step.choices * made_row)
        for routed, rows in self.rounds(bound, tokens, x.ctypes.data, result.ctypes.data):
            came = view(routed.rows, (rows * row,), _BYTE)
            made = view(routed.made, (rows * made_row,), _BYTE)
            device.upload(bound.rows, came)
            work(padded_rows(rows, step))
            device.download(made, bound.made)
            self.settle()
        device.upload(bound.result, result)
