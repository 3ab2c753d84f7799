"""Ahead-of-time compiling: jobs in, machine code out, by Triton in processes of its own.

Triton may abort or hang on a kernel, so that it never runs in this process. What was compiled once
is taken from the cache, without starting anything; jobs that are alike are compiled once.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ... import knobs
from ...errors import DiluError
from ...runtime.progress import Progress, silent
from ..cache import cache_key, cached, find_cached
from ..target import Gpu, Target
from .installations import installation

_SECONDS = 300.0  # after which a job counts as lost
_WORKER = Path(__file__).with_name("worker.py")
_FORMAT = "1"  # of cache entries
_FIRST_LINES = 12


@dataclass(frozen=True)
class Job:
    """A function of a module and how to compile it.

    `signature` has the run-time arguments in order, by Triton's names of types; `constants` the
    others. `aligned` are the pointers that are multiples of 16. `what` is what an error calls it.
    """

    name: str
    function: str
    source: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | bool | str], ...] = ()
    aligned: frozenset[str] = frozenset()
    warps: int = 4
    stages: int = 3
    what: str = ""
    requires_matrix: bool = False


@dataclass(frozen=True)
class Binary:
    """Machine code and what it takes. `text`: assembly that drivers compile, where there is such.

    `spills`: bytes of local memory of a thread. `scratch_pointers`: hidden arguments after the
    others. `instructions`: how often each matrix instruction of the target stands in the code.
    """

    code: bytes
    text: bytes
    symbol: str
    threads: int
    shared: int
    registers: int | None
    spills: int | None
    scratch_pointers: int
    instructions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a job has no machine code. `stage`: which of Triton's it failed in, "" before all."""

    job: Job
    reason: str
    stage: str = ""


def compile_jobs(
    jobs: Sequence[Job], target: Target, *, progress: Progress = silent, workers: int | None = None
) -> list[Binary | Failure]:
    """Return the outcome of every job, in order; raise DiluError where Triton is missing."""
    assert target.gpu is not None
    folder, version = installation(target)
    keys = [_key(job, target.gpu, version) for job in jobs]
    found: dict[str, Binary | Failure] = {}
    for key in dict.fromkeys(keys):
        data = find_cached(key, ".kernel")
        if data is not None:
            found[key] = _unpacked(data)
    left = {key: job for key, job in zip(keys, jobs, strict=True) if key not in found}
    if left:
        _Pool(target.gpu, folder, progress, f"compile kernels for {target.name}").run(
            left, found, min(workers or os.cpu_count() or 1, len(left))
        )
    return [_judged(job, found[key], target) for job, key in zip(jobs, keys, strict=True)]


def _judged(job: Job, outcome: Binary | Failure, target: Target) -> Binary | Failure:
    """Refuse machine code that the target cannot run, or that lacks what it was made for."""
    assert target.gpu is not None
    if isinstance(outcome, Failure):
        return replace(outcome, job=job)
    if outcome.shared > target.gpu.shared:
        return Failure(job, f"{outcome.shared} bytes of shared memory, of {target.gpu.shared}")
    if job.requires_matrix and target.gpu.matrix and not outcome.instructions:
        wanted = " or ".join(target.gpu.matrix)
        return Failure(job, f"no matrix instructions ({wanted}) in its machine code")
    return outcome


def raise_failure(failure: Failure, target: Target) -> None:
    """Raise the DiluError of a kernel that no variant of compiles."""
    job = failure.job
    kept = Path(tempfile.gettempdir(), f"dilu-failed-{cache_key([job.source, job.name])[:16]}.py")
    kept.write_text(job.source)
    lines = [line for line in failure.reason.strip().splitlines() if line.strip()]
    raise DiluError(
        f"the {job.what or job.name} does not compile for {target.name}:\n"
        + "\n".join(lines[:_FIRST_LINES]),
        hint=f"the source was kept as {kept}",
    )


# --------------------------------------------------------------------------------- cache


def _key(job: Job, gpu: Gpu, version: str) -> str:
    described = asdict(job) | {"name": "", "what": "", "aligned": sorted(job.aligned)}
    del described["source"], described["requires_matrix"]
    device = [gpu.backend, gpu.arch, gpu.warp, *gpu.matrix]
    parts = [_FORMAT, version, json.dumps(device), json.dumps(described), job.source]
    own = [gpu.toolkit, *gpu.code]
    return cache_key(parts + own if any(own) else parts)


def _packed(header: dict[str, Any], code: bytes, text: bytes) -> bytes:
    head = json.dumps({**header, "code": len(code)}).encode()
    return len(head).to_bytes(8, "little") + head + code + text


