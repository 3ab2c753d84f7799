"""Sharded models on devices, under Triton's interpreter; benchmarks/gpu/mesh.py runs more of them
on a GPU. The reference is one process on the CPU."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import ranks
from interpreted import INTERPRETED

import dilu
from dilu.codegen import targets

pytestmark = pytest.mark.slow
TOKENS = 2  # the interpreter takes seconds for each
MET = {"host": "ranks meet on the host", "device": "ranks meet on their devices"}


@pytest.mark.parametrize(
    ("mesh", "world", "where", "devices"),
    [
        ("ep=2,tp=2", 4, "host", "interpreter:0"),
        ("ep=2,tp=2", 4, "device", "interpreter:0"),
        ("ep=2", 2, "device", "interpreter:0"),
        ("tp=2", 2, "auto", "interpreter:0,cpu"),  # one pads its batches, the other does not
    ],
)
def test_equals_one_process_on_the_cpu(mesh, world, where, devices, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
    checkpoints.make_checkpoint(tmp_path / "model", "qwen3_moe", tokenizer=True)
    dilu.compile(tmp_path / "model").save(tmp_path / "one.dilu")
    with dilu.load(tmp_path / "one.dilu") as session:
        alone = ranks.found(session, TOKENS)
    both = ["cpu", INTERPRETED.name]
    artifact = dilu.compile(tmp_path / "model", mesh=mesh, target=both).save(tmp_path / "m.dilu")
    options = {
        "DILU_TEST_DEVICE": devices,
        "DILU_TEST_TOKENS": str(TOKENS),
        "DILU_COLLECTIVES": where,
    }
    each = ranks.run(artifact, tmp_path / "out", world, **options)
    assert MET.get(where, MET["host"]) in each[0]["reason"]
    for own in each:
        for got, want in zip(own["logits"], alone["logits"], strict=True):
            assert np.abs(np.array(got) - want).max() / np.abs(want).max() < 1e-5
        assert own["tokens"] == alone["tokens"]
        if "ep" in mesh:
            assert own["sent"] > 0
            assert own["expert_load"] == alone["expert_load"]
