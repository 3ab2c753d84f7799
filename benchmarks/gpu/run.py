"""Check and time dilu's GPU kernels on this machine's GPU: one command, one table, one JSON file.

    python benchmarks/gpu/run.py [--target cuda:80] [--target native] [--tune] [--skip checks]

Checked first: every kind of kernel against its reference, and whole models against the CPU target.
Then timed, in turn and in one process, with cold caches, against limits measured in the same run:

- products with e4m3 weights in 128 x 128 blocks for shapes of DeepSeek-V3, Qwen3-30B-A3B and
  Llama-8B: dilu, cuBLAS in bf16, the device's FP8 (`torch._scaled_mm`), a naive Triton decode;
- blocks of experts: dilu, cuBLAS in bf16 expert by expert;
- decode of a 1.1B Llama, with and without graph replay.

Up to 16 rows a product's figure is the share of copy bandwidth (bytes of weights and scales over
time), above it the share of the bf16 rate measured on a square product. `--target` defaults to
cuda:80, which has no FP8 instructions, and `native`, the device's own. `--interpret` runs all of it
small under Triton's interpreter, without a GPU, to check this script. Writes build/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
if "--interpret" in sys.argv:
    import interpreted  # before Triton is imported

import torch
from checks import Wrong, check_bundled, check_kernels, check_models
from kernels import (
    Kernels,
    OurCalls,
    Times,
    TorchCalls,
    copies,
    experts_text,
    in_turn,
    product_text,
)
from models import measure_decode
from peers import ExpertsBf16, Fp8Mm, Naive, decoded, random_codes, random_scales

from dilu.codegen import targets as known
from dilu.codegen.targets import find_target
from dilu.runtime.gpu.choose import own_target
from dilu.runtime.gpu.device import Device
from dilu.runtime.gpu.open_device import open_device

#: N, K of products.
PRODUCTS = {
    "DeepSeek-V3 q_a": (1536, 7168),
    "DeepSeek-V3 o": (7168, 16384),
    "DeepSeek-V3 gate": (18432, 7168),
    "Qwen3-30B-A3B q": (4096, 2048),
    "Qwen3-30B-A3B o": (2048, 4096),
    "Llama-8B q": (4096, 4096),
    "Llama-8B gate": (14336, 4096),
    "Llama-8B down": (4096, 14336),
}
#: Experts, hidden and intermediate size, experts of a token.
EXPERTS = {
    "DeepSeek-V3 experts": (256, 7168, 2048, 8),
    "Qwen3-30B-A3B experts": (128, 2048, 768, 8),
}
FEW, MANY = (1, 2, 4, 8, 16), (64, 256, 1024, 4096)
BOUND = 2e-2  # of |error| over |largest|, for bf16 in and out


@dataclass
class Row:
    """One line of the table: seconds by who took them, and what they are compared with."""

    what: str
    rows: int
    nbytes: int
    flop: float
    seconds: dict[str, Times] = field(default_factory=dict)
    error: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Bytes copied a second (read and written), and bf16 operations a second."""

    copy: float
    matrix: float


def measure_limits(place: str) -> Limits:
    """Return what the device can do at most, in torch's own copy and product."""
    size, edge = (1 << 30, 8192) if place == "cuda" else (1 << 20, 64)
    source = torch.zeros(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=place, dtype=torch.bfloat16) for _ in range(2))
    calls = {
        "copy": TorchCalls(lambda _: target.copy_(source), 1),
        "matrix": TorchCalls(lambda _: a @ b, 4),
    }
    times = in_turn(dict(calls), rounds=11)
    for call in calls.values():
        call.close()
    return Limits(2 * size / times["copy"].median, 2 * edge**3 / times["matrix"].median)


