from __future__ import annotations

from pathlib import Path

import pytest

from dilu import knobs
from dilu.errors import DiluError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in knobs.KNOBS:
        monkeypatch.delenv(knob.name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_defaults():
    values = {knob.name: knob.get() for knob in knobs.KNOBS}
    assert values == {
        "DILU_DEBUG": False,
        "DILU_PRINT": (),
        "DILU_DUMP": None,
        "DILU_CACHE": Path.home() / ".cache" / "dilu",
        "DILU_THREADS": None,
        "DILU_CC": (),
        "DILU_CFLAGS": (),
        "DILU_ALLOW_OVERCOMMIT": False,
        "DILU_GPU_LIBRARY": None,
        "DILU_GPU_GRAPHS": True,
        "DILU_GPU_SYNC": False,
        "DILU_TRITON_3_2": None,
        "DILU_TIMEOUT": 120,
        "DILU_COLLECTIVES": "auto",
        "NCCL_HOSTID": "",
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }


@pytest.mark.parametrize(
    ("knob", "text", "value"),
    [
        (knobs.DEBUG, "1", True),
        (knobs.DEBUG, "Yes", True),
        (knobs.DEBUG, "off", False),
        (knobs.PRINT, "all", ("all",)),
        (knobs.PRINT, "before:a, after:b", ("before:a", "after:b")),
        (knobs.DUMP, "~/d", Path.home() / "d"),
        (knobs.CACHE, "/c", Path("/c")),
        (knobs.THREADS, "3", 3),
        (knobs.CC, "zig cc", ("zig", "cc")),
        (knobs.CFLAGS, "-g '-DA=b c'", ("-g", "-DA=b c")),
        (knobs.ALLOW_OVERCOMMIT, "true", True),
        (knobs.GPU_LIBRARY, "/d/libcuda.so.1", Path("/d/libcuda.so.1")),
        (knobs.GPU_GRAPHS, "0", False),
        (knobs.GPU_SYNC, "1", True),
        (knobs.COLLECTIVES, "host", "host"),
    ],
)
def test_value(knob, text, value, monkeypatch):
    monkeypatch.setenv(knob.name, text)
    assert knob.get() == value


@pytest.mark.parametrize("knob", knobs.KNOBS, ids=lambda knob: knob.name)
def test_empty_is_unset(knob, monkeypatch):
    unset = knob.get()
    monkeypatch.setenv(knob.name, "")
    assert knob.get() == unset


@pytest.mark.parametrize(
    ("knob", "text", "why"),
    [
        (knobs.DEBUG, "maybe", "neither yes nor no"),
        (knobs.PRINT, "during:a", "'during:a' is not a moment of the pipeline"),
        (knobs.PRINT, "after:", "'after:' is not a moment of the pipeline"),
        (knobs.THREADS, "0", "not a whole number above zero"),
        (knobs.THREADS, "many", "not a whole number above zero"),
        (knobs.CFLAGS, "'-g", "No closing quotation"),
    ],
)
def test_bad_value_names_the_variable(knob, text, why, monkeypatch):
    monkeypatch.setenv(knob.name, text)
    with pytest.raises(DiluError, match=why) as caught:
        knob.get()
    assert str(caught.value).startswith(f"{knob.name}={text!r}: ")
    assert f"hint: {knob.name} takes: {knob.type}" in str(caught.value)


def test_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert knobs.CACHE.get() == Path("/x/dilu")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert knobs.CACHE.get() == Path.home() / ".cache" / "dilu"


def test_table_has_every_knob():
    declared = {v.name for v in vars(knobs).values() if isinstance(v, knobs.Knob)}
    assert [row[0] for row in knobs.table()] == [knob.name for knob in knobs.KNOBS]
    assert {row[0] for row in knobs.table()} == declared
