"""Whether the device computes right: the tests that else run under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dilu
from dilu.runtime.gpu.device import Device
from dilu.runtime.gpu.open_device import open_device

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("Return the", "The function", "If the argument")
TOKENS = 48


def open_tested(options: Any) -> Device:
    """Open the device that is tested: the interpreter's where there is no other."""
    if options.interpret:
        from interpreted import InterpretedDevice

        return InterpretedDevice()
    return open_device(options.device)


class Wrong(Exception):
    """The device computes something else than the reference."""


def check_kernels(target: str, options: Any) -> str:
    """Run every kernel test on the device."""
    return _tests("tests/codegen/triton/test_kernels.py", target, options)


def check_models(target: str, options: Any) -> str:
    """Run the five families on the device."""
    if options.interpret:
        return "not under the interpreter: pytest runs them"
    return _tests("tests/e2e/test_interpreted.py", target, options)


def check_bundled(target: str, options: Any) -> str:
    """Compare the bundled model with the CPU target, token by token."""
    artifact = ROOT / "build" / f"stdlib-moe-{target.replace(':', '-')}.dilu"
    if not artifact.exists():
        dilu.compile(ROOT / "examples" / "stdlib-moe", target=["cpu", target]).save(artifact)
    tokens = 4 if options.interpret else TOKENS
    with (
        dilu.load(artifact, device="cpu") as cpu,
        dilu.load(artifact, target=target, device=open_tested(options)) as gpu,
    ):
        for prompt in PROMPTS:
            want, got = (s.generate(prompt, max_tokens=tokens, temperature=0.0) for s in (cpu, gpu))
            if want != got:
                raise Wrong(f"{target} writes {got!r} where the CPU writes {want!r}")
    return f"{len(PROMPTS)} texts of {tokens} tokens equal to the CPU's"


def _tests(file: str, target: str, options: Any) -> str:
    environment = dict(os.environ)
    if not options.interpret:
        environment |= {"DILU_TEST_DEVICE": options.device, "DILU_TEST_TARGET": target}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / file)]
    if importlib.util.find_spec("xdist"):  # tests compile more than they compute
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    print(f"{file} on {target}: {last}", file=sys.stderr, flush=True)
    if done.returncode:
        raise Wrong(done.stdout[-8000:] + done.stderr[-2000:])
    return re.sub(r" in .*", "", last).strip("= ")
