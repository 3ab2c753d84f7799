"""Artifacts that earlier versions wrote still load, run and are described.

`tests/artifacts/format_1.tar.xz` was written by version 0.1.0, of two layers of Qwen3-MoE in FP8
for cpu:baseline, its weights bundled; what is expected is what that version made of it.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

import dilu
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.cpu.features import architecture
from dilu.runtime.describe import describe_artifact, kernel_text

FORMAT_1 = Path(__file__).parents[1] / "artifacts" / "format_1.tar.xz"
PROMPT = [5, 17, 3, 99]
LOGITS = [-0.39987, -0.00958, 1.02664, -0.06734, 1.03889, 1.01216, 0.29217, 0.90299]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FORMAT_1) as packed:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since 3.11.4
        packed.extractall(folder, **safe)
    return folder / "format_1.dilu"


def test_it_is_described(saved):
    artifact = Artifact.open(saved)
    text = describe_artifact(artifact)
    assert "format 1, made by dilu 0.1.0" in text
    kernel = artifact.targets["cpu:baseline"]["kernels"][0]["name"]
    assert "dilu_" in kernel_text(artifact, kernel)


@pytest.mark.skipif(architecture() != "x86_64", reason="its machine code is for x86-64")
def test_it_runs(saved):
    with dilu.load(saved) as session:
        (logits,) = session.language.logits([PROMPT])
        assert np.allclose(logits[-1][:8], LOGITS, atol=1e-4)
        tokens = [token for _, token in session.language.loop.generate([PROMPT], max_tokens=6)]
        assert tokens == [199, 182, 155, 162, 6, 51]
        assert session.generate("Hello", max_tokens=8) == "9\rns%R%"


def test_it_is_saved_again(saved, tmp_path):
    """Opened and saved, it is the same, whatever this version's manifest has in addition."""
    again = Artifact.open(Artifact.open(saved).save(tmp_path / "again.dilu"))
    assert again.manifest == Artifact.open(saved).manifest
