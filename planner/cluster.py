"""Clusters: a kind of device, and how devices are joined, level by level; read from YAML.

    name: three machines of eight A800
    device:
      name: A800-40G
      memory: 40 GB
      bandwidth: 1555 GB/s           # of its memory
      compute: {f32: 19.5 TFLOP/s, bf16: 312 TFLOP/s}
    levels:                          # from the inside out
      - {name: machine, count: 8, bandwidth: 200 GB/s, latency: 3 us}
      - {name: network, count: 3, bandwidth: 25 GB/s, latency: 10 us}

A device is what one rank runs on. A level joins `count` of the units below it; its `bandwidth` is
what each device can send through it while all devices do. Units are of powers of 1000.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DiluError, Loc

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}
_QUANTITY = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*")
_UNITS = {"B": "40 GB", "B/s": "900 GB/s", "FLOP/s": "312 TFLOP/s", "s": "3 us"}


@dataclass(frozen=True)
class Device:
    """What one rank runs on. Bytes, bytes/s, FLOP/s and seconds.

    `reach` and `efficiency` are the shares of `bandwidth` and `compute` that kernels get to;
    `kernel` is what starting one costs, `step` what a step costs beside its kernels. `products`,
    where measured, are the seconds that a weight takes in a product of some rows: (rows, seconds).
    """

    name: str
    memory: float
    bandwidth: float
    compute: dict[str, float]
    reach: float = 0.8
    efficiency: float = 0.3
    kernel: float = 3e-6
    step: float = 1e-4
    products: tuple[tuple[float, float], ...] = ()

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s that products of activations of a type reach."""
        found = self.compute.get(dtype, 0.0)
        if dtype == "f32":  # two 16-bit operands on matrix instructions, where there are some
            found = max(found, self.compute.get("bf16", 0.0) / 2)
        if not found:
            has = ", ".join(self.compute)
            raise DiluError(
                f"{self.name} has no rate for {dtype}, only for {has}",
                hint=f"add it to the device's compute, or give --dtype {has}",
            )
        return found * self.efficiency

    def product_seconds(self, weights: float, nbytes: float, rows: float, dtype: str) -> float:
        """Return the seconds for `rows` rows (of each matrix) times weights of `nbytes`."""
        if weights <= 0 or rows <= 0:
            return 0.0
        if self.products:
            at, seconds = zip(*self.products, strict=True)
            if rows >= at[-1]:
                return weights * seconds[-1] * rows / at[-1]
            per_weight = np.exp(np.interp(np.log(max(rows, 1)), np.log(at), np.log(seconds)))
            return weights * float(per_weight)
        return max(nbytes / (self.bandwidth * self.reach), 2 * weights * rows / self.rate(dtype))

    def seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """Return the seconds for other work: the larger of what reading and computing take."""
        return max(nbytes / (self.bandwidth * self.reach), flops / self.rate(dtype))


