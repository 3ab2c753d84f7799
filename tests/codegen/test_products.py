"""Matrix products and experts, compiled and run, against the reference in f64.

The bound is on |error| / (|a|·|b|), which is what accumulating in f32 can promise.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dilu.ir.dtypes import BF16, F8E4M3, F32, decode, encode, to_storage
from dilu.ir.weights import Weight

BOUND = 2e-6


def chain(name: str, rows: object, k: int, form: str, scales: str, block) -> tuple[str, str, str]:
    """Return (body parameters, nodes, value) of a stored weight `[rows, k]`."""
    shape = f"{rows},{k}"
    if not scales:
        declared = f"%{name}: {form}[{shape}]"
        if form == "f32":
            return declared, "", name
        return declared, f"%{name}.w: f32[{shape}] = cast(%{name}) {{dtype=f32}}\n", f"{name}.w"
    blocks = f"{-(-int(rows) // block[0])},{-(-k // block[1])}"
    stored = "u8" if scales == "f8e8m0" else scales
    nodes = f"%{name}.d: f32[{shape}] = decode(%{name}) {{format={form}, dtype=f32}}\n"
    scale = f"{name}.scales"
    if scales == "f8e8m0":
        nodes += f"%{scale}.d: f32[{blocks}] = decode(%{scale}) {{format=f8e8m0, dtype=f32}}\n"
        scale += ".d"
    elif scales != "f32":
        nodes += f"%{scale}.d: f32[{blocks}] = cast(%{scale}) {{dtype=f32}}\n"
        scale += ".d"
    nodes += (
        f"%{name}.w: f32[{shape}] = dequantize(%{name}.d, %{scale})"
        f" {{block=[{block[0]},{block[1]}], dtype=f32}}\n"
    )
    return f"%{name}: u8[{shape}], %{name}.scales: {stored}[{blocks}]", nodes, f"{name}.w"


def function(name: str, parameters: str, constants: str, nodes: str, result: str, kind="matmul"):
    """Return the text of a function that is one kernel. `result` is `%name: type`."""
    value, _, t = result.partition(": ")
    inputs = ", ".join(p for p in (parameters, constants) if p)
    names = ", ".join(p.split(":")[0] for p in inputs.split(", "))
    return (
        f"func @{name}({parameters}) const({constants}) {{\n"
        f'  %out: {t} = kernel({names}) {{kind="{kind}", body=func @{name}_kernel({inputs}) {{\n'
        f"{nodes}  return {value}\n}}}}\n  return %out\n}}\n"
    )


FORMATS = {
    "e4m3_128": ("f8e4m3", "f32", (128, 128)),
    "e5m2_row": ("f8e5m2", "bf16", (1, 128)),
    "e4m3_mx": ("f8e4m3", "f8e8m0", (32, 32)),
    "bf16": ("bf16", "", ()),
    "f16": ("f16", "", ()),
    "f32": ("f32", "", ()),
}
N, K = 150, 300


def plain(name: str) -> str:
    declared, nodes, w = chain("w", N, K, *FORMATS[name])
    nodes += f"%y: f32[T,{N}] = matmul(%x, %{w}) {{transpose_b=true}}\n"
    return function(f"plain_{name}", f"%x: f32[T,{K}]", declared, nodes, f"%y: f32[T,{N}]")


def norm_residual() -> str:
    declared, nodes, w = chain("w", N, K, *FORMATS["e4m3_128"])
    nodes += f"""
      %sq: f32[T,{K}] = mul(%x, %x)
      %s: f32[T,1] = reduce_sum(%sq) {{axes=[1], keepdims=true}}
      %n: f32[] = literal() {{value={K}.0, dtype=f32}}
      %m: f32[T,1] = div(%s, %n)
      %r: f32[T,1] = rsqrt(%m)
      %h: f32[T,{K}] = mul(%x, %r)
      %g: f32[{K}] = cast(%gain) {{dtype=f32}}
      %a: f32[T,{K}] = mul(%h, %g)
      %p: f32[T,{N}] = matmul(%a, %{w}) {{transpose_b=true}}
      %y: f32[T,{N}] = add(%residual, %p)
    """
    return function(
        "norm_residual", f"%x: f32[T,{K}], %residual: f32[T,{N}]",
        f"%gain: bf16[{K}], {declared}", nodes, f"%y: f32[T,{N}]",
    )  # fmt: skip


def gate_up() -> str:
    first, nodes, a = chain("gate", N, K, *FORMATS["e4m3_128"])
    second, more, b = chain("up", N, K, *FORMATS["e4m3_128"])
    nodes += f"""{more}
      %g: f32[T,{N}] = matmul(%x, %{a}) {{transpose_b=true}}
      %u: f32[T,{N}] = matmul(%x, %{b}) {{transpose_b=true}}
      %s: f32[T,{N}] = sigmoid(%g)
      %silu: f32[T,{N}] = mul(%g, %s)
      %y: f32[T,{N}] = mul(%silu, %u)
    """
    constants = f"{first}, {second}"
    return function("gate_up", f"%x: f32[T,{K}]", constants, nodes, f"%y: f32[T,{N}]")


H, R, D = 3, 144, 40


def absorbed(transpose_b: bool) -> str:
    """A product per head with the last 80 of every 144 rows of one weight."""
    declared, nodes, w = chain("w", H * R, D, *FORMATS["e4m3_128"])
    k, n = (D, 80) if transpose_b else (80, D)
    flag = "true" if transpose_b else "false"
    nodes += f"""
      %heads: f32[{H},{R},{D}] = reshape(%{w}) {{shape=[{H},{R},{D}]}}
      %part: f32[{H},80,{D}] = slice(%heads) {{axis=1, start=64, stop=144, step=1}}
      %turned: f32[{H},T,{k}] = transpose(%x) {{permutation=[1,0,2]}}
      %p: f32[{H},T,{n}] = matmul(%turned, %part) {{transpose_b={flag}}}
      %y: f32[T,{H},{n}] = transpose(%p) {{permutation=[1,0,2]}}
    """
    name = f"absorbed_{'nk' if transpose_b else 'kn'}"
    return function(name, f"%x: f32[T,{H},{k}]", declared, nodes, f"%y: f32[T,{H},{n}]")


def half_model() -> str:
    """A linear layer of a bf16 model, its result laid out by heads."""
    declared, nodes, w = chain("w", 120, K, "bf16", "", ())
    nodes += f"""
      %a: f32[2,T,{K}] = cast(%x) {{dtype=f32}}
      %p: f32[2,T,120] = matmul(%a, %{w}) {{transpose_b=true}}
      %c: bf16[2,T,120] = cast(%p) {{dtype=bf16}}
      %b: bf16[2,T,120] = add(%c, %bias)
      %split: bf16[2,T,4,30] = reshape(%b) {{shape=[2,<T>,4,30]}}
      %y: bf16[2,4,T,30] = transpose(%split) {{permutation=[0,2,1,3]}}
    """
    constants = f"%bias: bf16[120], {declared}"
    return function("half", f"%x: bf16[2,T,{K}]", constants, nodes, "%y: bf16[2,4,T,30]")


def between_activations(transpose_b: bool) -> str:
    """Neither operand is stored: scores of heads that lie interleaved."""
    flag, inner = ("true", "T,6") if transpose_b else ("false", "6,T")
    permutation = "[1,0,2]" if transpose_b else "[1,2,0]"
    nodes = f"""
      %a: f32[2,T,6] = transpose(%q) {{permutation=[1,0,2]}}
      %b: f32[2,{inner}] = transpose(%k) {{permutation={permutation}}}
      %y: f32[2,T,T] = matmul(%a, %b) {{transpose_b={flag}}}
    """
    name = f"scores_{'nk' if transpose_b else 'kn'}"
    parameters = "%q: f32[T,2,6], %k: f32[T,2,6]"
    return function(name, parameters, "", nodes, "%y: f32[2,T,T]").replace(" const()", "")


def gate_up_kn() -> str:
    """Two products with weights along K: no kernel takes them, so they are copied."""
    nodes = f"""
      %g: f32[T,{N}] = matmul(%x, %gate) {{transpose_b=false}}
      %u: f32[T,{N}] = matmul(%x, %up) {{transpose_b=false}}
      %y: f32[T,{N}] = mul(%g, %u)
    """
    constants = f"%gate: f32[{D},{N}], %up: f32[{D},{N}]"
    return function("gate_up_kn", f"%x: f32[T,{D}]", constants, nodes, f"%y: f32[T,{N}]")


TEXT = "graph planned\n" + "\n".join(
    [
        *map(plain, FORMATS),
        norm_residual(),
        gate_up(),
        gate_up_kn(),
        absorbed(True),
        absorbed(False),
        half_model(),
        between_activations(True),
        between_activations(False),
    ]
)


def model_inputs(function, sizes, random_inputs, seed: int) -> list[np.ndarray]:
    """Return random inputs: codes of ordinary size, scales near one."""
    rng = np.random.default_rng(seed)
    out = random_inputs(function, sizes, seed)
    for i, value in enumerate(function.inputs):
        if value.type.dtype.name == "u8":
            exponents = "f8e8m0" in value.name or value.name.endswith(".scales")
            if exponents:
                out[i] = rng.integers(124, 130, out[i].shape).astype(np.uint8)
            else:
                out[i] = encode(F8E4M3, rng.normal(size=out[i].shape) * 2)
        elif value.name.endswith(".scales"):
            out[i] = to_storage(value.type.dtype, 0.5 + rng.random(out[i].shape))
    return out


def assert_close(value, got: np.ndarray, want: np.ndarray, message: str) -> None:
    got = decode(value.type.dtype, got).astype(np.float64)
    bound = 2**-7 if value.type.dtype == BF16 else BOUND
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), message)
    error = np.nanmax(np.abs(got - want)) / np.nanmax(np.abs(want))
    assert error < bound, f"{message}: {error}"


@pytest.mark.parametrize("target", ["cpu:baseline", "cpu"])
def test_products(compiled, reference, random_inputs, target):
    module = compiled(TEXT, target)
    for size in (1, 3, 19):
        for f in module.graph.functions:
            inputs = model_inputs(f, {"T": size}, random_inputs, size)
            (got,) = module.run(f.name, inputs, {"T": size})
            (want,) = reference(module.graph, f.name, inputs, {"T": size}, wide=True)
            assert_close(f.results[0], got, want, f"@{f.name}, T={size}, {target}")


def test_products_use_stored_weights_as_they_lie(compiled):
    sources = {k.name: k.source for k in compiled(TEXT).module.kernels}
    for name, source in sources.items():
        copies = " b = (float*)" in source or "b = (float*)space" in source
        assert copies == name.startswith(("scores", "gate_up_kn")), name
    assert "dilu_matmul(&weights_f8e4m3_f32_128_128, 2, " in sources["gate_up_kernel"]
    assert "matmul_kn_f8e4m3_f32_128_128(" in sources["absorbed_kn_kernel"]
    assert ".batch_rows = 144," in sources["absorbed_nk_kernel"]
    assert ".row0 = 64," in sources["absorbed_nk_kernel"]


E, I, HID, TOP = 5, 70, 136, 2


def experts_text(activation: str = "silu", model: str = "f32") -> str:
    parameters = (
        f"%x: {model}[T,{HID}], %indices: i64[T,{TOP}], %weights: f32[T,{TOP}],"
        f" %residual: {model}[T,{HID}]"
    )
    constants = (
        f"%gu: u8[{E},2,{I},{HID}], %gu.scales: f32[{E},2,1,2],"
        f" %down: u8[{E},{HID},{I}], %down.scales: f32[{E},2,1]"
    )
    nodes = f"""
      %gd: f32[{E},2,{I},{HID}] = decode(%gu) {{format=f8e4m3, dtype=f32}}
      %gw: f32[{E},2,{I},{HID}] = dequantize(%gd, %gu.scales) {{block=[128,128], dtype=f32}}
      %dd: f32[{E},{HID},{I}] = decode(%down) {{format=f8e4m3, dtype=f32}}
      %dw: f32[{E},{HID},{I}] = dequantize(%dd, %down.scales) {{block=[128,128], dtype=f32}}
      %a: f32[T,{HID}] = cast(%x) {{dtype=f32}}
      %e: f32[T,{HID}] = experts(%a, %indices, %weights, %gw, %dw) {{activation="{activation}"}}
      %c: {model}[T,{HID}] = cast(%e) {{dtype={model}}}
      %y: {model}[T,{HID}] = add(%c, %residual)
    """
    name = f"experts_{activation}_{model}"
    return function(name, parameters, constants, nodes, f"%y: {model}[T,{HID}]", "experts")


@pytest.mark.parametrize("grid", [0, 1, 2])
def test_experts(compiled, reference, random_inputs, planned, grid):
    graph = planned(
        "graph planned\n" + experts_text() + experts_text("gelu_tanh") + experts_text(model="bf16")
    )
    weights = {
        c.name: Weight(c.type, min(grid, 1 if c.name.startswith("down") else 2))
        for c in graph.functions[0].constants
    }
    graph = replace(graph, weights=weights)
    module = compiled(graph)
    for size in (1, 9):
        for f in graph.functions:
            inputs = model_inputs(f, {"T": size}, random_inputs, size)
            inputs[1] = np.random.default_rng(size).integers(0, E, (size, TOP))
            (got,) = module.run(f.name, inputs, {"T": size})
            (want,) = reference(graph, f.name, inputs, {"T": size}, wide=True)
            assert_close(f.results[0], got, want, f"@{f.name}, T={size}, grid {grid}")


def test_what_is_not_finite_stays_in_its_row(compiled, random_inputs):
    """Of products and of experts, at sizes that no tile divides."""
    module = compiled("graph planned\n" + experts_text() + plain("f32"))
    for f, size in itertools.product(module.graph.functions, (9, 45)):
        inputs = model_inputs(f, {"T": size}, random_inputs, size)
        if f.name.startswith("experts"):
            inputs[1] = np.random.default_rng(size).integers(0, E, (size, TOP))
        (before,) = module.run(f.name, inputs, {"T": size})
        rows = [1, size // 2, size - 1]
        inputs[0][rows] = np.array([np.nan, np.inf, -np.inf])[:, None]
        (after,) = module.run(f.name, inputs, {"T": size})
        others = [i for i in range(size) if i not in rows]
        np.testing.assert_array_equal(before[others], after[others], f.name)
        assert np.isnan(after[1]).all()


def test_no_tokens(compiled, random_inputs, reference):
    module = compiled("graph planned\n" + experts_text() + plain("f32"))
    for f in module.graph.functions:
        inputs = random_inputs(f, {"T": 0})
        (got,) = module.run(f.name, inputs, {"T": 0})
        assert got.shape[0] == 0 and got.dtype == F32.storage
