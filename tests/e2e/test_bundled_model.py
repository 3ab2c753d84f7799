"""The bundled model through the whole house: perplexity, text, start-up and memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dilu

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODEL = EXAMPLES / "stdlib-moe"
WINDOW = 256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundled") / "model.dilu"
    dilu.compile(MODEL).save(path)
    return path


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from fp8_checkpoint import load_reference
    finally:
        sys.path.pop(0)
    return load_reference(MODEL)


def negative_log_likelihood(logits: np.ndarray, tokens: list[int]) -> float:
    """Return the sum over positions of -log p(next token), in f64."""
    x = logits[:-1].astype(np.float64)
    top = x.max(axis=1)
    log_sum = np.log(np.exp(x - top[:, None]).sum(axis=1)) + top
    return float((log_sum - x[np.arange(len(x)), tokens[1:]]).sum())


def test_perplexity_on_held_out_text_equals_transformers(artifact: Path, reference):
    text = (MODEL / "heldout.txt").read_text()
    with dilu.load(artifact) as session:
        tokens = session.language.encode(text)
        windows = [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW, WINDOW)][:24]
        ours = session.language.logits(windows)
    mine = theirs = 0.0
    for window, logits in zip(windows, ours, strict=True):
        with torch.no_grad():
            want = reference(torch.tensor([window])).logits[0].numpy()
        mine += negative_log_likelihood(logits, window)
        theirs += negative_log_likelihood(want, window)
    count = len(windows) * (WINDOW - 1)
    mine, theirs = np.exp(mine / count), np.exp(theirs / count)
    print(f"perplexity {mine:.4f}, transformers {theirs:.4f}, over {count} tokens")
    assert abs(mine / theirs - 1) < 0.005
    assert theirs < 70  # it has learnt: a uniform guess is 2048


def test_the_command_line_writes_text_and_figures(artifact: Path):
    command = [sys.executable, "-m", "dilu", "run", str(artifact), "--prompt", "Return the"]
    done = subprocess.run([*command, "--max-tokens", "24"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[A-Za-z]{3,}", done.stdout)) >= 8
    for figure in ("tok/s", "first token", "resident"):
        assert figure in done.stderr


def test_weights_stay_fp8_in_memory(artifact: Path):
    """What a run keeps beyond the mapped checkpoint is small: no copy in a wider type exists."""
    script = f"""
import dilu
from pathlib import Path
def anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) * 1024
import numpy
before = anonymous()
session = dilu.load({str(artifact)!r}, threads=1)
function = session.function("main")
session.language.logits([[5, 6, 7, 8]])
cache = function.state_bytes({{"B": 1}})
print(anonymous() - before - cache)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 1e6:.1f} MB beyond the mapped weights and the cache")
    bf16_copy = 2 * 6_440_000  # parameters of the model
    assert int(done.stdout) < bf16_copy