@dataclass(frozen=True)
class Level:
    """How `count` units are joined: bytes/s for each device, and seconds for a message."""

    name: str
    count: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Devices, numbered so that neighbours share the innermost units."""

    name: str
    device: Device
    levels: tuple[Level, ...] = ()
    source: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        return prod(level.count for level in self.levels)

    def spread(self, ranks: int, stride: int) -> list[tuple[Level, int]]:
        """Return, for every level that a group of ranks crosses, how many peers of a rank lie
        beyond the units below it. The group's ranks are `stride` devices apart."""
        found: list[tuple[Level, int]] = []
        inside, below = 1, 1
        for level in self.levels:
            below *= level.count
            together = min(ranks, max(1, below // stride))
            if together > inside:
                found.append((level, together - inside))
                inside = together
        return found

    def levels_of(self, ranks: int, stride: int) -> tuple[int, ...]:
        """Return how a group of ranks lies in the levels, from the outside in, such as 4 machines
        of 8; one level where they do not divide evenly. Raises DiluError for more ranks than the
        cluster has devices for."""
        if ranks * stride > self.size:
            raise DiluError(
                f"{ranks * stride} ranks are more than the {self.size} devices of {self.name}",
                Loc(self.source) if self.source else None,
                hint="give a smaller --mesh, or another cluster",
            )
        found: list[int] = []
        inside = 1
        for _, peers in self.spread(ranks, stride):
            times, left = divmod(inside + peers, inside)
            if left:
                return (ranks,)
            found.insert(0, times)
            inside += peers
        return tuple(found) or (ranks,)

    def all_to_all(self, ranks: int, stride: int, nbytes: float) -> float:
        """Return the seconds in which every rank of a group sends `nbytes` in all, to all alike.

        Data for other units go once through every level on their way, all levels at once; the
        messages of a level follow each other at a tenth of its latency.
        """
        crossing, slowest, waiting = 0.0, 0.0, 0.0
        for level, peers in reversed(self.spread(ranks, stride)):
            crossing += nbytes * peers / max(1, ranks - 1)
            slowest = max(slowest, crossing / level.bandwidth)
            messages = min(peers, level.count - 1)  # hierarchical: one for each unit
            waiting += level.latency * (1 + 0.1 * (messages - 1))
        return slowest + waiting

    def all_reduce(self, ranks: int, stride: int, nbytes: float) -> float:
        """Return the seconds of a sum over a group: of parts, level by level, or of all that every
        rank has, which takes one step instead of two."""
        total, left, inside = 0.0, nbytes, 1
        for level, peers in self.spread(ranks, stride):
            units = (inside + peers) / inside
            total += 2 * (left * (1 - 1 / units) / level.bandwidth + level.latency)
            left, inside = left / units, inside + peers
        return min(total, self.all_gather(ranks, stride, nbytes))

    def all_gather(self, ranks: int, stride: int, nbytes: float) -> float:
        """Return the seconds in which every rank gets the `nbytes` of every other."""
        return sum(
            nbytes * peers / level.bandwidth + level.latency
            for level, peers in self.spread(ranks, stride)
        )


# ----------------------------------------------------------------------------------- reading


def read_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read a cluster; raise DiluError for what is none, naming the field."""
    import yaml

    file = Path(path)
    try:
        content: Any = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise DiluError(f"cannot read the cluster: {error.strerror}", Loc(str(file))) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise DiluError(f"not YAML: {text}", Loc(str(file))) from None
    read = _Reader(str(file))
    top = read.mapping(content, "", required=("device",), optional=("name", "levels"))
    device = _device(read, top["device"])
    levels = top.get("levels", [])
    if not isinstance(levels, list):
        raise read.error("levels", "is no list of levels")
    return Cluster(
        str(top.get("name", file.stem)),
        device,
        tuple(_level(read, level, f"levels[{i}]") for i, level in enumerate(levels)),
        str(file),
    )


def _device(read: _Reader, content: Any) -> Device:
    known = {f.name for f in fields(Device)}
    required = ("name", "memory", "bandwidth", "compute")
    found = read.mapping(content, "device", required, tuple(sorted(known - set(required))))
    rates = read.mapping(found["compute"], "device.compute", (), ("f32", "bf16"))
    if not rates:
        raise read.error("device.compute", "names no rate; give {f32: …, bf16: …}")
    device = Device(
        str(found["name"]),
        read.quantity(found["memory"], "device.memory", "B"),
        read.quantity(found["bandwidth"], "device.bandwidth", "B/s"),
        {k: read.quantity(v, f"device.compute.{k}", "FLOP/s") for k, v in rates.items()},
    )
    changes: dict[str, Any] = {}
    for name in ("kernel", "step"):
        if name in found:
            changes[name] = read.quantity(found[name], f"device.{name}", "s", zero=True)
    for name in ("reach", "efficiency"):
        if name in found:
            changes[name] = read.share(found[name], f"device.{name}")
    if "products" in found:
        changes["products"] = _products(read, found["products"])
    return replace(device, **changes)


def _products(read: _Reader, content: Any) -> tuple[tuple[float, float], ...]:
    where = "device.products"
    if not isinstance(content, dict) or not content:
        raise read.error(where, "is no mapping of rows to seconds per weight, such as {1: 0.05 ns}")
    pairs = [
        (read.count(rows, f"{where}: rows"), read.quantity(seconds, f"{where}[{rows}]", "s"))
        for rows, seconds in content.items()
    ]
    return tuple(sorted((float(rows), seconds) for rows, seconds in pairs))


def _level(read: _Reader, content: Any, where: str) -> Level:
    found = read.mapping(content, where, ("name", "count", "bandwidth", "latency"))
    return Level(
        str(found["name"]),
        read.count(found["count"], f"{where}.count"),
        read.quantity(found["bandwidth"], f"{where}.bandwidth", "B/s"),
        read.quantity(found["latency"], f"{where}.latency", "s", zero=True),
    )


@dataclass(frozen=True)
class _Reader:
    """Checks what a file holds, field by field."""

    file: str

    def error(self, where: str, what: str) -> DiluError:
        return DiluError(
            f"{where or 'the cluster'} {what}", Loc(self.file), hint="docs/plan.md shows a cluster"
        )

    def mapping(
        self, content: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise self.error(where, "is no mapping")
        at = f"{where}." if where else ""
        for name in required:
            if name not in content:
                raise self.error(f"{at}{name}", "is missing")
        for name in content:
            if name not in (*required, *optional):
                raise self.error(
                    f"{at}{name}", "is unknown; known are " + ", ".join((*required, *optional))
                )
        return content

    def count(self, content: Any, where: str) -> int:
        if not isinstance(content, int) or isinstance(content, bool) or content < 1:
            raise self.error(where, f"is no number from 1 on: {content!r}")
        return content

    def share(self, content: Any, where: str) -> float:
        if not isinstance(content, (int, float)) or not 0 < content <= 1:
            raise self.error(where, f"is no share between 0 and 1: {content!r}")
        return float(content)

    def quantity(self, content: Any, where: str, unit: str, *, zero: bool = False) -> float:
        match = _QUANTITY.fullmatch(str(content))
        prefixes = _SMALL if unit == "s" else _PREFIXES
        number = 0.0
        known = match is not None and match[2].endswith(unit)
        if match is not None and known:
            try:
                number = float(match[1]) * prefixes[match[2].removesuffix(unit)]
            except (ValueError, KeyError):
                known = False
        if not known or (number <= 0 and not zero):
            raise self.error(
                where, f"is {content!r}; give a number with its unit, such as {_UNITS[unit]}"
            )
        return number


# ----------------------------------------------------------------------------------- writing


def cluster_text(cluster: Cluster) -> str:
    """Return the YAML of a cluster: `read_cluster` of it gives the cluster back, rounded."""
    import yaml

    device = cluster.device
    described: dict[str, Any] = {
        "name": device.name,
        "memory": _shown(device.memory, "B"),
        "bandwidth": _shown(device.bandwidth, "B/s"),
        "compute": {dtype: _shown(rate, "FLOP/s") for dtype, rate in device.compute.items()},
        "reach": round(device.reach, 4),
        "efficiency": round(device.efficiency, 4),
        "kernel": f"{device.kernel * 1e6:.4g} us",
        "step": f"{device.step * 1e6:.4g} us",
    }
    if device.products:
        described["products"] = {int(n): f"{s * 1e9:.4g} ns" for n, s in device.products}
    levels = [
        {
            "name": level.name,
            "count": level.count,
            "bandwidth": _shown(level.bandwidth, "B/s"),
            "latency": f"{level.latency * 1e6:.4g} us",
        }
        for level in cluster.levels
    ]
    content = {"name": cluster.name, "device": described, "levels": levels}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _shown(value: float, unit: str) -> str:
    for prefix in ("T", "G", "M"):
        if value >= _PREFIXES[prefix]:
            return f"{value / _PREFIXES[prefix]:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"
