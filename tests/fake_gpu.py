"""A driver library without a device (`fake_driver.c`), and an artifact for it made by hand."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import constant, offsets, value

import dilu
from dilu.codegen.c.driver import find_compiler
from dilu.errors import DiluError
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.artifact.fingerprint import fingerprint
from dilu.runtime.artifact.tensor_file import Entry, chunks, layout
from dilu.runtime.call.batch import PARAMETERS

PAGE, WIDTH = 4, 64


@dataclass(frozen=True)
class Launch:
    """A launch as the driver saw it; `kinds` has a letter per argument."""

    symbol: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """What the driver has given out and not got back."""

    memory: int
    host: int
    modules: int
    graphs: int
    streams: int
    events: int
    contexts: int
    pushed: int


class FakeDriver:
    """The library, and the functions of it that are for tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._native = ctypes.CDLL(str(path))
        self._native.fake_log.restype = ctypes.c_char_p
        self._native.fake_device.argtypes = [
            ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip

    def reset(self) -> None:
        self._native.fake_reset()

    def fail(self, call: str, code: int, at: int = 1) -> None:
        """Make the `at`-th call of this kind from now on fail."""
        self._native.fake_fail(call.encode(), at, code)

    def device(
        self, *, count: int = 1, capability: int = 80, arch: str = "gfx90a", memory: int = 1 << 30
    ) -> None:
        self._native.fake_device(count, capability, arch.encode(), memory)

    def refuse_binaries(self) -> None:
        self._native.fake_refuse(1)

    def shared(self, limit: int) -> None:
        self._native.fake_shared(limit)

    @property
    def log(self) -> list[str]:
        return self._native.fake_log().decode().splitlines()

    def clear(self) -> None:
        self._native.fake_clear_log()

    @property
    def launches(self) -> list[Launch]:
        pattern = re.compile(r"launch (\S+) grid (\S+) block (\S+) shared (\d+) arguments ?(.*)")
        found = [m for line in self.log if (m := pattern.fullmatch(line))]
        return [
            Launch(
                m[1], _numbers(m[2]), _numbers(m[3]), int(m[4]),
                tuple(int(word, 16) for word in m[5].split()),
            )
            for m in found
        ]  # fmt: skip

    @property
    def held(self) -> Held:
        numbers = (ctypes.c_int64 * 8)()
        self._native.fake_held(numbers)
        return Held(*numbers)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def read_f32(address: int, count: int) -> list[float]:
    return list(struct.unpack(f"{count}f", ctypes.string_at(address, 4 * count)))


@pytest.fixture(scope="session")
def fake_drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FakeDriver]]:
    try:
        compiler = find_compiler()
    except DiluError:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_driver.c")
    found: dict[str, FakeDriver] = {}
    for backend in ("cuda", "hip"):
        out = folder / f"lib{backend}.so"
        options = ["-shared", "-fPIC", "-O1", "-w", "-fvisibility=hidden"]
        defines = ["-DHIP"] if backend == "hip" else []
        subprocess.run([*compiler, *options, *defines, "-o", out, source], check=True)
        found[backend] = FakeDriver(out)
    yield found
    gc.unfreeze()


@pytest.fixture
def cuda(
    fake_drivers: dict[str, FakeDriver], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeDriver]:
    """A machine with an NVIDIA GPU: A100-like, 1 GiB."""
    yield from _machine(fake_drivers["cuda"], monkeypatch)


@pytest.fixture
def hip(
    fake_drivers: dict[str, FakeDriver], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeDriver]:
    """A machine with an AMD GPU."""
    yield from _machine(fake_drivers["hip"], monkeypatch)


