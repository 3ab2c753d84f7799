"""Whole models as GPUs get them, under Triton's interpreter: source, plans, padded sizes, all but
the machine code.

The reference is the CPU's target, which other tests hold to transformers' own models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from interpreted import INTERPRETED, bound, interpreted_target, under_test

import dilu
from dilu.codegen import targets
from dilu.ir.dtypes import F16
from dilu.runtime.session import Session

pytestmark = pytest.mark.slow

HALVES = interpreted_target(F16, "interpreter:16")
#: Two of a kind, so that kernels go from layer to layer, after a dense one where there are any.
LAYERS = {"glm4_moe": 3, "deepseek_v3": 3}
PROMPTS = ([5, 17, 3, 99, 42, 7, 250, 31, 8], [11, 4, 200, 100, 50, 25, 12, 6, 3, 90])


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED, HALVES))


def sessions(folder: Path, family: str, *names: str, dtype: str = "f32") -> Iterator[Session]:
    """Yield a session on the CPU, then one per name of a target on a device."""
    layers = LAYERS.get(family, 2)
    made = checkpoints.make_checkpoint(
        folder / "model", family, tokenizer=True, num_hidden_layers=layers
    )
    artifact = folder / "m.dilu"
    devices = [under_test(name) for name in names]
    targets = [target for target, _ in devices]
    dilu.compile(made.path, target=["cpu", *targets], dtype=dtype).save(artifact)
    yield dilu.load(artifact, device="cpu")
    for target, device in devices:
        yield dilu.load(artifact, target=target, device=device)


def error(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("family", checkpoints.FIVE)
def test_logits_and_greedy_tokens_equal_the_cpus(family, tmp_path):
    """A batch of prompts goes through the kernels for many rows, each token after through those
    for few; operands are f32, or the two f16 parts that stand for one."""
    name = "interpreter:16" if family in ("llama", "deepseek_v3") else "interpreter:0"
    cpu, gpu = sessions(tmp_path, family, name)
    with cpu, gpu:
        want = cpu.language.loop.logits(PROMPTS)
        assert error(gpu.language.loop.logits(PROMPTS), want) < bound(2e-5)
        tokens = [list(s.language.loop.generate(PROMPTS, max_tokens=3)) for s in (cpu, gpu)]
        assert tokens[0] == tokens[1]


def test_activations_in_bf16(tmp_path):
    cpu, gpu = sessions(tmp_path, "qwen3_moe", "interpreter:0", dtype="bf16")
    with cpu, gpu:
        want = cpu.language.loop.logits(PROMPTS)
        assert error(gpu.language.loop.logits(PROMPTS), want) < 3e-2


def test_weights_with_nan_codes(tmp_path):
    """A NaN among the weights makes the outcome NaN, not 480 times something."""
    made = checkpoints.make_checkpoint(
        tmp_path / "model", "llama", tokenizer=True, num_hidden_layers=2
    )
    (file,) = made.path.glob("*.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        names = [n for n in tensors.keys() if n.endswith("down_proj.weight")]  # noqa: SIM118
    poison(file, names[-1])
    artifact = tmp_path / "m.dilu"
    target, device = under_test()
    dilu.compile(made.path, target=["cpu", target]).save(artifact)
    with dilu.load(artifact, device="cpu") as session:
        want = session.language.loop.logits(PROMPTS[:1])[0]
    assert np.isnan(want).any()
    with dilu.load(artifact, target=target, device=device) as session:
        got = session.language.loop.logits(PROMPTS[:1])[0]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


def poison(file: Path, name: str) -> None:
    """Put the code of NaN into the first place of a tensor of e4m3."""
    import json

    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[8 + size + start] = 0x7F
    file.write_bytes(data)
