from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dilu.errors import DiluError
from dilu.runtime.artifact import replace
from dilu.runtime.artifact.replace import new_directory


def anything(_: Path) -> bool:
    return True


def write(target: Path, text: str) -> None:
    with new_directory(target, anything) as folder:
        (folder / "file").write_text(text)


def test_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "x"
    with new_directory(target, anything) as folder:
        (folder / "file").write_text("1")
        assert not target.exists()
    assert (target / "file").read_text() == "1"
    assert os.listdir(target.parent) == ["x"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replaces(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(replace, "_exchange", lambda a, b: False)
    write(tmp_path / "x", "1")
    write(tmp_path / "x", "2")
    assert (tmp_path / "x" / "file").read_text() == "2"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failure_leaves_nothing(tmp_path):
    write(tmp_path / "x", "1")

    def interrupted():
        with new_directory(tmp_path / "x", anything) as folder:
            (folder / "file").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x" / "file").read_text() == "1"
    assert os.listdir(tmp_path) == ["x"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "x").mkdir()
    with new_directory(tmp_path / "x", lambda _: False) as folder:
        (folder / "file").write_text("1")
    assert (tmp_path / "x" / "file").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_stays(tmp_path, kind):
    target = tmp_path / "x"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").touch()
    message = "this exists and is not a dilu artifact, so it is not replaced"
    with pytest.raises(DiluError, match=message), new_directory(target, lambda _: False):
        raise AssertionError
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "x"
    with pytest.raises(DiluError, match="cannot write here"), new_directory(target, anything):
        raise AssertionError


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = f"""
    import os, signal
    from pathlib import Path
    from dilu.runtime.artifact.replace import new_directory
    with new_directory(Path({str(tmp_path / "x")!r}), lambda _: True) as folder:
        (folder / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".x.")
    write(tmp_path / "x", "1")
    assert os.listdir(tmp_path) == ["x"]
