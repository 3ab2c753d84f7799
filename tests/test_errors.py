from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import dilu
from dilu.errors import DiluError, Loc, UnsupportedError


@pytest.mark.parametrize(
    ("loc", "text"),
    [
        (Loc("model.py"), "model.py"),
        (Loc("model.py", 12), "model.py:12"),
        (
            Loc("m.safetensors", tensor="layers.0.up.weight"),
            "m.safetensors, tensor 'layers.0.up.weight'",
        ),
    ],
)
def test_loc(loc, text):
    assert str(loc) == text


def test_message_alone():
    assert DiluError("no such file").format() == "error: no such file"


def test_everything_in_order():
    err = DiluError("shapes differ", Loc("model.py", 12), hint="transpose the weight")
    err.in_pass("fuse_loops", "%12 = matmul(%3, %4)")
    assert err.format() == (
        "error: shapes differ\n"
        "  at model.py:12\n"
        "  in pass fuse_loops\n"
        "  node %12 = matmul(%3, %4)\n"
        "  hint: transpose the weight"
    )


def test_innermost_pass_and_place_stay():
    err = DiluError("bad", Loc("inner.py", 1)).in_pass("inner", "%1 = add(%0, %0)")
    assert err.in_pass("outer", "%9 = call(%8)", Loc("outer.py", 2)) is err
    assert (err.pass_name, err.node, err.loc) == ("inner", "%1 = add(%0, %0)", Loc("inner.py", 1))


def test_pass_supplies_a_missing_place():
    assert DiluError("bad").in_pass("p", loc=Loc("m.py", 3)).loc == Loc("m.py", 3)


def test_long_nodes_are_one_short_line():
    line = str(DiluError("bad").in_pass("p", "%1 =\n  concat(" + "%0, " * 100 + ")")).splitlines()
    assert line[2].startswith("  node %1 = concat(%0, ")
    assert line[2].endswith("…")
    assert len(line) == 3
    assert len(line[2]) < 180


def test_crosses_processes():
    err = UnsupportedError("bad", Loc("m.py", 3), "mend it").in_pass("p", "%1")
    again = pickle.loads(pickle.dumps(err))
    assert type(again) is UnsupportedError
    assert str(again) == str(err)


def test_public_names():
    assert dilu.DiluError is DiluError
    assert set(dilu.__all__) <= set(dir(dilu))
    with pytest.raises(AttributeError, match="module 'dilu' has no attribute 'nothing'"):
        dilu.nothing


def test_importing_dilu_loads_nothing():
    code = "import sys, dilu; print([m for m in sys.modules if m.startswith('dilu.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
