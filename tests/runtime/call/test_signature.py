"""Signatures as a manifest has them: read, checked, and old artifacts without them."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest

import dilu
from dilu.errors import DiluError
from dilu.runtime.call.signature import Signature
from dilu.runtime.call.tree import build


class Point(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Output:
    logits: object
    extra: object = None


def slot(name, value, how="either", optional=False):
    return {"name": name, "how": how, "value": value, "optional": optional}


SIGNATURE = {
    "inputs": [
        slot("x", {"parameter": 1}),
        slot(
            None, {"list": [{"parameter": 0}, {"constant": "nan", "type": "float"}]}, "positional"
        ),
        slot("k", {"constant": 3, "type": "int"}, "keyword", optional=True),
    ],
    "result": {"dict": [["a", {"result": 0}], ["n", {"size": "2*N"}], ["same", {"parameter": 1}]]},
    "writes": [[1, 0]],
    "conditions": [["N % 2", "==", 0], ["N", "<=", "M"]],
}
ENTRY = {
    "parameters": [{"name": "p"}, {"name": "q"}],
    "results": [{"name": "r"}],
    "signature": SIGNATURE,
}
TYPES = ["f32[N]", "f32[M]"]


def test_arguments_go_where_they_belong():
    signature = Signature("f", ENTRY, TYPES)
    assert signature.arguments(["x", ["p", float("nan")]], {}) == ["p", "x"]
    assert signature.arguments(["x", ("p", float("nan"))], {"k": 3}) == ["p", "x"]
    assert signature.writes == {1: 0}
    assert signature.returned_parameters == {1}
    made = signature.structured(["r"], {1: "x"}, {"N": 4})
    assert made == {"a": "r", "n": 8, "same": "x"}
    assert list(made) == ["a", "n", "same"]


def test_errors_show_what_is_expected():
    signature = Signature("f", ENTRY, TYPES)
    with pytest.raises(DiluError, match=r"takes 2 arguments, not 0(.|\n)*x: f32\[M\], \*: \[f32"):
        signature.arguments([], {})
    with pytest.raises(DiluError, match="the argument k is 4, but the program was compiled for 3"):
        signature.arguments(["x", ["p", float("nan")]], {"k": 4})
    with pytest.raises(DiluError, match=r"the argument 1\[1\] is 0.5, .* compiled for nan only"):
        signature.arguments(["x", ["p", 0.5]], {})


def test_conditions():
    signature = Signature("f", ENTRY, TYPES)
    signature.check({"N": 4, "M": 4})
    signature.check({"N": 4})  # what is not known is not checked
    with pytest.raises(DiluError, match=r"f: the program holds for N % 2 == 0 only, and N=3"):
        signature.check({"N": 3, "M": 4})
    with pytest.raises(DiluError, match=r"holds for N <= M only, and M=2, N=4(.|\n)*compile it"):
        signature.check({"N": 4, "M": 2})


def test_without_a_signature_all_is_flat():
    flat = Signature(
        "f", {"parameters": [{"name": "p"}, {"name": "q"}], "results": [{}, {}]}, TYPES
    )
    assert flat.arguments([1, 2], {}) == flat.arguments([1], {"q": 2}) == [1, 2]
    assert flat.structured([3, 4], {}, {}) == (3, 4)
    one = Signature("f", {"parameters": [], "results": [{}]}, [])
    assert one.structured([3], {}, {}) == 3


BROKEN = {
    "inputs missing": lambda s: s.pop("inputs"),
    "a parameter too many": lambda s: s["inputs"][0].update(value={"parameter": 2}),
    "a parameter twice": lambda s: s["inputs"][0].update(value={"parameter": 0}),
    "a negative parameter": lambda s: s["inputs"][0].update(value={"parameter": -1}),
    "a result too many": lambda s: s.update(result={"result": 1}),
    "a result among inputs": lambda s: s["inputs"][0].update(value={"result": 0}),
    "an unknown kind": lambda s: s.update(result={"pickle": "b"}),
    "an unknown way": lambda s: s["inputs"][0].update(how="sideways"),
    "a name that is none": lambda s: s["inputs"][0].update(name=7),
    "a constant of another type": lambda s: s.update(result={"constant": 1, "type": "str"}),
    "a float that is none": lambda s: s.update(result={"constant": "x", "type": "float"}),
    "a size that is none": lambda s: s.update(result={"size": "N.real"}),
    "a key that is none": lambda s: s.update(result={"dict": [[None, {"result": 0}]]}),
    "an unknown relation": lambda s: s.update(conditions=[["N", "in", 3]]),
    "half a condition": lambda s: s.update(conditions=[["N", "=="]]),
    "a write to nowhere": lambda s: s.update(writes=[[5, 0]]),
    "fields without values": lambda s: s.update(
        result={"fields": ["a"], "values": [], "class": "m:A"}
    ),
    "a field that is no name": lambda s: s.update(
        result={"fields": ["a b"], "values": [{"result": 0}], "class": "m:A"}
    ),
    "no tree at all": lambda s: s.update(result=[]),
    "an empty tree": lambda s: s.update(result={}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest(name):
    entry = copy.deepcopy(ENTRY)
    BROKEN[name](entry["signature"])
    with pytest.raises(DiluError, match=r"does not say how f is called|not a size"):
        Signature("f", entry, TYPES)


def test_a_tree_without_end():
    entry = copy.deepcopy(ENTRY)
    tree: dict = {"result": 0}
    for _ in range(100):
        tree = {"list": [tree]}
    entry["signature"]["result"] = tree
    with pytest.raises(DiluError, match="a tree is too deep"):
        Signature("f", entry, TYPES)


# --------------------------------------------------------------------------- classes


def fields(kind, *names):
    values = [{"result": i} for i in range(len(names))]
    name = f"{kind.__module__}:{kind.__qualname__}" if isinstance(kind, type) else kind
    return {"fields": list(names), "values": values, "class": name}


def number(tree):
    return tree["result"]


def test_classes_that_are_loaded_are_used():
    assert build(fields(Point, "x", "y"), number) == Point(0, 1)
    assert type(build(fields(Point, "x", "y"), number)) is Point
    assert build(fields(Output, "logits", "extra"), number) == Output(0, 1)


@pytest.mark.parametrize(
    "tree",
    [
        fields("no_such_module_anywhere:Point", "x", "y"),
        fields(Point, "x", "z"),  # other fields than that class has
        fields("os:system", "x", "y"),  # no class at all
        fields("pathlib:Path", "x", "y"),
        fields("builtins:dict", "x", "y"),
        fields("m:f.<locals>.P", "x", "y"),
    ],
)
def test_others_are_named_tuples(tree):
    made = build(tree, number)
    assert tuple(made) == (0, 1)
    assert made._fields == tuple(tree["fields"])
    assert type(made) not in (Point, Output)


def test_a_saved_artifact_without_signatures(toy, tmp_path):
    """As all were that older versions wrote."""
    assert all("signature" not in f for f in toy.manifest["functions"])
    with dilu.load(toy.save(tmp_path / "toy.dilu")) as session:
        scale = session.function("scale")
        y, count = scale(x=[[1.0, 2.0, 3.0]])
        assert (y.shape, int(count)) == ((1, 3), 1)
        with pytest.raises(
            DiluError, match=r"scale has no argument called 'z'\n  hint: it takes x"
        ):
            scale([[1.0, 2.0, 3.0]], z=1)


def test_a_saved_artifact_with_a_broken_signature(toy, tmp_path):
    toy.manifest["functions"][1]["signature"] = {"inputs": []}
    path = toy.save(tmp_path / "toy.dilu")
    with pytest.raises(
        DiluError, match=r"does not say how scale is called(.|\n)*compile the model"
    ):
        dilu.load(path)
