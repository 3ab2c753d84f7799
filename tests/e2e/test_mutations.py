"""A slice of the configurations that are almost right; `python tests/mutations.py` tries more."""

from __future__ import annotations

import json
from pathlib import Path

import mutations
import pytest

pytestmark = pytest.mark.slow


def test_no_mutant_is_wrong(tmp_path: Path):
    """Whatever is changed in a configuration, the logits are transformers', or it is refused."""
    nursery = mutations.Nursery(tmp_path, ("qwen3_moe", "qwen3_sliding"))
    seen = {str(mutant): nursery.judge(mutant) for mutant in nursery.mutants(8, seed=5)}
    assert {verdict.kind for verdict in seen.values()} >= {"right", "refused"}
    assert not {k: v for k, v in seen.items() if v.kind in ("wrong", "internal")}


def test_the_judge_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Held to a reference that is off, to weights that are made up, to an error of another kind."""
    nursery = mutations.Nursery(tmp_path, ("llama",))
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    sound = mutations.Mutant("llama", (), config)
    assert nursery.judge(sound).kind == "right"
    want = nursery.reference(sound)
    monkeypatch.setattr(nursery, "reference", lambda _: want + 0.01 * abs(want).max())
    assert nursery.judge(sound).kind == "wrong"
    monkeypatch.setattr(nursery, "reference", lambda _: "made up by transformers: a head")
    assert nursery.judge(sound).kind == "wrong"

    def broken(*_: object, **__: object) -> None:
        raise KeyError("weights")

    monkeypatch.setattr(mutations.dilu, "compile", broken)
    assert nursery.judge(sound).kind == "internal"
