"""What a plan says, as text for people and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .simulate import PARTS, Estimate, Timing

if TYPE_CHECKING:
    from .plan import Plan

_SHOWN = 8  # meshes in the table


def plan_text(plan: Plan) -> str:
    """Return the answer: does it fit, on which mesh, how fast, what limits it."""
    parts = [_head(plan), _answer(plan), _meshes(plan)]
    shown = plan.best or (plan.estimates[0] if plan.estimates else None)
    if shown is not None:
        parts += [_memory(shown), _where(shown)]
    parts += [_batches(plan.batches), _scaling(plan)]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    cluster, demand = plan.cluster, plan.demand
    joined = ", ".join(f"{level.count} in a {level.name}" for level in cluster.levels)
    return (
        f"{plan.name}: {_large(plan.parameters)} parameters, computed in {plan.dtype}\n"
        f"{cluster.name}: {cluster.size} × {cluster.device.name}, "
        f"{amount(cluster.device.memory)} and {cluster.device.bandwidth / 1e9:,.0f} GB/s each"
        + (f" ({joined})" if joined else "")
        + f"\n{demand.batch:,} sequences of {demand.context:,} tokens, "
        f"{demand.prompt:,} of them the prompt"
    )


def _answer(plan: Plan) -> str:
    best = plan.best
    if best is not None:
        options = f"--mesh {best.mesh}" + (f" --replicas {best.replicas}" if best.replicas else "")
        least = next((devices for devices, each in plan.scaling if each is not None), None)
        few = "1 device is" if least == 1 else f"{least or 0:,} devices are"
        smallest = f"; of the parts tried, {few} enough" if least else ""
        return f"fits: {options}{smallest}"
    if not plan.estimates:
        return "does not fit: no mesh divides the model among these devices"
    nearest = min(plan.estimates, key=lambda e: sum(e.memory.values()))
    needed = sum(nearest.memory.values())
    return (
        f"does not fit: the least is {amount(needed)} on each device, with {nearest.mesh}; "
        f"they have {amount(plan.cluster.device.memory)}"
    )


def _meshes(plan: Plan) -> str:
    rows = [["mesh", "memory", "decode", "a sequence", "all", "prefill", "limited by"]]
    for e in plan.estimates[:_SHOWN]:
        mesh = str(e.mesh) + (f" +{e.replicas}" if e.replicas else "")
        memory = amount(sum(e.memory.values()))
        if not e.fits:
            rows.append([mesh, memory, "does not fit", "", "", "", ""])
            continue
        rows.append(
            [
                mesh, memory, _seconds(e.decode.seconds), _rate(1 / e.decode.seconds),
                _rate(e.decode_rate), _rate(e.prefill_rate), e.decode.limit,
            ]
        )  # fmt: skip
    return _table("meshes (+n: n copies of experts; memory is of a rank; rates are tokens/s)", rows)


def _memory(e: Estimate) -> str:
    shares = ", ".join(f"{name} {amount(size)}" for name, size in e.memory.items())
    return f"a rank's memory with {e.mesh}: {shares}"


def _where(e: Estimate) -> str:
    rows = [["", *PARTS, "all"]]
    for name, times, parts in e.decode.layers:
        label = f"{name} ×{times}" if times > 1 else name
        rows.append([label, *_parts(parts), _seconds(sum(parts.values()))])
    rows.append(["a step", *_parts(e.decode.parts), _seconds(e.decode.seconds)])
    rows.append(["", *_shares(e.decode), ""])
    return _table(f"where the time of a decode step goes with {e.mesh} (a layer, and all)", rows)


def _parts(parts: Any) -> list[str]:
    return [_seconds(parts[p]) for p in PARTS]


def _shares(timing: Timing) -> list[str]:
    return [f"{timing.parts[p] / timing.seconds:.0%}" for p in PARTS]


def _batches(batches: Sequence[Estimate]) -> str:
    rows = [["sequences", "decode", "a sequence", "all", "limited by"]]
    rows += [
        [f"{e.demand.batch:,}", _seconds(e.decode.seconds), _rate(1 / e.decode.seconds),
         _rate(e.decode_rate), e.decode.limit]
        for e in batches
    ]  # fmt: skip
    if not batches:
        return ""
    return _table(f"by sequences at once, as many as fit, with {batches[0].mesh}", rows)


def _scaling(plan: Plan) -> str:
    if len(plan.scaling) < 2:
        return ""
    rows = [["devices", "mesh", "all", "for each device"]]
    for devices, e in plan.scaling:
        if e is None:
            rows.append([f"{devices:,}", "does not fit", "", ""])
        else:
            each = _rate(e.decode_rate / devices)
            rows.append([f"{devices:,}", str(e.mesh), _rate(e.decode_rate), each])
    return _table(f"by devices, for {plan.demand.batch:,} sequences", rows)


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def amount(size: float) -> str:
    """Return bytes for people, in powers of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return (
                f"{size / unit:,.2f} {name}" if size < 10 * unit else f"{size / unit:,.1f} {name}"
            )
    return f"{size / 1e3:,.1f} kB"


def _seconds(value: float) -> str:
    if value == 0:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _large(number: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


# ---------------------------------------------------------------------------------- as data


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as what JSON can hold; seconds, bytes, tokens per second."""
    return {
        "model": plan.name,
        "parameters": plan.parameters,
        "dtype": plan.dtype,
        "cluster": plan.cluster.name,
        "devices": plan.cluster.size,
        "fits": plan.best is not None,
        "meshes": [_data(e) for e in plan.estimates],
        "batches": [_data(e) for e in plan.batches],
        "scaling": [
            {"devices": devices, "best": None if e is None else _data(e)}
            for devices, e in plan.scaling
        ],
    }


def _data(e: Estimate) -> dict[str, Any]:
    return {
        "mesh": str(e.mesh),
        "replicas": e.replicas,
        "fits": e.fits,
        "batch": e.demand.batch,
        "context": e.demand.context,
        "prompt": e.demand.prompt,
        "memory": dict(e.memory),
        "decode_seconds": e.decode.seconds,
        "decode_parts": dict(e.decode.parts),
        "decode_tokens_per_second": e.decode_rate,
        "prefill_seconds": e.prefill.seconds,
        "prefill_tokens_per_second": e.prefill_rate,
        "limit": e.decode.limit,
    }
