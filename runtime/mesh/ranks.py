"""The processes that run an artifact together, over torch.distributed: who is who, and agreement.

Processes are started by `torchrun`, or by anything that sets its variables. Ranks lie in a mesh
`dp × ep × tp`, row-major. Torch is imported when the first of several processes connects.

Invariants: every process calls the same methods in the same order; what goes wrong on one rank is
raised on all of them, naming it; nothing waits longer than DILU_TIMEOUT.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any, TypeVar

import numpy as np

from ... import knobs
from ...errors import DiluError
from .hops import TwoHops, sent_rows, worth_two_hops
from .swap import SmallExchange, SmallGather, let_work_go_first, start_swap

AXES = ("dp", "ep", "tp")
#: So many bytes, of all ranks of a group together, are few.
SMALL = 1 << 18
_MOST_KEPT = 64  # different sizes of small messages
_GRACE = 5.0  # seconds in which those that are alive say so after a failure
_T = TypeVar("_T")


class Ranks:
    """This process among those of a mesh."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        import torch.distributed as dist

        self.mesh = dict(mesh)
        self.size = prod(mesh[axis] for axis in AXES)
        self._dist = dist
        _check_world(self.mesh, self.size)
        longest = timedelta(seconds=knobs.TIMEOUT.get())
        if not dist.is_initialized():
            _join(longest)
            atexit.register(_leave)
        self.rank = dist.get_rank()
        self.coordinates = _coordinates(self.rank, self.mesh)
        #: By axis: the ranks that differ from this one along it alone, itself among them.
        self.groups: dict[str, list[int]] = {}
        self._handles: dict[str, Any] = {}
        for axis in ("ep", "tp"):
            for group in _groups(axis, self.mesh, self.size):
                # Every process makes every group; one without a timeout of its own waits long.
                made: Any = None
                if len(group) > 1:
                    made = _connected(partial(dist.new_group, group, timeout=longest))
                if self.rank in group:
                    self.groups[axis], self._handles[axis] = group, made and _backend(made, "cpu")
        self._everyone: Any = _backend(dist.group.WORLD, "cpu")
        self._small: dict[str, dict[Any, Any]] = {axis: {} for axis in self.groups}
        self._failures = 0
        let_work_go_first()
        #: By axis: how many of a group are on each machine, where rows take two hops; else 1.
        self._local = self._hops()

    @property
    def owners(self) -> int:
        """How many parts sequences are divided into."""
        return self.mesh["dp"] * self.mesh["ep"]

    @property
    def owner(self) -> int:
        """The part whose sequences this rank works on."""
        return self.coordinates["dp"] * self.mesh["ep"] + self.coordinates["ep"]

    def _hops(self) -> dict[str, int]:
        each = self.all_gather(np.array([knobs.LOCAL_SIZE.get()], np.int64), "agreement")
        found = dict.fromkeys(self.groups, 1)
        for axis in found:
            apart = prod(self.mesh[a] for a in AXES[AXES.index(axis) + 1 :])
            local, left = divmod(int(each[0, 0]), apart)
            if not left and (each == each[0]).all() and worth_two_hops(self.mesh[axis], local):
                found[axis] = local
        return found

    def on_devices(self, own: tuple[str, str] | None) -> tuple[dict[str, Any], str]:
        """Return the backends, by axis, by which the devices of ranks meet, and in words how they
        meet. `own`: the name of this rank's backend and which device it has; None for none.

        There are none where a rank has no device, or the same as another one.
        """
        each = self.gather(own)
        kinds = {place and place[0] for place in each}
        if len(kinds) > 1 or None in kinds:
            return {}, "ranks meet on the host"
        if len({tuple(place) for place in each}) < self.size:
            return {}, "ranks meet on the host, since some share a device"
        (kind,) = kinds
        device = "cpu" if kind == "gloo" else "cuda"
        made: dict[str, Any] = {}

        def connect() -> None:
            longest = timedelta(seconds=knobs.TIMEOUT.get())
            for axis in self.groups:
                for group in _groups(axis, self.mesh, self.size):
                    if len(group) > 1:
                        found = self._dist.new_group(group, timeout=longest, backend=kind)
                        if self.rank in group:
                            made[axis] = _backend(found, device)

        # Or a process ends where another one does.
        knobs.preset(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
        _connected(connect)
        return made, f"ranks meet on their devices, by {kind}"

    # -- agreement

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank hands in, in their order: values that JSON has."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = self.all_gather(np.array([data.size], np.int64), "agreement")[:, 0]
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: data.size] = data
        rows = self.all_gather(padded, "agreement")
        return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]

    def agreed(self, call: Callable[[], _T]) -> _T:
        """Return what `call` returns; raise on all ranks where it raises DiluError on one."""
        error: DiluError | None = None
        result: Any = None
        try:
            result = call()
        except DiluError as found:
            error = found
        found = self.gather(None if error is None else [error.message, error.hint])
        failed = [rank for rank, told in enumerate(found) if told is not None]
        if failed:
            message, hint = found[failed[0]]
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise DiluError(f"rank {failed[0]}{others}: {message}", hint=hint) from error
        return result

    def require_equal(self, value: str, what: str, hint: str) -> None:
        """Raise DiluError, naming the ranks, where they do not all have the same `value`."""
        values = self.gather(value)
        other = [str(rank) for rank, v in enumerate(values) if v != values[0]]
        if other:
            raise DiluError(
                f"the ranks do not have the same {what}: {', '.join(other)} differ from rank 0",
                hint=hint,
            )

    # -- arrays

    def all_gather(self, array: np.ndarray, what: str) -> np.ndarray:
        """Return `[ranks, …]` of all ranks' arrays of equal shape."""
        return self._gathered(array, self.size, self._everyone, what)

    def gather_along(self, axis: str, array: np.ndarray, what: str) -> np.ndarray:
        """Return `[N, …]` of the arrays, of equal shape, of this rank's group along an axis."""
        count = len(self.groups[axis])
        ready = self.small_gather(axis, (array.nbytes,) * count)
        if ready is None:
            return self._gathered(array, count, self._handles[axis], what)
        turn = self.guarded(partial(ready.meet, array.reshape(-1).view(np.uint8)), what)
        return ready.all[turn].copy().view(array.dtype).reshape(count, *array.shape)

    def small_gather(self, axis: str, sizes: tuple[int, ...]) -> SmallGather | None:
        """Return what gives every rank of this rank's group along an axis the bytes of all, `sizes`
        each, if they are few, and of few different sizes: it stays ready."""
        return self._ready(SmallGather, axis, sizes, sum(sizes))

    def small_exchange(self, axis: str, sizes: tuple[int, ...]) -> SmallExchange | None:
        """Return what gives the n-th rank of a group up to `sizes[n]` bytes of each, likewise."""
        return self._ready(SmallExchange, axis, sizes, len(sizes) * max(sizes))

    def _ready(self, kind: type[_T], axis: str, sizes: tuple[int, ...], total: int) -> _T | None:
        kept = self._small[axis]  # of this axis alone: along it, all make the same in turn
        found = kept.get((kind, sizes))
        if found is None and total <= SMALL and len(kept) < _MOST_KEPT:
            made: Any = kind
            found = kept[kind, sizes] = made(self._handles[axis], sizes, len(kept) + 1)
        return found

    def gather_rows_along(
        self, axis: str, rows: np.ndarray, counts: Sequence[int], what: str
    ) -> np.ndarray:
        """Return the rows, bytes, of this rank's group along an axis, `counts` of each. Few rows
        lie in memory that is used again the next time but one."""
        size = rows.shape[1]
        ready = self.small_gather(axis, tuple(n * size for n in counts))
        if ready is not None:
            turn = self.guarded(partial(ready.meet, rows.reshape(-1)), what)
            return ready.all[turn].reshape(-1, size)
        out = np.empty((sum(counts), size), rows.dtype)
        targets = np.split(out, np.cumsum(counts)[:-1])
        works = self._swapped(self._handles[axis], [rows] * len(targets), targets, what)
        self.wait(works, what)
        return out

    def gather_rows(self, rows: np.ndarray, counts: Sequence[int], what: str) -> list[np.ndarray]:
        """Return the rows of every owner of sequences, `counts` of each."""
        padded = np.zeros((max(counts, default=0), *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        each = self.all_gather(padded, what)
        every = self.size // self.owners
        return [each[owner * every][:count] for owner, count in enumerate(counts)]

    def _gathered(self, array: np.ndarray, count: int, group: Any, what: str) -> np.ndarray:
        out = np.empty((count, *array.shape), array.dtype)
        own = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        parts = list(out.reshape(count, -1).view(np.uint8)) if array.size else []
        self.wait(self._swapped(group, [own] * len(parts), parts, what), what)
        return out

    def all_to_all(
        self, axis: str, out: np.ndarray, sizes: np.ndarray, rows: np.ndarray, what: str
    ) -> list[Any]:
        """Start sending rows among the group along an axis: `sizes[n, m]` of the n-th rank's to the
        m-th, in the order of those they are for, to lie in `out` in the order of those they are
        from. Returns what `wait` takes."""
        group, own = self._handles[axis], self.groups[axis].index(self.rank)
        rows, out = rows.view(np.uint8), out.view(np.uint8)

        def swap(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[Any]:
            return self._swapped(group, sources, targets, what)

        if self._local[axis] > 1:
            return [TwoHops(swap, out, sizes, rows, own, self._local[axis])]
        return swap(
            np.split(rows, np.cumsum(sizes[own])[:-1]), np.split(out, np.cumsum(sizes[:, own])[:-1])
        )

    def sent_rows(self, axis: str, sizes: np.ndarray) -> int:
        """Return how many rows this rank sends to others in such an exchange."""
        return sent_rows(sizes, self.groups[axis].index(self.rank), self._local[axis])

    def wait(self, works: Sequence[Any], what: str) -> None:
        """Wait until what was started is over."""
        for work in works:
            self.guarded(work.wait, what)

    def _swapped(
        self,
        group: Any,
        sources: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        what: str,
    ) -> list[Any]:
        return self.guarded(partial(start_swap, group, sources, targets), what)

    # -- failures

    def guarded(self, call: Callable[[], _T], what: str) -> _T:
        """Return what a collective returns; raise DiluError, naming the ranks that are gone."""
        try:
            return call()
        except RuntimeError as error:  # what torch.distributed raises for whatever happens
            raise self.failure(what, str(error)) from error

    def failure(self, what: str, reason: str = "") -> DiluError:
        """Return the error of a meeting that not all ranks came to, with those that did not; where
        all did, with the reason."""
        lost = self._lost()
        who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        if not lost:
            who = "a rank"
            what += f" ({' '.join(reason.split())})" if reason else ""
        return DiluError(
            f"{who} of {self.size} stopped answering during {what}",
            hint="see what that process printed; start all of them again, with torchrun "
            f"--max-restarts by itself (ranks wait {knobs.TIMEOUT.get()} s, {knobs.TIMEOUT.name})",
        )

    def give_up(self) -> None:
        """Let the process end at its exit, whatever still waits for others."""
        global _given_up
        _given_up = True

    def _lost(self) -> list[int]:
        """Return the ranks that do not report a failure as this one does.

        One that lives may notice a whole DILU_TIMEOUT later, since it waits for others that live.
        The store, which the first rank has, answers or hangs for ever: it is asked by a thread.
        """
        self._failures += 1
        waiting = {rank: f"dilu/failure/{rank}/{self._failures}" for rank in range(self.size)}
        longest = knobs.TIMEOUT.get() + _GRACE
        asking = threading.Thread(target=_report, args=(self.rank, waiting, longest), daemon=True)
        asking.start()
        asking.join(longest + _GRACE)
        return [0] if 0 in waiting and asking.is_alive() else sorted(waiting)


def _report(own: int, waiting: dict[int, str], seconds: float) -> None:
    """Report a failure of this rank, and take those out of `waiting` that do so, too."""
    from torch.distributed import distributed_c10d

    end = time.monotonic() + seconds
    try:
        store: Any = distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        store.set(waiting[own], "1")
        while waiting and time.monotonic() < end:
            for rank in [r for r, key in waiting.items() if store.check([key])]:
                del waiting[rank]
            time.sleep(0.05)
    except Exception:  # the store is lost with the first rank, or that has heard enough
        if 0 in waiting:
            for rank in [r for r in waiting if r]:
                del waiting[rank]


def _join(longest: timedelta) -> None:
    """Connect with the other processes.

    torchrun's own store outlives those that it starts anew, and holds the addresses of those before
    (https://github.com/pytorch/pytorch/issues/135712): what is written there gets a prefix.
    """
    import torch.distributed

    dist: Any = torch.distributed

    def join() -> None:
        store, rank, size = next(dist.rendezvous("env://", timeout=longest))
        store = dist.PrefixStore(f"dilu/{knobs.RESTART.get()}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=longest)

    _connected(join)


def _backend(group: Any, device: str) -> Any:
    import torch

    return group._get_backend(torch.device(device))


def _connected(call: Callable[[], _T]) -> _T:
    try:
        return call()
    except (RuntimeError, ValueError) as error:  # of Gloo, of the store, of a missing variable
        reason = " ".join(str(error).split())
        raise DiluError(
            f"cannot connect with the other processes: {reason}",
            hint="start them with torchrun, on hosts that reach each other "
            "(GLOO_SOCKET_IFNAME names the network to use)",
        ) from error


_given_up = False


def _leave() -> None:
    """End Gloo's threads before the interpreter does: it aborts where one still sends."""
    import torch.distributed as dist

    if _given_up:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    if dist.is_initialized():
        dist.destroy_process_group()


def _check_world(mesh: Mapping[str, int], size: int) -> None:
    world = knobs.WORLD_SIZE.get()
    if world != size:
        axes = ",".join(f"{axis}={mesh[axis]}" for axis in AXES if mesh[axis] > 1)
        raise DiluError(
            f"the artifact was compiled for {size} processes ({axes}), and there are {world}",
            hint=f"start it with torchrun --nproc-per-node {size} -m dilu run …, or compile it "
            "with another --mesh",
        )


def _coordinates(rank: int, mesh: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, mesh[axis])
    return found


def _groups(axis: str, mesh: Mapping[str, int], size: int) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(size):
        others = tuple(v for a, v in _coordinates(rank, mesh).items() if a != axis)
        groups.setdefault(others, []).append(rank)
    return list(groups.values())
