"""A device that has no hardware: Triton's interpreter runs the kernels, on the host's memory.

    artifact = dilu.compile(model, target=…)  # with INTERPRETED among the targets
    dilu.load(artifact, device=InterpretedDevice())

Everything but the machine code is what a GPU gets: source, plans, arguments, arena, padded sizes.
The interpreter computes bf16 wrongly, so operands of products are f32 here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from dilu.codegen.target import Gpu, Target
from dilu.ir.dtypes import BF16, F16, F32, DType
from dilu.runtime.gpu.device import ALIGNMENT, Device, DeviceInfo, KernelCode
from dilu.runtime.gpu.open_device import open_device


def interpreted_target(dot: DType = F32, name: str = "interpreter:0") -> Target:
    gpu = Gpu("interpreter", name.partition(":")[2], 32, 1 << 20, dot, "portable", (), programs=4)
    return Target(
        name, language="triton", executable=False, activations=(F32, BF16, F16), keeps_rows=False,
        copies_weights=True, gpu=gpu,
    )  # fmt: skip


INTERPRETED = interpreted_target()

#: A real device (`cuda:0`) and a target of it (`cuda:80`) that tests use in the interpreter's
#: place, where they are set: benchmarks/gpu/run.py checks hardware with the same tests.
PLACE = os.environ.get("DILU_TEST_DEVICE")
TARGET = os.environ.get("DILU_TEST_TARGET")


def under_test(name: str = INTERPRETED.name) -> tuple[str, Device]:
    """Return the target and the device to test: the interpreter's, unless a real one is set."""
    if PLACE is None or TARGET is None:
        return name, InterpretedDevice(name.partition(":")[2])
    return TARGET, open_device(PLACE)


def bound(interpreted: float) -> float:
    """Return what relative error to allow: a real device's operands are sums of two 16-bit floats
    where the interpreter's are f32."""
    return interpreted if PLACE is None else max(interpreted, 1e-4)


def spare_work() -> None:
    """Leave out two things that take most of the interpreter's time and change nothing: Triton's
    language is patched for each launch, and then anew for every call of a function in it; and
    conditions of overflow are computed, then dropped, since assertions are off (on GPUs, too)."""
    call, builder = interpreter.InterpretedFunction.__call__, interpreter.interpreter_builder
    patched: set[str] = set()

    def of_a_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    assert not builder.options.debug
    interpreter.InterpretedFunction.__call__ = of_a_kernel
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


spare_work()

_TYPES = {
    "*fp64": torch.float64, "*fp32": torch.float32, "*fp16": torch.float16,
    "*bf16": torch.bfloat16, "*i64": torch.int64, "*i32": torch.int32, "*i16": torch.int16,
    "*i8": torch.int8, "*u8": torch.uint8, "*u16": torch.uint16, "*u32": torch.uint32,
}  # fmt: skip


_NOWHERE = (ctypes.c_uint8 * 16)()


def tensor_at(address: int, kind: str) -> torch.Tensor:
    """Return a tensor that begins at an address, whose type is all that the interpreter asks; what
    has no bytes begins at 0, which it does not take."""
    raw = (ctypes.c_uint8 * 8).from_address(address or ctypes.addressof(_NOWHERE))
    return torch.frombuffer(raw, dtype=torch.uint8).view(_TYPES[kind])


class InterpretedDevice:
    """A `Device` of the runtime over the interpreter."""

    can_capture = False
    stuck = False
    stream = 0

    def __init__(self, arch: str = "0") -> None:
        self.info = DeviceInfo("interpreter", 0, "Triton's interpreter", arch, 1 << 34, "0", 1)
        self.memory: dict[int, np.ndarray] = {}
        self.modules: dict[bytes, Any] = {}

    def active(self) -> Any:
        return contextlib.nullcontext()

    def free_memory(self) -> int | None:
        return None

    def allocate(self, nbytes: int) -> int:
        raw = np.full(nbytes + ALIGNMENT, 0xAB, np.uint8)  # nothing may rely on zeros
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.memory[address] = raw
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def allocate_host(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def free_host(self, array: np.ndarray) -> None: ...

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def zero(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def load(self, code: KernelCode, *, text: bool) -> Any:
        source = code.read(code.source)
        if source not in self.modules:
            self.modules[source] = module_of(source.decode())
        module = self.modules[source]
        return getattr(module, code.symbol), module.SIGNATURES[code.symbol], code

    def prepare(self, kernel: Any, grid: Sequence[int], arguments: Sequence[int]) -> Any:
        return *kernel, tuple(grid), tuple(arguments)

    def launch(self, prepared: Any) -> None:
        function, types, code, grid, arguments = prepared
        given = [
            tensor_at(value, kind) if kind.startswith("*") else value
            for kind, value in zip(types, arguments, strict=False)
        ]
        function[grid](*given, **code.constants)

    def synchronize(self) -> None: ...
    def event(self) -> Any: ...
    def record(self, event: Any) -> None: ...
    def wait(self, event: Any) -> None: ...
    def free_event(self, event: Any) -> None: ...
    def close(self) -> None: ...


_FOLDER = tempfile.TemporaryDirectory(prefix="dilu-interpreted-")


def module_of(source: str) -> Any:
    """Return a generated module, imported from a file, since Triton reads functions' sources."""
    path = Path(_FOLDER.name, f"kernels_{len(list(Path(_FOLDER.name).iterdir()))}.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
