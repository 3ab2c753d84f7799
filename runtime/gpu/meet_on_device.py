"""Ranks that meet on their devices: torch.distributed on the memory of each, no copy on the host.

NCCL, or RCCL, waits for ever for ranks that are gone. So it is this module that waits for the
device, no longer than DILU_TIMEOUT.

Invariants: sums are added in the order of the ranks, as on the host; the host decides which rows go
where, and never sees them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import knobs
from ..mesh.exchange import EXCHANGE, Block, Exchange, Routed
from ..mesh.host import ONE_STEP
from ..mesh.rounds import Sent
from ..mesh.wire import is_plain
from .array import DeviceArray
from .bind import BoundCollective, BoundRouted
from .device import Device
from .dlpack import HOST
from .meet import Meetings, ThroughHost, padded_rows
from .wire import decode, encode

if TYPE_CHECKING:
    from ..mesh.host import Host

_MEETING = "a meeting of devices"
_MOST_KEPT = 1 << 14  # tensors
_PATIENCE = 2e-3  # seconds of waiting without sleep
_GRACE = 5.0  # seconds for groups to end
_FLOATS = {2: "f16", 4: "f32", 8: "f64"}


def meeting_place(device: Device) -> tuple[str, str] | None:
    """Return the backend of torch.distributed for a device and which device of all machines it is;
    None where ranks on such devices meet on the host."""
    wanted = knobs.COLLECTIVES.get()
    if wanted == "host":
        return None
    if device.info.dlpack == HOST:  # torch takes its memory for the host's
        return ("gloo", f"{socket.gethostname()} {os.getpid()}") if wanted == "device" else None
    import torch

    index = device.info.index
    if torch.cuda.is_available() and index < torch.cuda.device_count():
        return "nccl", f"{knobs.NCCL_HOST.get()} {torch.cuda.get_device_properties(index).uuid}"
    return None


def meetings(device: Device, host: Host, groups: Mapping[str, Any]) -> Meetings:
    """Return how ranks meet: on devices by `groups`, backends by axis, if there are any."""
    if not groups:
        return ThroughHost(device, host)
    return OnDevice(device, host, groups)


class OnDevice(Meetings):
    """`groups[axis]`: the backend of torch.distributed for this rank's group along an axis."""

    def __init__(self, device: Device, host: Host, groups: Mapping[str, Any]) -> None:
        super().__init__(device, host)
        self.groups = groups
        self.bound: BoundRouted | None = None
        self._tensors: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._stream: Any = None
        host.exchange.make_job = lambda exchange, block: _SentOnDevice(exchange, block, self)

    def collect(self, bound: BoundCollective, rows: int, width: int) -> None:
        step = bound.step
        count = len(self._host.ranks.groups[step.axis])
        element = "bf16" if step.bfloat else _FLOATS.get(step.itemsize, "u8")
        if step.gather:
            element, width = "u8", width * step.itemsize
        if not rows * width:
            return
        x = self.tensor(bound.x, (rows, width), element)
        with self._meeting():
            if step.gather:
                result = self.tensor(bound.result, (rows, count, width), element)
                result.copy_(self._gathered(step.axis, x).transpose(0, 1))
                return
            result = self.tensor(bound.result, (rows, width), element)
            if count == 2 or rows * width * step.itemsize <= ONE_STEP:
                _add(self._gathered(step.axis, x), result)
            else:
                self._sum_in_two_steps(step.axis, x.reshape(-1), result.reshape(-1))

    def _gathered(self, axis: str, x: Any) -> Any:
        """Return `[ranks, …]` of all ranks' tensors along an axis."""
        count = len(self._host.ranks.groups[axis])
        self._host.sent_bytes += (count - 1) * x.nbytes
        out = x.new_empty((count, *x.shape))
        group, flat = self.groups[axis], (out.view(-1), x.contiguous().view(-1))
        self._host.ranks.guarded(lambda: group._allgather_base(*flat).wait(), _MEETING)
        return out

    def swapped(self, axis: str, came: Any, sent: Any, here: list[int], away: list[int]) -> Any:
        """Start giving rows to the ranks along an axis, `away` of them to each, and getting `here`
        from each (none: the same from all); return what to wait for."""
        group = self.groups[axis]
        return self._host.ranks.guarded(
            lambda: group.alltoall_base(came, sent, here, away), EXCHANGE
        )

    def _sum_in_two_steps(self, axis: str, x: Any, result: Any) -> None:
        """Every rank adds up a part, and gets the other parts' sums: less to send than all of x."""
        count = len(self._host.ranks.groups[axis])
        part = -(-len(x) // count)
        padded = x.new_zeros(count, part)
        padded.view(-1)[: len(x)] = x
        parts, total = padded.new_empty(count, part), padded.new_empty(part)
        self._host.sent_bytes += (count - 1) * total.nbytes
        self._host.ranks.wait([self.swapped(axis, parts, padded, [], [])], _MEETING)
        _add(parts, total)
        result.copy_(self._gathered(axis, total).view(-1)[: len(x)])

    def route(self, bound: BoundRouted, tokens: int, work: Callable[[int], None]) -> None:
        self.bound = bound
        with self._meeting():
            # Where x and the result are is for the job to know: the host never looks there.
            for _, rows in self.rounds(bound, tokens, bound.x, bound.result):
                work(padded_rows(rows, bound.step))

    def tensor(self, address: int, shape: tuple[int, ...], element: str) -> Any:
        """Return memory of the device as a tensor."""
        import torch

        key = (address, shape, element)
        if key not in self._tensors:
            if len(self._tensors) >= _MOST_KEPT:
                self._tensors.clear()
            array = DeviceArray(self._device, None, address, shape, element)
            self._tensors[key] = torch.from_dlpack(array)
        return self._tensors[key]

    @contextlib.contextmanager
    def _on_stream(self) -> Generator[None]:
        """Make torch work on the device's stream."""
        import torch

        if self._device.info.dlpack == HOST:
            yield
            return
        if self._stream is None:
            place = torch.device("cuda", self._device.info.index)
            self._stream = torch.cuda.ExternalStream(self._device.stream, place)
        with torch.cuda.stream(self._stream):
            yield

    @contextlib.contextmanager
    def _meeting(self) -> Generator[None]:
        """The same; where it fails, nothing is left on the device that waits for others: no memory
        could be freed before."""
        try:
            with self._on_stream():
                yield
        except BaseException:
            self._abort()
            raise

    def _abort(self) -> None:
        """End what waits on the device: all groups at once, since each waits for the device."""
        aborts = [group.abort for group in self.groups.values() if hasattr(group, "abort")]
        threads = [threading.Thread(target=abort, daemon=True) for abort in aborts]
        for thread in threads:
            thread.start()
        end = time.monotonic() + _GRACE
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        if any(thread.is_alive() for thread in threads):
            self._device.stuck = True
            self._host.ranks.give_up()

    def settle(self) -> None:
        if self._device.info.dlpack != HOST:
            with self._meeting():
                self._await()
        self._device.synchronize()

    def _await(self) -> None:
        import torch

        event = torch.cuda.Event()
        event.record()
        begun = time.monotonic()
        while not event.query():
            spent = time.monotonic() - begun
            if spent > knobs.TIMEOUT.get():
                raise self._host.ranks.failure(_MEETING)
            if spent > _PATIENCE:
                time.sleep(1e-4)


class _SentOnDevice(Sent):
    """Rows that travel from device to device."""

    def __init__(self, exchange: Exchange, block: Block, meetings: OnDevice) -> None:
        bound = meetings.bound
        assert bound is not None
        self.meetings, self.bound = meetings, bound
        step = bound.step
        self.element, self.made_element = (
            {2: "bf16", 4: "f32"}[n] for n in (step.itemsize, step.made_itemsize)
        )
        shape = (step.capacity, step.width)
        self.made = meetings.tensor(bound.made, shape, self.made_element)
        self.landed = meetings.tensor(bound.rows, shape, self.element)
        super().__init__(exchange, block)

    def dispatch(self, number: int) -> None:
        if number >= self.rounds:
            return
        sizes, places = self.traffic(number)
        block = self.block
        x = self.meetings.tensor(self.bound.x, (block.tokens, block.width), self.element)
        rows = x[self._index(self.token[places])]
        self.going[number] = self._swapped(self.exchange.out, rows, sizes)

    def hand_over(self, number: int, own: np.ndarray, routed: Routed) -> None:
        going = self.going.pop(number)
        self.landed[: len(own)] = self._arrived(self.exchange.out, self.landed.dtype, *going)
        if number >= 2:
            self.meetings.settle()  # the slots of two rounds ago are on their way until then
        shape = (self.block.capacity,)
        slots = self.exchange.memory(f"slots{number % 2}", shape, np.dtype(np.int64))
        slots[: len(own)] = own
        routed.slots_of = slots.ctypes.data

    def combine(self, number: int) -> None:
        sizes, places = self.traffic(number)
        form, made = self.exchange.back, self.made[: int(sizes[:, self.me].sum())]
        if is_plain(form, made.element_size()):
            made = made.clone()  # their place is used again before they have left
        self.coming[number] = (*self._swapped(form, made, sizes.T), places)

    def finish(self, number: int) -> None:
        *swapped, places = self.coming.pop(number)
        rows = self._arrived(self.exchange.back, self.made.dtype, *swapped)
        if len(places):
            shape = (len(self.experts), self.block.width)
            result = self.meetings.tensor(self.bound.result, shape, self.made_element)
            result[self._index(places)] = rows

    def _swapped(self, form: str, rows: Any, sizes: np.ndarray) -> tuple[Any, Any, Any]:
        """Start sending rows; return what to wait for, what comes, and what has to stay."""
        sent = encode(form, rows)
        here, away = sizes[:, self.me].tolist(), sizes[self.me].tolist()
        self.exchange.sent_bytes += (sum(away) - away[self.me]) * sent.shape[1]
        came = sent.new_empty((sum(here), sent.shape[1]))
        return self.meetings.swapped("ep", came, sent, here, away), came, sent

    def _arrived(self, form: str, dtype: Any, work: Any, came: Any, _: Any) -> Any:
        self.ranks.wait([work], EXCHANGE)
        return decode(form, came, dtype)

    def _index(self, places: np.ndarray) -> Any:
        """Return numbers on the device, which need not have arrived yet."""
        import torch

        index = torch.from_numpy(np.ascontiguousarray(places))
        device = self.made.device
        return index if device == index.device else index.pin_memory().to(device, non_blocking=True)


def _add(parts: Any, out: Any) -> None:
    """Put the sum over the first dimension into `out`; bf16 is rounded once, at the end."""
    import torch

    if parts.dtype == torch.bfloat16 and len(parts) > 2:
        parts = parts.float()
    total = torch.add(parts[0], parts[1])
    for other in parts[2:]:
        total += other
    out.copy_(total)
