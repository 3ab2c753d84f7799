from __future__ import annotations

import pytest

from dilu.errors import DiluError
from dilu.runtime import targets
from dilu.runtime.choice import Choice
from dilu.runtime.targets import choose_target


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(targets, "features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(targets, "architecture", lambda: "x86_64")


@pytest.fixture
def artifact(toy):
    library = {"library": "x.so", "architecture": "x86_64"}
    toy.manifest["targets"] = {
        "null": {"library": None},
        "cpu:baseline": {**library, "requires": []},
        "cpu:x86-64-v3": {**library, "requires": ["avx2", "fma"]},
        "cpu:x86-64-v4": {**library, "requires": ["avx2", "fma", "avx512f"]},
        "cpu:neon": {**library, "architecture": "aarch64"},
    }
    return toy


def test_the_best_that_runs(artifact):
    choice = choose_target(artifact)
    assert choice.target == "cpu:x86-64-v3"
    assert choice.device is None
    assert "needs avx2, fma" in choice.reason
    assert choose_target(artifact, "cpu").target == "cpu:x86-64-v3"
    assert choose_target(artifact, device="cpu").target == "cpu:x86-64-v3"


def test_the_one_that_was_asked_for(artifact):
    assert choose_target(artifact, "cpu:baseline") == Choice("cpu:baseline", "it was asked for")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cuda:80", r"no target 'cuda:80'(.|\n)*it has: null, cpu:baseline, .*--target cpu"),
        ("cpu:x86-64-v4", "cpu:x86-64-v4 needs avx512f, which this processor lacks"),
        ("cpu:neon", "cpu:neon is for aarch64, and this machine is x86_64"),
        ("null", "null has no machine code"),
    ],
)
def test_what_does_not_run(artifact, wanted, message):
    with pytest.raises(DiluError, match=message):
        choose_target(artifact, wanted)


def test_the_command_that_helps(artifact):
    artifact.manifest["targets"] = {"null": {"library": None}}
    artifact.manifest["options"] = {"source": "/models/m"}
    with pytest.raises(DiluError, match="dilu compile /models/m --target null --target cpu"):
        choose_target(artifact)