class Bench:
    """Kernels for the targets, on one device."""

    def __init__(self, device: Device, names: list[str], options: argparse.Namespace) -> None:
        self.device, self.names, self.options = device, names, options
        self.place = "cpu" if options.interpret else "cuda"
        self.products = {"tiny": (192, 256)} if options.interpret else PRODUCTS
        self.experts = {"tiny experts": (4, 128, 128, 2)} if options.interpret else EXPERTS
        self.few, self.many = ((1,), (20,)) if options.interpret else (FEW, MANY)
        self.flushed = 1 if options.interpret else 512 << 20

    def kernels(self, texts: list[str]) -> dict[str, Kernels]:
        made = {}
        for name in self.names:
            start = time.perf_counter()
            made[name] = Kernels(texts, find_target(name), self.device)
            say(f"compiled for {name} in {time.perf_counter() - start:.0f} s")
        return made

    def measure_products(self) -> Iterator[Row]:
        names = {what: f"product_{i}" for i, what in enumerate(self.products)}
        texts = [product_text(names[what], *shape) for what, shape in self.products.items()]
        kernels = self.kernels(texts)
        for what, (N, K) in self.products.items():
            count = copies(N * K, self.flushed)
            codes = [random_codes(N, K, seed=i, device=self.place) for i in range(count)]
            scales = random_scales(N, K, device=self.place)
            wide = [
                decoded(c, scales, torch.bfloat16) for c in codes[: copies(2 * N * K, self.flushed)]
            ]
            nbytes = N * K + 4 * scales.numel()
            for rows in (*self.few, *self.many):
                x = torch.randn(rows, K, device=self.place).bfloat16()
                want = x.double() @ decoded(codes[0], scales, torch.float64).t()
                row = Row(what, rows, nbytes, 2.0 * rows * N * K)
                calls: dict[str, Any] = {}
                for name, made in kernels.items():
                    y = torch.empty(rows, N, dtype=torch.bfloat16, device=self.place)
                    constants = [(c, scales) for c in codes]
                    calls |= self._ours(made, names[what], name, (x,), constants, y)
                    row.error = max(
                        row.error, self._error(made, names[what], x, constants, y, want)
                    )
                calls |= self._peers(codes, wide, scales, x)
                row.seconds = finish(calls, self.options.interpret)
                yield row

    def _peers(self, codes: Any, wide: Any, scales: Any, x: torch.Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {
            "bf16": TorchCalls(lambda copy: x @ wide[copy % len(wide)].t(), len(wide))
        }
        if not torch.cuda.is_available():
            return found
        for name, peer in (
            ("fp8", lambda: Fp8Mm(codes, x)),
            ("naive", lambda: Naive(codes, scales, x)),
        ):
            try:
                found[name] = TorchCalls(peer(), len(codes))
            except Exception as error:  # older devices have no FP8; a naive kernel may not compile
                say(f"no {name} here: {str(error).splitlines()[0]}")
        return found

    def _ours(
        self, made: Kernels, function: str, name: str, parameters: Any, constants: Any, y: Any
    ) -> dict[str, Any]:
        """Return the calls to time: of the default variants, or with --tune of each choice too."""
        rows = int(parameters[0].shape[0])
        self._settled()
        choices = made.variants(function, rows) if self.options.tune else [{}]
        calls = {}
        for number, choice in enumerate(choices):
            made.choose(choice)
            launches: list[Any] = []
            arenas = []
            for weights in constants:
                more, arena = made.prepared(function, parameters, weights, (y,))
                launches += more
                arenas.append(arena)
            label = name if number == 0 else f"{name} {describe(made, choice)}"
            calls[label] = OurCalls(self.device, launches, len(constants), (arenas, y, constants))
        made.choose({})
        return calls

    @staticmethod
    def _settled() -> None:
        """Wait for torch: our stream is another, and memory that torch has given away may still be
        read by what it has queued."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _error(
        self,
        made: Kernels,
        function: str,
        x: Any,
        constants: Any,
        y: Any,
        want: Any,
        more: Any = (),
    ) -> float:
        launches, _kept = made.prepared(function, (x, *more), constants[0], (y,))
        y.fill_(float("nan"))
        self._settled()
        made.run(launches)
        error = float((y.double() - want).abs().max() / want.abs().max())
        if not error < BOUND:
            failed(f"{function} at {len(x)} rows", Wrong(f"off by {error:.1e}"))
        return error

    def measure_experts(self) -> Iterator[Row]:
        names = {what: f"experts_{i}" for i, what in enumerate(self.experts)}
        shapes = {what: self._fitting(shape) for what, shape in self.experts.items()}
        kernels = self.kernels([experts_text(names[w], *shape) for w, shape in shapes.items()])
        for what, (E, H, I, top) in shapes.items():
            codes = [
                random_codes(E, 2, I, H, device=self.place),
                random_codes(E, H, I, device=self.place),
            ]
            scales = [
                random_scales(E, 2, I, H, device=self.place),
                random_scales(E, H, I, device=self.place),
            ]
            for rows in (*self.few, *self.many[:2]):
                rng = torch.Generator().manual_seed(rows)
                picks = [torch.randperm(E, generator=rng)[:top] for _ in range(rows)]
                indices = torch.stack(picks).to(self.place)
                weights = torch.full((rows, top), 1 / top, device=self.place)
                x = torch.randn(rows, H, device=self.place).bfloat16()
                hit = indices.unique()
                wide = [
                    decoded(c[hit], s[hit], torch.bfloat16)
                    for c, s in zip(codes, scales, strict=True)
                ]
                place = torch.zeros(E, dtype=torch.long, device=self.place)
                place[hit] = torch.arange(len(hit), device=self.place)
                peer = ExpertsBf16(wide[0], wide[1], x, place[indices])
                want = peer(0).double() / top
                row = Row(f"{what} ({E})", rows, len(hit) * 3 * I * H, 6.0 * rows * top * I * H)
                constants = [(codes[0], scales[0], codes[1], scales[1])]
                calls: dict[str, Any] = {}
                for name, made in kernels.items():
                    y = torch.empty(rows, H, dtype=torch.bfloat16, device=self.place)
                    given = (x, indices, weights)
                    calls |= self._ours(made, names[what], name, given, constants, y)
                    error = self._error(made, names[what], x, constants, y, want, given[1:])
                    row.error = max(row.error, error)
                calls["bf16"] = TorchCalls(peer, 1)
                row.seconds = finish(calls, self.options.interpret)
                yield row

    def _fitting(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return a shape with as many experts as fit the device, codes and bf16 of those hit."""
        E, H, I, top = shape
        with self.device.active():
            free = self.device.free_memory() or 1 << 40
        while top < E and free < E * 3 * H * I * 3.2:
            E //= 2
        return E, H, I, top


def describe(made: Kernels, choice: dict[str, int]) -> str:
    ((name, index),) = choice.items()
    kernel = next(k for k in made.executor.program.kernels if k.name == name)
    return " ".join(f"{c}{v}" for c, v in kernel.variants[index].constants.items())


def finish(calls: dict[str, Any], once: bool) -> dict[str, Times]:
    times = in_turn(calls, 2, 0) if once else in_turn(calls)
    for call in calls.values():
        call.close()
    return times


FAILED: list[str] = []  # a device is not always at hand: the rest runs on


def failed(what: str, error: BaseException) -> None:
    FAILED.append(what)
    say(f"FAILED {what}: {error}")


def attempt(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns, or note its failure and return None."""
    start = time.perf_counter()
    try:
        found = call(*arguments)
    except Exception as error:
        if not isinstance(error, Wrong):
            traceback.print_exc()
        return failed(what, error)
    say(f"{what}: {time.perf_counter() - start:.0f} s {found if isinstance(found, str) else ''}")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------- the table


def line(row: Row, limits: Limits, first: str) -> str:
    """Return a line of the table: microseconds, shares of a limit, ratios to the first."""
    ours = row.seconds[first].median
    few = row.rows <= FEW[-1]
    share = row.nbytes / ours / limits.copy if few else row.flop / ours / limits.matrix
    ratios = "  ".join(
        f"{name} {times.median * 1e6:.1f} ({times.median / ours:.2f}x)"
        for name, times in row.seconds.items()
        if name != first
    )
    return (
        f"{row.what:24} {row.rows:5}  {ours * 1e6:9.1f} us  {share:5.0%} of"
        f" {'copy' if few else 'bf16'}  error {row.error:.0e}  {ratios}"
    )


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--target", action="append", help="cuda:80, native, …; may be repeated")
    parser.add_argument("--tune", action="store_true", help="time every variant, not the default")
    parser.add_argument("--skip", action="append", default=[],
                        choices=["checks", "products", "experts", "decode"])  # fmt: skip
    parser.add_argument("--interpret", action="store_true", help="no GPU, tiny: checks this script")
    parser.add_argument("--output", type=Path, default=Path("build/gpu.json"))
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    if options.interpret:
        known.TARGETS = (*known.TARGETS, interpreted.INTERPRETED)
        device: Device = interpreted.InterpretedDevice()
    else:
        device = open_device(options.device)
        torch.cuda.set_device(device.info.index)
    own = own_target(device.info)
    wanted = options.target or (["native"] if options.interpret else ["cuda:80", "native"])
    names = list(dict.fromkeys(own if name == "native" else name for name in wanted))
    say(f"{device.info.text}, {device.info.arch}, driver {device.info.driver}; {', '.join(names)}")
    place = "cpu" if options.interpret else "cuda"
    result: dict[str, Any] = {
        "device": asdict(device.info),
        "targets": names,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if "checks" not in options.skip:
        result["checks"] = {
            f"{check.__name__} {name}": attempt(f"{check.__name__} {name}", check, name, options)
            for check in (check_bundled, check_kernels, check_models)
            for name in names
        }
        write(options.output, result)
    limits = measure_limits(place)
    result["limits"] = asdict(limits)
    rates = f"copy {limits.copy / 1e9:.0f} GB/s, bf16 {limits.matrix / 1e12:.1f} TFLOP/s"
    print(f"{device.info.text}: {rates}")
    print(f"times are of {names[0]}; others in us and as multiples of it")
    bench = Bench(device, names, options)
    result["rows"] = []
    for section, rows in (("products", bench.measure_products), ("experts", bench.measure_experts)):
        if section in options.skip:
            continue
        attempt(section, record, rows(), limits, result, options.output)
    if "decode" not in options.skip:
        result["decode"] = [
            found
            for name in names
            for graphs in (True, False)
            if (found := attempt(f"decode on {name}", measure_decode, name, graphs, options))
        ]
        for found in result["decode"]:
            share = found["nbytes"] / found["seconds"] / limits.copy
            print(
                f"decode of {found['model']}, {found['target']}, graphs {found['graphs']}:"
                f" {1 / found['seconds']:.1f} tok/s, {share:.0%} of copy"
            )
    result["failed"] = FAILED
    write(options.output, result)
    if FAILED:
        raise SystemExit(f"failed: {', '.join(FAILED)}")


def record(rows: Iterator[Row], limits: Limits, result: dict[str, Any], path: Path) -> None:
    for row in rows:
        print(line(row, limits, result["targets"][0]), flush=True)
        result["rows"].append(asdict(row))
        write(path, result)


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
