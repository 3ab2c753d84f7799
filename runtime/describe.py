"""What an artifact holds, as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, cast

from ..errors import DiluError
from .artifact.artifact import Artifact
from .artifact.bundle import piece_bytes
from .artifact.expression import evaluate, symbols
from .artifact.manifest import CpuTargetEntry, KernelEntry, TargetEntry, ValueEntry
from .artifact.weights import megabytes
from .call.batch import PREFILL_TOKENS
from .call.function import describe
from .cpu.features import architecture
from .machine import available_memory, physical_cores, resident_memory
from .notes import notes_of
from .session import nominal_sizes
from .targets import is_gpu, obstacle
from .text_table import table

if TYPE_CHECKING:
    from .session import Session
    from .text.generate import Statistics


def describe_artifact(artifact: Artifact) -> str:
    """Return an overview: functions, targets, weights, memory plan, passes."""
    parts = [
        _head(artifact),
        _functions(artifact),
        _targets(artifact),
        *_gpu_kernels(artifact),
        _weights(artifact),
        _memory(artifact),
        _passes(artifact),
    ]
    return "\n\n".join(part for part in parts if part)


def stage_text(artifact: Artifact, stage: str) -> str:
    """Return the IR of a stage."""
    name = f"graph/{stage}.txt"
    if name not in artifact.files:
        order = dict.fromkeys(["captured", *(p["stage"] for p in artifact.manifest["passes"])])
        stages = [s for s in order if f"graph/{s}.txt" in artifact.files]
        raise DiluError(f"there is no stage {stage!r}", hint=f"stages: {', '.join(stages)}")
    return artifact.read(name).decode()


def kernel_text(artifact: Artifact, name: str, target: str | None = None) -> str:
    """Return the source of a kernel, by its name or the beginning of it."""
    chosen, kernel = find_kernel(artifact, name, target)
    assert kernel["lines"] is not None
    first, last = kernel["lines"]
    lines = artifact.read(artifact.targets[chosen]["source"]).decode().splitlines()
    return "\n".join(lines[first - 1 : last]) + "\n"


def find_kernel(
    artifact: Artifact, name: str, target: str | None = None
) -> tuple[str, KernelEntry]:
    """Return the target and the entry of a kernel, by its name or the beginning of it; of the first
    target that has it, unless one is given."""
    if target is not None and target not in artifact.targets:
        raise DiluError(
            f"there is no target {target!r}", hint=f"targets: {', '.join(artifact.targets)}"
        )
    for chosen in [target] if target else artifact.targets:
        kernels = {k["name"]: k for k in artifact.targets[chosen]["kernels"]}
        matches = [kernels[name]] if name in kernels else _starting(kernels, name)
        if len(matches) == 1 and matches[0]["lines"]:
            return chosen, matches[0]
    known = [k["name"] for entry in artifact.targets.values() for k in entry["kernels"]]
    near = [k for k in dict.fromkeys(known) if name in k] or list(dict.fromkeys(known))
    raise DiluError(f"there is no one kernel {name!r}", hint=f"kernels: {', '.join(near)}")


def describe_run(statistics: Statistics, session: Session) -> str:
    """Return what a run did, in one line."""
    parts = [f"prompt {statistics.prompt_tokens} tokens, {statistics.prompt_rate:.1f} tok/s"]
    if statistics.first_token_seconds is not None:
        parts.append(f"first token after {statistics.first_token_seconds:.3f} s")
    parts.append(f"{statistics.new_tokens} new tokens, {statistics.decode_rate:.1f} tok/s")
    resident = resident_memory()
    if resident is not None:
        own = f"{megabytes(resident[1])} without mapped files"
        parts.append(f"{megabytes(resident[0])} resident ({own})")
    parts.append(f"{session.target} on {session.place}")
    return "; ".join(parts)


def _starting(kernels: dict[str, KernelEntry], name: str) -> list[KernelEntry]:
    return [kernel for key, kernel in kernels.items() if key.startswith(name)]


def _head(artifact: Artifact) -> str:
    manifest, options = artifact.manifest, artifact.manifest["options"]
    lines = [f"{artifact.name}: format {manifest['format']}, made by dilu {manifest['dilu']}"]
    if options.get("source"):
        lines.append(f"  from {options['source']}")
    info = manifest["language_model"]
    if info:
        count = f", {info['parameters'] / 1e6:,.1f}M parameters" if info.get("parameters") else ""
        lines.append(f"  {info['architecture']}{count}, vocabulary of {info['vocab_size']}")
        dtype = f", computes in {info['dtype']}" if info.get("dtype") else ""
        lines.append(
            f"  up to {info['max_positions']} tokens, cache pages of {info['page_size']}{dtype}"
        )
        lines += [f"  note: {note}" for note in notes_of(artifact)]
    return "\n".join(lines)


def _functions(artifact: Artifact) -> str:
    lines = ["functions"]
    for entry in artifact.manifest["functions"]:
        lines.append(f"  {entry['name']}({_values(entry['parameters'])})")
        lines.append(f"    -> {_values(entry['results'])}")
        if entry["states"]:
            lines.append(f"    keeps {_values(entry['states'])}")
    return "\n".join(lines)


def _values(entries: Iterable[ValueEntry]) -> str:
    return ", ".join(f"{e['name']}: {describe(e)}" for e in entries)


def _targets(artifact: Artifact) -> str:
    rows: list[Sequence[str]] = []
    for name, target in artifact.targets.items():
        kinds = Counter(k["kind"] for k in target["kernels"])
        kernels = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        needs = ", ".join(target.get("requires", ())) or "-"
        rows.append((name, f"needs {needs}", kernels, _whether_here(target)))
    return table("targets", rows)


def _whether_here(target: TargetEntry) -> str:
    if not is_gpu(target):
        reason = obstacle(cast(CpuTargetEntry, target))
        return "runs here" if reason is None else f"does not run here: {reason}"
    from .gpu.choose import fit  # only here: most artifacts have no such target
    from .gpu.open_device import find_devices

    devices, _ = find_devices(target["backend"])
    places = [d.info.text for d in devices if fit(target, d.info) is not None]
    for device in devices:
        device.close()
    return f"runs here on {', '.join(places)}" if places else "does not run here: no such device"


def describe_devices() -> str:
    """Return what this machine can run on: its processor and every GPU whose driver answers."""
    from .gpu.open_device import backends, find_devices

    memory = available_memory()
    cores = f"{physical_cores()} cores"
    free = "" if memory is None else f"{megabytes(memory)} free"
    rows: list[Sequence[str]] = [("cpu", architecture(), cores, free, "")]
    missing: list[str] = []
    for backend in backends():
        devices, problem = find_devices(backend)
        if problem is not None:
            missing.append(f"  {problem}")
        for info in (device.info for device in devices):
            driver = f"driver {info.driver}"
            rows.append((info.place, info.name, info.arch, megabytes(info.memory), driver))
        for device in devices:
            device.close()
    return "\n".join([table("devices here", rows), *missing])


def _gpu_kernels(artifact: Artifact) -> list[str]:
    """Show what the kernels of each GPU target were compiled to, those in use without tuning."""
    parts: list[str] = []
    for name, target in artifact.targets.items():
        if not is_gpu(target):
            continue
        from .gpu.program import read_program

        rows: list[Sequence[str]] = [
            ("kernel", "variants", "registers", "spills", "shared memory", "matrix instructions")
        ]
        for kernel in read_program(artifact, name).kernels:
            used = kernel.variants[kernel.default]
            counts = ["?" if n is None else str(n) for n in (used.registers, used.spills)]
            matrix = " ".join(f"{n} {op}" for op, n in used.instructions.items()) or "-"
            shared = megabytes(used.shared) if used.shared else "-"
            rows.append((kernel.name, str(len(kernel.variants)), *counts, shared, matrix))
        parts.append(table(f"kernels of {name}", rows))
    return parts


def _weights(artifact: Artifact) -> str:
    sizes: Counter[str] = Counter()
    pieces: Counter[str] = Counter()
    for constant in artifact.manifest["constants"].values():
        form = constant.get("format") or constant["dtype"]
        count = prod(constant["shape"][: constant["grid"]])
        pieces[form] += count
        sizes[form] += count * piece_bytes(constant)
    if not sizes:
        return "weights\n  none"
    rows = [(form, megabytes(n), f"{pieces[form]} tensors") for form, n in sizes.most_common()]
    rows.append(("all", megabytes(sizes.total()), f"{pieces.total()} tensors"))
    if not artifact.has_weights:
        return table("weights (compiled from a configuration only: none are there)", rows)
    files = artifact.manifest["files"]
    places = [(f.get("absolute") or f["path"], megabytes(f["size"])) for f in files]
    return table("weights", rows) + "\n\n" + table("weight files", places)


def _memory(artifact: Artifact) -> str:
    """Show what the plan needs for a token and for a chunk of a prompt."""
    nominal = nominal_sizes(artifact.manifest["language_model"])
    chunk = nominal.get("T", PREFILL_TOKENS)
    rows: list[Sequence[str]] = []
    for entry in artifact.manifest["functions"]:
        for plan in entry.get("memory", ()):
            slots = plan["slots"]
            names = {s for slot in slots for s in symbols(slot["size"])}
            cases = [{n: nominal.get(n, 1) for n in names} | {"T": t} for t in (1, chunk)]
            one, many = (megabytes(sum(evaluate(s["size"], c) for s in slots)) for c in cases)
            values = sum(slot["values"] for slot in slots)
            times = f" ×{plan['times']}" if plan["times"] > 1 else ""
            size = f"{one}, {many} for T={chunk}" if "T" in names else one
            rows.append((plan["function"] + times, f"{values} values in {len(slots)} slots", size))
    return table("memory plan (working memory of a call; scratch of kernels not counted)", rows)


def _passes(artifact: Artifact) -> str:
    rows = [
        (
            record["stage"],
            record["name"],
            f"{record['nodes_before']} → {record['nodes_after']} nodes",
            f"{record['seconds']:.2f} s",
        )
        for record in artifact.manifest["passes"]
    ]
    return table("passes", rows) if rows else ""
