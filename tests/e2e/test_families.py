"""Whole models: checkpoint → artifact → logits and text, against transformers' own model.

For each family: a tiny random FP8 checkpoint of ragged sizes; the reference is the transformers
module in f32 on weights dequantized in f64.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch

import dilu
from dilu.runtime.call.batch import pages_for
from dilu.runtime.session import Session
from dilu.runtime.text.sequences import PagePool, Sequence, Step, batch

PROMPTS = ([5, 17, 3, 99, 42, 7, 250, 31, 8], [11, 4], [200, 100, 50, 25, 12, 6, 3, 90, 45, 22, 13])
DECODE = 32
VARIANTS = ("llama_scaled", "qwen2", "qwen3_sliding", "deepseek_v3_yarn")


@dataclass
class Loaded:
    """A tiny checkpoint, its reference and the session that runs its artifact."""

    reference: checkpoints.TinyCheckpoint
    session: Session


def load(
    folder: Path, family: str, *, target: str = "cpu", dtype: str = "f32", **options
) -> Loaded:
    reference = checkpoints.make_checkpoint(folder / "model", family, tokenizer=True, **options)
    path = folder / "model.dilu"
    dilu.compile(reference.path, target=target, dtype=dtype).save(path)
    return Loaded(reference, dilu.load(path))


@pytest.fixture(scope="module", params=checkpoints.FIVE)
def loaded(request, tmp_path_factory) -> Loaded:
    return load(tmp_path_factory.mktemp(request.param), request.param)


class Runner:
    """Runs sequences step by step and keeps every wanted row's logits."""

    def __init__(self, session: Session, prompts: SequenceOf[list[int]], room: int) -> None:
        self.function = session.function("main")
        self.page_size = session.artifact.manifest["language_model"]["page_size"]
        each = [pages_for(len(p) + room, self.page_size) for p in prompts]
        self.function.allocate({"B": sum(each)})
        pool = PagePool(sum(each))
        self.sequences = [
            Sequence(list(p), pool.take(n)) for p, n in zip(prompts, each, strict=True)
        ]

    def run(self) -> list[np.ndarray]:
        """Run what is not in the cache yet; return the logits of the new rows per sequence."""
        counts = [len(s.tokens) - s.done for s in self.sequences]
        steps = [
            Step(s, len(s.tokens), tuple(range(s.done, len(s.tokens)))) for s in self.sequences
        ]
        (logits,) = self.function.run(*batch(steps, self.page_size))
        for s in self.sequences:
            s.done = len(s.tokens)
        return np.split(logits, np.cumsum(counts)[:-1])

    def push(self, tokens: SequenceOf[int]) -> None:
        for s, token in zip(self.sequences, tokens, strict=True):
            s.tokens.append(token)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def decode(session: Session, prompts: SequenceOf[list[int]], count: int) -> list[np.ndarray]:
    """Return per prompt the logits of all its rows, then of `count` greedy steps."""
    runner = Runner(session, prompts, count)
    rows = [[part] for part in runner.run()]
    for _ in range(count):
        runner.push([int(r[-1][-1].argmax()) for r in rows])
        for mine, new in zip(rows, runner.run(), strict=True):
            mine.append(new)
    return [np.concatenate(r) for r in rows]


def check_against_reference(loaded: Loaded, bound: float) -> None:
    """Prompt and decode steps: logits within `bound`, and the same greedy tokens."""
    prompt = list(PROMPTS[0])
    (logits,) = decode(loaded.session, [prompt], DECODE)
    tokens = prompt + [int(row.argmax()) for row in logits[len(prompt) - 1 :]]
    want = loaded.reference.logits(tokens[:-1]).numpy()
    assert relative_error(logits, want) < bound
    assert tokens[len(prompt) : -1] == loaded.reference.greedy(prompt, DECODE)


@pytest.mark.slow
def test_logits_and_greedy_tokens_equal_transformers(loaded: Loaded):
    check_against_reference(loaded, 1e-4)


@pytest.mark.slow
def test_a_batch_of_prompts_is_bitwise_each_alone(loaded: Loaded):
    together = decode(loaded.session, PROMPTS, 4)
    for prompt, rows in zip(PROMPTS, together, strict=True):
        (alone,) = decode(loaded.session, [prompt], 4)
        np.testing.assert_array_equal(rows, alone)


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(loaded: Loaded):
    (here,) = decode(loaded.session, PROMPTS[:1], 2)
    with dilu.load(loaded.session.artifact, threads=3) as other:
        (there,) = decode(other, PROMPTS[:1], 2)
    np.testing.assert_array_equal(here, there)


@pytest.mark.slow
def test_a_long_prompt_crosses_pages(loaded: Loaded):
    prompt = torch.randint(2, 270, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    (logits,) = decode(loaded.session, [prompt], 0)
    assert relative_error(logits, loaded.reference.logits(prompt).numpy()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.usefixtures("compiled_quickly")
def test_variants_of_the_families(family: str, tmp_path: Path):
    check_against_reference(load(tmp_path, family), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"scale_dtype": torch.bfloat16, "shards": 3},
        {"block": (64, 32)},
        {"exclude": ("q_a_proj", "down_proj"), "plain_dtype": torch.float16},
        {"quantized": False, "plain_dtype": torch.float32},
    ],
    ids=["bf16-scales-sharded", "other-blocks", "excluded-f16", "plain-f32"],
)
@pytest.mark.usefixtures("compiled_quickly")
def test_formats_of_checkpoints(options: dict, tmp_path: Path):
    check_against_reference(load(tmp_path, "deepseek_v3", **options), 1e-4)


@pytest.mark.slow
def test_baseline_target_agrees(tmp_path: Path):
    check_against_reference(load(tmp_path, "deepseek_v3", target="cpu:baseline"), 1e-4)


@pytest.mark.slow
def test_bf16_activations_stay_close(tmp_path: Path):
    loaded = load(tmp_path, "qwen3_moe", dtype="bf16")
    prompt = list(PROMPTS[0])
    (logits,) = decode(loaded.session, [prompt], 0)
    if logits.dtype == np.uint16:
        logits = (logits.astype(np.uint32) << 16).view(np.float32)
    assert relative_error(logits, loaded.reference.logits(prompt).numpy()) < 0.05


@pytest.mark.slow
def test_text_from_the_public_api(loaded: Loaded):
    text = loaded.session.generate("def f(x):", max_tokens=8, temperature=0.0)
    assert text == "".join(loaded.session.stream("def f(x):", max_tokens=8, temperature=0.0))
