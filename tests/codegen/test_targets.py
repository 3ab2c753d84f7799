from __future__ import annotations

import pytest

from dilu.codegen import targets
from dilu.codegen.targets import find_target
from dilu.errors import DiluError
from dilu.ir.dtypes import F8E4M3, F32
from dilu.runtime.cpu.features import parse_cpuinfo

ZEN3 = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse sse2 avx avx2 fma f16c bmi1 bmi2
bugs\t\t: spectre_v1
"""


def test_targets_are_found_by_name():
    assert find_target("cpu:baseline").requires == ()
    assert find_target("cpu:x86-64-v3").flags[:2] == ("-mavx2", "-mfma")
    assert not find_target("null").executable
    assert F32 in find_target("null").native
    assert F8E4M3 not in find_target("cpu:x86-64-v3").native


def test_an_unknown_target_is_an_error_that_lists_the_known():
    with pytest.raises(DiluError, match="unknown target 'cuda:99'") as error:
        find_target("cuda:99")
    assert error.value.hint is not None and "cpu:x86-64-v3" in error.value.hint


def test_the_host_gets_the_best_target_it_can_run(monkeypatch):
    monkeypatch.setattr(targets, "features", lambda: parse_cpuinfo(ZEN3))
    assert find_target("cpu").name == "cpu:x86-64-v3"
    monkeypatch.setattr(targets, "features", lambda: frozenset({"sse2", "avx2"}))
    assert find_target("cpu").name == "cpu:baseline"