def _machine(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    gc.collect()  # what tests before this one left goes first
    gc.freeze()  # and what stays, all of torch's perhaps, is not looked through again
    driver.reset()
    monkeypatch.setenv("DILU_GPU_LIBRARY", str(driver.path))
    yield driver
    driver.reset()


# ------------------------------------------------------------------------- the artifact


def variant(kernel: str, kinds: str, **changed: Any) -> dict[str, Any]:
    """A variant of a kernel whose arguments have these kinds: p and i."""
    symbol = changed.pop("symbol", kernel)
    file = changed.pop("file", f"{symbol}.cubin")
    return {
        "constants": {}, "file": file, "text": file.replace(".cubin", ".ptx"), "symbol": symbol,
        "threads": 128, "shared": 0, "registers": 40, "spills": 0, "scratch_pointers": 2,
        "instructions": {}, "nan": False,
    } | changed  # fmt: skip


def kernel(name: str, kinds: str, *variants: dict[str, Any], **changed: Any) -> dict[str, Any]:
    names = {"p": "pointer", "i": "i32"}
    return {
        "name": name, "kernel": name, "kind": "loops", "arguments": [names[k] for k in kinds],
        "variants": list(variants) or [variant(name, kinds)], "default": 0,
    } | changed  # fmt: skip


def launch(run: int, grid: list[Any], *arguments: Any, rows: Any = None) -> dict[str, Any]:
    """A launch; an argument is `"size"`, `("state", 0)` or `("scratch", 0)`."""
    given = [
        {"size": a}
        if isinstance(a, (str, int))
        else {"scratch": a[1]}
        if a[0] == "scratch"
        else {"place": list(a)}
        for a in arguments
    ]
    return {"run": run, "rows": rows, "grid": grid, "arguments": given}


def step(*launches: dict[str, Any], scratch: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"kernel": "k", "kind": "loops", "scratch": list(scratch), "launches": list(launches)}


def plan(name: str, slots: list[Any], *steps: dict[str, Any]) -> dict[str, Any]:
    counts = dict.fromkeys(("parameters", "states", "constants", "results"), 0)
    return {"name": name, **counts, "slots": slots, "steps": list(steps)}


P, Q, S, R = ("parameter", 0), ("parameter", 1), ("state", 0), ("result", 0)
C = ("constant", 0)
DOUBLE, ADD, COUNT, TOUCH, DECODE, ROW, ROWS, LOGITS = range(8)


def program() -> dict[str, Any]:
    return {
        "kernels": [
            kernel("double", "ppi"),
            kernel("add", "pppi"),
            kernel("count", "pi"),
            kernel("touch", "ppi", variant("touch", "ppi", shared=65536, threads=256)),
            kernel(
                "decode", "pp",
                variant("decode", "pp", symbol="decode_30us", constants={"BN": 64}),
                variant("decode", "pp", symbol="decode_10us", constants={"BN": 32}),
                variant("decode", "pp", symbol="decode_nan_20us", constants={"BN": 64}, nan=True),
                variant("decode", "pp", symbol="decode_nan_15us", constants={"BN": 32}, nan=True),
            ),
            kernel("row", "pp"),
            kernel("rows", "pp", variant("rows", "pp", constants={"BM": 16})),
            kernel("logits", "p" * 8 + "i" * 5),
        ],
        "plans": [
            plan("twice", [], step(launch(DOUBLE, ["N", 1, 1], P, R, "N"))),
            plan(
                "chain", ["256*N"],
                {
                    "plan": 2, "times": 3, "parameters": [P], "results": [("slot", 0)],
                    "states": [{"place": S, "stride": "4*N"}],
                    "constants": [{"place": C, "stride": 256}, {"place": C, "stride": 0}],
                    "result_sizes": ["256*N"],
                },
                step(launch(DOUBLE, ["N", 1, 1], ("slot", 0), R, "64*N")),
            ),
            plan(
                "layer", ["4*N"],
                step(launch(ADD, [1, 1, 1], P, C, R, 64)),
                step(
                    launch(TOUCH, [1, "N", 1], ("scratch", 0), ("scratch", 1), 7),
                    launch(COUNT, [1, 1, 1], S, 1),
                    scratch=("N", 300),
                ),
            ),
            plan(
                "decode", [],
                step(
                    launch(ROW, ["N", 1, 1], P, R, rows=["N", 1, 1]),
                    launch(ROWS, ["(N + BM - 1) // BM", 2, 1], P, R, rows=["N", 2, None]),
                ),
                step(launch(DECODE, ["256 // BN", 1, 1], C, R)),
            ),
            plan(
                "main", ["4*T"],
                step(
                    launch(
                        LOGITS, ["T", "R", 1], *(("parameter", n) for n in range(6)), S, R,
                        "T", "S", "P", "R", "B",
                    )
                ),
            ),
        ],
        "entries": [
            {"plan": 4, "symbols": ["T", "S", "P", "R", "B"], "work": "T"},
            {"plan": 0, "symbols": ["N"], "work": "N"},
            {"plan": 1, "symbols": ["N"], "work": "N"},
            {"plan": 3, "symbols": ["N"], "work": 1},
        ],
    }  # fmt: skip


def functions() -> list[dict[str, Any]]:
    batch = ["T", "T", "T", "T", ("S", "P"), "R"]
    return [
        {
            "name": "main", "symbols": ["T", "S", "P", "R", "B"],
            "parameters": [
                value(name, "i64", *(dims if isinstance(dims, tuple) else (dims,)))
                for name, dims in zip(PARAMETERS, batch, strict=True)
            ],
            "states": [value("keys", "f32", 2, "B", PAGE)],
            "results": [value("logits", "f32", "R", 8)], "constants": [],
        },
        {
            "name": "twice", "symbols": ["N"], "parameters": [value("x", "f32", "N")],
            "states": [], "results": [value("y", "f32", "N")], "constants": [],
        },
        {
            "name": "chain", "symbols": ["N"], "parameters": [value("x", "f32", "N", WIDTH)],
            "states": [value("memory", "f32", 3, "N")],
            "results": [value("y", "f32", "N", WIDTH)], "constants": ["w"],
        },
        {
            "name": "decode", "symbols": ["N"], "parameters": [value("x", "bf16", "N")],
            "states": [], "results": [value("y", "bf16", "N")], "constants": ["codes"],
        },
    ]  # fmt: skip


def kernel_files(folder: str, table: dict[str, Any]) -> dict[str, bytes]:
    """Return the program and the files of its kernels, as the fake driver reads them."""
    files = {f"{folder}/program.json": json.dumps(table).encode()}
    for entry in table["kernels"]:
        kinds = "".join("p" if a == "pointer" else "i" for a in entry["arguments"])
        for v in entry["variants"]:
            hidden = "p" * v["scratch_pointers"]
            text = f"\n{v['symbol']} {kinds}{hidden}\n"
            files[f"{folder}/{v['file']}"] = f"BINARY{text}".encode()
            if v["text"]:
                files[f"{folder}/{v['text']}"] = f"PTX{text}".encode()
    return files


def gpu_target(name: str) -> dict[str, Any]:
    """The manifest's entry of a GPU target."""
    backend, _, arch = name.partition(":")
    folder = f"kernels/{name.replace(':', '-')}"
    return {
        "program": f"{folder}/program.json", "source": f"{folder}/module.py", "backend": backend,
        "arch": int(arch) if backend == "cuda" else arch, "requires": [],
        "kernels": [{"name": "double", "kind": "loops", "function": "double", "lines": None}],
    }  # fmt: skip


def add_target(artifact: Artifact, name: str, table: dict[str, Any] | None = None) -> None:
    """Give an artifact a GPU target with a program."""
    artifact.manifest["targets"][name] = gpu_target(name)
    folder = f"kernels/{name.replace(':', '-')}"
    artifact.files |= kernel_files(folder, table or program())
    artifact.files[f"{folder}/module.py"] = b"# kernels\n"


def weights_file(folder: Path, codes: np.ndarray) -> Path:
    tensors = {
        "w.0": np.full(WIDTH, 1, np.float32),
        "w.1": np.full(WIDTH, 10, np.float32),
        "w.2": np.full(WIDTH, 100, np.float32),
        "codes.1": codes[128:],
        "codes.0": codes[:128],
    }
    kinds = {4: "f32", 1: "u8"}
    entries = [Entry(n, kinds[a.itemsize], a.shape, a.nbytes) for n, a in tensors.items()]
    path = folder / "model.safetensors"
    contents = ([a.tobytes()] for a in tensors.values())
    path.write_bytes(b"".join(chunks(layout(entries), contents)))
    return path


def gpu_artifact(folder: Path, *targets: str, codes: np.ndarray | None = None) -> Artifact:
    """Return an artifact in memory with weights in `folder` and these GPU targets."""
    folder.mkdir(parents=True, exist_ok=True)
    if codes is None:
        codes = np.arange(256, dtype=np.uint8) % 0x7F
    path = weights_file(folder, codes)
    w = offsets(path, "w.0", "w.1", "w.2")
    c = offsets(path, "codes.0", "codes.1")
    manifest: dict[str, Any] = {
        "format": 1, "dilu": dilu.__version__, "name": "gpu", "functions": functions(),
        "targets": {},
        "files": [
            {"path": str(path), "size": path.stat().st_size, "fingerprint": fingerprint(path)}
        ],
        "constants": {
            "w": constant([3, WIDTH], 1, w, ["w.0", "w.1", "w.2"]),
            "codes": constant([2, 128], 1, c, ["codes.0", "codes.1"])
            | {"dtype": "u8", "format": "f8e4m3"},
        },
        "language_model": {
            "architecture": "FakeForCausalLM", "vocab_size": 8, "page_size": PAGE,
            "max_positions": 64, "eos_token_ids": [7], "bos_token_id": 6,
        },
        "passes": [], "options": {"source": "/models/m"},
    }  # fmt: skip
    artifact = Artifact(manifest, {})
    for target in targets or ("cuda:80",):
        add_target(artifact, target)
    return artifact
