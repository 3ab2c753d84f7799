"""Memory of the host that a device copies from and to while the program goes on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .device import Device, align


class Pinned:
    """A buffer that is made larger when it has to be, after `settle` has waited for the device."""

    def __init__(self, device: Device, settle: Callable[[], None]) -> None:
        self._device, self._settle = device, settle
        self._buffer: np.ndarray | None = None

    def take(self, nbytes: int) -> np.ndarray:
        """Return u8[at least nbytes]; what was taken before must not be in use any more, but by
        what the device was asked to copy."""
        if self._buffer is None or len(self._buffer) < nbytes:
            if self._buffer is not None:
                self._settle()
            self.free()
            self._buffer = self._device.allocate_host(align(nbytes))
        return self._buffer

    def free(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._device.free_host(buffer)
