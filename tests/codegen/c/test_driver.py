from __future__ import annotations

from pathlib import Path

import pytest

from dilu.codegen.c import driver
from dilu.codegen.c.driver import compile_source, find_compiler
from dilu.codegen.targets import find_target
from dilu.errors import DiluError

BASELINE = find_target("cpu:baseline")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DILU_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DILU_CC", raising=False)
    monkeypatch.delenv("DILU_CFLAGS", raising=False)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DiluError, match="no C compiler was found") as error:
        find_compiler()
    assert error.value.hint is not None and "ziglang" in error.value.hint


def test_the_wheel_stands_in_for_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda _: object())
    command = find_compiler()
    assert command[1:] == ("-m", "ziglang", "cc")
    assert "-mcpu=baseline" in driver._general(command)
    assert driver._general(("/usr/bin/cc",)) == ()


def test_a_chosen_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setenv("DILU_CC", "no-such-compiler -m64")
    with pytest.raises(DiluError, match="DILU_CC='no-such-compiler' is not found"):
        find_compiler()


def test_a_failing_compile_says_what_and_keeps_the_source(tmp_path):
    with pytest.raises(DiluError, match=r"error: .*banana") as error:
        compile_source("int f(void) { return banana; }\n", BASELINE)
    assert error.value.hint is not None
    kept = Path(error.value.hint.rsplit(" ", 1)[1])
    assert kept.read_text() == "int f(void) { return banana; }\n"
    kept.unlink()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_compiler_that_is_killed(monkeypatch, tmp_path):
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\ncase "$1" in --version) echo 1;; *) kill -9 $$;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("DILU_CC", str(script))
    with pytest.raises(DiluError, match="failed"):
        compile_source("int x;\n", BASELINE)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_no_flag_changes_the_value_of_an_expression():
    flags = " ".join(driver.FLAGS)
    assert "fast-math" not in flags and "unsafe" not in flags and "finite" not in flags
    assert "-ffp-contract=off" in flags


def test_options_are_part_of_the_key(monkeypatch, tmp_path):
    compile_source("int x;\n", BASELINE)
    compile_source("int x;\n", BASELINE)
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1
    monkeypatch.setenv("DILU_CFLAGS", "-DY")
    compile_source("int x;\n", BASELINE)
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2
