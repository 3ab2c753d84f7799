"""Sharded models on devices: under Triton's interpreter, or on the GPU that the ranks then share.

The reference is one process on the CPU.
"""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import ranks
from interpreted import INTERPRETED, PLACE, TARGET, bound

import dilu
from dilu.codegen import targets

pytestmark = pytest.mark.slow

#: The interpreter takes seconds for a token.
TOKENS = 12 if PLACE else 2
CASES = [("qwen3_moe", "ep=2,tp=2", 4), ("qwen3_moe", "ep=2", 2)]
if PLACE:
    CASES += [
        ("qwen3_moe", "ep=8", 8),
        ("glm4_moe", "ep=2", 2),
        ("deepseek_v3", "ep=4", 4),
        ("deepseek_v3", "dp=2,tp=2", 4),
        ("llama", "tp=2", 2),
    ]


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("family", "mesh", "world"), CASES)
def test_equals_one_process_on_the_cpu(family, mesh, world, where, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
    checkpoints.make_checkpoint(tmp_path / "model", family, tokenizer=True)
    dilu.compile(tmp_path / "model").save(tmp_path / "one.dilu")
    with dilu.load(tmp_path / "one.dilu") as session:
        alone = ranks.found(session, TOKENS)
    target = TARGET or INTERPRETED.name
    artifact = dilu.compile(tmp_path / "model", mesh=mesh, target=target).save(tmp_path / "m.dilu")
    options = {
        "DILU_TEST_DEVICE": PLACE or INTERPRETED.name,
        "DILU_TEST_TOKENS": str(TOKENS),
        "DILU_COLLECTIVES": where,
        # NCCL refuses two processes on one device, but not on two machines.
        "NCCL_HOSTID": "machine{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    each = ranks.run(artifact, tmp_path / "out", world, **options)
    met = {"host": "on the host", "device": "on their devices"}[where]
    assert all(met in own["reason"] for own in each)
    for own in each:
        for got, want in zip(own["logits"], alone["logits"], strict=True):
            assert np.abs(np.array(got) - want).max() / np.abs(want).max() < bound(1e-5)
        assert own["tokens"] == alone["tokens"]
        if "ep" in mesh:
            assert own["sent"] > 0
            assert own["expert_load"] == alone["expert_load"]
