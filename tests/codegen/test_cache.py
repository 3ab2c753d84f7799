from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dilu.codegen.cache import cache_key, cached


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DILU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_entry_is_made_once(folder):
    made = []

    def make() -> bytes:
        made.append(1)
        return b"code"

    key = cache_key(["a", b"b"])
    assert [cached(key, ".so", make) for _ in range(3)] == [b"code"] * 3
    assert len(made) == 1
    (entry,) = [f for f in folder.rglob("*") if f.is_file()]
    assert entry.name == f"{key}.so"


def test_keys_know_where_parts_end():
    assert cache_key(["ab", "c"]) != cache_key(["a", "bc"])
    assert cache_key(["ab"]) == cache_key([b"ab"])


def test_a_failure_leaves_nothing(folder):
    def fail() -> bytes:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached("ab", ".so", fail)
    assert not [f for f in folder.rglob("*") if f.is_file()]


def test_a_killed_writer_leaves_no_entry(folder, monkeypatch):
    """The process dies between writing the temporary file and renaming it."""
    code = (
        "import time, pathlib, dilu.codegen.cache as c\n"
        "pathlib.Path.replace = lambda *_: (print('written', flush=True), time.sleep(60))\n"
        "c.cached('abcd', '.so', lambda: b'half')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "ab" / "abcd.so").exists()
    (orphan,) = (folder / "ab").iterdir()
    old = time.time() - 7200
    os.utime(orphan, (old, old))
    assert cached("abcd", ".so", lambda: b"whole") == b"whole"
    assert [f.name for f in (folder / "ab").iterdir()] == ["abcd.so"]


def test_a_cache_that_cannot_be_written_is_no_error(folder, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DILU_CACHE", str(blocked))
    assert cached("ab", ".so", lambda: b"code") == b"code"
