"""Processes that begin with torch imported, which takes seconds, by forks of one that has it.

    process = Forked(function, arguments, environment, folder / "errors")

Of `subprocess.Popen`, what tests use. Unlike a process started anew, one ends without finalizing
the interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any


def _context() -> Any:
    """Return what starts processes. The one they are forked from has one thread, as it must."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "dilu.runtime.session", "pytest"])
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return context


def _run(
    function: Callable[..., None], arguments: Sequence[str], environment: Mapping[str, str], to: str
) -> None:
    file = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
    sys.stdout.flush()


class Forked:
    """A process that calls `function(*arguments)` in an environment. What it writes is errors."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        errors: Path,
    ) -> None:
        self.errors = errors
        given = (function, arguments, dict(environment), str(errors))
        self.process = _context().Process(target=_run, args=given, daemon=True)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return nothing, and what was written."""
        self.wait(timeout)
        return "", self.errors.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
