"""Doors of other packages: by a call, and by an entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import dilu
from dilu.errors import DiluError
from dilu.frontend import doors
from dilu.frontend.door import Captured
from dilu.ir.text import parse_graph
from dilu.runtime.artifact.artifact import Artifact

DOUBLE = "graph captured\nfunc @main(%x: f32[T]) {\n  %y: f32[T] = add(%x, %x)\n  return %y\n}\n"


class TextDoor:
    """Takes files of a kind, each the text of a graph."""

    def __init__(self, suffix: str = ".graph") -> None:
        self.suffix = suffix

    def takes(self, model):
        return isinstance(model, Path) and model.suffix == self.suffix

    def capture(self, model, call, options, progress):
        return Captured(parse_graph(model.read_text()), model.stem + self.suffix, str(model))


@pytest.fixture(autouse=True)
def our_doors(monkeypatch):
    monkeypatch.setattr(doors, "DOORS", list(doors.DOORS))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "double.graph"
    path.write_text(DOUBLE)
    return path


def compiled(model: Path) -> Artifact:
    return dilu.compile(model, target="null")


def bring(monkeypatch, what) -> None:
    point = EntryPoint("text", "a_package:door", doors.ENTRY_POINTS)
    monkeypatch.setattr(doors, "entry_points", lambda **by: EntryPoints([point]).select(**by))
    if what is not None:
        monkeypatch.setattr(EntryPoint, "load", lambda _: what)


def test_a_door_that_was_registered(model):
    with pytest.raises(DiluError, match="not a checkpoint"):
        compiled(model)
    dilu.register_door(TextDoor())
    artifact = compiled(model)
    assert artifact.name == "double.graph"
    assert artifact.read("graph/captured.txt").decode() == DOUBLE.replace("\nfunc", "\n\nfunc")


def test_the_last_one_is_asked_first(model, monkeypatch):
    first, last = TextDoor(), TextDoor()
    dilu.register_door(first)
    dilu.register_door(last)
    monkeypatch.setattr(first, "capture", None)
    assert compiled(model).name == "double.graph"


def test_other_models_come_in_as_before(tmp_path):
    dilu.register_door(TextDoor())
    with pytest.raises(DiluError, match="not a checkpoint"):
        compiled(Path(__file__))


def test_a_door_of_another_package(model, monkeypatch):
    bring(monkeypatch, TextDoor)
    assert compiled(model).name == "double.graph"


def test_a_package_that_cannot_be_loaded(model, monkeypatch):
    bring(monkeypatch, None)
    with pytest.raises(DiluError, match="brings the door text cannot be loaded: No module"):
        compiled(model)


def test_what_is_no_door(model, monkeypatch):
    with pytest.raises(DiluError, match=r"object is no door\n.*takes and capture"):
        dilu.register_door(object())  # type: ignore[arg-type]
    bring(monkeypatch, lambda: "no door")
    with pytest.raises(DiluError, match="what a_package:door returns is no door"):
        compiled(model)