def _unpacked(data: bytes) -> Binary:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    size = header.pop("code")
    return Binary(code=data[start : start + size], text=data[start + size :], **header)


# ------------------------------------------------------------------------------- workers


class _Pool:
    """Processes that compile, a thread of this one talking to each."""

    def __init__(self, gpu: Gpu, folder: Path | None, progress: Progress, text: str) -> None:
        self.gpu = gpu
        self.folder = folder
        self.progress = progress
        self.text = text
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False

    def run(self, jobs: dict[str, Job], found: dict[str, Binary | Failure], workers: int) -> None:
        """Compile all jobs into `found`; whatever interrupts this ends the processes."""
        waiting: queue.SimpleQueue[tuple[str, Job]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, Binary | Failure | BaseException]] = queue.SimpleQueue()
        for item in jobs.items():
            waiting.put(item)
        with tempfile.TemporaryDirectory(prefix="dilu-") as scratch:
            threads = [
                threading.Thread(target=self._serve, args=(waiting, done, scratch), daemon=True)
                for _ in range(workers)
            ]
            try:
                for thread in threads:
                    thread.start()
                for count in range(len(jobs)):
                    self.progress(self.text, count, len(jobs))
                    key, outcome = done.get()
                    if isinstance(outcome, BaseException):
                        raise outcome
                    found[key] = outcome
            finally:
                self.stopped = True
                for process in self.processes:
                    process.kill()
                for thread in threads:
                    thread.join(timeout=5)

    def _serve(
        self,
        waiting: queue.SimpleQueue[tuple[str, Job]],
        done: queue.SimpleQueue[tuple[str, Binary | Failure | BaseException]],
        scratch: str,
    ) -> None:
        process: subprocess.Popen[str] | None = None
        while not self.stopped:
            try:
                key, job = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                if process is None or process.poll() is not None:
                    process = self._started(scratch)
                done.put((key, self._compiled(process, key, job, Path(scratch))))
            except BaseException as error:
                done.put((key, error))

    def _started(self, scratch: str) -> subprocess.Popen[str]:
        environment = knobs.inherited(
            TRITON_CACHE_DIR=f"{scratch}/cache",
            TRITON_HOME=scratch,
            TRITON_DISABLE_LINE_INFO="1",
            TRITON_INTERPRET=None,
            PYTHONPATH=None if self.folder is None else str(self.folder),
        )
        with open(f"{scratch}/messages", "a") as messages:
            process = subprocess.Popen(
                [sys.executable, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=messages, text=True, env=environment,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def _compiled(
        self, process: subprocess.Popen[str], key: str, job: Job, scratch: Path
    ) -> Binary | Failure:
        path = scratch / f"{key[:32]}.py"
        path.write_text(job.source)
        request = {
            "id": key, "path": str(path), "function": job.function, "signature": job.signature,
            "constants": job.constants, "aligned": sorted(job.aligned), "warps": job.warps,
            "stages": job.stages, "backend": self.gpu.backend, "arch": self.gpu.arch,
            "warp": self.gpu.warp, "matrix": self.gpu.matrix,
            "keep": self.gpu.kept,
        }  # fmt: skip
        reply = _asked(process, json.dumps(request))
        if reply is None:
            process.kill()
            process.wait()  # so that the next job sees that it is gone
            return Failure(job, "Triton aborted or took too long")
        outcome = json.loads(reply)
        if "error" in outcome:
            return Failure(job, outcome["error"], outcome["stage"])
        return self._kept(key, job, outcome)

    def _kept(self, key: str, job: Job, outcome: dict[str, Any]) -> Binary:
        """Put an outcome into the cache."""
        files = {kind: Path(path).read_bytes() for kind, path in outcome["files"].items()}
        code, *texts = (files[kind] for kind in self.gpu.kept)
        header = {name: outcome[name] for name in _HEADER}
        header["scratch_pointers"] = outcome["parameters"] - len(job.signature)
        data = cached(key, ".kernel", lambda: _packed(header, code, b"".join(texts[:1])))
        return _unpacked(data)


_HEADER = ("symbol", "threads", "shared", "registers", "spills", "instructions")


def _asked(process: subprocess.Popen[str], request: str) -> str | None:
    """Return a worker's reply, None where it ended or took too long."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(_SECONDS, process.kill)
    timer.start()
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        return process.stdout.readline() or None
    except (BrokenPipeError, OSError):
        return None
    finally:
        timer.cancel()
